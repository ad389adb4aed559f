"""Profiles: what a family's stages cost on one machine, measured or computed, as one msgpack file.

    {"format": "ruyi-flow profile", "version": 1, "kind": "measured" | "analytic", "source": str, "family": str,
     "hidden_size": int, "context": int, "dtype": str, "weights": str, "threads": int, "machine": {…},
     "step_s": s, "round_s": s, "request_s": s, "exchange_s": s, "exchange_byte_s": s,
     "round_cpu_s": s, "exchange_cpu_s": s, "pauses_s": [s, …], "cold_s": [s, …],
     "open_bytes": n, "up_bytes": n, "position_bytes": n, "down_bytes": n, "decision_bytes": n,
     "stages": [{"exit": p, "first_layer": l, "rows": [1, …], "trunk_s": [s, …], "branch_s": [s, …], "head_s": [s, …],
                 "attended_s": s, "context_s": s, "branch_attended_s": s, "branch_context_s": s, "session_s": s,
                 "scale_s": s, "weight_bytes": n, "kv_bytes": n}]}

A step of `n` rows of `k` sessions, of which the branch takes in `b` and reads `r`, takes

    trunk(n) + attended_s * A + context_s * C + session_s * (k - 1)
        + branch(b) + head(r) + branch_attended_s * A' + branch_context_s * C' + scale_s * r'

where A is the sum over rows of the positions that each attends to, and C the sum over sessions of the positions that
they hold afterwards, whose keys and values are read once; A' and C' are the same for the rows that are read. The
functions are straight between the grid's points, go on straight past them, and are 0 at 0. `branch` is what the
branch's keys and values take, `head` the rest of it: it is run for the rows that are read alone, r' of which have
calibrated confidence. The first step after a pause takes `cold` of its length more: straight between the points, from
0 at none, and no more past the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ruyi_flow.errors import ConfigError

__all__ = ["Profile", "StageCost", "StepCost"]

_FORMAT = "ruyi-flow profile"
_VERSION = 1

_TABLE = 512
"""Rows up to which times are looked up in a list."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage costs; see the module."""

    exit: int
    first_layer: int
    rows: tuple[int, ...]
    """Ascending, from 1."""
    trunk_s: tuple[float, ...]
    branch_s: tuple[float, ...]
    """Of the branch's keys and values."""
    head_s: tuple[float, ...]
    """Of the rest of the branch, the head included."""
    attended_s: float = 0.0
    context_s: float = 0.0
    branch_attended_s: float = 0.0
    branch_context_s: float = 0.0
    session_s: float = 0.0
    scale_s: float = 0.0
    """Of calibrated confidence, for each row that is read: the probe, its curve."""
    weight_bytes: int = 0
    """Of the stage's own tensors."""
    kv_bytes: int = 0
    """Of a position's keys and values."""

    def __post_init__(self) -> None:
        """Refuse what is not a cost with a ValueError."""
        times = (self.trunk_s, self.branch_s, self.head_s)
        if not self.rows or self.rows[0] != 1 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"stage {self.exit}: rows must ascend from 1")
        if any(len(t) != len(self.rows) or min(t) < 0 for t in times):
            raise ValueError(f"stage {self.exit}: there must be a time of 0 or more for each number of rows")


