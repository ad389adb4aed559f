"""The stages of one node: their weights, their sessions' caches, and one step of several sessions.

Everything here is synchronous and runs on the node's one compute thread (`runtime/worker.py`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ruyi_flow.errors import CapacityError, ContextLengthError, RuyiFlowError
from ruyi_flow.family.transformer import Attention, FamilySlice, Rope
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS, Reading
from ruyi_flow.runtime.attention import LONG_PAGE, BatchedAttention, CachedAttention, flash_attention
from ruyi_flow.runtime.cuda_graphs import Graphs
from ruyi_flow.runtime.kv_cache import PagePool, Run
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.scores import Confidence, likeliest, reading
from ruyi_flow.types import SamplingParams

__all__ = ["CHUNK", "Pass", "Shard", "ShardSession"]

CHUNK = 512
"""Positions that go through the layers at once where a session is alone; that bounds a prompt's memory."""


class Pass:
    """New states of one session on their way through one stage, in one step or several.

    Args:
        session: whose.
        stage: index of the stage on this node.
        states: (n, hidden) boundary states that enter it, of the next positions, whose token ids must be in
            `session.token_ids` already.
        wants: the positions among them whose next token is wanted, ascending.
    """

    __slots__ = ("error", "found", "looks", "session", "stage", "states", "wants")

    def __init__(self, session: ShardSession, stage: int, states: Tensor, wants: Sequence[int]) -> None:
        self.session, self.stage, self.states, self.wants = session, stage, states, wants
        self.looks = session.looks(stage)
        self.found: list[tuple[int, float]] = []
        """A token and a confidence for each wanted position that has been run, where the stage looks."""
        self.error: Exception | None = None
        """Why it cannot go on."""

    @property
    def rows(self) -> int:
        """Rows that are still to be run."""
        return self.states.shape[0]


