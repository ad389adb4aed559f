"""One sequence on one node's stages: what it holds and what was asked of it. Pure: states are rows that somebody else
computes, tensors on a real node and bare counts in the simulator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ruyi_flow.loop.pages import Run
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS, Reading
from ruyi_flow.types import SamplingParams

if TYPE_CHECKING:
    from ruyi_flow.loop.capacity import Rooms

__all__ = ["CHUNK", "Found", "Pass", "Piece", "Session", "Stages", "States"]

CHUNK = 512
"""Positions that go through the layers at once where a session is alone; that bounds a prompt's memory."""

States = Any
"""(n, hidden) rows: a tensor, or what stands for one; it has a `shape` and can be sliced."""

Found = list[tuple[int, float]]
"""What a branch says at some positions: its token, and how sure it is of it."""


class Stages(Protocol):
    """A node's consecutive stages, with room for sessions."""

    exits: tuple[int, ...]
    """Where they end."""
    rooms: Rooms

    @property
    def is_entry(self) -> bool:
        """Whether the first of them starts with the embedding."""
        ...

    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """Run the next rows of several sessions' passes through one stage, together.

        Args:
            parts: passes at the same stage, and how many rows of each.
        """
        ...


class Pass:
    """New states of one session on their way through one stage, in one step or several.

    Args:
        session: whose.
        stage: index of the stage on this node.
        states: (n, hidden) boundary states that enter it, of the next positions, whose token ids must be in
            `session.token_ids` already.
        wants: the positions among them whose next token is wanted, ascending.
    """

    __slots__ = ("error", "found", "looks", "rows", "session", "stage", "states", "wants")

    def __init__(self, session: Session, stage: int, states: States, wants: Sequence[int]) -> None:
        self.session, self.stage, self.states, self.wants = session, stage, states, wants
        self.rows: int = states.shape[0]
        """That are still to be run."""
        self.looks = session.looks(stage)
        self.found: Found | None = [] if self.looks else None
        """A token and a confidence for each wanted position that has been run; None where the stage does not look."""
        self.error: Exception | None = None
        """Why it cannot go on."""

    def take(self, count: int) -> States:
        """Take the states of the next rows off it."""
        states = self.states
        self.rows -= count
        if not self.rows:
            self.states = None
            return states
        self.states = states[count:]
        return states[:count]


class Piece:
    """The next rows of a pass, in one step."""

    __slots__ = ("asked", "count", "run", "start", "states", "work")

    def __init__(self, work: Pass, count: int) -> None:
        session = work.session
        self.work, self.count, self.states = work, count, work.take(count)
        self.start, self.run = session.positions[work.stage], session.run
        self.asked = session.asked(work.stage, self.start, count, work.wants) if work.looks else ()
        """The rows that the branch is read at."""

    @property
    def stop(self) -> int:
        """Position after the last one."""
        return self.start + self.count

    @property
    def wants(self) -> list[int]:
        """The positions among them whose next token is wanted."""
        return [p for p in self.work.wants if self.start <= p < self.stop]


