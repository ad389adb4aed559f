"""Recording traces (`calibration/trace.py`): the last exit answers prompts, then all exits read the answers in one pass."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ruyi_flow.calibration.trace import ExitRecord, Header, Own, Record, Scorer, Writer
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.scorers import Asked, number
from ruyi_flow.family.every_exit import Tree, each_exit
from ruyi_flow.local import Family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.runtime.scores import loss_and_entropy, measure_all
from ruyi_flow.serving.answering import end_tokens
from ruyi_flow.training.distill import Answer, answers
from ruyi_flow.types import Encoding, Weights

__all__ = ["TEMPERATURES", "record"]

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)


def record(
    family: Family,
    asked: Sequence[Asked],
    out: Path,
    *,
    scorer: Scorer = Scorer.AGREEMENT,
    max_new_tokens: int = 128,
    batch: int = 32,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a trace of a family's answers to prompts, or go on with one; each record as its answers end.

    Args:
        asked: a prompt that leaves no room for an answer is left out; one that is there twice is asked once.
        scorer: what answers are worth.
        max_new_tokens: of an answer.
        batch: prompts that an exit answers side by side.
        report: told how many prompts are done, and of how many.

    Returns:
        How many prompts were left out.

    Raises:
        ConfigError: no prompts, or a file of something else.
    """
    if not asked:
        raise ConfigError("there are no prompts to trace")
    checkpoint, config = family.checkpoint, family.config
    longest = [max(map(len, a.options), default=0) if scorer is Scorer.CHOICE else max_new_tokens for a in asked]
    numbers = [i for i, a in enumerate(asked) if 0 < len(a.prompt) <= config.max_positions - longest[i]]
    if not numbers:
        raise ConfigError(
            f"none of the {len(asked)} prompts leaves room for an answer of {max(longest)} tokens in the family's "
            f"context of {config.max_positions}"
        )
    few_bits = "" if family.weights in (None, Weights.BF16) else f", {family.weights} weights"
    header = Header(
        family=checkpoint.fingerprint,
        name=checkpoint.folder.name,
        exits=family.exits,
        hidden_size=config.hidden_size,
        boundary_bytes={encoding.value: encoding.row_bytes(config.hidden_size) for encoding in Encoding},
        dtype=str(family.model.dtype).removeprefix("torch.") + few_bits,
        max_new_tokens=1 if scorer is Scorer.CHOICE else max_new_tokens,
        scores=tuple(s for s in scores_of(family) if s is not Score.PROBE or scorer is not Scorer.CHOICE),
        temperatures=TEMPERATURES,
        scorer=scorer,
        branch_layers=config.branch_layers,
        layer_flops=config.layer_flops(0),
        attention_flops=config.layer_flops(1) - config.layer_flops(0),
        head_flops=config.head_flops,
    )
    answering = _Answering(family, scorer, header, batch)
    first_of = {_digits(asked[i]): i for i in reversed(numbers)}
    with Writer(out, header) as writer:
        left = sorted(i for digits, i in first_of.items() if digits not in writer.done)
        done = len(first_of) - len(left)
        report(done, len(first_of))
        for made in answering.records(left, [asked[i] for i in left]):
            writer.add(made)
            done += 1
            report(done, len(first_of))
    return len(asked) - len(numbers)


def _digits(asked: Asked) -> str:
    """See `Record.prompt`."""
    return hashlib.sha256(json.dumps(asdict(asked)).encode()).hexdigest()[:16]


def scores_of(family: Family) -> tuple[Score, ...]:
    """The scores that there are of a family's branches."""
    return tuple(s for s in Score if s is not Score.PROBE or family.config.probe_size)


