"""Recording of traces: the last exit answers prompts, then all exits read the answers in one pass of the trunk."""

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

from ruyi_flow.calibration.trace import ExitRecord, Header, OwnAnswer, Record, Scorer, Writer
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.scorers import Question, score_number
from ruyi_flow.family.every_exit import Tree, exit_logits
from ruyi_flow.family.tokenizer import end_tokens
from ruyi_flow.local import Family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.runtime.scores import loss_and_entropy, measure_all
from ruyi_flow.training.distill import Answer, answers
from ruyi_flow.types import Encoding, Weights

__all__ = ["TEMPERATURES", "record_trace"]

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)


def record_trace(
    family: Family,
    questions: Sequence[Question],
    out: Path,
    *,
    scorer: Scorer = Scorer.AGREEMENT,
    max_new_tokens: int = 128,
    batch: int = 32,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Record a trace of a family's answers, or resume one; each record is written when its answers end.

    Args:
        family: the whole family.
        questions: the prompts. One that leaves no room for an answer is skipped; one that occurs twice is asked once.
        out: the trace file.
        scorer: measure of an answer's quality.
        max_new_tokens: most tokens of an answer.
        batch: most prompts that an exit answers in one batch.
        report: called with the number of prompts that are done and their total.

    Returns:
        The number of skipped prompts.

    Raises:
        ConfigError: there are no prompts, or the file is a trace with another header.
    """
    if not questions:
        raise ConfigError("there are no prompts to trace; give at least one")
    checkpoint, config = family.checkpoint, family.config
    longest = [max(map(len, q.options), default=0) if scorer is Scorer.CHOICE else max_new_tokens for q in questions]
    numbers = [i for i, q in enumerate(questions) if 0 < len(q.prompt) <= config.max_positions - longest[i]]
    if not numbers:
        raise ConfigError(
            f"none of the {len(questions)} prompts leaves room for an answer of {max(longest)} tokens in the family's "
            f"context of {config.max_positions}; shorten the prompts or lower --max-new-tokens"
        )
    weights = "" if family.weights in (None, Weights.BF16) else f", {family.weights} weights"
    has_probe = family.config.probe_size and scorer is not Scorer.CHOICE
    header = Header(
        family=checkpoint.fingerprint,
        name=checkpoint.folder.name,
        exits=family.exits,
        hidden_size=config.hidden_size,
        boundary_bytes={encoding.value: encoding.row_bytes(config.hidden_size) for encoding in Encoding},
        dtype=str(family.model.dtype).removeprefix("torch.") + weights,
        max_new_tokens=1 if scorer is Scorer.CHOICE else max_new_tokens,
        scores=tuple(s for s in Score if s is not Score.PROBE or has_probe),
        temperatures=TEMPERATURES,
        scorer=scorer,
        branch_layers=config.branch_layers,
        layer_flops=config.layer_flops(0),
        attention_flops=config.layer_flops(1) - config.layer_flops(0),
        head_flops=config.head_flops,
    )
    recorder = _Recorder(family, scorer, header, batch)
    number_of = {_prompt_hash(questions[i]): i for i in reversed(numbers)}  # the first one of equal prompts
    with Writer(out, header) as writer:
        left = sorted(i for prompt, i in number_of.items() if prompt not in writer.done)
        done = len(number_of) - len(left)
        report(done, len(number_of))
        for made in recorder.records(left, [questions[i] for i in left]):
            writer.add(made)
            done += 1
            report(done, len(number_of))
    return len(questions) - len(numbers)


def _prompt_hash(question: Question) -> str:
    """Compute `Record.prompt`."""
    return hashlib.sha256(json.dumps(asdict(question)).encode()).hexdigest()[:16]


class _Recorder:
    """Answers questions and makes their records."""

    def __init__(self, family: Family, scorer: Scorer, header: Header, batch: int) -> None:
        self.family, self.scorer, self.header, self.batch = family, scorer, header, batch
        self.names = [Score(name) for name in header.scores]
        self.ends = end_tokens(family.checkpoint, family.tokenizer)

    def records(self, numbers: Sequence[int], questions: Sequence[Question]) -> Iterator[Record]:
        """Yield the records of questions with these numbers, each when its answers end."""
        if self.scorer is Scorer.CHOICE:
            yield from map(self._choice_record, numbers, questions)
            return
        exits = self.family.exits
        asking = exits if self.scorer is Scorer.NUMBER else exits[-1:]
        answered: dict[int, dict[int, Answer]] = defaultdict(dict)
        for ended in zip(*(self._answers(questions, p) for p in asking), strict=True):
            for p, answer in zip(asking, ended, strict=True):
                i = answer.index
                answered[i][p] = answer
                if len(answered[i]) == len(asking):
                    yield self._record(numbers[i], questions[i], answered.pop(i))

    def _record(self, number: int, question: Question, answered: Mapping[int, Answer]) -> Record:
        """Make the record of one question from the answers of the exits that gave one."""
        last = self.family.exits[-1]
        found = self._read(answered[last], self.family.exits)
        if self.scorer is Scorer.NUMBER:
            for p, answer in answered.items():
                scores = found[p].scores if p == last else self._read(answer, (p,))[p].scores
                text = str(self.family.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
                found[p] = replace(found[p], own=OwnAnswer(scores, score_number(text, question.reference)))
        # The answer is the last exit's predictions in this pass, since the other exits' are compared with them: in
        # bfloat16 a near tie may be decided differently in a pass of many rows.
        return Record(number, _prompt_hash(question), len(question.prompt), found[last].tokens, found)

    def _answers(self, questions: Sequence[Question], exit: int) -> Iterator[Answer]:
        longest = max((len(q.prompt) for q in questions), default=0) + self.header.max_new_tokens
        return answers(
            self.family.model,
            [q.prompt for q in questions],
            exit=exit,
            max_new_tokens=self.header.max_new_tokens,
            max_positions=longest,
            batch=max(1, min(self.batch, len(questions))),
            eos_token_ids=self.ends,
        )

    def _read(self, answer: Answer, exits: Sequence[int]) -> dict[int, ExitRecord]:
        """Let exits read an answer, and record their predictions."""
        tree = Tree((*answer.prompt, *answer.token_ids[:-1]), ())
        begin = max(0, len(answer.prompt) - 1 - READ_TOKENS)
        middle = len(answer.prompt) - 1 - begin
        found: dict[int, ExitRecord] = {}
        for p, logits, states in exit_logits(self.family.model, exits, [tree], [torch.arange(begin, len(tree))]):
            following = torch.tensor(answer.prompt[begin + 1 :], device=logits.device)
            means = loss_and_entropy(logits[:middle], following)
            tokens = logits[middle:].argmax(-1).int().cpu().numpy()
            found[p] = ExitRecord(tokens, self._scores(p, logits[middle:], states[middle:]), *means)
        return found

    def _choice_record(self, number: int, question: Question) -> Record:
        """Make the record of a question with options; their likelihoods are the distribution of the answer."""
        tree = Tree(question.prompt, question.options)
        n = len(question.prompt)
        begin = max(0, n - 1 - READ_TOKENS)
        wanted = torch.tensor([t for option in question.options for t in option])
        rows, start = list(range(begin, n)), n
        for option in question.options:
            rows += [n - 1, *range(start, start + len(option) - 1)]
            start += len(option) - 1
        sizes = [len(option) for option in question.options]
        exits: dict[int, ExitRecord] = {}
        for p, logits, _ in exit_logits(self.family.model, self.family.exits, [tree], [torch.tensor(rows)]):
            means = loss_and_entropy(
                logits[: n - 1 - begin], torch.tensor(question.prompt[begin + 1 :], device=logits.device)
            )
            log_probs = logits[n - begin :].log_softmax(-1).gather(1, wanted.to(logits.device)[:, None])[:, 0]
            likely = torch.stack([part.sum() for part in log_probs.split(sizes)])[None]
            chosen, scores = int(likely.argmax()), self._scores(p, likely, None)
            tokens = np.array([chosen], np.int32)
            exits[p] = ExitRecord(tokens, scores, *means, OwnAnswer(scores, float(chosen == question.right)))
        return Record(number, _prompt_hash(question), n, exits[self.family.exits[-1]].tokens, exits)

    def _scores(self, exit: int, logits: Tensor, states: Tensor | None) -> NDArray[np.float32]:
        """Score logits: (n, vocab) -> (n, scores, temperatures). The last exit has no probe and scores 1 by it."""
        probe = self.family.model.branch_at[exit].probe
        return measure_all(logits, self.names, TEMPERATURES, probe=probe, head_input=states).cpu().numpy()