class Session(ABC):
    """Token ids, positions, judges, and states that the stage beyond has not seen.

    Args:
        shard: the stages that it is on.
        session_id: its number there.
        run: its pages.
        vocab_size: of the family.
        policy: what decides.
        params: how tokens are picked.
        prompt_length: positions of the prompt.
        max_positions: it never holds more.
        stands_in: the last exit here must be able to decide whatever it is asked.
    """

    def __init__(
        self,
        shard: Stages,
        session_id: int,
        run: Run,
        vocab_size: int,
        policy: Policy,
        params: SamplingParams,
        prompt_length: int,
        max_positions: int,
        stands_in: bool,
    ) -> None:
        self.shard, self.session_id, self.run, self.params = shard, session_id, run, params
        self.max_positions, self.stands_in = max_positions, stands_in
        self.vocab_size, self.prompt_length = vocab_size, prompt_length
        self.token_ids: list[int] = []
        """Of positions 0 …, on the entry node drafts included."""
        self.positions = [0] * len(shard.exits)
        """Positions that each stage holds keys and values for."""
        self.exits = tuple(p for p in shard.exits if p <= policy.deepest)
        """Of the stages that this session may ever run."""
        self._follow(policy)
        self._unseen: list[list[States]] = [[] for _ in shard.exits]
        self._unseen_start = [0] * len(shard.exits)

    @property
    def alone(self) -> bool:
        """Whether no other session is open on this node."""
        return len(self.shard.rooms.sessions) == 1

    @abstractmethod
    def embed(self, token_ids: Sequence[int]) -> States:
        """(n, hidden) states that enter the first stage."""

    @abstractmethod
    def join(self, states: Sequence[States]) -> States:
        """Rows after rows."""

    def close(self) -> None:
        """Give the pages back; the session must not be used any more."""
        self.shard.rooms.release(self)

    def _follow(self, policy: Policy) -> None:
        """Take on a policy, before any stage that it concerns has run."""
        self.policy = policy
        self.judges = tuple(Judge(policy, p) for p in self.exits)
        drafts = policy.draft > 0 and self.shard.is_entry and self.exits[0] < policy.deepest
        self._always_looking = tuple(
            (i == 0 and (drafts or policy.start is not None)) or (self.stands_in and p == self.shard.exits[-1])
            for i, p in enumerate(self.exits)
        )
        self._looking = tuple(policy.looks(p) or self._always_looking[i] for i, p in enumerate(self.exits))

    def looks(self, stage: int) -> bool:
        """Whether a stage's branch is run; where not, it keeps no branch keys and values, and is not run later."""
        return self._looking[stage] and (self._always_looking[stage] or not self.judges[stage].retired)

    def advance(self, stage: int, states: States, wants: Sequence[int]) -> Found | None:
        """Run a stage on the states of the next positions, alone; see `Pass`.

        Returns:
            A token and a confidence for each wanted position; None where this stage never looks.
        """
        work = Pass(self, stage, states, wants)
        while work.rows:
            self.shard.run([(work, min(work.rows, CHUNK))])
            if work.error is not None:
                raise work.error
        return work.found

    def asked(self, stage: int, start: int, count: int, wants: Sequence[int]) -> Sequence[int]:
        """The rows of a block that the branch is read at: the wanted ones, or what is read of a prompt at its end."""
        if self.begins(stage, start + count):
            return range(max(0, count - READ_TOKENS - 1), count)
        if count == 1:
            return (0,) if start in wants else ()
        return [p - start for p in wants if start <= p < start + count]

    def went_through(self, stage: int, boundary: States) -> None:
        """Count positions that a stage has run, and keep its (n, hidden) states for the stage beyond."""
        self.positions[stage] += boundary.shape[0]
        if self.shard.exits[stage] < self.policy.deepest:
            self._unseen[stage].append(boundary)

    def begins(self, stage: int, stop: int) -> bool:
        """Whether a block that ends before this position ends the prompt, of which the answering exit is chosen."""
        return self.policy.start is not None and stage == 0 and stop == self.prompt_length

    def begin(self, reading: Reading) -> None:
        """Choose the exit that answers, now that the first branch has read the prompt."""
        start = self.policy.start
        assert start is not None
        self._follow(self.policy.starting_at(start.exit(reading, self.policy.deepest)))

    def unseen_start(self, stage: int) -> int:
        """Positions that the stage beyond this one holds."""
        return self._unseen_start[stage]

    def take_unseen(self, stage: int, stop: int) -> States:
        """(stop - unseen_start, hidden) boundary states that the stage beyond has not seen; they count as seen now."""
        states = self._unseen[stage]
        joined = states[0] if len(states) == 1 else self.join(states)
        count = stop - self._unseen_start[stage]
        self._unseen_start[stage] = stop
        if count == joined.shape[0]:
            self._unseen[stage] = []
            return joined
        self._unseen[stage] = [joined[count:]]
        return joined[:count]

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        if position >= len(self.token_ids):
            return
        del self.token_ids[position:]
        for judge in self.judges:
            judge.rewind(position)
        for stage, held in enumerate(self.positions):
            if held <= position:
                continue
            self.positions[stage] = position
            start = self._unseen_start[stage]
            if start >= position:
                self._unseen[stage], self._unseen_start[stage] = [], position
            elif self._unseen[stage]:
                self._unseen[stage] = [self.join(self._unseen[stage])[: position - start]]
