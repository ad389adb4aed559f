"""Training: data, both scopes, exact resumption, and what stays as it was."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from ruyi_flow import cli
from ruyi_flow.errors import CheckpointError, ConfigError, TrainingError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import PROBE_NAMES, Checkpoint
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.local import Family, load_family
from ruyi_flow.testing import free_ports, tiny_family
from ruyi_flow.training.corpus import Document, chat_prompt, pack_documents
from ruyi_flow.training.distill import answers, distill
from ruyi_flow.training.recipe import Recipe, SelfDistill
from ruyi_flow.training.train import Step, train
from ruyi_flow.training.trainees import cross_entropy


class Letters:
    """A tokenizer of 26 letters and a space, for families of this test."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("a") + 3 if c.isalpha() else 30 for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i + ord("a") - 3) if 3 <= i < 29 else " " for i in ids)


def recipe(folder: Path, **changes: Any) -> Recipe:
    data = {
        "family": "x",
        "out": folder / "out",
        "data": [{"path": folder / "text.txt"}],
        "length": 32,
        "batch": 8,
        "steps": 12,
        "precision": "no",
        "validate_every": 6,
        "save_every": 4,
    }
    return Recipe.model_validate(data | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text whose next letter mostly follows from the one before."""
    generator = random.Random(0)
    follows = {c: generator.choice("abcdefghijklmnopqrstuvwxyz ") for c in "abcdefghijklmnopqrstuvwxyz "}
    text, letter = [], "a"
    for _ in range(16000):
        letter = follows[letter] if generator.random() < 0.8 else generator.choice("abcdefghijklmnopqrstuvwxyz ")
        text.append(letter)
    (tmp_path / "text.txt").write_text("".join(text))
    return tmp_path


def test_packing_keeps_documents_whole_and_apart() -> None:
    generator = random.Random(1)
    documents = [Document(tuple(generator.randrange(1, 60) for _ in range(n)), n // 2) for n in range(2, 33)]
    packed = pack_documents(documents, length=32, seed=3)
    assert len(packed) < 20
    found = []
    for row in range(len(packed)):
        for number in range(int(packed.documents[row].max()) + 1):
            here = packed.documents[row] == number
            ids = packed.token_ids[row][here].tolist()
            assert packed.positions[row][here].tolist() == list(range(len(ids)))
            assert packed.answers[row][here].sum() == len(ids) - len(ids) // 2
            found.append(tuple(ids))
    assert Counter(found) == Counter(d.token_ids for d in documents)


@pytest.mark.parametrize(("start", "loss"), [("copy", "kl"), ("zero", "hidden"), ("copy", "cross_entropy")])
def test_branches_come_closer_to_the_last(folder: Path, tiny: Path, start: str, loss: str) -> None:
    steps: list[Step] = []
    losses = dict.fromkeys(("kl", "hidden", "cross_entropy"), 0.0) | {loss: 1.0}
    changes = {"steps": 40, "validate_every": 20, "learning_rate": 3e-3, "losses": losses}
    run = recipe(folder, branch_layers={2: 2}, start=start, **changes)
    checkpoint = Checkpoint(tiny)
    file = train(run, checkpoint, Letters(), report=steps.append)
    for exit in (2, 4):
        early, late = (sum(s.losses[f"{loss}/{exit}"] for s in part) for part in (steps[:5], steps[-5:]))
        assert late < 0.97 * early
    tensors = load_file(file)
    assert "model.eeblocks.0.0.mlp.up_proj.weight" in tensors and not any("layers.5" in name for name in tensors)
    assert set(tensors) & set(checkpoint.names((2, 4, 6))) == {n for n in tensors if "eeblocks" not in n}
    assert steps[-1].validation.keys() >= {"agreement/2", "agreement/4"}
    grafted = Checkpoint(tiny, branches=[file])
    assert grafted.config.branch_layers == (2, 1, 1) and grafted.fingerprint != checkpoint.fingerprint
    ids = torch.arange(3, 25)[None]
    before, after = load_family(tiny, dtype="float32"), Family(grafted, dtype=torch.float32)
    assert torch.equal(before.logits(ids), after.logits(ids))  # the last exit, to the bit
    assert not torch.equal(before.logits(ids, exit=2), after.logits(ids, exit=2))
    with safe_open(file, "pt") as handle:
        described = json.loads(handle.metadata()["ruyi_flow.recipe"])
    assert described["data"] == [{"path": "text.txt", "documents": None}] and described["steps"] == 40
    assert described["fingerprint"] == checkpoint.fingerprint and str(folder) not in json.dumps(described)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41)) and "validation/agreement/2" in lines[-1]


@pytest.mark.parametrize("scope", ["branches", "joint"])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(folder: Path, tiny: Path, scope: str) -> None:
    whole = load_file(train(recipe(folder, scope=scope, losses={"positions": 0.5}), Checkpoint(tiny), Letters()))
    broken = recipe(folder, scope=scope, losses={"positions": 0.5}, out=folder / "broken")
    losses: dict[int, float] = {}

    def kill(step: Step) -> None:
        losses.setdefault(step.step, step.losses["loss"])
        assert losses[step.step] == step.losses["loss"]  # steps that are done again give the same loss
        if step.step == 7 and 8 not in losses:
            losses[8] = math.nan  # only once
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, Checkpoint(tiny), Letters(), report=kill)
    os.replace(broken.out / "state", broken.out / "state.new")  # as if killed in the middle of a save, too
    del losses[8]
    losses[8] = json.loads((recipe(folder).out / "metrics.jsonl").read_text().splitlines()[7])["loss"]
    told: list[str] = []
    resumed = load_file(train(broken, Checkpoint(tiny), Letters(), report=kill, say=told.append))
    assert "resuming after step 4" in told
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and whole.keys() == resumed.keys()


def test_a_run_may_become_shorter_on_the_way(folder: Path, tiny: Path) -> None:
    def kill(step: Step) -> None:
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe(folder, steps=12, save_every=3), Checkpoint(tiny), Letters(), report=kill)
    seen: list[int] = []
    train(recipe(folder, steps=7, save_every=3), Checkpoint(tiny), Letters(), report=lambda s: seen.append(s.step))
    assert seen == [4, 5, 6, 7]
    assert len((folder / "out/metrics.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("scope", ["branches", "joint"])
def test_recomputing_what_is_not_kept_changes_nothing(folder: Path, tiny: Path, scope: str) -> None:
    losses = []
    for checkpointing in (False, True):
        steps: list[Step] = []
        run = recipe(
            folder, out=folder / f"out{checkpointing}", scope=scope, gradient_checkpointing=checkpointing, accumulate=2
        )
        train(run, Checkpoint(tiny), Letters(), report=steps.append)
        losses.append([step.losses["loss"] for step in steps])
        pytest.importorskip("tensorboard")
        assert list(run.out.glob("events.out.tfevents.*"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_joint_training_from_nothing_learns(folder: Path) -> None:
    config = Checkpoint(tiny_family(folder / "f", exits=(1, 2, 3), shared_heads=True)).config
    steps: list[Step] = []
    run = recipe(folder, scope="joint", steps=240, validate_every=240, learning_rate=5e-3, exit_weights="equal")
    train(run, config, Letters(), report=steps.append)
    counts = Counter((folder / "text.txt").read_text())
    total = sum(counts.values())
    unigram = -sum(n / total * math.log(n / total) for n in counts.values())
    found = steps[-1].validation
    assert found["loss/1"] < unigram
    assert found["loss/3"] <= found["loss/2"] + 0.02 and found["loss/2"] <= found["loss/1"] + 0.02


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tiny: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+, on sequences \[.*begins '"):
        train(recipe(folder, learning_rate=1e30, clip=1e30, scope="joint"), Checkpoint(tiny), Letters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_layers": {6: 2}}, "6 is not one of the early exits"),
        ({"batch": 500000}, "give more data, or a smaller batch"),
        ({"data": [{"path": "/nowhere.txt"}]}, "nowhere.txt: cannot be read"),
    ],
)
def test_recipes_that_cannot_run_are_refused(folder: Path, tiny: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(folder, **changes), Checkpoint(tiny), Letters())


def test_a_recipe_file_is_checked_like_a_topology(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("family: x\nout: o\nsteps: 1\ndata: [{path: a}]\nlosses: {kll: 1}\n")
    with pytest.raises(ConfigError, match=r"losses\.kll: 1: unknown key; the keys here are kl, .*did you mean 'kl'"):
        Recipe.load(path)
    path.write_text("family: x\nout: o\nsteps: 1\nself_distill: {batch: 4}\n")
    with pytest.raises(ConfigError, match="self_distill: .*: there is nothing to answer; set prompts: "):
        Recipe.load(path)
    path.write_text("family: x\nout: o\nsteps: 5\ndata: [{path: a.txt}]\n")
    assert Recipe.load(path).data[0].path == tmp_path / "a.txt" and Recipe.load(path).out == tmp_path / "o"


def test_trained_branches_become_a_family_of_the_store(folder: Path, home: Path) -> None:
    plain = tiny_family(folder / "plain", base="llama", ordinary=True)
    file = train(recipe(folder, branch_layers={2: 3}), Checkpoint(plain, (2, 4)), Letters())
    stored = store.pull(str(plain), name="trained", exits=(2, 4), branches=[file])
    family, base = load_family("trained", dtype="float32"), load_family(plain, dtype="float32", exits=(2, 4))
    assert family.config.branch_layers == (3, 1, 1) and not family.config.ordinary
    ids = torch.arange(3, 25)[None]
    assert torch.equal(family.logits(ids), base.logits(ids))
    grafted = Family(Checkpoint(plain, (2, 4), [file]), dtype=torch.float32)
    for exit in (2, 4):
        assert torch.equal(family.logits(ids, exit=exit), grafted.logits(ids, exit=exit))
    assert store.pull(str(plain), name="trained", exits=(2, 4), branches=[file]) == stored
    with pytest.raises(CheckpointError, match="exists already, from"):
        store.pull(str(plain), name="trained", exits=(2, 4))
    with pytest.raises(
        CheckpointError, match=r"its branches are for exits \[2, 4, 6\], but the family has exits \[3, 6\]"
    ):
        Checkpoint(plain, (3,), [file])
    with pytest.raises(CheckpointError, match="not a file of trained branches"):
        Checkpoint(plain, (2, 4), [plain / "model.safetensors"])


def test_the_command_distills_trains_and_says_what_to_do_next(
    folder: Path, spoken: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "yes"}]} for w in "abcdefgh"
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    plan = {
        "family": str(spoken),
        "out": "out",
        "self_distill": {
            "prompts": [{"path": "chats.jsonl"}],
            "temperatures": [0, 1],
            "max_new_tokens": 12,
            "batch": 3,
        },
        "length": 64,
        "batch": 1,
        "steps": 2,
        "precision": "no",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plan))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ruyi-flow", "train", str(folder / "recipe.yaml"), *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    code, _, said = run()
    assert code == 2 and "nothing to train on" in said
    code, out, said = run("--self-distill")
    assert code == 0, said
    assert "ruyi-flow pull" in out and "--branches" in out and "agreement/2" in said
    items = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert {(i["prompt_number"], i["temperature"]) for i in items} == {(n, t) for n in range(8) for t in (0, 1)}
    family = load_family(spoken, dtype="float32")
    for item in items:
        if item["temperature"] == 0:
            greedy = family.generate(torch.tensor([item["prompt"]]), max_new_tokens=12, min_new_tokens=0)[0].tolist()
            assert item["answer"] == greedy[: len(item["answer"])]
    (folder / "out" / "answers.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items[:5]) + '{"prompt_nu')
    assert run("--self-distill", "--json")[0] == 0
    again = [json.loads(line) for line in (folder / "out" / "answers.jsonl").read_text().splitlines()]
    assert again[:5] == items[:5] and len(again) == len(items)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plan | {"learning_rate": 0.1}))
    code, _, said = run()
    assert code == 2 and "is the state of a run with another recipe, family or data" in said


def test_the_family_writes_prompts_itself_and_answers_them(folder: Path, spoken: Path) -> None:
    checkpoint = Checkpoint(spoken)
    tokenizer, ends = load_tokenizer(checkpoint), tuple(range(3, 30))  # so many ends, or it would never stop
    own: dict[str, Any] = {"own_prompts": 40, "max_new_tokens": 12, "batch": 16}
    asked = recipe(folder, self_distill=SelfDistill(**own), length=64)
    told: list[tuple[int, int]] = []
    file = distill(asked, checkpoint, tokenizer, ends, report=lambda done, of, _: told.append((done, of)))
    written = (asked.out / "prompts.jsonl").read_text()
    texts = [json.loads(line)["prompt"] for line in written.splitlines()]
    assert 5 < len(texts) < 40 and len(set(texts)) == len(texts) and all(text == text.strip() != "" for text in texts)
    items = {item["prompt_number"]: item for item in map(json.loads, file.read_text().splitlines())}
    assert told[39] == (40, 40) and told[-1] == (len(texts), len(texts)) == (len(items), len(items))
    for number, text in enumerate(texts):
        assert items[number]["prompt"] == chat_prompt({"prompt": text}, tokenizer)[0]
    file.unlink()
    assert distill(asked, checkpoint, tokenizer, ends).exists()
    assert (asked.out / "prompts.jsonl").read_text() == written, "they are not made again"
    with pytest.raises(ConfigError, match="none of 40 prompts ended within max_new_tokens .12.; raise"):
        distill(asked.model_copy(update={"out": folder / "endless"}), checkpoint, tokenizer, ())
    for template, message in ((None, "cannot be used"), ("{{ 'a' }}", "puts nothing before")):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            distill(asked, checkpoint, tokenizer, ends)


def test_answers_side_by_side_are_those_given_one_by_one(spoken: Path) -> None:
    model = load_family(spoken, dtype="float32").model
    prompts = [[3 + (7 * i + j) % 200 for j in range(2 + i % 5)] for i in range(9)]

    def said(batch: int) -> dict[int, tuple[int, ...]]:
        found = answers(
            model, prompts, max_new_tokens=24, max_positions=64, batch=batch, ended=lambda ids: sum(ids) % 7 == 0
        )
        return {answer.index: answer.token_ids for answer in found}

    alone = said(1)
    assert len({len(ids) for ids in alone.values()}) > 3, "answers end at different times, so rows change places"
    assert said(4) == alone


def test_probes_learn_where_a_branch_agrees(folder: Path, tiny: Path, home: Path) -> None:
    steps: list[Step] = []
    branches = train(recipe(folder, steps=60, learning_rate=3e-3, out=folder / "branches"), Checkpoint(tiny), Letters())
    family = Checkpoint(tiny, branches=[branches])
    changes = {"scope": "probes", "probe_size": 8, "steps": 120, "validate_every": 120, "learning_rate": 1e-2}
    AcceleratorState._reset_state(reset_partial_state=True)  # which allows one precision a process
    file = train(recipe(folder, **changes, precision="bf16"), family, Letters(), report=steps.append)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert set(load_file(file)) == {f"model.probes.{i}.{part}" for i in (0, 1) for part in PROBE_NAMES}
    found = steps[-1].validation
    for exit in (2, 4):
        early, late = (sum(s.losses[f"log_loss/{exit}"] for s in part) for part in (steps[:10], steps[-10:]))
        assert late < 0.95 * early and found[f"auc/{exit}"] > 0.6
    store.pull(str(tiny), name="a", branches=[branches])
    store.pull(str(home / "families/a"), name="b", branches=[file])
    plain, probed = load_family("a", dtype="float32"), load_family("b", dtype="float32")
    assert plain.config.probe_size == 0 and probed.config.probe_size == 8
    ids = torch.arange(3, 25)[None]
    for exit in (2, 4, 6):
        assert torch.equal(plain.logits(ids, exit), probed.logits(ids, exit))
    assert probed.model.branch_at[2].probe is not None and probed.model.branch_at[6].probe is None
    again = train(recipe(folder, out=folder / "again"), probed.checkpoint, Letters())
    assert Checkpoint(tiny, branches=[again]).config.probe_size == 0  # other branches, no probes of theirs


def test_sparse_cross_entropy_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 40, generator=generator) * 4).requires_grad_()
    chances, columns = torch.randn(7, 40, generator=generator).topk(5, -1)
    chances = chances.softmax(-1)
    weight = torch.rand(7, generator=generator)
    expected = -(chances * logits.log_softmax(-1).gather(1, columns)).sum(-1)
    (gradient,) = torch.autograd.grad((weight * expected).sum(), logits)
    found = cross_entropy(logits, columns, chances)
    assert (found - expected).abs().max() < 1e-5
    assert (torch.autograd.grad((weight * found).sum(), logits)[0] - gradient).abs().max() < 1e-6


def test_two_processes_train_as_one(folder: Path, spoken: Path) -> None:
    text = (folder / "text.txt").read_text().encode()
    sizes = [17 + i * 7 % 16 for i in range(400)]  # each fills a sequence of 32 alone, so their labels differ in number
    lines = [{"prompt": [*text[40 * i : 40 * i + n]], "answer": [65]} for i, n in enumerate(sizes)]
    (folder / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = {"family": str(spoken), "data": [{"path": "ids.jsonl"}], "scope": "joint", "length": 33, "steps": 6}
    plan |= {"precision": "no", "exit_weights": "equal", "validate_every": 3, "save_every": 3}
    for name, batch in (("one", 8), ("two", 4)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plan | {"out": name, "batch": batch}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", str(free_ports(1)[0])]
    for command, name in (([sys.executable], "one"), (launch, "two")):
        command = [*command, "-m", "ruyi_flow.cli", "train", str(folder / f"{name}.yaml"), "--json"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1  # of several processes one speaks
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 6
    key = "validation/loss/6"
    assert one[2][key] > one[5][key]  # it learned, and both the same
    for line in (*one, *two):
        del line["tokens_per_s"]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4)


def test_what_the_trunk_gives_is_the_same_from_disk_and_anew(folder: Path, tiny: Path) -> None:
    losses = []
    for number, cache_gb in enumerate((20.0, 0.004, 0.0)):  # all of it, half of it, nothing
        steps: list[Step] = []
        run = recipe(folder, out=folder / f"out{number}", cache_gb=cache_gb, steps=8)
        train(run, Checkpoint(tiny), Letters(), report=steps.append)
        losses.append([s.losses["loss"] for s in steps] + list(steps[-1].validation.values()))
        kept = sum(file.stat().st_size for file in (folder / f"out{number}").glob("trunk-*/there"))
        assert (kept > 400, 100 < kept < 400, kept == 0)[number]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)
