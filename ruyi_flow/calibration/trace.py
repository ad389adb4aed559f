"""Traces: every exit's tokens and scores along the last exit's answers, read by calibration and the simulator.

A file is a stream of msgpack objects: a header, then one record for each prompt. Version 3:

    header  {"format": "ruyi-flow trace", "version": 3, "family": fingerprint, "name": str, "exits": [p, …],
             "hidden_size": int, "boundary_bytes": {encoding: int}, "dtype": str, "max_new_tokens": int,
             "scores": [name, …], "temperatures": [T, …], "scorer": name, "branch_layers": [n, …],
             "layer_flops": float, "attention_flops": float, "head_flops": float}
    record  {"number": int, "prompt": first 16 hex digits of the SHA-256 of the request, "prompt_tokens": int,
             "answer": int32[n],
             "exits": {p: {"tokens": int32[n], "scores": float32[n, scores, temperatures],
                           "prompt_loss": float, "prompt_entropy": float,
                           "own": None or {"scores": float32[m, scores, temperatures], "right": float}}}}

Arrays are little-endian bytes in row-major order. `answer` is the last exit's greedy answer. `tokens` are an exit's
predictions when it is fed that answer (teacher forcing). A position costs `boundary_bytes` on every link that it
crosses, whatever the exit. `prompt_loss` and `prompt_entropy` are means over the last 64 tokens of the prompt, in nats.
With a scorer, `own` is the exit's own answer: the scores along it, and how right it is, 0 to 1. With scorer `choice`
an answer is one option, and "tokens" are option numbers. A reader accepts its own version only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ruyi_flow.errors import ConfigError

__all__ = ["ExitRecord", "Header", "OwnAnswer", "Record", "Scorer", "Trace", "Writer", "read_trace"]

_FORMAT = "ruyi-flow trace"
_VERSION = 3

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


class Scorer(StrEnum):
    """A measure of an answer's quality."""

    AGREEMENT = "agreement"
    """Share of its tokens that equal the last exit's."""
    NUMBER = "number"
    """1 when its last number equals the reference's, else 0 (as for GSM8K)."""
    CHOICE = "choice"
    """1 when the most probable option is the right one, else 0 (as lm-evaluation-harness scores ARC)."""


@dataclass(frozen=True, slots=True)
class Header:
    """The family and the settings that a trace was recorded with."""

    family: str
    """Fingerprint of the family."""
    name: str = field(compare=False)
    """Name of the family where it was traced; the fingerprint identifies it."""
    exits: tuple[int, ...]
    hidden_size: int
    boundary_bytes: dict[str, int]
    """Bytes of one position's boundary state, by a link's encoding."""
    dtype: str
    max_new_tokens: int
    scores: tuple[str, ...]
    temperatures: tuple[float, ...]
    scorer: str = Scorer.AGREEMENT
    branch_layers: tuple[int, ...] = ()
    """Layers of every exit's branch."""
    layer_flops: float = 0.0
    """Floating-point operations of one position in one layer, without attention's products."""
    attention_flops: float = 0.0
    """Floating-point operations of one position in one layer for each position that it attends to."""
    head_flops: float = 0.0
    """Floating-point operations of one position in the LM head."""


@dataclass(frozen=True, slots=True)
class OwnAnswer:
    """An exit's own answer of m tokens."""

    scores: Floats
    """(m, scores, temperatures) scores along the answer."""
    right: float
    """Quality of the answer by the trace's scorer, 0 … 1."""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """One exit's predictions along the last exit's answer of n tokens."""

    tokens: Ints
    """(n,) the exit's predictions."""
    scores: Floats
    """(n, scores, temperatures) the scores of these predictions."""
    prompt_loss: float
    """Mean loss over the last tokens of the prompt, in nats."""
    prompt_entropy: float
    """Mean entropy over the same tokens, in nats."""
    own: OwnAnswer | None = None
    """The exit's own answer; None without a scorer."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its answer and every exit's predictions."""

    number: int
    """Number of the prompt in its file."""
    prompt: str
    """Digits of a hash of the request, which tell prompts apart."""
    prompt_tokens: int
    answer: Ints
    """(n,) the last exit's answer."""
    exits: dict[int, ExitRecord]


