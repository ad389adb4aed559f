"""Which waiting work a node does next: continuous batching over its stages. Pure: no torch, clock or socket.

Work is some rows of one session at one stage. A step takes work of one stage, since one matrix product serves all its
rows (as in Yu et al. 2022, Orca), and mixes decodes with a part of a long prompt, so that neither waits for the other
to end (Agrawal et al. 2024, Sarathi-Serve).
"""

from __future__ import annotations

from dataclasses import dataclass

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
    passed: int = 0


class Scheduler:
    """First come, first served, over rows that fit into one step.

    The oldest work says which stage a step is for, and is part of it; work of the same stage joins in order, what is
    short before what is long. Of long work, as much is taken as the budget has left, a quarter of it at the least for
    the oldest; what remains waits behind everything that waits now.

    Where the oldest is short, short work of a shallower stage goes first, PATIENCE times at the most: sessions that
    decode at different depths so come to the same one, and share its steps from then on. Work with k others before it
    is therefore in one of the next (k + 1) * (PATIENCE + 1) steps.

    Args:
        budget: rows of a step; short work that comes first is taken whole even where it is more.
    """

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ConfigError(f"a step of {budget} positions does nothing; it must have room for 1 at the least")
        self.budget = budget
        self._waiting: dict[int, _Work] = {}  # by age, the oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, key: int, stage: int, rows: int) -> None:
        """Let work wait; a key that waits already must not be added again."""
        assert key not in self._waiting and rows > 0
        self._waiting[key] = _Work(key, stage, rows)

    def drop(self, key: int) -> None:
        """Forget work that nobody wants any more; one that does not wait is fine."""
        self._waiting.pop(key, None)

    def next(self) -> list[tuple[int, int]]:
        """The next step: keys, all at one stage, and how many of the rows of each; [] when nothing waits."""
        if not self._waiting:
            return []
        oldest = next(iter(self._waiting.values()))
        if len(self._waiting) == 1:
            return [self._take(oldest, alone(oldest.rows, self.budget))]
        stage = oldest.stage
        if oldest.rows <= WHOLE and oldest.passed < PATIENCE:
            stage = min(work.stage for work in self._waiting.values() if work.rows <= WHOLE)
            oldest.passed += stage != oldest.stage
        mates = [work for work in self._waiting.values() if work.stage == stage]
        if len(mates) == 1:
            return [self._take(mates[0], alone(mates[0].rows, self.budget))]
        oldest = mates[0]
        short = sum(work.rows for work in mates[1:] if work.rows <= WHOLE)
        given = oldest.rows
        if oldest.rows > WHOLE:
            given = min(oldest.rows, max(self.budget - short, self.budget // 4, 1))
        step, left = [(oldest, given)], self.budget - given
        for work in sorted(mates[1:], key=lambda work: work.rows > WHOLE):  # stable: by age in both halves
            rows = min(work.rows, left)
            if rows > 0 and (rows == work.rows or work.rows > WHOLE):
                step.append((work, rows))
                left -= rows
        return [self._take(work, rows) for work, rows in step]

    def _take(self, work: _Work, rows: int) -> tuple[int, int]:
        del self._waiting[work.key]
        work.rows -= rows
        if work.rows:
            self._waiting[work.key] = work  # behind everything that waits now
        return work.key, rows


def alone(rows: int, budget: int) -> int:
    """Rows of a step that one work has to itself."""
    return rows if rows <= WHOLE else min(rows, budget)
