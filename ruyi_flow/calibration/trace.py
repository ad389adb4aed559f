"""Traces: what every exit said at every position of the last exit's answers. Calibration and the simulator read them.

A file is a stream of msgpack objects: a header, then a record for each prompt. Version 3:

    header  {"format": "ruyi-flow trace", "version": 3, "family": fingerprint, "name": str, "exits": [p, …],
             "hidden_size": int, "boundary_bytes": {encoding: int}, "dtype": str, "max_new_tokens": int,
             "scores": [name, …], "temperatures": [T, …], "scorer": name, "branch_layers": [n, …],
             "layer_flops": float, "attention_flops": float, "head_flops": float}
    record  {"number": int, "prompt": of what was asked, the first 16 digits of its SHA-256, "prompt_tokens": int,
             "answer": int32[n],
             "exits": {p: {"tokens": int32[n], "scores": float32[n, scores, temperatures],
                           "prompt_loss": float, "prompt_entropy": float, "own": None, or
                           {"scores": float32[m, scores, temperatures], "right": float}}}}

Arrays are little-endian bytes in row-major order. `answer` is what the last exit said, greedily; `tokens` is what an
exit says there, teacher-forced on that answer; a position costs `boundary_bytes` on each link that it goes beyond,
whatever the exit; `prompt_loss` and `prompt_entropy` are means over the last 64 of the
prompt's tokens, in nats. With a scorer, `own` is what the exit does by itself: the scores along its own answer, and
whether that is right, 0 to 1. For scorer `choice` the answers are one option each, and "tokens" are options' numbers.
A reader refuses versions other than its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from ruyi_flow.errors import ConfigError

__all__ = ["ExitRecord", "Header", "Own", "Record", "Scorer", "Trace", "Writer", "read"]

_FORMAT = "ruyi-flow trace"
_VERSION = 3

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Scorer(StrEnum):
    """What an answer of an exit is worth."""

    AGREEMENT = "agreement"
    """The share of its tokens that are the last exit's."""
    NUMBER = "number"
    """Right when its last number is the reference's (GSM8K)."""
    CHOICE = "choice"
    """Right when the likeliest option, as a continuation, is the right one (as lm-evaluation-harness asks ARC)."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a trace is of."""

    family: str
    """Fingerprint."""
    name: str = field(compare=False)
    """What the family is called where it was traced; the fingerprint says which it is."""
    exits: tuple[int, ...]
    hidden_size: int
    boundary_bytes: dict[str, int]
    """Of one position's state, by the encoding of a link."""
    dtype: str
    max_new_tokens: int
    scores: tuple[str, ...]
    temperatures: tuple[float, ...]
    scorer: str = Scorer.AGREEMENT
    branch_layers: tuple[int, ...] = ()
    """Of every exit."""
    layer_flops: float = 0.0
    """Floating-point operations of one position in one layer, attention's products left out; "head_flops": of its
    product with the vocabulary."""
    attention_flops: float = 0.0
    """Of one position in one layer for each position that it attends to."""
    head_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Own:
    """What one exit does by itself, in m tokens."""

    scores: Floats
    """(m, scores, temperatures)"""
    right: float
    """0 … 1"""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """What one exit said along one answer of n tokens."""

    tokens: Ints
    """(n,)"""
    scores: Floats
    """(n, scores, temperatures)"""
    prompt_loss: float
    prompt_entropy: float
    own: Own | None = None
    """With a scorer."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt."""

    number: int
    """Of the prompt in its file."""
    prompt: str
    """Digits of a hash of what was asked, which tell prompts apart."""
    prompt_tokens: int
    answer: Ints
    """(n,) what the last exit said."""
    exits: dict[int, ExitRecord]


