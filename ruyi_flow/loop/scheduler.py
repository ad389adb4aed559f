"""Which waiting work a node does next: continuous batching over its stages. Pure: no torch, clock or socket.

Work is some rows of one session at one stage. A step takes work of one stage, since one matrix product serves all its
rows (as in Yu et al. 2022, Orca), and mixes decodes with a part of a long prompt, so that neither waits for the other
to end (Agrawal et al. 2024, Sarathi-Serve).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from operator import attrgetter

from ruyi_flow.errors import ConfigError

__all__ = ["PATIENCE", "WHOLE", "Scheduler", "alone"]

PATIENCE = 8
"""How often short work lets other short work catch up with it."""

WHOLE = 80
"""Work of so many rows is never cut: drafts under verification, and what is read of a prompt."""


@dataclass(slots=True)
class _Work:
    key: int
    stage: int
    rows: int
    turn: tuple[float, int, int]
    """Whoever has the smallest goes first."""
    passed: int = 0

    @property
    def long(self) -> bool:
        return self.rows > WHOLE


class Scheduler:
    """First come, first served, over rows that fit into one step.

    The oldest work says which stage a step is for, and is part of it; work of the same stage joins in order, what is
    short before what is long. Of long work, as much is taken as the budget has left, a quarter of it at the least for
    the oldest; what remains waits behind everything that waits now. Long work joins other long work only whole, and
    where both fill half of the budget at the most: past that a step is bound by arithmetic, and whoever is first
    would only wait for the other.

    Where the oldest is short, short work of a shallower stage goes first, alone, PATIENCE times at the most: sessions
    that decode at different depths so come to the same one, and share its steps from then on. Work with k others before
    it is therefore in one of the next (k + 1) * (PATIENCE + 1) steps. Whoever goes on at a further stage keeps its time
    and so its turn: what came first ends first. For those behind it, it counts once more.

    Args:
        budget: rows of a step; short work that comes first is taken whole even where it is more.
    """

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ConfigError(f"a step of {budget} positions does nothing; it must have room for 1 at the least")
        self.budget = budget
        self._waiting: dict[int, _Work] = {}
        self._latest, self._behind = -math.inf, itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, key: int, stage: int, rows: int, since: float) -> None:
        """Let work wait.

        Args:
            key: whose; of two that came at the same time, the smaller goes first. One that waits must not be added.
            since: when it came.
        """
        assert key not in self._waiting and rows > 0
        self._waiting[key] = _Work(key, stage, rows, (since, 0, key))
        self._latest = max(self._latest, since)

    def drop(self, key: int) -> None:
        """Forget work that nobody wants any more; one that does not wait is fine."""
        self._waiting.pop(key, None)

    def next(self) -> list[tuple[int, int]]:
        """The next step: keys, all at one stage, and how many of the rows of each; [] when nothing waits."""
        if not self._waiting:
            return []
        waiting = sorted(self._waiting.values(), key=_turn)
        oldest = waiting[0]
        stage = oldest.stage
        if len(waiting) > 1 and not oldest.long and oldest.passed < PATIENCE:
            stage = min(work.stage for work in waiting if not work.long)
        waits = stage != oldest.stage
        oldest.passed += waits
        mates = [work for work in waiting if work.stage == stage and not (waits and work.long)]
        oldest = mates[0]
        if len(mates) == 1:
            return [self._take(oldest, alone(oldest.rows, self.budget))]
        given, half = oldest.rows, self.budget // 2
        if oldest.long:
            short = sum(work.rows for work in mates[1:] if not work.long)
            given = min(given, max(self.budget - short, self.budget // 4, 1))
        step, count, long = [(oldest, given)], given, oldest.long
        for work in sorted(mates[1:], key=_long):  # stable: by age in both halves
            rows = min(work.rows, self.budget - count)
            if work.long and long:
                rows = rows if count + rows <= half and rows == work.rows else 0
            if rows > 0 and (rows == work.rows or work.long):
                step.append((work, rows))
                count, long = count + rows, work.long
        return [self._take(work, rows) for work, rows in step]

    def _take(self, work: _Work, rows: int) -> tuple[int, int]:
        work.rows -= rows
        if work.rows:
            work.turn = (self._latest, next(self._behind), 0)  # behind everything that waits now
        else:
            del self._waiting[work.key]
        return work.key, rows


_turn = attrgetter("turn")
_long = attrgetter("long")


def alone(rows: int, budget: int) -> int:
    """Rows of a step that one work has to itself."""
    return rows if rows <= WHOLE else min(rows, budget)
