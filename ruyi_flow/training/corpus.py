"""Training text: chats, plain text and a family's own answers, as packed sequences of token ids.

A file is JSON lines of `{"messages": [{"role", "content"}, …]}`, `{"question", "answer"}` or, for its prompts alone,
`{"prompt"}` (all through the tokenizer's own chat template), or of `{"prompt": [ids], "answer": [ids]}` (what
`distill.py` gives), or plain text (`.txt`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor

from ruyi_flow.errors import ConfigError

__all__ = [
    "CHAT",
    "Document",
    "Packed",
    "chat_prompt",
    "each_line",
    "pack_documents",
    "read_documents",
    "read_prompts",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """One chat or a piece of plain text."""

    token_ids: tuple[int, ...]
    answer: int
    """Where the last answer begins; 0 for plain text, all of which counts as one."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences of one length, each filled with documents; (rows, length) tensors."""

    token_ids: Tensor
    documents: Tensor
    """Which document of its row a position is of; -1 for padding."""
    positions: Tensor
    """Place in the document."""
    answers: Tensor
    """Whether the token at a position belongs to an answer."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def rows(self, indices: Tensor) -> Packed:
        """Some of the rows."""
        return Packed(self.token_ids[indices], self.documents[indices], self.positions[indices], self.answers[indices])


def read_documents(path: Path, tokenizer: Any, *, length: int) -> Iterator[Document]:
    """The documents of a file; longer ones are cut to `length` tokens, plain text into pieces of it.

    Raises:
        ConfigError: the file, and the line that is wrong.
    """
    if path.suffix == ".txt":
        with _readable(path):
            ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        yield from (Document(tuple(ids[i : i + length]), 0) for i in range(0, len(ids) - 1, length))
        return
    for document in each_line(path, partial(_document, tokenizer=tokenizer), f"{CHAT}, or {_IDS}"):
        if document.answer < length:  # else nothing of the answer would be left
            yield Document(document.token_ids[:length], document.answer)


def read_prompts(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """The prompts of a file of chats: everything before the last answer.

    Raises:
        ConfigError: the file, and the line that is wrong.
    """
    return each_line(path, lambda item: chat_prompt(item, tokenizer)[0], CHAT)


def chat_prompt(item: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """A line's token ids up to where its last answer begins, and that answer."""
    messages = _messages(item)
    return _chat_prompt(messages[:-1], tokenizer), messages[-1]["content"]


CHAT = '{"messages": [{"role": …, "content": …}, …]}, {"prompt": …} or {"question": …, "answer": …}'
"""What a line of chats can be."""

_IDS = '{"prompt": [ids], "answer": [ids]}'


def each_line(path: Path, read: Callable[[Any], T], expected: str) -> Iterator[T]:
    """What `read` makes of each line of a file of JSON; its errors become one that names the line.

    Args:
        path: the file.
        read: may raise a `ConfigError` that says what is wrong with its line, or anything on one of another form.
        expected: what a line can be, for messages.

    Raises:
        ConfigError: the file, and the line that is wrong.
    """
    with _readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read(json.loads(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
            except TemplateError as error:
                raise ConfigError(f"{path}, line {number}: the family's chat template refuses it: {error}") from None
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                there = line.strip() or "an empty line"
                there = there if len(there) <= 80 else f"{there[:79]}…"
                raise ConfigError(f"{path}, line {number}: expected {expected}; there is {there}") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _chat_prompt(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a chat up to where its last answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(item: dict[str, Any]) -> list[dict[str, str]]:
    """A line's turns; the last one is the answer."""
    if "messages" in item:
        messages = list(item["messages"])
    else:
        question = item["question"] if "question" in item else item["prompt"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": item.get("answer", "")}]
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError
    return messages


def _document(item: dict[str, Any], tokenizer: Any) -> Document:
    if isinstance(item.get("prompt"), list):
        prompt, answer = [int(i) for i in item["prompt"]], [int(i) for i in item["answer"]]
        return Document((*prompt, *answer), len(prompt))
    messages = _messages(item)
    prompt = _chat_prompt(messages[:-1], tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    return Document(tuple(tokenizer(whole, add_special_tokens=False)["input_ids"]), len(prompt))


def pack_documents(documents: Sequence[Document], *, length: int, seed: int) -> Packed:
    """Fill sequences with whole documents, in an order that the seed gives.

    Args:
        documents: none longer than `length`.
        length: of a sequence.
        seed: of the order.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows: list[list[Document]] = []
    open_rows: list[tuple[int, list[Document]]] = []  # room, row; the few that may still take something
    for document in order:
        size = len(document.token_ids)
        fit = next((i for i, (room, _) in enumerate(open_rows) if room >= size), None)
        room, row = (length, []) if fit is None else open_rows.pop(fit)
        if fit is None:
            rows.append(row)
        row.append(document)
        open_rows.append((room - size, row))
        if len(open_rows) > 16:
            open_rows.remove(min(open_rows, key=lambda item: item[0]))
    shape = (len(rows), length)
    token_ids, positions = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    kept, answers = torch.full(shape, -1, dtype=torch.int16), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            stop = start + len(document.token_ids)
            token_ids[i, start:stop] = torch.tensor(document.token_ids, dtype=torch.int32)
            positions[i, start:stop] = torch.arange(stop - start, dtype=torch.int32)
            kept[i, start:stop] = number
            answers[i, start + document.answer : stop] = True
            start = stop
    return Packed(token_ids, kept, positions, answers)