class Writer:
    """Writes a trace, or goes on with one that was cut off or is to have more prompts.

    Args:
        path: the file.
        header: what it is to be of.

    Raises:
        ConfigError: the file is of something else.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.done: set[str] = set()
        """The prompts that are there; see `Record.prompt`."""
        whole = 0
        if path.exists() and path.stat().st_size:
            there, records = _open(path)
            if there != header:
                compared = (f.name for f in fields(Header) if f.compare)
                changed = [name for name in compared if getattr(there, name) != getattr(header, name)]
                raise ConfigError(
                    f"{path}: a trace of something else (another {', '.join(changed)}); remove it, or name another file"
                )
            for record, stop in records:
                self.done.add(record.prompt)
                whole = stop
        self._path, self._header = path, header
        self._file: BinaryIO | None = None
        """A new one is there from its first record on."""
        if whole:
            self._file = path.open("r+b")
            self._file.truncate(whole)
            self._file.seek(whole)

    def add(self, record: Record) -> None:
        """Write a record; it is on its way to the disk afterwards."""
        exits = {
            p: {
                "tokens": e.tokens.astype("<i4").tobytes(),
                "scores": e.scores.astype("<f4").tobytes(),
                "prompt_loss": e.prompt_loss,
                "prompt_entropy": e.prompt_entropy,
                "own": e.own and {"scores": e.own.scores.astype("<f4").tobytes(), "right": e.own.right},
            }
            for p, e in record.exits.items()
        }
        asked = {"number": record.number, "prompt": record.prompt, "prompt_tokens": record.prompt_tokens}
        made = msgpack.packb({**asked, "answer": record.answer.astype("<i4").tobytes(), "exits": exits})
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
            made = msgpack.packb({"format": _FORMAT, "version": _VERSION, **asdict(self._header)}) + made
        self._file.write(made)
        self._file.flush()
        self.done.add(record.prompt)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> tuple[Header, list[Record]]:
    """A trace file; a record that was cut off is left out.

    Raises:
        ConfigError: it is not a trace, or of a later version.
    """
    header, records = _open(path)
    return header, [record for record, _ in records]


@dataclass(frozen=True, slots=True)
class Trace:
    """All positions of a trace in one row, for computing with; N positions of P prompts."""

    header: Header
    prompt: NDArray[np.int64]
    """(N,) which prompt, 0 … P-1, a position is of."""
    agrees: dict[int, NDArray[np.bool_]]
    """By early exit: (N,) whether its token is the last exit's."""
    scores: dict[int, Floats]
    """By early exit: (N, scores, temperatures)."""
    records: tuple[Record, ...]

    @property
    def right(self) -> dict[int, float]:
        """By exit, with a scorer: the share of its own answers that are right."""
        by_exit: dict[int, list[float]] = {p: [] for p in self.header.exits}
        for record in self.records:
            for p, e in record.exits.items():
                by_exit[p] += [] if e.own is None else [e.own.right]
        return {p: sum(found) / len(found) for p, found in by_exit.items() if found}

    @classmethod
    def of(cls, header: Header, records: Sequence[Record]) -> Trace:
        """Of some of a file's records.

        Raises:
            ConfigError: there is none.
        """
        if not records:
            raise ConfigError("the trace is empty: it has no prompt to calibrate on")
        early = header.exits[:-1]
        return cls(
            header,
            np.repeat(np.arange(len(records)), [len(r.answer) for r in records]),
            {p: np.concatenate([r.exits[p].tokens == r.answer for r in records]) for p in early},
            {p: np.concatenate([r.exits[p].scores for r in records]) for p in early},
            tuple(records),
        )

    @classmethod
    def load(cls, *paths: Path) -> Trace:
        """Of one whole file or several, whose prompts are taken together; one that is there twice counts once.

        Raises:
            ConfigError: one is not a trace, or an empty one, or they are of different things.
        """
        header, records = read(paths[0])
        for path in paths[1:]:
            other, more = read(path)
            if replace(other, max_new_tokens=header.max_new_tokens) != header:
                raise ConfigError(
                    f"{path}: of another family, format or scorer than {paths[0]}; they do not go together"
                )
            longest = max(header.max_new_tokens, other.max_new_tokens)
            header = replace(header, max_new_tokens=longest)
            records += more
        try:
            return cls.of(header, list({record.prompt: record for record in reversed(records)}.values())[::-1])
        except ConfigError as error:
            raise ConfigError(f"{paths[0]}: {error}") from None

    def of_prompts(self, chosen: Sequence[int]) -> Trace:
        """The trace of some of its prompts, 0 … P-1."""
        return Trace.of(self.header, [self.records[i] for i in chosen])


def _open(path: Path) -> tuple[Header, Iterator[tuple[Record, int]]]:
    """The header, and the records with where each ends."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; ruyi-flow trace records one") from None
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=len(data) or 1)
    unpacker.feed(data)
    try:
        raw = unpacker.unpack()
        if raw.pop("format") != _FORMAT:
            raise ValueError
        version = raw.pop("version")
        if version != _VERSION:
            todo = "update this program" if version > _VERSION else "trace again"
            raise ConfigError(f"{path}: a trace of version {version}, not {_VERSION}: {todo}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        header = Header(**fields)
    except (msgpack.OutOfData, msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a trace (ruyi-flow trace writes one)") from None

    def records() -> Iterator[tuple[Record, int]]:
        while True:
            try:
                raw = unpacker.unpack()
                record = _record(raw, header)
            except msgpack.OutOfData:
                return  # the last one may be cut off
            except (msgpack.UnpackException, ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}: damaged after {unpacker.tell()} bytes; trace again") from None
            yield record, unpacker.tell()

    return header, records()


def _record(raw: dict[str, Any], header: Header) -> Record:
    shape = (-1, len(header.scores), len(header.temperatures))
    answer = np.frombuffer(raw["answer"], "<i4")
    exits = {
        p: ExitRecord(
            np.frombuffer(e["tokens"], "<i4"),
            np.frombuffer(e["scores"], "<f4").reshape(shape),
            e["prompt_loss"],
            e["prompt_entropy"],
            e["own"] and Own(np.frombuffer(e["own"]["scores"], "<f4").reshape(shape), e["own"]["right"]),
        )
        for p, e in raw["exits"].items()
    }
    if set(exits) != set(header.exits) or any(len(e.tokens) != len(answer) for e in exits.values()):
        raise ValueError("a record's exits or lengths do not fit")
    return Record(raw["number"], raw["prompt"], raw["prompt_tokens"], answer, exits)
