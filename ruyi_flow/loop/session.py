"""One sequence on one node's stages: what it contains and what was asked of it. Pure: states are rows that the stages
compute, tensors on a real node and bare counts in the simulator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from ruyi_flow.errors import NodeFault
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.pages import PAGE_SIZE, PageRun
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS, Reading
from ruyi_flow.types import Decision, Likelihood

__all__ = ["CHUNK", "Found", "Pass", "Piece", "Session", "Stages", "States"]

CHUNK = 512
"""Positions that run through the layers at once when a session is alone on its node; this bounds a prompt's memory."""

States = Any
"""(n, hidden) rows: a tensor, or a stand-in that has a `shape` and can be sliced."""

Found = list[tuple[int, float]]
"""A branch's token and confidence at some positions."""


class Stages(Protocol):
    """A node's consecutive stages, and the capacity for sessions on them."""

    exits: tuple[int, ...]
    """The exit at the end of each stage."""
    capacity: Capacity
    """The node's sessions and KV cache pages."""

    @property
    def is_entry(self) -> bool:
        """Whether the first stage starts with the embedding."""
        ...

    def open(self, opening: SessionOpen, lease: Lease, *, covers_next: bool = False) -> Session:
        """Start a session.

        Args:
            opening: the handshake.
            lease: the capacity for `opening.max_positions`; the session gives it back when it is closed. The caller
                does where no session can be started.
            covers_next: whether the last branch here must be able to decide in place of the next node.
        """
        ...

    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """Run the next rows of several sessions' passes through one stage, together.

        Args:
            parts: passes at the same stage, and how many rows to run of each.
        """
        ...


class Pass:
    """New states of one session that run through one stage, in one step or several.

    Args:
        session: the session.
        stage: index of the stage on this node.
        states: (n, hidden) boundary states of the next positions, whose token ids `session.token_ids` already contains.
        wants: the positions among them whose next token is wanted, ascending.
    """

    __slots__ = ("count", "error", "found", "looks", "rows", "session", "stage", "states", "wants")

    def __init__(self, session: Session, stage: int, states: States, wants: Sequence[int]) -> None:
        self.session, self.stage, self.states, self.wants = session, stage, states, wants
        self.count: int = states.shape[0]
        """Number of its rows."""
        self.rows = self.count
        """Number of rows that have not run yet."""
        self.looks = session.runs_branch(stage)
        """Whether the stage's branch runs on these rows."""
        self.found: Found | None = [] if self.looks else None
        """A token and a confidence for each wanted position that has run; None where the branch does not run."""
        self.error: Exception | None = None
        """Why the pass cannot go on."""

    @property
    def exit(self) -> int:
        """The exit that ends the stage."""
        return self.session.stages.exits[self.stage]

    def take(self, count: int) -> States:
        """Remove the next rows and return their states."""
        states = self.states
        self.rows -= count
        if not self.rows:
            self.states = None
            return states
        self.states = states[count:]
        return states[:count]


class Piece:
    """The rows of a pass that run in one step. If they are outside the session's pages, the pass gets an error."""

    __slots__ = ("asked", "count", "pages", "start", "states", "work")

    def __init__(self, work: Pass, count: int) -> None:
        session = work.session
        self.work, self.count, self.states = work, count, work.take(count)
        self.start, self.pages = session.positions[work.stage], session.lease.pages
        if self.start < 0 or self.stop > self.pages.count * PAGE_SIZE:
            # The last check before positions become places in memory that all sessions share.
            work.error = NodeFault(f"positions {self.start} … {self.stop - 1} are outside the session's KV cache pages")
        self.asked = session.rows_to_read(work.stage, self.start, count, work.wants) if work.looks else ()
        """The rows whose vocabulary logits are computed."""

    @property
    def stop(self) -> int:
        """Position after the last row."""
        return self.start + self.count

    @property
    def wants(self) -> list[int]:
        """The positions among the rows whose next token is wanted."""
        return [p for p in self.work.wants if self.start <= p < self.stop]


