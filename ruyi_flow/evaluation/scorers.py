"""What an answer is worth, beside its agreement with the last exit's: prompts with references, and how to compare."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruyi_flow.calibration.trace import Scorer
from ruyi_flow.errors import ConfigError
from ruyi_flow.training.corpus import CHAT, chat_prompt, each_line

__all__ = ["Asked", "number", "read_asked"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and what answers to it are compared with."""

    prompt: tuple[int, ...]
    reference: str = ""
    options: tuple[tuple[int, ...], ...] = ()
    """Scorer `choice`: token ids of each."""
    right: int = 0
    """Which of them."""


_CHOICE = '{"question": …, "choices": {"text": […], "label": […]}, "answerKey": …}'


def read_asked(path: Path, tokenizer: Any, scorer: Scorer) -> Iterator[Asked]:
    """The prompts of a file of JSON lines.

    Chats ({"messages": …}, {"prompt": …}, {"question": …, "answer": …}); for `choice` {"question": …, "choices":
    {"text": […], "label": […]}, "answerKey": …}.

    Raises:
        ConfigError: the file, and the line that is wrong.
    """

    def read(item: dict[str, Any]) -> Asked:
        if scorer is Scorer.CHOICE:
            choices, encode = item["choices"], tokenizer.encode
            context = encode(f"Question: {item['question']}\nAnswer:")
            # As the harness splits them: what an option adds to the context's own tokens.
            whole = [encode(f"Question: {item['question']}\nAnswer: {text}") for text in choices["text"]]
            options = tuple(tuple(ids[len(context) :]) for ids in whole)
            if not all(options):
                raise ConfigError("one of its choices is empty")
            labels, key = choices["label"], item["answerKey"]
            if len(labels) != len(options) or key not in labels:
                raise ConfigError(
                    f'its "answerKey" is {key!r}; it must be one of its labels {labels}, one a choice ({len(options)})'
                )
            return Asked(tuple(context), "", options, labels.index(key))
        prompt, answer = chat_prompt(item, tokenizer)
        if scorer is Scorer.NUMBER and _last_number(answer) is None:
            raise ConfigError("its answer has no number to compare with")
        return Asked(tuple(prompt), answer)

    return each_line(path, read, _CHOICE if scorer is Scorer.CHOICE else CHAT)


def number(text: str, reference: str) -> float:
    """1 when the last numbers of both are equal, else 0."""
    said = _last_number(text)
    return float(said is not None and said == _last_number(reference))


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
