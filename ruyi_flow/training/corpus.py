"""Training data: chats, plain text and a family's own answers, as packed sequences of token ids.

A file is plain text (`.txt`) or has JSON lines. A line is `{"messages": [{"role", "content"}, …]}`, `{"question"}` or
`{"prompt"}`, the latter two with or without an `"answer"`: these go through the chat template. A last message of the
role `assistant` is the chat's answer, and what precedes it is the prompt. A chat that ends with a message of the user
or of a tool is a prompt as a whole, and has no answer. A line can also be `{"prompt": [ids], "answer": [ids]}`, which
`distill.py` writes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
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
    """Index of the first token of the last answer: 0 for plain text, which counts as an answer, and the number of
    tokens for a chat without an answer."""

    @property
    def has_answer(self) -> bool:
        """Whether any token belongs to an answer."""
        return self.answer < len(self.token_ids)


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


def read_documents(
    path: Path, tokenizer: Any, *, length: int, too_long: Callable[[Document], None] = lambda document: None
) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
        path: a file of chats, answers or plain text.
        tokenizer: the family's tokenizer.
        length: most tokens of a document. Plain text is split into pieces of this length. Chats are cut to it, and left
            out if that would remove all of their answer.
        too_long: called with each chat that is longer.

    Raises:
        ConfigError: the file or one of its lines cannot be read.
    """
    if path.suffix == ".txt":
        with _readable(path):
            ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        yield from (Document(tuple(ids[i : i + length]), 0) for i in range(0, len(ids) - 1, length))
        return
    for document in each_line(path, partial(_document, tokenizer=tokenizer), f"{CHAT}, or {_IDS}"):
        if len(document.token_ids) <= length:
            yield document
            continue
        too_long(document)
        if document.answer < length or not document.has_answer:
            yield Document(document.token_ids[:length], min(document.answer, length))


def read_prompts(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Read the prompts of a file of chats as token ids: what precedes an answer at the end, or all of a chat.

    Raises:
        ConfigError: the file or one of its lines cannot be read.
    """
    return each_line(path, lambda item: chat_prompt(item, tokenizer)[0], CHAT)


def chat_prompt(item: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """Return the token ids of a chat up to the answer at its end, and the text of that answer, or "" without one.

    Raises:
        ConfigError: the line is not a chat, its last question is blank, or the chat template rejects it.
    """
    prompt, answer = _chat(item)
    if not prompt[-1]["content"].strip():
        raise ConfigError("its prompt is blank")
    text = _render(prompt, tokenizer, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), answer or ""


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


def _chat(item: dict[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """Return the turns of a line without the answer at their end, and that answer; None if there is none."""
    if "messages" in item:  # beside them, some data sets repeat the first message as "prompt"
        turns = list(item["messages"])
    elif "question" in item and "prompt" in item:
        raise ConfigError('it has both "question" and "prompt"; keep the one that is meant')
    else:
        turns = [{"role": "user", "content": item["question"] if "question" in item else item["prompt"]}]
    if "answer" in item and turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": item["answer"]})
    if not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
        raise TypeError
    last = turns[-1]["role"]
    if last not in ("user", "tool", "assistant"):
        raise ConfigError(
            f'its last message has the role {last!r}; expected "user" or "tool" for a prompt, or "assistant" for its '
            "answer"
        )
    if last != "assistant":
        return turns, None
    if len(turns) == 1:
        raise ConfigError("it has an answer, but no prompt before it")
    return turns[:-1], turns[-1]["content"]


def _render(turns: Sequence[dict[str, str]], tokenizer: Any, **options: bool) -> str:
    """Return the text that the chat template makes of some turns."""
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
    except Exception as error:  # a template is a program that comes with the family; it may raise anything
        raise ConfigError(f"the family's chat template rejects it: {error}") from None


def _document(item: dict[str, Any], tokenizer: Any) -> Document:
    if isinstance(item.get("prompt"), list):
        prompt_ids, answer_ids = item["prompt"], item["answer"]
        if not all(type(i) is int for i in (*prompt_ids, *answer_ids)):
            raise TypeError
        return Document((*prompt_ids, *answer_ids), len(prompt_ids))
    prompt, answer = _chat(item)
    if answer is None:
        ids = tokenizer(_render(prompt, tokenizer), add_special_tokens=False)["input_ids"]
        return Document(tuple(ids), len(ids))
    text = _render([*prompt, {"role": "assistant", "content": answer}], tokenizer)
    start = _answer_start(text, prompt, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return Document(tuple(encoded["input_ids"]), next((i for i, end in enumerate(ends) if end > start), len(ends)))


_ANY_ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for an answer in a text, to find where answers begin. It is not in any other text."""


def _answer_start(text: str, prompt: Sequence[dict[str, str]], tokenizer: Any) -> int:
    """Return the index of the first character of a chat's text that answers the prompt.

    Many templates do not render a prompt as the chat with its answer begins: they open a thought, or change earlier
    messages. The answer then begins where the text depends on the answer.
    """
    asked = _render(prompt, tokenizer, add_generation_prompt=True)
    if text.startswith(asked):
        return len(asked)
    other = _render([*prompt, {"role": "assistant", "content": _ANY_ANSWER}], tokenizer)
    return len(os.path.commonprefix([text, other]))


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
