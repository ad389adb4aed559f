"""The command line: what commands print, and that every user error is one line and exit status 2."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ruyi_flow.client import Client, make_request
from ruyi_flow.errors import RequestError
from ruyi_flow.local import load_family
from ruyi_flow.routing.confidence import Curve
from ruyi_flow.testing import tiny_family
from tests.conftest import Command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def topology(tmp_path: Path, tiny: Path) -> Path:
    """One node in this process, as a file."""
    path = tmp_path / "one.yaml"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    path.write_text(yaml.safe_dump({"family": str(tiny), "nodes": [node]}))
    return path


def test_help_teaches_every_command(run: Command) -> None:
    code, out, _ = run("--help")
    assert code == 0
    listed = re.findall(r"^│ ([a-z][\w-]*)  ", out, re.MULTILINE)
    assert {"pull", "shard", "node", "up", "demo", "generate", "chat", "status", "explain"} <= set(listed)
    for command in listed:
        code, shown, _ = run(command, "--help")
        assert code == 0 and f"ruyi-flow {command} " in shown


def test_help_of_the_simulator_has_examples(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command, words in (
        (
            "simulate",
            (
                "Example: ruyi-flow simulate",
                "YAML value",
                "phone-4g",
                "docs/guides/simulation-and-planning.md",
                "own folder",
            ),
        ),
        ("profile", ("Example", "--nodes topology.yaml", "--link 192.168", "not downwards")),
        ("sweep", ("Example", "'auto'", "'local'")),
        ("plan", ("Example",)),
    ):
        shown = " ".join(run(command, "--help")[1].replace("│", " ").split())
        assert [word for word in words if word not in shown] == []


def test_pull_and_shard_report_in_json(run: Command, tmp_path: Path, home: Path) -> None:
    plain = tiny_family(tmp_path / "plain", base="llama", ordinary=True)
    code, out, _ = run("pull", str(plain), "--name", "mine", "--exits", "2,4", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["exits"] == [2, 4, 6] and facts["new"] and (home / "families" / "mine").is_dir()
    assert not json.loads(run("pull", str(plain), "--name", "mine", "--json")[1])["new"]
    file = tmp_path / "t.yaml"
    nodes = [
        {"name": "a", "address": "127.0.0.1:1", "exits": [2]},
        {"name": "b", "address": "127.0.0.1:2", "exits": [4, 6]},
    ]
    file.write_text(yaml.safe_dump({"family": "mine", "nodes": nodes, "links": [{"from": "a", "to": "b"}]}))
    code, out, _ = run("shard", "--topology", str(file), "--out", str(tmp_path / "shards"), "--json")
    shards = json.loads(out)["shards"]
    assert code == 0 and [s["exits"] for s in shards] == [[2], [4, 6]]
    assert sum(s["bytes"] for s in shards) < 1.2 * (home / "families" / "mine" / "model.safetensors").stat().st_size
    code, out, err = run("shard", "--topology", str(file), "--out", str(tmp_path / "shards"))
    assert code == 2 and "exists already" in err


@pytest.fixture
def rounded(tmp_path: Path, spoken: Path) -> Path:
    """One node in 4 bits of a family with a tokenizer, as a file."""
    family = tiny_family(tmp_path / "family", vocab_size=261, eos_token_id=258, intermediate_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(spoken / name, family / name)
    file, node = tmp_path / "rounded.yaml", {"name": "whole", "exits": [2, 4, 6], "weights": "int4"}
    file.write_text(yaml.safe_dump({"family": str(family), "nodes": [node]}))
    return file


def test_shard_says_what_few_bits_cost_and_where_a_perplexity_comes_from(
    run: Command, rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    asked, text = tmp_path / "asked.jsonl", tmp_path / "text.txt"
    asked.write_text('{"prompt": "hi"}\n')
    text.write_text("some text")
    call = ("shard", "-t", str(rounded), "--prompts", str(asked), "--threads", "3")
    code, out, _ = run(*call, "-o", str(tmp_path / "a"))
    assert code == 0 and "loss of quality" in out and "add --text FILE to measure the perplexity" in out
    assert threads == [3]
    code, out, _ = run(*call, "-o", str(tmp_path / "b"), "--text", str(text), "--json")
    assert code == 0 and all(row["perplexity"] > 1 for row in json.loads(out)["quality"])
    (tmp_path / "family" / "tokenizer.json").unlink()
    code, out, _ = run("shard", "-t", str(rounded), "-o", str(tmp_path / "c"))
    assert code == 0 and "not measured: the family has no tokenizer.json" in out


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--prompts", None, "asked: cannot be read"),
        ("--prompts", b"{", "asked, line 1: expected {"),
        ("--prompts", b"", "asked: contains no prompts"),
        ("--text", None, "asked: cannot be read as text"),
        ("--text", b"\xff", "asked: cannot be read as text"),
    ],
)
def test_shard_reads_what_it_measures_on_before_it_cuts(
    run: Command, rounded: Path, tmp_path: Path, option: str, content: bytes | None, message: str
) -> None:
    file, folder = tmp_path / "asked", tmp_path / "shards"
    if content is not None:
        file.write_bytes(content)
    code, out, err = run("shard", "-t", str(rounded), "-o", str(folder), option, str(file))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1 and not folder.exists()
    (tmp_path / "family" / "tokenizer.json").unlink()
    code, out, err = run("shard", "-t", str(rounded), "-o", str(folder), option, str(file))
    assert code == 2 and "has no tokenizer.json, which --prompts and --text need" in err and not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-t", "none.yaml", "-p", "x"), "none.yaml: no such topology file"),
        (("shard", "-t", "{topology}", "-o", "{topology}"), "cannot be written"),
        (("shard", "-t", "{topology}", "-o", "x", "--text", "y"), "require a node with weights: int8 or int4"),
        (("up", "-t", "{topology}"), "runs inside its clients"),
        (("generate", "-t", "{topology}", "-p", "x"), "has no tokenizer.json"),
        (("generate", "-t", "{topology}", "-p", ""), "prompt is empty"),
        (("generate", "-t", "{topology}", "-p", "x", "--exit", "3"), "exit 3 is not one"),
        (("generate", "-t", "{topology}", "-p", "x", "--threshold", "high"), "--threshold is 'high'; write 0.8"),
        (("generate", "-t", "{topology}", "-p", "x", "--threshold", "2=a"), "--threshold is '2=a'"),
        (
            ("generate", "-t", "{topology}", "-p", "x", "--threshold", "2=0.9,2=0.1"),
            "--threshold is '2=0.9,2=0.1'; it names an exit twice",
        ),
        (
            ("generate", "-t", "{topology}", "-p", "x", "--threshold", "0.5", "--window", "3"),
            "window requires mode 'cascade'; the mode is 'token'",
        ),
        (
            ("explain", "-t", "{topology}", "-p", "x", "--html", "{topology}/e.html"),
            "is a file; name a file in a folder",
        ),
        (("explain", "-t", "{topology}", "-p", "x", "--html", "."), "--html .: is a folder"),
        (("generate", "-t", "{topology}", "-p", "x", "--temperature", "-1"), "temperature is -1"),
        (("up", "{topology}"), "runs inside its clients"),
        (("node", "whole", "-t", "{topology}"), "no address to listen on"),
        (("node", "hole", "-t", "{topology}"), "did you mean 'whole'"),
        (("node", "cloud", "-t", "local", "--replica", "2"), "--replica 2: node 'cloud' has 1 address: 127.0.0.1:"),
        (("node", "cloud", "-t", "local", "--listen", "7101"), "--listen 7101: write it as host:port"),
        (("node", "cloud", "-t", "local", "--listen", "0.0.0.0:0"), "--listen 0.0.0.0:0: port 0 picks a random port"),
        (("status", "-t", "{topology}"), "and has no status"),
        (("pull", "nothing"), "neither a folder"),
        (("pull", "smollm2", "--exits", "5;11"), "--exits is '5;11'"),
    ],
)
def test_a_user_error_is_one_line(
    run: Command, topology: Path, home: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(*(a.format(topology=topology) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate", "error: --max-new-tokens is 0"),
        ("explain", "error: --max-new-tokens is 0"),
        ("chat", "error: --max-new-tokens is 0"),
        ("demo", "greater than or equal"),
    ],
)
def test_an_answer_has_a_token_at_least(run: Command, topology: Path, command: str, said: str) -> None:
    prompt = () if command == "chat" else ("-p", "hi")
    code, _, err = run(command, "-t", str(topology), *prompt, "--max-new-tokens", "0")
    assert code == 2 and said in err


def test_help_teaches_tracing_and_calibrating(run: Command) -> None:
    for command, words in (
        ("trace", ("{PROMPTS}", "Example: ruyi-flow trace", "hundreds to thousands")),
        (
            "calibrate",
            ("{TRACE}...", "Example: ruyi-flow calibrate", "Learn then Test", "<token|cascade>", "thousands"),
        ),
        ("explain", ("Example: ruyi-flow explain",)),
    ):
        out = run(command, "--help")[1]
        assert all(word in out for word in words), command


def test_an_unknown_option_is_refused(run: Command) -> None:
    code, _, err = run("generate", "--topolgy", "x")
    assert code == 2 and "unknown option '--topolgy'; did you mean '--topology'?" in err
    code, _, err = run("generate", "--zzzz", "x")
    assert code == 2 and "No such option: --zzzz" in err and "did you mean" not in err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("max_length", "max_new_tokens"),
        ("n_predict", "max_new_tokens"),
        ("repeat_penalty", "repetition_penalty"),
        ("temp", "temperature"),
        ("tempreature", "temperature"),
    ],
)
def test_an_option_of_another_tool_gets_its_name_here(run: Command, given: str, meant: str) -> None:
    """The SDK and the command line say the same."""
    with pytest.raises(RequestError, match=f"^unknown option '{given}'; did you mean '{meant}'\\?$"):
        make_request("hi", {given: 1})
    told = f"unknown option '--{given}'; did you mean '--{meant}'?".replace("_", "-")
    code, _, err = run("generate", f"--{given}".replace("_", "-"), "1")
    assert code == 2 and told in err


def test_a_log_level_that_is_none_is_refused(run: Command, topology: Path) -> None:
    code, _, err = run("node", "whole", "-t", str(topology), "--log-level", "foo")
    assert code == 2 and "'foo' is not one of" in err and "Value error" not in err


def test_port_zero_is_nobodys_address(run: Command, topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    data["nodes"][0]["address"] = "127.0.0.1:0"
    topology.write_text(yaml.safe_dump(data))
    code, _, err = run("up", str(topology))
    assert code == 2 and "nodes.0.address: port 0 picks a random port that clients cannot know" in err


def test_the_version_is_the_packages(run: Command) -> None:
    from importlib.metadata import version

    assert run("--version") == (0, f"ruyi-flow {version('ruyi-flow')}\n", "")


def test_a_store_that_cannot_be_written_is_said(
    run: Command, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUYI_FLOW_HOME", str(tmp_path / "file"))
    code, _, err = run("pull", str(tiny))
    assert code == 2 and err.startswith("error: ") and "file" in err and err.count("\n") == 1


def test_explain_says_who_decided_each_token_and_what_the_last_branch_would_have(
    run: Command, spoken: Path, tmp_path: Path
) -> None:
    file, page = tmp_path / "one.yaml", tmp_path / "answer.html"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    file.write_text(yaml.safe_dump({"family": str(spoken), "nodes": [node]}))
    asked = ["explain", "-t", str(file), "-p", "<b>hi</b>", "--max-new-tokens", "8"]
    code, out, _ = run(*asked, "--threshold", "2=0.02,4=0.9", "--html", str(page), "--json")
    told = json.loads(out)["tokens"]
    assert code == 0 and 0 < len(told) <= 8
    family = load_family(spoken, dtype="float32")
    ids = family.tokenizer("<user><b>hi</b>|", add_special_tokens=False)["input_ids"]
    prompt = list(ids)
    with Client(file) as client:
        reply = client.generate("<b>hi</b>", thresholds={2: 0.02, 4: 0.9}, max_new_tokens=8)
    for row, token in zip(told, reply.tokens, strict=True):
        logits = {p: family.logits(torch.tensor([prompt]), p)[0, -1] for p in family.exits}
        assert row["exit"] == token.exit
        assert row["own"] == pytest.approx(float(logits[row["exit"]].softmax(-1).max()), abs=1e-4)
        assert row["threshold"] == {2: 0.02, 4: 0.9}.get(row["exit"])
        assert row["agrees"] == (int(logits[6].argmax()) == token.id)
        prompt.append(token.id)
    html = page.read_text()
    assert "&lt;b&gt;hi&lt;/b&gt;" in html and "<b>hi" not in html and "http" not in html
    assert html.count("<tr") == 1 + len(told)
    code, out, _ = run(*asked, "--mode", "exact")
    assert code == 0 and f"{len(told) and 8} of 8 tokens are those that the last branch predicts" in out


def test_explain_shows_the_mean_that_decides_in_cascade(run: Command, spoken: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "one.yaml", tmp_path / "answer.html"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    file.write_text(yaml.safe_dump({"family": str(spoken), "nodes": [node]}))
    family, bounds = load_family(spoken, dtype="float32"), {2: 0.52, 4: 0.4}
    cascade = ["--mode", "cascade", "--threshold", "2=0.52,4=0.4", "--window", "3", "--draft", "2"]
    asked = ["explain", "-t", str(file), "-p", "hi", "--max-new-tokens", "12", "--html", str(page), *cascade]
    for back in (None, 0.02):
        code, out, err = run(*asked, "--json", *([] if back is None else ["--back", str(back)]))
        assert code == 0, err
        told = json.loads(out)["tokens"]
        prompt = list(family.tokenizer("<user>hi|", add_special_tokens=False)["input_ids"])
        options: dict[str, Any] = {"mode": "cascade", "thresholds": bounds, "window": 3, "back": back}
        with Client(file) as client:
            reply = client.generate("hi", max_new_tokens=12, **options)
        seen: dict[int, list[float]] = {2: [], 4: []}
        for row, token in zip(told, reply.tokens, strict=True):
            for p in (2, 4):
                if p <= row["exit"]:
                    sure = family.logits(torch.tensor([prompt]), p)[0, -1].softmax(-1).max()
                    seen[p].append(float(sure))
            recent = seen.get(row["exit"], [])[-3:]
            expected = None if row["exit"] == 6 else (sum(recent) + 3 - len(recent)) / 3
            assert row["mean"] == (expected if expected is None else pytest.approx(expected, abs=1e-4))
            assert row["threshold"] == bounds.get(row["exit"])
            assert back is not None or row["mean"] is None or row["mean"] >= row["threshold"]
            prompt.append(token.id)
        exits = [row["exit"] for row in told]
        assert {2, 6} <= set(exits) and (exits == sorted(exits)) == (back is None)
    assert "<th>mean" in page.read_text() and "averaged over 3 tokens" in page.read_text()
    assert " mean " in run(*asked)[1]
    assert " mean " not in run(*asked[:7], "--threshold", "0.5")[1]


def test_explain_shows_the_score_that_confidence_is_made_of(run: Command, spoken: Path, tmp_path: Path) -> None:
    file, policy = tmp_path / "one.yaml", tmp_path / "p.yaml"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    family = load_family(spoken, dtype="float32")
    curve = {"temperature": 1.5, "scores": [0.0, 0.01, 1.0], "chances": [0.1, 0.4, 0.9]}
    made = {"family": family.checkpoint.fingerprint, "score": "margin", "thresholds": {2: 0.35}, "curves": {2: curve}}
    file.write_text(yaml.safe_dump({"family": str(spoken), "nodes": [node]}))
    policy.write_text(yaml.safe_dump(made))
    asked = ["explain", "-t", str(file), "-p", "hi", "--max-new-tokens", "12", "--policy", str(policy)]
    told = json.loads(run(*asked, "--json")[1])["tokens"]
    assert {row["exit"] for row in told} == {2, 6}
    prompt = list(family.tokenizer("<user>hi|", add_special_tokens=False)["input_ids"])
    with Client(file) as client:
        reply = client.generate("hi", policy=policy, max_new_tokens=12)
    for row, token in zip(told, reply.tokens, strict=True):
        if row["exit"] == 2:
            two = (family.logits(torch.tensor([prompt]), 2)[0, -1] / 1.5).softmax(-1).topk(2).values
            assert row["own"] == pytest.approx(float(two[0] - two[1]), abs=1e-4)
            assert row["confidence"] == pytest.approx(Curve(1.5, (0, 0.01, 1), (0.1, 0.4, 0.9))(row["own"]), abs=1e-3)
        else:
            assert row["own"] is None
        prompt.append(token.id)
    assert " margin " in run(*asked)[1]


def test_explain_holds_the_family_as_the_last_node_does(run: Command, even: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32", "weights": "int8"}
    file.write_text(yaml.safe_dump({"family": str(even), "nodes": [node]}))
    told = json.loads(run("explain", "-t", str(file), "-p", "hi", "--max-new-tokens", "6", "--json")[1])["tokens"]
    with Client(file) as client:
        ids = client.generate("hi", max_new_tokens=6).token_ids
    prompt = load_family(even).tokenizer("<user>hi|", add_special_tokens=False)["input_ids"]
    own = {}
    for weights in (None, "int8"):
        logits = load_family(even, dtype="float32", weights=weights).logits(torch.tensor([[*prompt, *ids[:-1]]]))
        own[weights] = logits[0, len(prompt) - 1 :].softmax(-1).amax(-1).tolist()
    assert [row["own"] for row in told] == pytest.approx(own["int8"], abs=1e-5)
    assert own[None] != pytest.approx(own["int8"], abs=1e-5) and all(row["agrees"] for row in told)


@pytest.mark.parametrize("begun", ["ruyi_flow.cli.asking", "typer", "ruyi_flow.family.store"])
def test_ctrl_c_while_modules_are_loaded_is_one_line(begun: str) -> None:
    code = f"""
import importlib.abc, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{begun}":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["ruyi-flow", "demo"]
from ruyi_flow.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
