"""Profiles: the costs of a family's stages on one machine, measured or computed, in one msgpack file.

    {"format": "ruyi-flow profile", "version": 1, "kind": "measured" | "analytic", "source": str, "family": str,
     "hidden_size": int, "context": int, "dtype": str, "weights": str, "threads": int, "machine": {…},
     "step_s": s, "round_s": s, "request_s": s, "exchange_s": s, "exchange_byte_s": s,
     "round_cpu_s": s, "exchange_cpu_s": s, "pauses_s": [s, …], "cold_s": [s, …],
     "open_bytes": n, "up_bytes": n, "position_bytes": n, "down_bytes": n, "decision_bytes": n,
     "stages": [{"exit": p, "first_layer": l, "rows": [1, …], "trunk_s": [s, …], "branch_s": [s, …], "head_s": [s, …],
                 "attended_s": s, "context_s": s, "branch_attended_s": s, "branch_context_s": s, "session_s": s,
                 "scale_s": s, "weight_bytes": n, "kv_bytes": n}]}

A step of n rows of k sessions, b of whose rows enter the branch and r of which are read by its head, takes

    trunk(n) + attended_s * A + context_s * C + session_s * (k - 1)
        + branch(b) + head(r) + branch_attended_s * A' + branch_context_s * C' + scale_s * r'

seconds. A is the sum over rows of the positions that each row attends to. C is the sum over sessions of the positions
in their KV cache after the step, which is read once. A' and C' are the same sums over the rows that are read. trunk,
branch and head are 0 at 0 rows, linear between the listed numbers of rows, and extended linearly beyond them. branch
is the time of the branch's keys and values, head that of the rest of the branch, which only runs for the rows that are
read; r' of those have calibrated confidence. The first step after a pause takes `cold` seconds more: linear between
the listed pauses from 0 at none, and constant beyond the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from pydantic import TypeAdapter, ValidationError

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.errors import ConfigError

__all__ = ["Profile", "StageCost", "StepCost"]

_FORMAT = "ruyi-flow profile"
_VERSION = 1

_TABLE = 512
"""Largest number of rows whose time is looked up in a table."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """The costs of one stage, in the terms of the formula in the module's docstring."""

    exit: int
    first_layer: int
    rows: tuple[int, ...]
    """Numbers of rows for which times are listed, ascending from 1."""
    trunk_s: tuple[float, ...]
    """Seconds of the trunk layers, for each number of rows."""
    branch_s: tuple[float, ...]
    """Seconds of the branch's keys and values, for each number of rows."""
    head_s: tuple[float, ...]
    """Seconds of the rest of the branch, including the LM head, for each number of rows."""
    attended_s: float = 0.0
    context_s: float = 0.0
    branch_attended_s: float = 0.0
    branch_context_s: float = 0.0
    session_s: float = 0.0
    scale_s: float = 0.0
    """Seconds of calibrating the confidence of one row: the probe and its curve."""
    weight_bytes: int = 0
    """Bytes of the stage's own tensors."""
    kv_bytes: int = 0
    """Bytes of one position in the stage's KV cache."""

    def __post_init__(self) -> None:
        """Raise a ValueError for rows or times that make no sense."""
        times = (self.trunk_s, self.branch_s, self.head_s)
        if not self.rows or self.rows[0] != 1 or any(a >= b for a, b in zip(self.rows, self.rows[1:], strict=False)):
            raise ValueError(f"stage {self.exit}: rows must ascend from 1")
        if any(len(t) != len(self.rows) or min(t) < 0 for t in times):
            raise ValueError(f"stage {self.exit}: each number of rows needs a time of 0 or more")