class _Answering:
    """Makes records of prompts.

    Args:
        family, scorer, header: of the trace.
        batch: prompts that an exit answers side by side.
    """

    def __init__(self, family: Family, scorer: Scorer, header: Header, batch: int) -> None:
        self.family, self.scorer, self.header, self.batch = family, scorer, header, batch
        self.names = [Score(name) for name in header.scores]
        self.ends = end_tokens(family.checkpoint, family.tokenizer)

    def records(self, numbers: Sequence[int], asked: Sequence[Asked]) -> Iterator[Record]:
        """Of some prompts, with their numbers, as their answers end."""
        if self.scorer is Scorer.CHOICE:
            yield from map(self._choice, numbers, asked)
            return
        exits = self.family.exits
        asking = exits if self.scorer is Scorer.NUMBER else exits[-1:]
        answered: dict[int, dict[int, Answer]] = defaultdict(dict)
        for ended in zip(*(self._answers(asked, p) for p in asking), strict=True):
            for p, answer in zip(asking, ended, strict=True):
                i = answer.index
                answered[i][p] = answer
                if len(answered[i]) == len(asking):
                    yield self._record(numbers[i], asked[i], answered.pop(i))

    def _record(self, at: int, asked: Asked, answered: Mapping[int, Answer]) -> Record:
        """Of one prompt and the answers of those exits that gave one."""
        last = self.family.exits[-1]
        found = self._along(answered[last], self.family.exits)
        if self.scorer is Scorer.NUMBER:
            for p, answer in answered.items():
                scores = found[p].scores if p == last else self._along(answer, (p,))[p].scores
                own = Own(scores, number(self._text(answer.token_ids), asked.reference))
                found[p] = replace(found[p], own=own)
        # The last exit's reading of its own answer: in bfloat16 a near tie may fall otherwise in a pass of many
        # rows, and what it says there is what the others are compared with.
        return Record(at, _digits(asked), len(asked.prompt), found[last].tokens, found)

    def _answers(self, asked: Sequence[Asked], exit: int) -> Iterator[Answer]:
        longest = max((len(a.prompt) for a in asked), default=0) + self.header.max_new_tokens
        return answers(
            self.family.model,
            [a.prompt for a in asked],
            exit=exit,
            max_new_tokens=self.header.max_new_tokens,
            max_positions=longest,
            batch=max(1, min(self.batch, len(asked))),
            eos_token_ids=self.ends,
        )

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.family.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _along(self, answer: Answer, exits: Sequence[int]) -> dict[int, ExitRecord]:
        """What some exits say along an answer."""
        tree = Tree((*answer.prompt, *answer.token_ids[:-1]), ())
        begin = max(0, len(answer.prompt) - 1 - READ_TOKENS)
        middle = len(answer.prompt) - 1 - begin
        found: dict[int, ExitRecord] = {}
        for p, logits, read in each_exit(self.family.model, exits, [tree], [torch.arange(begin, len(tree))]):
            following = torch.tensor(answer.prompt[begin + 1 :], device=logits.device)
            means = loss_and_entropy(logits[:middle], following)
            said = logits[middle:].argmax(-1).int().cpu().numpy()
            found[p] = ExitRecord(said, self._scores(p, logits[middle:], read[middle:]), *means)
        return found

    def _choice(self, index: int, asked: Asked) -> Record:
        """Of a question with options, whose likelihoods are the distribution of an answer of one option."""
        tree = Tree(asked.prompt, asked.options)
        n = len(asked.prompt)
        begin = max(0, n - 1 - READ_TOKENS)
        wanted = torch.tensor([t for option in asked.options for t in option])
        rows, start = list(range(begin, n)), n
        for option in asked.options:
            rows += [n - 1, *range(start, start + len(option) - 1)]
            start += len(option) - 1
        sizes = [len(option) for option in asked.options]
        exits: dict[int, ExitRecord] = {}
        for p, logits, _ in each_exit(self.family.model, self.family.exits, [tree], [torch.tensor(rows)]):
            following = torch.tensor(asked.prompt[begin + 1 :], device=logits.device)
            means = loss_and_entropy(logits[: n - 1 - begin], following)
            told = logits[n - begin :].log_softmax(-1).gather(1, wanted.to(logits.device)[:, None])[:, 0]
            likely = torch.stack([part.sum() for part in told.split(sizes)])[None]
            said, scores = int(likely.argmax()), self._scores(p, likely, None)
            tokens = np.array([said], np.int32)
            exits[p] = ExitRecord(tokens, scores, *means, Own(scores, float(said == asked.right)))
        return Record(index, _digits(asked), n, exits[self.family.exits[-1]].tokens, exits)

    def _scores(self, exit: int, logits: Tensor, read: Tensor | None) -> NDArray[np.float32]:
        """(n, vocab) -> (n, scores, temperatures); the last exit, which has no probe, is sure by that score."""
        probe = self.family.model.branch_at[exit].probe
        return measure_all(logits, self.names, TEMPERATURES, probe=probe, head_input=read).cpu().numpy()
