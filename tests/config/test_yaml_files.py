"""YAML files from strangers, for all kinds of files: bombs, endless lists and long values end in a short error."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.config.yaml_files import parse_value, read_yaml
from ruyi_flow.errors import ConfigError, shown
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.training.recipe import Recipe

READERS: list[Callable[[Path], object]] = [Topology.load, PolicyFile.load, Scenario.read, Recipe.load]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)
"""Ten lines of 9¹⁰ values."""


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "the file has more than 20000 values, with what aliases repeat"),
        (BOMB + "family: *a9\nnodes: *a9\n", "the file has more than 20000 values"),
        ("family: &a [*a]\n", "an anchor contains itself"),
        ("family: &a {b: &c {d: [*a, *c]}}\n", "an anchor contains itself"),
        ("family: f\nnodes: [{name: a, exits: [" + "1, " * 300_000 + "]}]", "has more than|is larger than"),
        ("family: f\nnodes: [{name: a, exits: [" + "1, " * 30_000 + "]}]", "the file has more than 20000 values"),
        ("[" * 5000, "not valid YAML"),
        ("family: " + "x" * 2**21, "is larger than 1048576 characters"),
    ],
)
def test_a_file_that_only_wastes_memory_is_refused(
    tmp_path: Path, read: Callable[[Path], object], text: str, message: str
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "family: x\nnodes: [\n  a: b: c\n",
            "line 3, column 7: not valid YAML: expected ',' or ']', but got ':' "
            "(while parsing a flow sequence from line 2, column 8 on)",
        ),
        ("a: 1\na: 2\n", "line 2, column 1: not valid YAML: the key 'a' occurs twice"),
        (
            "a: 1\n\tb: 2\n",
            "line 2, column 1: not valid YAML: found character '\\t' that cannot start any token "
            "(while scanning for the next token)",
        ),
        ("a: 1\nb: *c\n", "line 2, column 4: not valid YAML: found undefined alias 'c'"),
        ("a: 1\nb: x\x00\n", "line 2, column 5: not valid YAML: the character U+0000 is not allowed"),
        ("\x00", "line 1, column 1: not valid YAML: the character U+0000 is not allowed"),
        ("[" * 5000, "not valid YAML: lists or mappings are nested too deeply"),
        ("a: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_syntax_error_is_one_line_with_its_place(
    tmp_path: Path, read: Callable[[Path], object], text: str, message: str
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize("text", ["a: b: c", "[1", "\x00", "2020-13-45"])
def test_a_wrong_value_of_an_option_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value(text, "--set x")
    said = str(caught.value)
    assert (
        said.startswith(f"--set x: {text!r} is not valid YAML: ") and "\n" not in said and "unicode string" not in said
    )


def test_an_unknown_key_is_told_without_the_list_or_mapping_behind_it(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("family: x\nnodez: [{name: a, exits: [5]}]\nlinkz: {a: 1}\n")
    keys = "unknown key; the keys here are family, exits, nodes, links, policy, security"
    with pytest.raises(ConfigError) as caught:
        Topology.load(file)
    assert f"{file}: nodez: {keys}; did you mean 'nodes'?\n" in str(caught.value)
    assert f"{file}: linkz: {keys}; did you mean 'links'?" in str(caught.value)


def test_what_an_alias_repeats_counts_each_time(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"a: &a [{'1, ' * 90}]\nb: [{'*a, ' * 200}]\n")
    data = read_yaml(file, "topology")
    assert isinstance(data, dict) and data["b"] == [[1] * 90] * 200
    file.write_text(f"a: &a [{'1, ' * 90}]\nb: [{'*a, ' * 230}]\n")
    with pytest.raises(ConfigError, match="more than 20000 values"):
        read_yaml(file, "topology")


def test_many_mistakes_are_told_briefly(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"family: f\nnodes: [{{name: a, exits: [{'x, ' * 1000}]}}]\n{'k' * 1000}: [{'1, ' * 10_000}]\n")
    with pytest.raises(ConfigError, match="nodes.0.exits.0: 'x': must be a whole number") as caught:
        Topology.load(file)
    assert "more mistakes" in str(caught.value) and len(str(caught.value)) < 5000


def test_too_many_exits_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"family: f\nnodes: [{{name: a, exits: {list(range(1, 3000))}}}]\n")
    with pytest.raises(ConfigError, match="nodes.0.exits: .*: must have at most 1024 items"):
        Topology.load(file)


def test_a_value_is_shown_whole_only_if_it_is_short() -> None:
    short: list[object] = [5, "abc", [1, {"a": (2, 3)}], None, 1.5, {"a": 1}, "x" * 100]
    for value in short:
        assert shown(value) == repr(value)
    bomb: list[object] = []
    for _ in range(100):
        bomb = [bomb] * 9
    long: list[object] = [bomb, "x" * 10**6, list(range(10**5)), {"a": "x" * 200}, {"x" * 200: 1}]
    for value in long:
        assert len(shown(value)) <= 201 and "..." in shown(value)
