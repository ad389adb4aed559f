"""Which waiting work a node runs next: continuous batching over its stages. Pure: no torch, clock or socket.

Work is some rows of one session at one stage. A step takes work of one stage, since one matrix product serves all its
rows (Yu et al. 2022, Orca), and mixes decodes with a part of a long prompt, so that neither waits for the other to end
(Agrawal et al. 2024, Sarathi-Serve).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from operator import attrgetter

from ruyi_flow.errors import ConfigError

__all__ = ["PATIENCE", "SHORT_ROWS", "Scheduler", "rows_alone"]

PATIENCE = 8
"""Number of times that short work lets other short work at a shallower stage go first."""

SHORT_ROWS = 80
"""Work of at most so many rows is short and is never split: drafts that are verified, the rated end of a prompt."""


@dataclass(slots=True)
class _Work:
    key: int
    stage: int
    rows: int
    turn: tuple[float, int, int]
    """Work with the smallest turn goes first."""
    passed: int = 0

    @property
    def long(self) -> bool:
        return self.rows > SHORT_ROWS


class Scheduler:
    """First come, first served, over rows that fit into one step.

    The oldest work determines the stage of a step and is part of it. Work of the same stage joins in order, short
    before long. Of long work, as many rows are taken as the budget has left, and of the oldest at least a quarter of
    the budget; the rest waits behind everything that waits now. Long work joins other long work only whole, and only
    while both fill at most half of the budget: past that a step is bound by arithmetic, so the first one would only
    wait for the other.

    If the oldest work is short, short work of a shallower stage goes first, up to PATIENCE times: sessions that decode
    at different depths meet at one stage this way, and share its steps from then on. Work with k others before it is
    therefore in one of the next (k + 1) * (PATIENCE + 1) steps. Work that goes on at the next stage keeps its time of
    arrival and so its turn: what arrived first ends first. This may delay later work by one more step.

    Args:
        budget: rows of a step; short work that is first is taken whole even if it has more rows.
    """

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ConfigError(f"a step must have at least 1 position, not {budget} (limits.max_step_positions)")
        self.budget = budget
        self._waiting: dict[int, _Work] = {}
        self._latest, self._behind = -math.inf, itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, key: int, stage: int, rows: int, since: float) -> None:
        """Add work to the queue.

        Args:
            key: identifies the work, which must not be waiting already; the smaller key breaks ties.
            stage: index of the stage.
            rows: number of rows, at least 1.
            since: when it arrived.
        """
        assert key not in self._waiting and rows > 0
        self._waiting[key] = _Work(key, stage, rows, (since, 0, key))
        self._latest = max(self._latest, since)

    def drop(self, key: int) -> None:
        """Remove work, if it is waiting."""
        self._waiting.pop(key, None)

    def next(self) -> list[tuple[int, int]]:
        """Return the next step: keys, all at one stage, and the number of rows of each; [] when nothing waits."""
        if not self._waiting:
            return []
        waiting = sorted(self._waiting.values(), key=_turn)
        mates = self._mates(waiting)
        oldest = mates[0]
        if len(mates) == 1:
            return [self._take(oldest, rows_alone(oldest.rows, self.budget))]
        step = [(oldest, self._share_of_oldest(mates))]
        step += self._joiners(mates, step[0][1])
        return [self._take(work, rows) for work, rows in step]

    def _mates(self, waiting: list[_Work]) -> list[_Work]:
        """Return the work of the stage that runs next, by age."""
        oldest = waiting[0]
        stage = oldest.stage
        if len(waiting) > 1 and not oldest.long and oldest.passed < PATIENCE:
            stage = min(work.stage for work in waiting if not work.long)
        passed = stage != oldest.stage
        oldest.passed += passed
        return [work for work in waiting if work.stage == stage and not (passed and work.long)]

    def _share_of_oldest(self, mates: list[_Work]) -> int:
        """Return the rows of the oldest work: all if it is short, else what the others leave, at least a quarter."""
        oldest = mates[0]
        if not oldest.long:
            return oldest.rows
        short = sum(work.rows for work in mates[1:] if not work.long)
        return min(oldest.rows, max(self.budget - short, self.budget // 4, 1))

    def _joiners(self, mates: list[_Work], count: int) -> list[tuple[_Work, int]]:
        """Return the work that joins a step in which the oldest has so many rows, short work first."""
        step, long = [], mates[0].long
        for work in sorted(mates[1:], key=_long):  # stable: by age among short and among long work
            rows = min(work.rows, self.budget - count)
            if work.long and long and (rows < work.rows or count + rows > self.budget // 2):
                continue
            if rows > 0 and (rows == work.rows or work.long):
                step.append((work, rows))
                count, long = count + rows, long or work.long
        return step

    def _take(self, work: _Work, rows: int) -> tuple[int, int]:
        work.rows -= rows
        if work.rows:
            work.turn = (self._latest, next(self._behind), 0)  # behind everything that waits now
        else:
            del self._waiting[work.key]
        return work.key, rows


_turn = attrgetter("turn")
_long = attrgetter("long")


def rows_alone(rows: int, budget: int) -> int:
    """Return the rows of a step that contains only one work."""
    return rows if rows <= SHORT_ROWS else min(rows, budget)
