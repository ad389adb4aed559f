"""Traces: what every exit said at every position of the last exit's answers. Calibration and the simulator read them.

A file is a stream of msgpack objects: a header, then a record for each prompt. Version 1:

    header  {"format": "ruyi-flow trace", "version": 1, "family": fingerprint, "name": str, "exits": [p, …],
             "hidden_size": int, "dtype": str, "max_new_tokens": int, "prompts": SHA-256 of the prompts' token ids,
             "scores": [name, …], "temperatures": [T, …]}
    record  {"number": int, "prompt_tokens": int, "answer": int32[n],
             "exits": {p: {"tokens": int32[n], "scores": float32[n, scores, temperatures],
                           "prompt_loss": float, "prompt_entropy": float}}}

Arrays are little-endian bytes in row-major order. `answer` is what the last exit said, greedily; `tokens` is what an
exit says there, teacher-forced on that answer; `prompt_loss` and `prompt_entropy` are means over the prompt's tokens,
in nats. Values are added in later versions, never given another meaning; a reader refuses a version above its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from ruyi_flow.errors import ConfigError

__all__ = ["ExitRecord", "Header", "Record", "Trace", "Writer", "read"]

_FORMAT = "ruyi-flow trace"
_VERSION = 1

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Header:
    """What a trace is of."""

    family: str
    """Fingerprint."""
    name: str
    exits: tuple[int, ...]
    hidden_size: int
    dtype: str
    max_new_tokens: int
    prompts: str
    scores: tuple[str, ...]
    temperatures: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """What one exit said along one answer of n tokens."""

    tokens: Ints
    """(n,)"""
    scores: Floats
    """(n, scores, temperatures)"""
    prompt_loss: float
    prompt_entropy: float


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt."""

    number: int
    """Of the prompt in its file."""
    prompt_tokens: int
    answer: Ints
    """(n,) what the last exit said."""
    exits: dict[int, ExitRecord]


class Writer:
    """Writes a trace, or goes on with one that was cut off.

    Args:
        path: the file.
        header: what it is to be of.

    Raises:
        ConfigError: the file is of something else.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.done: set[int] = set()
        """Numbers of the prompts that are there."""
        whole = 0
        if path.exists() and path.stat().st_size:
            there, records = _open(path)
            if there != header:
                changed = [name for name, value in asdict(there).items() if value != asdict(header)[name]]
                raise ConfigError(
                    f"{path}: a trace of something else (another {', '.join(changed)}); remove it, or name another file"
                )
            for record, stop in records:
                self.done.add(record.number)
                whole = stop
        self._file: BinaryIO = path.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write({"format": _FORMAT, "version": _VERSION, **asdict(header)})

    def add(self, record: Record) -> None:
        """Write a record; it is on its way to the disk afterwards."""
        exits = {
            p: {
                "tokens": e.tokens.astype("<i4").tobytes(),
                "scores": e.scores.astype("<f4").tobytes(),
                "prompt_loss": e.prompt_loss,
                "prompt_entropy": e.prompt_entropy,
            }
            for p, e in record.exits.items()
        }
        answer = record.answer.astype("<i4").tobytes()
        self._write({"number": record.number, "prompt_tokens": record.prompt_tokens, "answer": answer, "exits": exits})
        self.done.add(record.number)

    def _write(self, value: Any) -> None:
        self._file.write(msgpack.packb(value))
        self._file.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
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
    def load(cls, path: Path) -> Trace:
        """Of a whole file.

        Raises:
            ConfigError: it is not a trace, or an empty one.
        """
        header, records = read(path)
        try:
            return cls.of(header, records)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def of_prompts(self, chosen: Sequence[int]) -> Trace:
        """The trace of some of its prompts, 0 … P-1."""
        return Trace.of(self.header, [self.records[i] for i in chosen])


def _open(path: Path) -> tuple[Header, Iterator[tuple[Record, int]]]:
    """The header, and the records with where each ends."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=len(data) or 1)
    unpacker.feed(data)
    try:
        raw = unpacker.unpack()
        if raw.pop("format") != _FORMAT:
            raise ValueError
        version = raw.pop("version")
        if version > _VERSION:
            raise ConfigError(f"{path}: a trace of version {version}; this program reads up to {_VERSION}: update it")
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
            except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path}: damaged after {unpacker.tell()} bytes: {error}") from None
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
        )
        for p, e in raw["exits"].items()
    }
    if set(exits) != set(header.exits) or any(len(e.tokens) != len(answer) for e in exits.values()):
        raise ValueError("a record's exits or lengths do not fit")
    return Record(raw["number"], raw["prompt_tokens"], answer, exits)
