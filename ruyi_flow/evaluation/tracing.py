"""Recording traces (`routing/trace.py`): the last exit answers prompts, then all exits read the answers in one pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ruyi_flow.entry import end_tokens
from ruyi_flow.errors import ConfigError
from ruyi_flow.family.distill import Answer, answers
from ruyi_flow.family.reading import Tree, each_exit
from ruyi_flow.family.transformer import Probe
from ruyi_flow.local import Family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.trace import ExitRecord, Header, Record, Writer
from ruyi_flow.runtime.scores import losses, measure

__all__ = ["TEMPERATURES", "record"]

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)


def record(
    family: Family,
    prompts: Sequence[Sequence[int]],
    out: Path,
    *,
    max_new_tokens: int = 128,
    batch: int = 32,
    batch_tokens: int = 2048,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Header:
    """Write a trace of a family's answers to prompts, or go on with one.

    Args:
        prompts: token ids; one that leaves no room for an answer is left out.
        max_new_tokens: of an answer.
        batch: prompts that are answered side by side.
        batch_tokens: tokens that are read in one pass.
        report: told how many prompts are done, and of how many.

    Raises:
        ConfigError: no prompts, or a file of something else.
    """
    checkpoint, model = family.checkpoint, family.model
    room = family.config.max_positions - max_new_tokens
    numbers = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) <= room]
    if not numbers:
        raise ConfigError(f"there is no prompt that leaves room for an answer of {max_new_tokens} tokens")
    header = Header(
        family=checkpoint.fingerprint,
        name=checkpoint.folder.name,
        exits=family.exits,
        hidden_size=family.config.hidden_size,
        dtype=str(model.dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        prompts=hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest(),
        scores=scores_of(family),
        temperatures=TEMPERATURES,
    )
    with Writer(out, header) as writer:
        report(len(writer.done), len(numbers))
        left = [i for i in numbers if i not in writer.done]
        for first in range(0, len(left), batch):
            group = left[first : first + batch]
            asked = [prompts[i] for i in group]
            given = answers(
                model,
                asked,
                max_new_tokens=max_new_tokens,
                max_positions=max(map(len, asked)) + max_new_tokens,
                batch=len(asked),
                eos_token_ids=end_tokens(checkpoint, family.tokenizer),
            )
            waiting = sorted(given, key=lambda a: -len(a.prompt) - len(a.token_ids))
            while waiting:
                count = max(1, batch_tokens // (len(waiting[0].prompt) + len(waiting[0].token_ids)))
                for made in _read(family, waiting[:count], group):
                    writer.add(made)
                waiting = waiting[count:]
                report(len(writer.done), len(numbers))
    return header


def scores_of(family: Family) -> tuple[Score, ...]:
    """The scores that there are of a family's branches."""
    return tuple(s for s in Score if s is not Score.PROBE or family.config.probe_size)


def _read(family: Family, read: Sequence[Answer], numbers: Sequence[int]) -> list[Record]:
    """What every exit says along some answers."""
    trees = [Tree((*a.prompt, *a.token_ids[:-1]), ()) for a in read]
    prompts = torch.tensor([t for a in read for t in a.prompt[1:]], device=family.model.device)
    every = [torch.arange(len(tree)) for tree in trees]
    parts: list[dict[int, ExitRecord]] = [{} for _ in read]
    for p, logits, read_states in each_exit(family.model, family.exits, trees, every):
        starts = np.cumsum([0, *map(len, trees)]).tolist()
        rows = [torch.arange(s + len(a.prompt) - 1, s + len(t)) for s, a, t in zip(starts, read, trees, strict=False)]
        before = torch.cat([torch.arange(s, s + len(a.prompt) - 1) for s, a in zip(starts, read, strict=False)])
        chosen = torch.cat(rows).to(logits.device)
        asked, probe = logits[chosen], family.model.branch_at[p].probe
        scores = _scores(asked, scores_of(family), probe, read_states[chosen]).cpu().numpy()
        said = asked.argmax(-1).int().cpu().numpy()
        loss, entropy = (t.cpu() for t in losses(logits[before.to(logits.device)], prompts))
        at = at_prompt = 0
        for part, answer in zip(parts, read, strict=True):
            stop, stop_prompt = at + len(answer.token_ids), at_prompt + len(answer.prompt) - 1
            here = slice(at_prompt, stop_prompt)
            means = [float(t[here].mean()) if stop_prompt > at_prompt else 0.0 for t in (loss, entropy)]
            part[p] = ExitRecord(said[at:stop], scores[at:stop], *means)
            at, at_prompt = stop, stop_prompt
    last = family.exits[-1]
    # The last exit's reading of its own answer: in bfloat16 a near tie may fall otherwise in a pass of many rows, and
    # what it says there is what the others are compared with.
    return [
        Record(numbers[answer.index], len(answer.prompt), part[last].tokens, part)
        for answer, part in zip(read, parts, strict=True)
    ]


def _scores(logits: Tensor, names: Sequence[Score], probe: Probe | None, read: Tensor) -> Tensor:
    """(n, vocab) -> (n, scores, temperatures); the last exit, which has no probe, is sure by that score."""
    columns = []
    for name in names:
        if name is Score.PROBE and probe is None:
            columns.append(torch.ones(len(logits), len(TEMPERATURES), device=logits.device))
        else:
            columns.append(torch.stack([measure(logits, name, t, probe=probe, read=read) for t in TEMPERATURES], -1))
    return torch.stack(columns, 1)
