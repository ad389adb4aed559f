"""The docs: what they show can be used as it stands, and what follows from the code is up to date."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ruyi_flow.cli.commands import app
from ruyi_flow.config.topology import Topology
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.training.recipe import Recipe
from tests.generate_docs import FOLDER, generate

ROOT = Path(__file__).parent.parent
HISTORY = ROOT / "docs" / "log.md"  # tells what was, in the words of its day
PAGES = sorted([ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if path != HISTORY)])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_generated_pages_are_up_to_date() -> None:
    for page, text in generate().items():
        assert (FOLDER / page).read_text() == text, "run make docs"


def test_the_guides_recipe_and_topology_can_be_read(tmp_path: Path) -> None:
    for text in blocks(ROOT / "docs/guides/training.md", "yaml"):
        (tmp_path / text.split()[1]).write_text(text)  # each begins with its name, as a comment
    recipe, topology = Recipe.load(tmp_path / "recipe.yaml"), Topology.load(tmp_path / "topology.yaml")
    exits = [p for node in topology.nodes for p in node.exits]
    assert set(recipe.branch_layers) < set(exits) and recipe.self_distill is not None


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_topologies_can_be_read(path: Path) -> None:
    for text in blocks(path, "yaml"):
        data = yaml.safe_load(text)
        if {"family", "nodes"} <= data.keys():
            Topology.parse(data, where=name(path))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_exist(path: Path) -> None:
    for text in blocks(path, "(?:shell|bash|sh)"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("ruyi-flow "):  # other lines may be parts of a text over several lines
                check_command(shlex.split(line, comments=True)[1:], line)


def test_there_are_commands_and_topologies_to_check() -> None:
    shown = [text for path in PAGES for text in blocks(path, "(?:shell|bash|sh)")]
    assert len(re.findall(r"^ruyi-flow \w+", "".join(shown), re.MULTILINE)) > 30
    assert [text for path in PAGES for text in blocks(path, "yaml") if "\nnodes:" in text]


def check_command(words: list[str], line: str) -> None:
    """The words name a command, and every option is one that it has."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= known | {"--help", "-h"}, line


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_files_of_this_project_exist(path: Path) -> None:
    for file in re.findall(r"`((?:[\w-]+/)+[\w.-]*\w\.(?:py|yaml))\b", path.read_text()):
        assert (ROOT / file).exists() or (ROOT / "ruyi_flow" / file).exists(), file


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_answers_of_each_exit_are_those_of_today(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs/results/index.md"
    sizes = FamilyConfig.parse(json.loads((smollm2 / "config.json").read_text()))
    [code] = blocks(page, "python")
    exec(code)  # prints an exit and its answer a line
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line in lines:
        exit, _, answer = line.partition(" ")
        assert f"| {exit} | {sizes.num_parameters(int(exit)) / 1e6:.0f}M | {answer} |" in page.read_text()


@pytest.mark.model
def test_the_first_steps_show_what_their_code_prints(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [text for text in blocks(ROOT / "docs/tutorial.md", "python") if "load_family" in text]
    exec(code)
    shown = re.findall(r"# ?(.*)$", code, re.MULTILINE)  # a comment for each line that is printed
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [line.strip() for line in shown]


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path], cwd=ROOT, check=True)
    assert (tmp_path / "index.html").exists()
    for page in tmp_path.rglob("*.html"):
        found = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?https?:[^>]*>', page.read_text())
        assert not found, page
    for style in tmp_path.rglob("*.css"):
        assert "url(http" not in style.read_text(), style
