"""Policy files: written by calibrate, named by topologies and requests, refused for other families."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow import cli
from ruyi_flow.calibration.trace import Scorer, Writer
from ruyi_flow.client import Client
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import Mode
from tests.calibration.test_thresholds import HEADER, made
from tests.conftest import Command


def write(path: Path, **changes: object) -> Path:
    curve = {"temperature": 1.0, "scores": [0.0, 1.0], "chances": [0.0, 1.0]}
    policy = {"family": "f" * 64, "score": "margin", "thresholds": {2: 0.5, 4: 0.4}, "curves": {2: curve, 4: curve}}
    path.write_text(yaml.safe_dump(policy | changes))
    return path


def test_a_policy_comes_back(tmp_path: Path) -> None:
    policy = PolicyFile.load(write(tmp_path / "p.yaml", promise={"max_disagreement": 0.05}))
    policy.save(tmp_path / "q.yaml")
    assert PolicyFile.load(tmp_path / "q.yaml") == policy
    routing = Routing().updated(policy.options({}))
    assert routing.thresholds == {2: 0.5, 4: 0.4} and routing.scale is not None and routing.family == "f" * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "margn"}, "p.yaml: score: 'margn': must be one of .*did you mean 'margin'"),
        ({"treshold": 1}, "unknown key.*did you mean"),
        ({"thresholds": {2: -1.0}}, "a threshold is -1.0"),
        ({"curves": {2: {"temperature": 1.0, "scores": [1.0, 0.0], "chances": [0.0, 1.0]}}}, "its points must ascend"),
        ({"thresholds": {2: 0.5, 3: 0.4}}, "p.yaml: curves: exit 3 has none, but its threshold of 0.4"),
        ({"back": 0.9}, "p.yaml: back requires mode 'cascade', not 'token'"),
        ({"window": 3}, "p.yaml: window requires mode 'cascade'"),
        ({"start": {"weights": {2: [0.0] * 5}, "chance": 0.5}}, "p.yaml: start requires mode 'cascade'"),
    ],
)
def test_files_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyFile.load(write(tmp_path / "p.yaml", **changes))


def test_an_exit_that_is_never_sure_needs_no_curve(tmp_path: Path) -> None:
    policy = PolicyFile.load(write(tmp_path / "p.yaml", thresholds={2: 0.5, 3: 1.1}))
    assert policy.thresholds[3] == 1.1 and 3 not in policy.curves


@pytest.mark.parametrize("mode", [None, Mode.EXACT])
@pytest.mark.parametrize("curved", [(7,), (2, 7)], ids=["only exit 7", "a curve too many"])
def test_a_policy_of_other_exits_is_refused_in_every_mode(
    tmp_path: Path, mode: Mode | None, curved: tuple[int, ...]
) -> None:
    curve = {"temperature": 1.0, "scores": [0.0, 1.0], "chances": [0.0, 1.0]}
    path = write(tmp_path / "p.yaml", thresholds={curved[0]: 0.5}, curves=dict.fromkeys(curved, curve))
    routing = Routing().updated(PolicyFile.load(path).options({} if mode is None else {"mode": mode}))
    with pytest.raises(RequestError, match="exit 7 is not one of the exits"):
        Policy.resolve(routing, (2, 4, 6))


def test_a_topology_names_a_policy_and_a_request_another(spoken: Path, tmp_path: Path) -> None:
    fingerprint = Checkpoint(spoken).fingerprint
    never = write(tmp_path / "never.yaml", family=fingerprint, thresholds={2: 1.1, 4: 1.1})
    write(tmp_path / "always.yaml", family=fingerprint, thresholds={2: 0.0})
    other = write(tmp_path / "other.yaml")
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}
    data = {"family": str(spoken), "nodes": [node], "policy": {"file": "always.yaml", "draft": 2}}
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(data))
    with Client(path) as client:
        asked: dict[str, Any] = {"max_new_tokens": 6, "eos_token_ids": ()}
        assert {t.exit for t in client.generate("hi", **asked).tokens} == {2}
        assert {t.exit for t in client.generate("hi", policy=never, **asked).tokens} == {6}
        assert all(0 <= t.confidence <= 1 for t in client.generate("hi", policy=never, **asked).tokens)
        exact = client.generate("hi", policy=never, mode="exact", draft=3, **asked)
        assert exact.token_ids == client.generate("hi", mode="exact", **asked).token_ids
        with pytest.raises(RequestError, match="calibrated for family ffffffffffff; this family is"):
            client.generate("hi", policy=other, **asked)
        probes = write(tmp_path / "probes.yaml", family=fingerprint, score="probe")
        with pytest.raises(RequestError, match="the branch at exit 2 has none"):
            client.generate("hi", policy=probes, **asked)
        with pytest.raises(RequestError, match="threshold cannot be combined with a policy file"):
            client.generate("hi", policy=never, threshold=0.5, **asked)
    for policy, message in (
        ({"file": "none.yaml"}, "no such policy file"),
        ({"file": "always.yaml", "threshold": 0.5}, "policy: threshold cannot be combined with a policy file"),
        ({"file": "always.yaml", "mode": "fixed"}, "was calibrated for mode 'token', not for 'fixed'"),
    ):
        path.write_text(yaml.safe_dump(data | {"policy": policy}))
        with pytest.raises(ConfigError, match=message):
            Topology.load(path)


def test_calibrate_writes_what_a_topology_can_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "t.msgpack", tmp_path / "p.yaml"
    with Writer(trace, HEADER) as writer:
        for made_record in made(1200, 8).records:
            writer.add(made_record)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ruyi-flow", "calibrate", str(trace), "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, said, _ = run("--max-disagreement", "0.1", "--report", str(tmp_path / "report"))
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "frontier.csv",
        "frontier.png",
        "reliability.png",
    }
    rows = list(csv.DictReader((tmp_path / "report/frontier.csv").read_text().splitlines()))
    (deep,) = (row for row in rows if row["policy"] == "always" and row["setting"] == "6")
    assert float(deep["agreement"]) == 1 and float(deep["cost"]) == 7 and float(deep["at_6"]) == 1
    assert code == 0 and "with a confidence of 95%" in said
    policy = PolicyFile.load(out)
    assert policy.family == HEADER.family and set(policy.thresholds) == {2, 4} and policy.promise["prompts"] == 1200
    code, said, _ = run("--max-disagreement", "0.1", "--score", "margin", "--json")
    facts = json.loads(said)
    assert facts["score"] == "margin" and all(after < 0.03 < before for before, after in facts["errors"].values())
    kept = out.read_bytes()
    code, _, said = run("--max-disagreement", "0.0001")
    assert code == 2 and said.startswith("error: 1200 prompts cannot show") and out.read_bytes() == kept
    code, _, said = run("--max-disagreement", "1")
    assert code == 2 and "it must lie between 0 and 1" in said


@pytest.mark.parametrize(("prompts", "few"), [(20, True), (400, False)])
def test_few_prompts_are_said_where_no_bound_is_tested(run: Command, tmp_path: Path, prompts: int, few: bool) -> None:
    trace, topology = tmp_path / "t.msgpack", tmp_path / "t.yaml"
    with Writer(trace, HEADER) as writer:
        for made_record in made(prompts, 8).records:
            writer.add(made_record)
    nodes = [{"name": f"n{p}", "address": f"127.0.0.1:{p}", "exits": [p]} for p in (2, 4, 6)]
    links = [{"from": "n2", "to": "n4"}, {"from": "n4", "to": "n6"}]
    topology.write_text(yaml.safe_dump({"family": "x", "nodes": nodes, "links": links}))
    given = ("--topology", str(topology), "--out", str(tmp_path / "p.yaml"), "--max-escalation", "0.4")
    code, said, error = run("calibrate", str(trace), *given)
    assert code == 0, error
    assert "no bound was requested" in said and ("so few prompts say little about new ones" in said) == few


def test_calibrate_fits_a_budget_or_a_cascade(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out, topology = tmp_path / "t.msgpack", tmp_path / "p.yaml", tmp_path / "t.yaml"
    with Writer(trace, replace(HEADER, branch_layers=(1, 1, 1), layer_flops=1.0)) as writer:
        for made_record in made(400, 8).records:
            writer.add(made_record)
    nodes = [{"name": f"n{p}", "address": f"127.0.0.1:{p}", "exits": [p]} for p in (2, 4, 6)]
    links = [{"from": "n2", "to": "n4", "encoding": "int8"}, {"from": "n4", "to": "n6"}]
    topology.write_text(yaml.safe_dump({"family": "x", "nodes": nodes, "links": links}))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ruyi-flow", "calibrate", str(trace), "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    given = ("--topology", str(topology), "--json")
    spends = []
    for share in ("0.1", "0.4"):
        code, said, error = run("--max-escalation", share, *given)
        assert code == 0, error
        facts = json.loads(said)
        assert facts["spent"]["escalation"] < float(share) + 0.05 and facts["mode"] == "token"
        spends.append(facts["promise"]["disagreement"])
    assert spends[0] > spends[1], "more questions, less disagreement"
    code, said, _ = run("--max-bytes-per-token", "20", *given)
    assert code == 0 and json.loads(said)["spent"]["bytes_per_token"] < 22
    code, said, _ = run("--max-disagreement", "0.2", "--max-escalation", "0.9")
    assert code == 0 and "the first node asks the next one" in said
    code, said, _ = run("--mode", "cascade", "--max-loss", "0.4", "--report", str(tmp_path / "r"))
    assert code == 0 and "of its compute" in said
    assert {file.name for file in (tmp_path / "r").iterdir()} == {"cascade.csv", "cascade.png", "reliability.png"}
    rows = list(csv.DictReader((tmp_path / "r/cascade.csv").read_text().splitlines()))
    assert {row["policy"] for row in rows} == {"calibrated", "always", "random", "uncalibrated", "oracle"}
    deep, shallow = ([r for r in rows if r["policy"] == "always" and float(r[at]) == 1] for at in ("at_6", "at_2"))
    assert float(deep[0]["escalated"]) == float(deep[0]["compute"]) == 1 and float(deep[0]["bytes_per_token"]) > 16
    assert float(shallow[0]["escalated"]) == float(shallow[0]["bytes_per_token"]) == 0
    assert PolicyFile.load(out).mode is Mode.CASCADE
    kept = out.read_bytes()
    for arguments, message in (
        (("--max-latency", "1"), "needs --topology"),
        (("--max-escalation", "0"), "--max-escalation is 0; it must be above 0"),
        (("--max-escalation", "2"), "--max-escalation is 2; it is a share"),
        (("--max-bytes-per-token", "-3"), "--max-bytes-per-token is -3; it must be above 0"),
        (("--confidence", "1"), "--confidence is 1; it must lie between 0 and 1"),
        (("--max-bytes-per-token", "1", "--max-disagreement", "0.01"), "cannot show"),
        (
            ("--mode", "cascade", "--max-escalation", "0.5"),
            "--max-escalation is only valid with mode token, not with cascade",
        ),
        (("--mode", "cascade", "--topology", str(topology)), "--topology is only valid with mode token"),
        (("--max-loss", "0.1"), "--max-loss is only valid with mode cascade, not with token"),
        (("--window", "4"), "--window is only valid with mode cascade"),
        (("--score", "probe", "--mode", "cascade", "--max-loss", "2"), "--max-loss is 2; it must lie between 0 and 1"),
    ):
        code, _, said = run(*arguments)
        assert code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
    topology.write_text(yaml.safe_dump({"family": str(tiny), "nodes": nodes, "links": links}))
    code, _, said = run("--max-escalation", "0.5", *given)
    assert code == 2 and "the trace ffffffffffff" in said
    nodes[0]["exits"] = [1, 2]
    topology.write_text(yaml.safe_dump({"family": "x", "nodes": nodes, "links": links}))
    code, _, said = run("--max-escalation", "0.5", *given)
    assert code == 2 and "has exits [1, 2, 4, 6], the trace [2, 4, 6]" in said
    trace.unlink()
    with Writer(trace, replace(HEADER, branch_layers=(1, 1, 1), layer_flops=1.0, scorer=Scorer.CHOICE)) as writer:
        for made_record in made(400, 8).records:
            writer.add(made_record)
    code, _, said = run("--max-disagreement", "0.2")
    assert code == 2 and "the trace compares options" in said
    code, said, _ = run("--mode", "cascade", "--max-loss", "0.4")
    assert code == 0 and "no policy is written" in said
    assert out.read_bytes() == kept


def test_calibrate_checks_where_it_writes_before_it_computes(run: Command, tmp_path: Path) -> None:
    trace, other, folder = tmp_path / "t.msgpack", tmp_path / "notes.yaml", tmp_path / "report"
    with Writer(trace, HEADER) as writer:
        writer.add(made(1, 8).records[0])
    other.write_text("note: keep me\n")
    kept = trace.read_bytes()
    for arguments, message in (
        (("--out", str(trace)), "t.msgpack: exists and is not a policy file; name another file or remove it"),
        (("--out", str(other)), "notes.yaml: exists and is not a policy file"),
        (("--out", "."), "--out .: is a folder; name a file"),
        (("--out", str(other / "p.yaml"), "--report", str(folder)), "is a file; name a file in a folder"),
        (("--out", str(tmp_path / "p.yaml"), "--report", str(other)), "notes.yaml is a file; name a folder"),
        (("--out", str(tmp_path / "p.yaml"), "--report", str(other / "r")), "notes.yaml is a file; name a folder"),
    ):
        code, _, said = run("calibrate", str(trace), *arguments)
        assert code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
    assert trace.read_bytes() == kept and other.read_text() == "note: keep me\n" and not folder.exists()
    code, _, said = run("calibrate", str(trace), "--seed", "-1")
    assert code == 2 and "than or equal to 0" in said and "Traceback" not in said
    code, _, said = run("calibrate", str(trace), "--mode", "exact")
    assert code == 2 and "'exact' is not one of 'token'" in said