class Shard:
    """A node's consecutive stages and the memory for their keys and values.

    Args:
        model: the stages.
        max_positions: of keys and values, over all sessions. Memory is reserved, and used as positions fill.
        max_sessions: at once.
        paged: whether short steps run padded, every row as a sequence of its own, and on CUDA as graphs; only on CUDA
            when left out (docs/design/0003-cuda.md).
    """

    def __init__(self, model: FamilySlice, *, max_positions: int, max_sessions: int, paged: bool | None = None) -> None:
        config = model.config
        weight = next(model.parameters())
        self.model, self.exits, self.config = model, model.exits, config
        self.pool = PagePool(max_positions)
        self.max_sessions = max_sessions
        self.sessions: dict[int, ShardSession] = {}
        self.rope = Rope(config, weight.dtype, weight.device)
        self.flash = flash_attention(weight.device, weight.dtype)
        if paged is None:
            paged = weight.is_cuda
        positions = self.pool.num_positions + (LONG_PAGE if paged else 0)
        self.memory = torch.empty(
            (model.num_slots, 2, config.num_kv_heads, positions, config.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        self.graphs = Graphs(model, self.memory, self.pool.num_pages, self.flash) if paged else None
        self.on_release: Callable[[], None] = lambda: None
        """Called, on whatever thread, when a session has given its room back."""
        self._ids = itertools.count()
        self._lock = threading.Lock()  # sessions open on the event loop and close on the compute thread

    @property
    def is_entry(self) -> bool:
        """Whether these stages start with the embedding."""
        return self.model.first_layer == 0

    def open(
        self,
        policy: Policy,
        params: SamplingParams,
        prompt_length: int,
        max_positions: int,
        *,
        stands_in: bool = False,
    ) -> ShardSession:
        """Start a session that never holds more than `max_positions`.

        Args:
            stands_in: the last exit here must be able to decide whatever it is asked.

        Raises:
            CapacityError: too many sessions, or no room for its keys and values.
            ContextLengthError: more positions than the family's context.
            RequestError: a policy that this family cannot serve.
        """
        if max_positions > self.config.max_positions:
            raise ContextLengthError(
                f"a session of {max_positions} positions is past the family's context of {self.config.max_positions}"
            )
        with self._lock:
            if len(self.sessions) >= self.max_sessions:
                raise CapacityError(f"{len(self.sessions)} sessions are running, the limit here is {self.max_sessions}")
            session_id = next(self._ids)
            run = self.pool.allocate(session_id, max_positions)
            try:
                session = ShardSession(self, session_id, run, policy, params, prompt_length, max_positions, stands_in)
            except BaseException:
                self.pool.release(run)
                raise
            self.sessions[session_id] = session
            return session

    @torch.inference_mode()
    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """Run the next rows of several sessions' passes through one stage, together.

        What a session sees does not depend on the others, but for how a product of many rows is rounded. An error of
        one session's alone becomes its pass's.

        Args:
            parts: passes at the same stage, and how many rows of each.
        """
        stage = parts[0][0].stage
        first_layer, exit = self.model.stages[stage]
        pieces = [_Piece.of(work, count) for work, count in parts]
        one = pieces[0] if len(pieces) == 1 else None
        states = one.states if one else torch.cat([piece.states for piece in pieces])
        rope = self._rope(pieces)
        if self.graphs is not None and self.graphs.take(pieces):
            boundary = self.graphs.trunk(stage, pieces, states, rope)
        else:
            boundary = self.model.run(states, first_layer, exit, rope, self._attention(pieces))
        parted = [boundary] if one else boundary.split([piece.count for piece in pieces])
        for piece, states in zip(pieces, parted, strict=True):
            piece.work.session.went_through(stage, states)
        looking = [(piece, states) for piece, states in zip(pieces, parted, strict=True) if piece.work.looks]
        if not looking:
            return
        if len(looking) < len(pieces):
            pieces, boundary = [piece for piece, _ in looking], torch.cat([states for _, states in looking])
            rope = self._rope(pieces)
        self._look(exit, pieces, boundary, rope)

    def _rope(self, pieces: Sequence[_Piece]) -> tuple[Tensor, Tensor]:
        tables = [self.rope.at(piece.start, piece.start + piece.count) for piece in pieces]
        if len(tables) == 1:
            return tables[0]
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])

    def _attention(self, pieces: Sequence[_Piece], asked: Sequence[Sequence[int]] | None = None) -> Attention:
        if len(pieces) == 1:
            return pieces[0].attention
        at = [piece.work.session.run.positions.start + piece.start + i for piece in pieces for i in range(piece.count)]
        blocks = [piece.attention for piece in pieces]
        return BatchedAttention(blocks, self.memory, torch.tensor(at, device=self.memory.device), asked)

    def _look(self, exit: int, pieces: Sequence[_Piece], boundary: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Run the branch at an exit, and pick tokens where they are wanted."""
        rows: list[int] = []
        before = 0
        for piece in pieces:
            rows += [before + row for row in piece.asked]
            before += piece.count
        chosen = None if len(rows) == before else torch.tensor(rows, dtype=torch.int64, device=boundary.device)
        if self.graphs is not None and self.graphs.take(pieces):
            read, logits = self.graphs.branch(exit, pieces, boundary, rope)
            if chosen is not None:
                read, logits = read[chosen], logits[chosen]
            if not rows:
                return
        else:
            attention = self._attention(pieces, None if chosen is None else [piece.asked for piece in pieces])
            reading = self.model.reading(exit, boundary, rope, attention, chosen)
            if reading is None:
                return
            read, logits = reading, self.model.head_at[exit].run(reading)
        tokens, sure = likeliest(logits)
        start = 0
        for piece in pieces:
            stop = start + len(piece.asked)
            if stop > start:
                known = tokens[start:stop], sure[start:stop]
                try:
                    piece.work.session.pick(piece, exit, logits[start:stop], read[start:stop], known)
                except RuyiFlowError as error:
                    piece.work.error = error
            start = stop

    def release(self, session: ShardSession) -> None:
        """Take a session's pages back; it must not be used any more. Releasing twice is fine."""
        with self._lock:
            if self.sessions.pop(session.session_id, None) is None:
                return
            self.pool.release(session.run)
        self.on_release()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool's pages and the open sessions agree."""
        with self._lock:
            self.pool.check_integrity()
            assert self.pool.used == sum(s.run.count for s in self.sessions.values()), "pages of a closed session"


class _Piece:
    """The next rows of a pass, in one step."""

    __slots__ = ("asked", "count", "run", "start", "states", "work")

    def __init__(self, work: Pass, count: int, states: Tensor) -> None:
        session = work.session
        self.work, self.count, self.states = work, count, states
        self.start = session.positions[work.stage]
        self.run = session.run
        self.asked = session.asked(work.stage, self.start, count, work.wants) if work.looks else ()

    @classmethod
    def of(cls, work: Pass, count: int) -> _Piece:
        """Take the rows off the pass."""
        states, work.states = (
            (work.states, work.states[:0]) if count == work.rows else (work.states[:count], work.states[count:])
        )
        return cls(work, count, states)

    @property
    def attention(self) -> CachedAttention:
        """Of these rows alone."""
        return self.work.session.attention(self.start, self.count)


class ShardSession:
    """One sequence on this node's stages: token ids, caches, and states that the stage beyond has not seen."""

    def __init__(
        self,
        shard: Shard,
        session_id: int,
        run: Run,
        policy: Policy,
        params: SamplingParams,
        prompt_length: int,
        max_positions: int,
        stands_in: bool,
    ) -> None:
        self.shard, self.session_id, self.run, self.params = shard, session_id, run, params
        self.max_positions, self.stands_in = max_positions, stands_in
        self.vocab_size = shard.config.vocab_size
        self.sampler = Sampler(params, prompt_length)
        self.token_ids: list[int] = []
        """Of positions 0 …, on the entry node drafts included."""
        self.positions = [0] * len(shard.exits)
        """Positions that each stage holds keys and values for."""
        self.exits = tuple(p for p in shard.exits if p <= policy.deepest)
        """Of the stages that this session may ever run."""
        self._prompt_length = prompt_length
        self._follow(policy)
        branches = shard.model.branch_at
        self._confidence = {p: Confidence(policy.scale, p, branches[p].probe) for p in self.exits}
        self._memory = shard.memory[:, :, :, run.positions]
        self._attention = CachedAttention(self._memory, 0, 0, shard.flash)
        self._unseen: list[list[Tensor]] = [[] for _ in shard.exits]
        self._unseen_start = [0] * len(shard.exits)

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

    @property
    def alone(self) -> bool:
        """Whether no other session is open on this node."""
        return len(self.shard.sessions) == 1

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """(n, hidden) states that enter the first stage."""
        return self.shard.model.embed(torch.tensor(token_ids, device=self.shard.memory.device))

    def advance(self, stage: int, states: Tensor, wants: Sequence[int]) -> list[tuple[int, float]] | None:
        """Run a stage on the states of the next positions, alone; see `Pass`.

        Returns:
            A token and a confidence for each wanted position; None where this stage never looks.
        """
        work = Pass(self, stage, states, wants)
        while work.rows:
            self.shard.run([(work, min(work.rows, CHUNK))])
            if work.error is not None:
                raise work.error
        return work.found if work.looks else None

    def through(
        self, stage: int, states: Tensor, wants: Sequence[int]
    ) -> Generator[Pass, None, list[tuple[int, float]] | None]:
        """The same as a part of a task: whoever runs the task runs the pass."""
        work = Pass(self, stage, states, wants)
        yield work
        return work.found if work.looks else None

    def attention(self, start: int, count: int) -> CachedAttention:
        """For a block at these positions; stages after the first go over the same ones."""
        last = self._attention
        if last.start != start or last.count != count:
            last = self._attention = CachedAttention(self._memory, start, count, self.shard.flash)
        return last

    def asked(self, stage: int, start: int, count: int, wants: Sequence[int]) -> Sequence[int]:
        """The rows of a block that the branch is read at: the wanted ones, or what is read of a prompt at its end."""
        if self._begins(stage, start + count):
            return range(max(0, count - READ_TOKENS - 1), count)
        return [p - start for p in wants if start <= p < start + count]

    def went_through(self, stage: int, boundary: Tensor) -> None:
        """Count positions that a stage has run, and keep its (n, hidden) states for the stage beyond."""
        self.positions[stage] += boundary.shape[0]
        if self.shard.exits[stage] < self.policy.deepest:
            self._unseen[stage].append(boundary)

    def pick(
        self, piece: _Piece, exit: int, logits: Tensor, read: Tensor, known: tuple[list[int], list[float]]
    ) -> None:
        """Pick tokens from a block's (rows, vocab) logits, and from the (rows, hidden) states that the head read."""
        work, stop = piece.work, piece.start + piece.count
        begins = self._begins(work.stage, stop)
        if begins:
            following = torch.tensor(self.token_ids[stop - len(logits) + 1 : stop], device=logits.device)
            loss, entropy = reading(logits[:-1], following)
            logits, read, known = logits[-1:], read[-1:], (known[0][-1:], known[1][-1:])
        wants = [p for p in work.wants if piece.start <= p < stop]
        tokens, sure = self.sampler.pick(logits, wants, self.token_ids, self._confidence[exit], read, known)
        if begins:
            self._begin(Reading(self._prompt_length, loss, entropy, sure[0]))
        work.found += zip(tokens, sure, strict=True)

    def _begins(self, stage: int, stop: int) -> bool:
        """Whether a block that ends before this position ends the prompt, of which the answering exit is chosen."""
        return stage == 0 and self.policy.start is not None and stop == self._prompt_length

    def _begin(self, reading: Reading) -> None:
        """Choose the exit that answers, now that the first branch has read the prompt."""
        start = self.policy.start
        assert start is not None
        self._follow(self.policy.starting_at(start.exit(reading, self.policy.deepest)))

    def unseen_start(self, stage: int) -> int:
        """Positions that the stage beyond this one holds."""
        return self._unseen_start[stage]

    def take_unseen(self, stage: int, stop: int) -> Tensor:
        """(stop - unseen_start, hidden) boundary states that the stage beyond has not seen; they count as seen now."""
        states = self._unseen[stage]
        joined = states[0] if len(states) == 1 else torch.cat(states)
        count = stop - self._unseen_start[stage]
        self._unseen[stage] = [joined[count:]] if count < len(joined) else []
        self._unseen_start[stage] = stop
        return joined[:count]

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
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
                self._unseen[stage] = [torch.cat(self._unseen[stage])[: position - start]]

    def close(self) -> None:
        """Give the pages back; the session must not be used any more."""
        self.shard.release(self)