@dataclass(frozen=True, slots=True)
class Profile:
    """The costs of a family's stages on one machine."""

    kind: str
    """How the costs were found: "measured" or "analytic"."""
    source: str
    """Origin of the costs, for display."""
    family: str
    """The family's fingerprint if the costs were measured, otherwise its name."""
    hidden_size: int
    context: int
    """Most positions of a session."""
    stages: tuple[StageCost, ...]
    dtype: str = "bfloat16"
    weights: str = ""
    threads: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    step_s: float = 0.0
    """Seconds of handing a task to the compute thread and back; brief tasks of a lone session do without."""
    round_s: float = 0.0
    """Seconds of a round on the entry node in addition to its steps: deciding, decoding text, the reply to the user."""
    request_s: float = 0.0
    """Seconds of a request on the entry node before its first step."""
    exchange_s: float = 0.0
    """Seconds of the messages of a question and its answer at both nodes, in addition to the link's time."""
    exchange_byte_s: float = 0.0
    """The same per byte of the question."""
    round_cpu_s: float = 0.0
    """Processor seconds of a round in addition to its steps, on all cores; for nodes that share cores."""
    exchange_cpu_s: float = 0.0
    """Processor seconds of a question and its answer in addition to steps, on all cores; for nodes that share cores."""
    pauses_s: tuple[float, ...] = ()
    """Pauses in seconds, ascending, that `cold_s` lists times for."""
    cold_s: tuple[float, ...] = ()
    """Extra seconds of a node's first step after each pause, when the processor's caches have gone cold."""
    open_bytes: int = 320
    """Bytes of the handshake."""
    up_bytes: int = 24
    """Bytes of a question without its positions."""
    position_bytes: int = 4
    """Bytes of one position in a question without its state."""
    down_bytes: int = 48
    """Bytes of an answer without its decisions."""
    decision_bytes: int = 12
    """Bytes of one decision in an answer."""

    def __post_init__(self) -> None:
        """Raise a ValueError for pauses that do not ascend or lack a time."""
        if len(self.pauses_s) != len(self.cold_s) or any(
            a >= b for a, b in zip((0.0, *self.pauses_s), self.pauses_s, strict=False)
        ):
            raise ValueError("pauses must be above 0 and ascend, with a time for each")

    def cold(self, pause_s: float) -> float:
        """Return the extra seconds of the first step after a pause."""
        return float(np.interp(pause_s, (0.0, *self.pauses_s), (0.0, *self.cold_s))) if self.pauses_s else 0.0

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits that the stages end at, ascending."""
        return tuple(stage.exit for stage in self.stages)

    def stage(self, exit: int) -> StageCost:
        """Return the stage that ends at an exit; raise a KeyError if there is none."""
        for stage in self.stages:
            if stage.exit == exit:
                return stage
        raise KeyError(exit)

    def save(self, path: Path) -> None:
        """Write the profile's file, whole or not at all."""
        with atomic_file(path) as new:
            new.write_bytes(msgpack.packb({"format": _FORMAT, "version": _VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile file.

        Raises:
            ConfigError: the file is missing, is not a profile, or has another version.
        """
        try:
            raw = msgpack.unpackb(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such profile; make it with: ruyi-flow profile FAMILY --out {path}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception:  # msgpack raises several kinds, some of them bare
            raw = None
        try:
            if raw.pop("format") != _FORMAT:
                raise ValueError
            version = raw.pop("version")
            if version != _VERSION:
                todo = "update Ruyi Flow" if version > _VERSION else "measure again (ruyi-flow profile)"
                raise ConfigError(f"{path}: this profile has version {version}, not {_VERSION}: {todo}")
            return TypeAdapter(cls).validate_python(raw)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = f": {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else ""
            raise ConfigError(f"{path}: not a profile (ruyi-flow profile writes one){why}") from None


class StepCost:
    """The seconds of a stage's steps.

    Args:
        stage: the stage's costs.
        scale: factor on all of its costs.
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
            flags = {"taken": taken, "read": read, "scaled": scaled}
            none, one = (
                self.seconds(1, x - 0.5, x, read_attended=read * x, read_context=x, **flags) for x in (0.0, 1.0)
            )
            self._lines.append((none, one - none))

    def seconds_of_one(self, context: int, taken: bool, read: int, scaled: int) -> float:
        """Return the seconds of a step of a single row: `seconds` is linear in the context, so a line is stored."""
        at_none, each = self._lines[taken + read + scaled]
        return at_none + each * context

    def seconds(
        self,
        rows: int,
        attended: float,
        context: float,
        *,
        sessions: int = 1,
        taken: int = 0,
        read: int = 0,
        read_attended: float = 0.0,
        read_context: float = 0.0,
        scaled: int = 0,
    ) -> float:
        """Return the seconds of a step.

        Args:
            rows: rows of all sessions together.
            attended: sum over rows of the positions that each attends to.
            context: sum over sessions of the positions in their KV cache after the step.
            sessions: number of sessions in the step.
            taken: rows that enter the branch; 0 if it does not run.
            read: rows that the branch's head reads.
            read_attended, read_context: `attended` and `context` of those rows and their sessions.
            scaled: number of those rows whose confidence is calibrated.
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
    """Return the times of 0 to _TABLE rows; no rows take no time."""
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


def _past(table: list[float], rows: int) -> float:
    """Return the time of more rows than the table has."""
    return table[_TABLE] + (rows - _TABLE) * (table[_TABLE] - table[_TABLE - 1])
