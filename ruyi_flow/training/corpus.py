"""Training data: chats, plain text and a family's own answers, as packed sequences of token ids.

A file is plain text (`.txt`) or has JSON lines. A line is `{"messages": [{"role", "content"}, …]}`,
`{"question", "answer"}` or, where only prompts are needed, `{"prompt"}`: these go through the chat template. A line
can also be `{"prompt": [ids], "answer": [ids]}`, which `distill.py` writes.
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
    """One chat, or a piece of plain text."""

    token_ids: tuple[int, ...]
    answer: int
    """Index of the first token of the last answer; 0 for plain text, which counts as an answer."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences of one length, each filled with documents. All tensors are (rows, length)."""

    token_ids: Tensor
    """int32 token ids; 0 for padding."""
    documents: Tensor
    """int16 number of each position's document within its row; -1 for padding."""
    positions: Tensor
    """int32 position within the document."""
    answers: Tensor
    """bool, whether the token at this position belongs to an answer."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def rows(self, indices: Tensor) -> Packed:
        """Return the rows with these indices."""
        return Packed(self.token_ids[indices], self.documents[indices], self.positions[indices], self.answers[indices])


def read_documents(path: Path, tokenizer: Any, *, length: int) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: a file of chats, answers or plain text.
        tokenizer: the family's tokenizer.
        length: most tokens of a document. Chats are cut to this length, plain text is split into pieces of it.

    Raises:
        ConfigError: the file or one of its lines cannot be read.
    """
    if path.suffix == ".txt":
        with _readable(path):
            ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        yield from (Document(tuple(ids[i : i + length]), 0) for i in range(0, len(ids) - 1, length))
        return
    for document in each_line(path, partial(_document, tokenizer=tokenizer), f"{CHAT}, or {_IDS}"):
        if document.answer < length:  # otherwise the cut would remove all of the answer
            yield Document(document.token_ids[:length], document.answer)


def read_prompts(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Read the prompts of a file of chats as token ids: each is all that precedes the last answer.

    Raises:
        ConfigError: the file or one of its lines cannot be read.
    """
    return each_line(path, lambda item: chat_prompt(item, tokenizer)[0], CHAT)


def chat_prompt(item: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """Return the token ids of a chat up to its last answer, and the text of that answer."""
    messages = _messages(item)
    return _chat_prompt(messages[:-1], tokenizer), messages[-1]["content"]


CHAT = '{"messages": [{"role": …, "content": …}, …]}, {"prompt": …} or {"question": …, "answer": …}'
"""The forms of a line of a file of chats, for errors."""

_IDS = '{"prompt": [ids], "answer": [ids]}'


def each_line(path: Path, read: Callable[[Any], T], expected: str) -> Iterator[T]:
    """Apply `read` to each line of a file of JSON lines.

    Args:
        path: the file.
        read: called with the parsed line. It may raise `ConfigError` with the reason, or ValueError, TypeError,
            KeyError, IndexError or AttributeError if the line has another form.
        expected: the forms of a line, for errors.

    Yields:
        The results of `read`.

    Raises:
        ConfigError: the file cannot be read, or `read` failed; the error names the line.
    """
    with _readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield read(json.loads(line))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
            except TemplateError as error:
                raise ConfigError(f"{path}, line {number}: the family's chat template rejects it: {error}") from None
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                found = line.strip() or "an empty line"
                found = found if len(found) <= 80 else f"{found[:79]}…"
                raise ConfigError(f"{path}, line {number}: expected {expected}; there is {found}") from None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _chat_prompt(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """Return the token ids that a chat template makes of the turns before an answer."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(item: dict[str, Any]) -> list[dict[str, str]]:
    """Return a line's turns; the last one is the answer."""
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
    """Fill sequences with whole documents, in a random order.

    Args:
        documents: documents of at most `length` tokens.
        length: tokens of a sequence.
        seed: seed of the order.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows: list[list[Document]] = []
    open_rows: list[tuple[int, list[Document]]] = []  # (free tokens, row) of the last rows that are not full
    for document in order:
        size = len(document.token_ids)
        fit = next((i for i, (free, _) in enumerate(open_rows) if free >= size), None)
        free, row = (length, []) if fit is None else open_rows.pop(fit)
        if fit is None:
            rows.append(row)
        row.append(document)
        open_rows.append((free - size, row))
        if len(open_rows) > 16:
            open_rows.remove(min(open_rows, key=lambda item: item[0]))
    shape = (len(rows), length)
    token_ids, positions = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    numbers, answers = torch.full(shape, -1, dtype=torch.int16), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            stop = start + len(document.token_ids)
            token_ids[i, start:stop] = torch.tensor(document.token_ids, dtype=torch.int32)
            positions[i, start:stop] = torch.arange(stop - start, dtype=torch.int32)
            numbers[i, start:stop] = number
            answers[i, start + document.answer : stop] = True
            start = stop
    return Packed(token_ids, numbers, positions, answers)
