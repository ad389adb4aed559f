"""The command line: what commands print, and that every user error is one line and exit status 2."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ruyi_flow.client import Client
from ruyi_flow.local import load_family
from ruyi_flow.testing import tiny_family

ROOT = Path(__file__).parent.parent


@pytest.fixture
def topology(tmp_path: Path, tiny: Path) -> Path:
    """One node in this process, as a file."""
    path = tmp_path / "one.yaml"
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    path.write_text(yaml.safe_dump({"family": str(tiny), "nodes": [node]}))
    return path


def test_help_teaches_every_command(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("--help")
    assert code == 0
    for command in ("pull", "shard", "node", "up", "demo", "generate", "chat", "status", "explain"):
        assert command in out
        assert run(command, "--help")[0] == 0


def test_help_of_the_simulator_has_examples(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "200")
    for command, words in (
        ("simulate", ("Example: ruyi-flow simulate", "YAML value", "configs/sim", "docs/simulation.md", "own folder")),
        ("profile", ("Example", "--nodes topology.yaml", "--link 192.168", "not downwards")),
        ("sweep", ("Example", "'auto'", "'local'")),
        ("plan", ("Example",)),
    ):
        shown = " ".join(run(command, "--help")[1].replace("│", " ").split())
        assert [word for word in words if word not in shown] == []


def test_pull_and_shard_report_in_json(run, tmp_path: Path, home: Path) -> None:  # type: ignore[no-untyped-def]
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-t", "none.yaml", "-p", "x"), "none.yaml: no such topology file"),
        (("shard", "-t", "{topology}", "-o", "{topology}"), "cannot be written"),
        (("up", "-t", "{topology}"), "runs inside its clients"),
        (("generate", "-t", "{topology}", "-p", "x"), "has no tokenizer.json"),
        (("generate", "-t", "{topology}", "-p", ""), "prompt is empty"),
        (("generate", "-t", "{topology}", "-p", "x", "--exit", "3"), "exit 3 is not one"),
        (("generate", "-t", "{topology}", "-p", "x", "--threshold", "high"), "--threshold is 'high'; write 0.8"),
        (("generate", "-t", "{topology}", "-p", "x", "--threshold", "2=a"), "--threshold is '2=a'"),
        (("generate", "-t", "{topology}", "-p", "x", "--temperature", "-1"), "temperature is -1"),
        (("up", "{topology}"), "runs inside its clients"),
        (("node", "whole", "-t", "{topology}"), "no address to listen on"),
        (("node", "hole", "-t", "{topology}"), "did you mean 'whole'"),
        (("status", "-t", "{topology}"), "there is nothing to ask"),
        (("pull", "nothing"), "neither a folder"),
        (("pull", "smollm2", "--exits", "5;11"), "--exits is '5;11'"),
    ],
)
def test_a_user_error_is_one_line(run, topology: Path, home: Path, arguments: tuple[str, ...], message: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(*(a.format(topology=topology) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err
    assert "Traceback" not in err and err.count("\n") == 1


def test_an_unknown_option_is_refused(run) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run("generate", "--topolgy", "x")
    assert code == 2 and "topolgy" in err


def test_a_log_level_that_is_none_is_refused(run, topology: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run("node", "whole", "-t", str(topology), "--log-level", "foo")
    assert code == 2 and "'foo' is not one of" in err


def test_port_zero_is_nobodys_address(run, topology: Path) -> None:  # type: ignore[no-untyped-def]
    data = yaml.safe_load(topology.read_text())
    data["nodes"][0]["address"] = "127.0.0.1:0"
    topology.write_text(yaml.safe_dump(data))
    code, _, err = run("up", str(topology))
    assert code == 2 and "nodes.0.address: nobody would know which port 0 becomes" in err


def test_without_the_default_topology_one_must_be_named(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("status")
    assert code == 2 and "(the default); name yours with --topology FILE" in err


def test_the_version_is_the_packages(run) -> None:  # type: ignore[no-untyped-def]
    from importlib.metadata import version

    assert run("--version") == (0, f"ruyi-flow {version('ruyi-flow')}\n", "")


def test_a_store_that_cannot_be_written_is_said(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RUYI_FLOW_HOME", str(tmp_path / "file"))
    code, _, err = run("pull", str(tiny))
    assert code == 2 and err.startswith("error: ") and "file" in err and err.count("\n") == 1


def test_explain_says_who_decided_each_token_and_what_the_last_branch_would_have(  # type: ignore[no-untyped-def]
    run, spoken: Path, tmp_path: Path
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
    reply = Client(file).__enter__().generate("<b>hi</b>", thresholds={2: 0.02, 4: 0.9}, max_new_tokens=8)
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
    assert code == 0 and f"{len(told) and 8} of 8 tokens are what the last branch would have said" in out
