"""Batches, processes and validation parts with few and many labels: each position counts the same."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.training.corpus import Document, Packed, pack_documents
from ruyi_flow.training.recipe import Recipe
from ruyi_flow.training.train import Step, _trained, train
from ruyi_flow.training.trainees import Branches, Joint, Probes, _before_answers, _labels, cross_entropy

SIZES = ((63, 1), (60, 40), (6, 3), (40, 39), (7, 0), (33, 30), (9, 8), (50, 5))
"""Tokens of each sequence, and how many of them precede the answer."""
SCOPES: list[tuple[str, dict[str, Any]]] = [
    ("joint", {}),
    ("branches", {"vocabulary": "full"}),
    ("branches", {"vocabulary": "full", "cross_entropy": 1.0, "positions": 0.5, "prompt": 0.0}),
    ("probes", {}),
]


def write(folder: Path) -> None:
    """Write documents that fill sequences of 64 tokens very differently: no two of them fit into one."""
    generator = random.Random(0)
    lines = []
    for total, prompt in [*((33 + n, 30) for n in range(0, 31, 3)), *((64, n) for n in range(2, 62, 6))] * 2:
        ids = [generator.randrange(3, 60) for _ in range(total)]
        lines.append(json.dumps({"prompt": ids[:prompt], "answer": ids[prompt:]}) + "\n")
    (folder / "ids.jsonl").write_text("".join(lines))


def recipe(folder: Path, scope: str, losses: dict[str, Any], **changes: Any) -> Recipe:
    data: dict[str, Any] = {"family": "x", "out": folder / "out", "data": [{"path": folder / "ids.jsonl"}]}
    data |= {"scope": scope, "losses": losses, "probe_size": 8, "length": 64, "steps": 4, "precision": "no"}
    return Recipe.model_validate(data | {"validate_every": 4, "save_every": 100} | changes)


def one_a_row() -> Packed:
    """Pack each document into a sequence of its own."""
    generator = random.Random(0)
    documents = [Document(tuple(generator.randrange(3, 60) for _ in range(n)), prompt) for n, prompt in SIZES]
    rows = [pack_documents([document], length=64, seed=0) for document in documents]
    names = ("token_ids", "documents", "positions", "answers")
    return Packed(*(torch.cat([getattr(row, name) for row in rows]) for name in names))


def gradient(trainee: Joint | Branches | Probes, groups: Sequence[Sequence[int]]) -> Tensor:
    trainee.zero_grad()
    whole = torch.tensor([index for group in groups for index in group])
    for group in groups:
        trainee(torch.tensor(group), 3, whole)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in trainee.parameters() if p.grad is not None])


@pytest.mark.parametrize(("scope", "losses"), SCOPES)
def test_the_gradient_of_some_batches_is_that_of_one(
    tmp_path: Path, tiny: Path, scope: str, losses: dict[str, Any]
) -> None:
    packed, checkpoint = one_a_row(), Checkpoint(tiny)
    run = recipe(tmp_path, scope, losses)
    config = _trained(checkpoint.config, run)
    trainee: Joint | Branches | Probes
    if scope == "joint":
        trainee = Joint(checkpoint, config, run, packed)
    else:
        kind = Branches if scope == "branches" else Probes
        trainee = kind(checkpoint, config=config, recipe=run, packed=packed, device=torch.device("cpu"))
    one = gradient(trainee, [range(len(packed))])
    assert one.norm() > 0
    for groups in ([[0, 1, 2], [3, 4, 5], [6, 7]], [[i] for i in reversed(range(len(packed)))]):
        assert (gradient(trainee, groups) - one).norm() < 3e-6 * one.norm()


@pytest.mark.parametrize(("scope", "losses"), SCOPES)
def test_a_run_that_accumulates_has_the_losses_of_one_with_a_large_batch(
    tmp_path: Path, tiny: Path, scope: str, losses: dict[str, Any]
) -> None:
    write(tmp_path)
    found: list[list[float]] = []
    for batch, accumulate in ((4, 1), (1, 4)):
        steps: list[Step] = []
        changes = {"batch": batch, "accumulate": accumulate, "out": tmp_path / f"out{batch}", "validation": 0.2}
        train(recipe(tmp_path, scope, losses, **changes), Checkpoint(tiny), None, report=steps.append)
        found.append([value for step in steps for value in (*step.losses.values(), *step.validation.values())])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_sequences_without_an_answer_do_not_break_a_step(tmp_path: Path, tiny: Path) -> None:
    lines = [{"prompt": [3 + i % 50] * 40, "answer": [9] * (i % 2)} for i in range(24)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for scope, losses in (("branches", {"prompt": 0.0, "hidden": 0.0}), ("probes", {})):
        steps: list[Step] = []
        changes = {"batch": 1, "steps": 12, "out": tmp_path / scope}
        train(recipe(tmp_path, scope, losses, **changes), Checkpoint(tiny), None, report=steps.append)
        losses_of_steps = [step.losses["loss"] for step in steps]
        assert 0.0 in losses_of_steps and max(losses_of_steps) > 0


def test_positions_before_an_answer_are_those_of_its_own_document() -> None:
    documents = [Document((5, 6, 7, 8), 2), Document((9, 10, 11), 0), Document((12, 13), 2)]
    packed = pack_documents(documents, length=10, seed=0)
    before, labels = _before_answers(packed), _labels(packed)
    answered = {8: False, 7: True, 6: True, 5: False, 9: True, 10: True, 11: False, 12: False, 13: False}
    for token, expected in answered.items():
        here = packed.token_ids == token
        assert before[here].item() is expected
        following = {5: 6, 6: 7, 7: 8, 9: 10, 10: 11, 12: 13}.get(token, -100)
        assert labels[here].item() == following
    assert before.sum() == 4


def test_a_rows_weight_does_not_tilt_its_gradient_when_it_is_rounded() -> None:
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    chances = logits.detach().float().softmax(-1)  # so the true gradient is nearly 0
    loss = cross_entropy(logits, torch.arange(40).expand(64, 40), chances)
    weight = 1.0038  # half-way between two numbers of bfloat16
    (gradient,) = torch.autograd.grad(weight * loss.sum(), logits)
    assert gradient.float().sum().abs() < 1e-3 * weight * len(logits)
