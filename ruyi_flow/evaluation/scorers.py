"""Prompts with references, and how answers are scored against them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruyi_flow.calibration.trace import Scorer
from ruyi_flow.errors import ConfigError
from ruyi_flow.training.corpus import CHAT, chat_prompt, each_line

__all__ = ["Question", "read_questions", "score_number"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the reference that answers are compared with."""

    prompt: tuple[int, ...]
    reference: str = ""
    options: tuple[tuple[int, ...], ...] = ()
    """Token ids of each option, for scorer `choice`."""
    right: int = 0
    """Number of the right option."""


_CHOICE = '{"question": …, "choices": {"text": […], "label": […]}, "answerKey": …}'


def read_questions(path: Path, tokenizer: Any, scorer: Scorer) -> Iterator[Question]:
    """Read the prompts of a file of JSON lines.

    Args:
        path: chats ({"messages": …}, {"prompt": …} or {"question": …, "answer": …}); with scorer `choice` {"question":
            …, "choices": {"text": […], "label": […]}, "answerKey": …}.
        tokenizer: the family's tokenizer.
        scorer: scorer that the references are for.

    Raises:
        ConfigError: the file or a line of it cannot be read; the message names the line.
    """

    def read(item: dict[str, Any]) -> Question:
        if scorer is Scorer.CHOICE:
            choices, encode = item["choices"], tokenizer.encode
            context = encode(f"Question: {item['question']}\nAnswer:")
            # An option is what it adds to the context's tokens, as the harness splits them.
            whole = [encode(f"Question: {item['question']}\nAnswer: {text}") for text in choices["text"]]
            options = tuple(tuple(ids[len(context) :]) for ids in whole)
            if not all(options):
                raise ConfigError("one of its choices is empty")
            labels, key = choices["label"], item["answerKey"]
            if len(labels) != len(options) or key not in labels:
                raise ConfigError(
                    f'its "answerKey" is {key!r}; it must be one of its labels {labels}, '
                    f"one for each choice ({len(options)})"
                )
            return Question(tuple(context), "", options, labels.index(key))
        prompt, answer = chat_prompt(item, tokenizer)
        if scorer is Scorer.NUMBER and _last_number(answer) is None:
            raise ConfigError("its answer contains no number to compare with")
        return Question(tuple(prompt), answer)

    return each_line(path, read, _CHOICE if scorer is Scorer.CHOICE else CHAT)


def score_number(text: str, reference: str) -> float:
    """Return 1 when the last numbers of both texts are equal, else 0."""
    said = _last_number(text)
    return float(said is not None and said == _last_number(reference))


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
