"""Quality loss of weight formats: how often the last exit predicts the same token, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ruyi_flow.calibration.trace import Scorer
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.scorers import read_questions
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.local import Family
from ruyi_flow.types import Weights

__all__ = ["QUESTIONS", "Quality", "measure_quality"]

QUESTIONS = (
    "Why is the sky blue?",
    "Explain how a bicycle stays upright.",
    "Write a short letter to a friend who has moved to another city.",
    "What is the capital of France, and what is it known for?",
    "Tom has 3 boxes with 12 pencils each and gives away 7 pencils. How many are left?",
    "List five things to check before a long drive.",
    "Summarize what photosynthesis does in two sentences.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Why?",
)
"""Default prompts."""

_ANSWER, _WINDOW, _WINDOWS = 64, 512, 16
"""Tokens of an answer, tokens of a window of text, and most windows."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One weight format compared with bfloat16, at the last exit."""

    weights: str
    agreement: float
    """Share of tokens on which both formats predict the same, along bfloat16's greedy answers."""
    tokens: int
    """Number of these tokens."""
    perplexity: float | None
    """Perplexity per token over windows of the text; None without a text."""


def measure_quality(
    checkpoint: Checkpoint,
    formats: Sequence[Weights],
    *,
    prompts: Path | None = None,
    text: Path | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Quality]:
    """Compare weight formats with the same family in bfloat16, which comes first in the result.

    Args:
        checkpoint: a whole family with unquantized weights.
        formats: the formats to compare.
        prompts: JSON lines as for a trace. Default: `QUESTIONS`.
        text: text file whose first windows measure perplexity. Default: no perplexity.
        report: called with the part of the work, such as a format, the amount that is done, and the total or 0.

    Raises:
        CheckpointError: a format does not support this family.
        ConfigError: a file cannot be read, or the family has no tokenizer.
    """
    report("loading the family", 0, 0)
    wide = Family(checkpoint, dtype=torch.bfloat16)
    tokenizer, last = wide.tokenizer, wide.exits[-1]
    if tokenizer is None:
        raise ConfigError(f"{checkpoint.folder} has no tokenizer.json, which measuring quality needs")
    asked = _prompts(prompts, tokenizer)
    read: list[int] = []
    if text is not None:
        try:
            read = tokenizer(text.read_text(encoding="utf-8"))["input_ids"][: _WINDOW * _WINDOWS]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{text}: cannot be read as text: {error}") from None
    windows = [w for i in range(0, len(read), _WINDOW) if len(w := read[i : i + _WINDOW]) > 1]
    answers: list[list[int]] = []
    for prompt in asked:
        report("answers to compare", len(answers), len(asked))
        answers.append(wide.generate(torch.tensor([prompt]), max_new_tokens=_ANSWER)[0].tolist())
    report("answers to compare", len(asked), len(asked))
    expected: list[Tensor] = []
    found = []
    for weights in (Weights.BF16, *formats):
        family = wide if weights is Weights.BF16 else Family(checkpoint, dtype=torch.bfloat16, weights=weights)
        done, total = 0, len(asked) + len(windows)
        predicted = []
        for prompt, answer in zip(asked, answers, strict=True):
            logits = family.logits(torch.tensor([[*prompt, *answer]]), last)
            predicted.append(logits[0, len(prompt) - 1 : -1].argmax(-1))
            report(weights, done := done + 1, total)
        expected = expected or predicted
        loss = 0.0
        for window in windows:
            ids = torch.tensor([window])
            loss += float(F.cross_entropy(family.logits(ids, last)[0, :-1], ids[0, 1:], reduction="sum"))
            report(weights, done := done + 1, total)
        same, scored = torch.cat(predicted) == torch.cat(expected), sum(len(window) - 1 for window in windows)
        perplexity = math.exp(loss / scored) if scored else None
        found.append(Quality(weights, float(same.float().mean()), len(same), perplexity))
    return found


def _prompts(file: Path | None, tokenizer: Any) -> list[list[int]]:
    """Read the prompts of a file, or encode `QUESTIONS`, each as one user turn if the family has a chat template."""
    if file is not None:
        return [list(question.prompt) for question in read_questions(file, tokenizer, Scorer.AGREEMENT)]
    if tokenizer.chat_template is None:
        return [tokenizer(question)["input_ids"] for question in QUESTIONS]
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