class Session(ABC):
    """Token ids, positions, judges, and boundary states: those that the next stage here lacks, and the log.

    The log has the states after the last stage here of every position, as long as the session may ask the next node.
    It has as many rows as that stage has positions, and its memory belongs to the lease.

    Args:
        stages: the node's stages.
        lease: the session's capacity, which `close` gives back.
        opening: the handshake: policy, sampling, prompt length, and the largest number of positions.
        vocab_size: number of tokens of the family.
        covers_next: whether the last branch here must be able to decide in place of the next node.
    """

    def __init__(
        self, stages: Stages, lease: Lease, opening: SessionOpen, *, vocab_size: int, covers_next: bool
    ) -> None:
        self.stages, self.lease, self.vocab_size = stages, lease, vocab_size
        self.token_ids: list[int] = []
        """The token id of every position, on the entry node including drafts."""
        self.positions = [0] * len(stages.exits)
        """Number of positions in the KV cache of each stage."""
        self._looked = [0] * len(stages.exits)
        """Number of positions, from the first on, that are in the KV cache of each stage's branch."""
        self._unsent: list[list[States]] = [[] for _ in stages.exits[1:]]
        """States that the next stage here lacks, of each stage but the last."""
        self._unsent_start = [0] * len(self._unsent)
        self._logged = 0
        """Number of positions, from the first on, that are in the log."""
        self.next_has = 0
        """Number of positions that the next node had of the session when it was parked."""
        self.begin(opening, covers_next=covers_next)

    def begin(self, opening: SessionOpen, *, covers_next: bool) -> None:
        """Begin an answer: that of a new session, or another one with the caches that a parked session has."""
        self.params, self.covers_next = opening.sampling, covers_next
        self.max_positions, self.prompt_length = opening.max_positions, opening.prompt_length
        self.exits = tuple(p for p in self.stages.exits if p <= opening.policy.deepest)
        """The exits of the stages that this session may run."""
        self._adopt(opening.policy)
        self.likelihoods: dict[tuple[int, int], Likelihood] = {}
        """How probable a branch found the token that it picked, by exit and position, where the session asks for it."""
        self.prompt_likelihoods: list[Likelihood] = []
        """Likelihoods of the prompt's tokens that have not been told to the previous node."""

    def needs_log(self, policy: Policy) -> bool:
        """Return whether the next node may be asked under a policy."""
        return self.stages.exits[-1] < policy.deepest

    def settle(self) -> None:
        """Forget what a step that was broken off has left behind, so that the caches of all stages fit together."""
        for stage, start in enumerate(self._unsent_start):
            if start > self.positions[stage + 1]:  # its states were on their way to the next stage
                self.rewind(self.positions[stage + 1])
        self.rewind(self.positions[0])

    def reusable(self, policy: Policy, common: int, *, covers_next: bool) -> int:
        """Return how many of the first `common` positions an answer with another policy can reuse."""
        most = min(common, self.positions[0])
        if self.needs_log(policy) and self._logged < self.positions[-1]:
            most = min(most, self._logged)
        exits = [p for p in self.stages.exits if p <= policy.deepest]
        for stage, runs in enumerate(self._branches(policy, covers_next)[1]):
            if runs and self._looked[stage] < self.positions[stage]:
                most = min(most, self._looked[stage])
            kept = 0 if stage >= len(exits) - 1 else sum(states.shape[0] for states in self._unsent[stage])
            if stage < len(exits) - 1 and self._unsent_start[stage] + kept < self.positions[stage]:
                most = min(most, self.positions[stage + 1])
        return most

    @abstractmethod
    def use_pages(self, moved_from: PageRun | None) -> None:
        """Use the pages that the lease has now; see `Lease.resume`.

        Args:
            moved_from: the pages from which the caches and the log must be copied. None: they are there already.
        """

    @property
    def alone(self) -> bool:
        """Whether no other session is open on this node."""
        return self.lease.alone

    @property
    def log_length(self) -> int:
        """Number of rows of the log."""
        return self.positions[-1]

    @abstractmethod
    def embed(self, token_ids: Sequence[int]) -> States:
        """Return the (n, hidden) states that enter the first stage."""

    @abstractmethod
    def states(self, start: int, stop: int) -> States:
        """Return the rows start … stop-1 of the log, which must not be written to."""

    @abstractmethod
    def write_log(self, start: int, boundary: States) -> None:
        """Write the (n, hidden) states of positions from `start` on into the log."""

    @abstractmethod
    def join(self, states: Sequence[States]) -> States:
        """Concatenate rows."""

    def compact(self, states: States) -> States:
        """Return the same rows in memory of their own, if they would keep much more of it alive."""
        return states

    def close(self) -> None:
        """Give the capacity back; the session must not be used any more."""
        self.lease.give_back()

    def _adopt(self, policy: Policy) -> None:
        """Take over a policy, before any stage that it concerns has run."""
        self.policy = policy
        self.judges = tuple(Judge(policy, p) for p in self.exits)
        self._always_runs_branch, self._may_run_branch = self._branches(policy, self.covers_next)

    def _branches(self, policy: Policy, covers_next: bool) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Return, for each stage that a policy may run, whether its branch always runs, and whether it may."""
        routing, exits = policy.routing, [p for p in self.stages.exits if p <= policy.deepest]
        drafts = routing.draft > 0 and self.stages.is_entry and exits[0] < policy.deepest
        always = tuple(
            (i == 0 and (drafts or routing.start is not None)) or (covers_next and p == self.stages.exits[-1])
            for i, p in enumerate(exits)
        )
        return always, tuple(policy.can_decide(p) or always[i] for i, p in enumerate(exits))

    def runs_branch(self, stage: int) -> bool:
        """Return whether a stage's branch runs. Where it does not, it fills no KV cache and never runs later."""
        return self._may_run_branch[stage] and (self._always_runs_branch[stage] or not self.judges[stage].retired)

    def rows_to_read(self, stage: int, start: int, count: int, wants: Sequence[int]) -> Sequence[int]:
        """Return the rows of a piece whose logits are computed: those of `rows_to_pick`, or all of a prompt's."""
        return range(count) if self.reads_prompt(stage, start) else self.rows_to_pick(stage, start, count, wants)

    def rows_to_pick(self, stage: int, start: int, count: int, wants: Sequence[int]) -> Sequence[int]:
        """Return the rows of a piece from which tokens are picked: the wanted ones, or the end of a rated prompt."""
        if self.rates_prompt(stage, start + count):
            return range(max(0, count - READ_TOKENS - 1), count)
        if count == 1:
            return (0,) if start in wants else ()
        return [p - start for p in wants if start <= p < start + count]

    def add_boundary(self, stage: int, boundary: States, *, looks: bool = False) -> None:
        """Count positions that a stage has run, and keep their (n, hidden) states for the next stage.

        Args:
            stage: the stage.
            boundary: the states.
            looks: whether the stage's branch runs on them as well.
        """
        start = self.positions[stage]
        self.positions[stage] = stop = start + boundary.shape[0]
        if looks and self._looked[stage] == start:
            self._looked[stage] = stop
        if self.stages.exits[stage] < self.policy.deepest:
            if stage < len(self._unsent):
                self._unsent[stage].append(self.compact(boundary))
            else:
                self.write_log(start, boundary)
                if self._logged == start:
                    self._logged = stop

    def rates_prompt(self, stage: int, stop: int) -> bool:
        """Return whether a piece that ends before position `stop` ends a prompt from which the first exit is chosen."""
        return self.policy.routing.start is not None and stage == 0 and stop == self.prompt_length

    def reads_prompt(self, stage: int, start: int) -> bool:
        """Return whether a piece from this position on has tokens of a prompt whose likelihoods are asked for."""
        return (
            self.params.prompt_logprobs is not None
            and start + 1 < self.prompt_length
            and self.exits[stage] == self.policy.deepest
        )

    def with_likelihoods(self, decisions: Sequence[Decision], positions: Sequence[int]) -> tuple[Decision, ...]:
        """Return decisions with the likelihoods that the branches here found, and forget those of decided positions.

        Args:
            decisions: decided tokens; those of deeper nodes have their likelihoods already.
            positions: the position before each of them.
        """
        found = self.likelihoods
        self.likelihoods = {key: value for key, value in found.items() if key[1] > positions[len(decisions) - 1]}
        return tuple(
            d._replace(likelihood=found.get((d.exit, position))) if d.likelihood is None else d
            for d, position in zip(decisions, positions, strict=False)
        )

    def take_prompt_likelihoods(self) -> tuple[Likelihood, ...]:
        """Return the likelihoods of the prompt's tokens that the previous node does not know yet."""
        found, self.prompt_likelihoods = tuple(self.prompt_likelihoods), []
        return found

    def choose_start(self, reading: Reading) -> None:
        """Choose the exit that answers from what the first branch makes of the prompt."""
        start = self.policy.routing.start
        assert start is not None
        self._adopt(self.policy.starting_at(start.exit(reading, self.policy.deepest)))

    def unsent_start(self, stage: int) -> int:
        """Return the number of positions that the next stage here has received."""
        return self._unsent_start[stage]

    def take_unsent(self, stage: int, stop: int) -> States:
        """Return the (stop - unsent_start, hidden) states that the next stage here lacks; it has received them then."""
        states = self._unsent[stage]
        joined = states[0] if len(states) == 1 else self.join(states)
        count = stop - self._unsent_start[stage]
        self._unsent_start[stage] = stop
        if count == joined.shape[0]:
            self._unsent[stage] = []
            return joined
        self._unsent[stage] = [self.compact(joined[count:])]
        return joined[:count]

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        if position >= len(self.token_ids):
            return
        del self.token_ids[position:]
        for judge in self.judges:
            judge.rewind(position)
        for stage, count in enumerate(self.positions):
            if count <= position:
                continue
            self.positions[stage] = position
            self._looked[stage] = min(self._looked[stage], position)
            if stage == len(self._unsent):
                self._logged = min(self._logged, position)
                continue
            start = self._unsent_start[stage]
            if start >= position:
                self._unsent[stage], self._unsent_start[stage] = [], position
            elif self._unsent[stage]:
                self._unsent[stage] = [self.compact(self.join(self._unsent[stage])[: position - start])]