@dataclass(frozen=True, slots=True)
class Profile:
    """A family's stages on one machine."""

    kind: str
    """measured or analytic"""
    source: str
    """How it came about; for people."""
    family: str
    """Fingerprint where it was measured, else a name."""
    hidden_size: int
    context: int
    """Positions of a session, at the most."""
    stages: tuple[StageCost, ...]
    dtype: str = "bfloat16"
    weights: str = ""
    threads: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    step_s: float = 0.0
    """Of a task that goes to the compute thread and back; a lone session's brief ones do not."""
    round_s: float = 0.0
    """Of a round at the entry node, beyond its steps: deciding, text, the message to the user."""
    request_s: float = 0.0
    """Of a request at the entry node, before its first step."""
    exchange_s: float = 0.0
    """Of a question and its answer between nodes, beyond the link: both ends' messages."""
    exchange_byte_s: float = 0.0
    """The same for each byte."""
    round_cpu_s: float = 0.0
    exchange_cpu_s: float = 0.0
    """Processor time of a round and of an exchange beyond steps, all over the machine: where nodes share its cores."""
    pauses_s: tuple[float, ...] = ()
    cold_s: tuple[float, ...] = ()
    """What a node's first step after so long a pause takes more: caches have lost its code and data, the core slept."""
    open_bytes: int = 320
    """Of the handshake."""
    up_bytes: int = 24
    """Of a question, beyond its positions."""
    position_bytes: int = 4
    """Of a position in it, beyond its state."""
    down_bytes: int = 48
    """Of an answer, beyond its decisions."""
    decision_bytes: int = 12

    def __post_init__(self) -> None:
        """Refuse pauses without what follows them with a ValueError."""
        if len(self.pauses_s) != len(self.cold_s) or any(
            a >= b for a, b in zip((0.0, *self.pauses_s), self.pauses_s, strict=False)
        ):
            raise ValueError("pauses must ascend from above 0, with a time for each")

    def cold(self, pause_s: float) -> float:
        """Seconds that the first step after a pause takes more."""
        return float(np.interp(pause_s, (0.0, *self.pauses_s), (0.0, *self.cold_s))) if self.pauses_s else 0.0

    @property
    def exits(self) -> tuple[int, ...]:
        """Of its stages, ascending."""
        return tuple(stage.exit for stage in self.stages)

    def stage(self, exit: int) -> StageCost:
        """The stage that ends at an exit; a KeyError when it is not there."""
        for stage in self.stages:
            if stage.exit == exit:
                return stage
        raise KeyError(exit)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        try:
            new.write_bytes(msgpack.packb({"format": _FORMAT, "version": _VERSION, **asdict(self)}))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile file.

        Raises:
            ConfigError: it is not there, or not a profile, or of another version.
        """
        try:
            raw = msgpack.unpackb(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such profile; make one: ruyi-flow profile FAMILY --out {path}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception:  # msgpack raises several kinds, some of them bare
            raw = None
        try:
            if raw.pop("format") != _FORMAT:
                raise ValueError
            version = raw.pop("version")
            if version != _VERSION:
                todo = "update this program" if version > _VERSION else "measure again"
                raise ConfigError(f"{path}: a profile of version {version}, not {_VERSION}: {todo}")
            listed: list[dict[str, Any]] = raw.pop("stages")
            stages = tuple(StageCost(**{k: _frozen(v) for k, v in stage.items()}) for stage in listed)
            return cls(stages=stages, **{k: _frozen(v) for k, v in raw.items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = f": {error}" if isinstance(error, ValueError) and str(error) else ""
            raise ConfigError(f"{path}: not a profile (ruyi-flow profile writes one){why}") from None


class StepCost:
    """The time of a stage's steps, looked up.

    Args:
        stage: what it costs.
        scale: factor on all of it.
    """

    def __init__(self, stage: StageCost, scale: float = 1.0) -> None:
        self._trunk, self._branch, self._head = (
            _table(stage.rows, times, scale) for times in (stage.trunk_s, stage.branch_s, stage.head_s)
        )
        self._attended, self._context = scale * stage.attended_s, scale * stage.context_s
        self._branch_attended, self._branch_context = scale * stage.branch_attended_s, scale * stage.branch_context_s
        self._session, self._scale = scale * stage.session_s, scale * stage.scale_s
        self._lines = []
        for taken, read, scaled in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
            none, one = (self.of(1, x - 0.5, x, 1, taken, read, read * x, x, scaled) for x in (0.0, 1.0))
            self._lines.append((none, one - none))

    def of_one(self, context: int, taken: bool, read: int, scaled: int) -> float:
        """Seconds of a step of one row alone; `of` is linear in the positions held, so that its line says it."""
        at_none, each = self._lines[taken + read + scaled]
        return at_none + each * context

    def of(
        self,
        rows: int,
        attended: float,
        context: float,
        sessions: int = 1,
        taken: int = 0,
        read: int = 0,
        read_attended: float = 0.0,
        read_context: float = 0.0,
        scaled: int = 0,
    ) -> float:
        """Seconds of a step.

        Args:
            rows: of all sessions together.
            attended: sum over rows of the positions that each attends to.
            context: sum over sessions of the positions that they hold afterwards.
            sessions: in the step.
            taken: rows whose keys and values the branch takes in; 0 where it is not run.
            read: rows that the branch reads.
            read_attended, read_context: as above, of those rows and their sessions.
            scaled: of those rows, the ones whose confidence is calibrated.
        """
        spent = (
            (self._trunk[rows] if rows <= _TABLE else _past(self._trunk, rows))
            + self._attended * attended
            + self._context * context
        )
        if sessions > 1:
            spent += self._session * (sessions - 1)
        if taken:
            spent += self._branch[taken] if taken <= _TABLE else _past(self._branch, taken)
            if read:
                spent += self._head[read] if read <= _TABLE else _past(self._head, read)
                spent += self._branch_attended * read_attended + self._branch_context * read_context
                spent += self._scale * scaled
        return spent


def _table(rows: Sequence[int], times: Sequence[float], scale: float) -> list[float]:
    """Times of 0 … _TABLE rows; 0 of none."""
    xs, ys = np.array(rows, float), np.array(times, float) * scale
    wanted = np.arange(_TABLE + 1)
    found = np.interp(wanted, xs, ys)
    if len(xs) > 1:
        slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
        past = wanted > xs[-1]
        found[past] = ys[-1] + slope * (wanted[past] - xs[-1])
    else:
        found = ys[0] * np.maximum(1, wanted)
    found[0] = 0.0
    out: list[float] = found.tolist()
    return out


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _past(table: list[float], rows: int) -> float:
    """Of more rows than the table has."""
    return table[_TABLE] + (rows - _TABLE) * (table[_TABLE] - table[_TABLE - 1])