class Writer:
    """A writer of a new trace file, or of more records to one that exists, complete or cut off.

    Args:
        path: the file.
        header: the header that the file gets or has.

    Raises:
        ConfigError: the file exists and has another header.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.done: set[str] = set()
        """Prompts in the file; see `Record.prompt`."""
        whole = 0
        if path.exists() and path.stat().st_size:
            there, records = _open(path)
            if there != header:
                ours, theirs = asdict(header), asdict(there)
                changed = ", ".join(key for key in ours if key != "name" and ours[key] != theirs[key])
                raise ConfigError(f"{path}: was recorded with another {changed}; remove it or name another file")
            for record, stop in records:
                self.done.add(record.prompt)
                whole = stop
        self._path, self._header = path, header
        self._file: BinaryIO | None = None
        """A new file is created with its first record."""
        if whole:
            self._file = path.open("r+b")
            self._file.truncate(whole)
            self._file.seek(whole)

    def add(self, record: Record) -> None:
        """Write a record and flush it to the operating system."""
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


def read_trace(path: Path) -> tuple[Header, list[Record]]:
    """Read a trace file, without a last record that was cut off.

    Raises:
        ConfigError: it is not a trace, or has another version.
    """
    header, records = _open(path)
    return header, [record for record, _ in records]


@dataclass(frozen=True, slots=True)
class Trace:
    """The answers of a trace in one row, as arrays: N tokens of P prompts."""

    header: Header
    prompt: NDArray[np.int64]
    """(N,) the prompt, 0 … P-1, that each token answers."""
    agrees: dict[int, NDArray[np.bool_]]
    """(N,) whether each early exit's token equals the last exit's."""
    scores: dict[int, Floats]
    """(N, scores, temperatures) the scores of each early exit."""
    records: tuple[Record, ...]

    @property
    def right(self) -> dict[int, float]:
        """Return the mean quality of each exit's own answers; empty without a scorer."""
        by_exit: dict[int, list[float]] = {p: [] for p in self.header.exits}
        for record in self.records:
            for p, e in record.exits.items():
                by_exit[p] += [] if e.own is None else [e.own.right]
        return {p: sum(found) / len(found) for p, found in by_exit.items() if found}

    @classmethod
    def from_records(cls, header: Header, records: Sequence[Record]) -> Trace:
        """Build a trace from records of one file.

        Raises:
            ConfigError: there are no records.
        """
        if not records:
            raise ConfigError("the trace is empty; record prompts with ruyi-flow trace")
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
        """Load one or several files as one trace; a prompt that occurs twice counts once.

        Raises:
            ConfigError: a file is not a trace, all are empty, or their headers differ.
        """
        header, records = read_trace(paths[0])
        for path in paths[1:]:
            other, more = read_trace(path)
            if replace(other, max_new_tokens=header.max_new_tokens) != header:
                raise ConfigError(
                    f"{path}: its family, number format or scorer differs from {paths[0]}; they cannot be combined"
                )
            header = replace(header, max_new_tokens=max(header.max_new_tokens, other.max_new_tokens))
            records += more
        unique = list({record.prompt: record for record in reversed(records)}.values())[::-1]
        try:
            return cls.from_records(header, unique)
        except ConfigError as error:
            raise ConfigError(f"{paths[0]}: {error}") from None

    def select(self, prompts: Sequence[int]) -> Trace:
        """Return the trace of some prompts, given by their numbers 0 … P-1."""
        return Trace.from_records(self.header, [self.records[i] for i in prompts])


def _open(path: Path) -> tuple[Header, Iterator[tuple[Record, int]]]:
    """Open a file: its header, and its records with the offset at which each ends."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; record a trace with ruyi-flow trace") from None
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=len(data) or 1)
    unpacker.feed(data)
    try:
        raw = unpacker.unpack()
        if raw.pop("format") != _FORMAT:
            raise ValueError
        version = raw.pop("version")
        if version != _VERSION:
            todo = "update ruyi-flow" if version > _VERSION else "record it again"
            raise ConfigError(f"{path}: the trace has version {version}, expected {_VERSION}; {todo}")
        header = TypeAdapter(Header).validate_python(raw)  # types, too
        if not header.exits or list(header.exits) != sorted({*header.exits}) or header.exits[0] < 1:
            raise ValueError("exits must ascend")
    except (msgpack.OutOfData, msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a trace; record one with ruyi-flow trace") from None

    def records() -> Iterator[tuple[Record, int]]:
        while True:
            try:
                raw = unpacker.unpack()
                record = _parse_record(raw, header)
            except msgpack.OutOfData:
                return  # the last one may be cut off
            except (msgpack.UnpackException, ValueError, KeyError, TypeError, AttributeError):
                raise ConfigError(f"{path}: damaged after {unpacker.tell()} bytes; record it again") from None
            yield record, unpacker.tell()

    return header, records()


def _parse_record(raw: dict[str, Any], header: Header) -> Record:
    shape = (-1, len(header.scores), len(header.temperatures))
    answer = np.frombuffer(raw["answer"], "<i4")
    exits = {
        p: ExitRecord(
            np.frombuffer(e["tokens"], "<i4"),
            np.frombuffer(e["scores"], "<f4").reshape(shape),
            float(e["prompt_loss"]),
            float(e["prompt_entropy"]),
            e["own"] and OwnAnswer(np.frombuffer(e["own"]["scores"], "<f4").reshape(shape), float(e["own"]["right"])),
        )
        for p, e in raw["exits"].items()
    }
    lengths = {len(found) for e in exits.values() for found in (e.tokens, e.scores)}
    if set(exits) != set(header.exits) or lengths != {len(answer)}:
        raise ValueError("the exits or lengths of a record differ from the header's")
    return Record(int(raw["number"]), str(raw["prompt"]), int(raw["prompt_tokens"]), answer, exits)
