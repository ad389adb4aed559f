"""Files have the permissions that the umask leaves: the user of a node is often not the one who made its files."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.gguf import convert_gguf
from ruyi_flow.training.recipe import Recipe
from ruyi_flow.training.train import train
from tests.conftest import Command
from tests.family.gguf_kit import tiny_model, write_gguf
from tests.sim.small import scenario
from tests.training.test_train import Letters

UMASK = 0o027


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """A mask that lets the group read, and others nothing."""
    before = os.umask(UMASK)
    yield
    os.umask(before)


def check(folder: Path, *kinds: str) -> None:
    """Check the permissions of all files and folders below a folder, which has files whose names end like this."""
    found = [path for path in folder.rglob("*") if not path.is_symlink() and path.suffix != ".lock"]
    missing = [kind for kind in kinds if not any(path.name.endswith(kind) for path in found)]
    assert missing == [], f"there are {sorted(path.name for path in found)}"
    wrong = {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in [folder, *found]
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~UMASK
    }
    assert wrong == {}


def test_families_and_shards(run: Command, home: Path, tmp_path: Path, spoken: Path) -> None:
    assert run("pull", str(spoken))[0] == 0
    check(home / "families", "config.json", "model.safetensors", "tokenizer.json", "source.txt", ".jinja")
    node = {"name": "whole", "exits": [2, 4, 6]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"family": "spoken", "nodes": [node]}))
    assert run("shard", "-t", str(tmp_path / "one.yaml"), "-o", str(tmp_path / "shards"))[0] == 0
    check(tmp_path / "shards", "config.json", "model.safetensors", "tokenizer.json")


def test_families_from_gguf_files(home: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    convert_gguf(file, tmp_path / "converted")
    check(tmp_path / "converted", "00000.safetensors", "tokenizer.json", "config.json", "index.json")
    check(store.pull(str(file), exits=(1,)).parent, "model.safetensors", "tokenizer.json")
    check(store.pull(str(file), exits=(1,), force=True).parent, "model.safetensors", "tokenizer.json")


def test_what_a_training_run_writes(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "text.txt").write_text("abc bca " * 300)
    out = tmp_path / "made" / "out"
    plan: dict[str, Any] = {"family": "x", "out": out, "data": [{"path": tmp_path / "text.txt"}], "precision": "no"}
    plan |= {"length": 32, "batch": 4, "steps": 4, "save_every": 2, "validate_every": 2}
    train(Recipe.model_validate(plan), Checkpoint(tiny), Letters())
    check(tmp_path / "made", "branches.safetensors", "metrics.jsonl", "step.json", "state")


def test_traces_policies_and_explained_answers(run: Command, tmp_path: Path, spoken: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    (tmp_path / "one.yaml").write_text(
        yaml.safe_dump({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    )
    made = tmp_path / "made"
    trace = ("trace", str(tmp_path / "asked.jsonl"), "--family", str(spoken), "--max-new-tokens", "6")
    assert run(*trace, "--out", str(made / "t.msgpack"))[0] == 0
    calibrate = ("calibrate", str(made / "t.msgpack"), "-t", str(tmp_path / "one.yaml"), "--max-escalation", "0.5")
    code, _, said = run(*calibrate, "--out", str(made / "p.yaml"), "--report", str(made / "report"))
    assert code == 0, said
    explain = ("explain", "-t", str(tmp_path / "one.yaml"), "-p", "hi", "--max-new-tokens", "3")
    assert run(*explain, "--html", str(made / "e.html"))[0] == 0
    check(made, "t.msgpack", "p.yaml", "frontier.csv", "frontier.png", "e.html")


def test_evaluations(run: Command, tmp_path: Path, spoken: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    made = tmp_path / "made"
    given = ("--tasks", "text_agreement", "--chats", str(tmp_path / "chats.jsonl"), "--out", str(made))
    code, _, said = run("eval", "--family", str(spoken), *given)
    assert code == 0, said
    check(made, ".md", ".json", ".png")


def test_profiles_simulations_sweeps_and_plans(run: Command, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    file = str(scenario(made))
    assert run("simulate", file, "--out", str(made / "run"))[0] == 0
    grid = ("--grid", "policy.threshold=0.5,0.9", "--out", str(made / "sweep"))
    assert run("sweep", file, *grid)[0] == 0
    objective = ("--objective", "p95 token_s < 9", "--finalists", "1", "--out", str(made / "plan.yaml"))
    code, _, said = run("plan", file, *objective)
    assert code == 0, said
    check(made, "costs.msgpack", "requests.csv", "trace.json", "metrics.json", "report.html", "plan.yaml", ".png")
