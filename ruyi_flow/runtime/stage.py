"""The stages of one node: their weights, their sessions' caches, and one step of several sessions.

Everything here is synchronous and runs on the node's one compute thread (`runtime/worker.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.family.transformer import Attention, FamilySlice, Rope
from ruyi_flow.loop.capacity import Rooms
from ruyi_flow.loop.pages import Run
from ruyi_flow.loop.session import Pass, Piece, Session
from ruyi_flow.routing.policy import Policy
from ruyi_flow.routing.start import Reading
from ruyi_flow.runtime.attention import LONG_PAGE, BatchedAttention, CachedAttention, flash_attention
from ruyi_flow.runtime.cuda_graphs import Graphs
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.scores import Confidence, loss_and_entropy, most_probable
from ruyi_flow.types import SamplingParams

__all__ = ["Shard", "ShardSession"]


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
        self.rooms = Rooms(max_positions, max_sessions, config.max_positions)
        self.pool, self.sessions = self.rooms.pool, self.rooms.sessions
        self.rope = Rope(config, weight.dtype, weight.device)
        self.flash = flash_attention(weight.device, weight.dtype, config.head_dim)
        if paged is None:
            paged = weight.is_cuda
        positions = self.pool.num_positions + (LONG_PAGE if paged else 0)
        self.memory = torch.empty(
            (model.num_slots, 2, config.num_kv_heads, positions, config.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        self.graphs = Graphs(model, self.memory, self.pool.num_pages, self.flash) if paged else None

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
        return self.rooms.open(
            max_positions,
            lambda session_id, run: ShardSession(
                self, session_id, run, policy, params, prompt_length, max_positions, stands_in
            ),
        )

    @torch.inference_mode()
    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """See `Stages.run`.

        What a session sees does not depend on the others, but for how a product of many rows is rounded. An error of
        one session's alone becomes its pass's.
        """
        stage = parts[0][0].stage
        first_layer, exit = self.model.stages[stage]
        pieces = [Piece(work, count) for work, count in parts]
        one = pieces[0] if len(pieces) == 1 else None
        states = one.states if one else torch.cat([piece.states for piece in pieces])
        rope = self._rope(pieces)
        if self.graphs is not None and self.graphs.accepts(pieces):
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

    def _rope(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        tables = [self.rope.at(piece.start, piece.stop) for piece in pieces]
        if len(tables) == 1:
            return tables[0]
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])

    def _attention(self, pieces: Sequence[Piece], asked: Sequence[Sequence[int]] | None = None) -> Attention:
        sessions = [_session(piece) for piece in pieces]
        blocks = [session.attention(piece.start, piece.count) for session, piece in zip(sessions, pieces, strict=True)]
        if len(blocks) == 1:
            return blocks[0]
        first = [session.run.positions.start + piece.start for session, piece in zip(sessions, pieces, strict=True)]
        at = [start + i for start, piece in zip(first, pieces, strict=True) for i in range(piece.count)]
        return BatchedAttention(blocks, self.memory, torch.tensor(at, device=self.memory.device), asked)

    def _look(self, exit: int, pieces: Sequence[Piece], boundary: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Run the branch at an exit, and pick tokens where they are wanted."""
        rows: list[int] = []
        before = 0
        for piece in pieces:
            rows += [before + row for row in piece.asked]
            before += piece.count
        chosen = None if len(rows) == before else torch.tensor(rows, dtype=torch.int64, device=boundary.device)
        if self.graphs is not None and self.graphs.accepts(pieces):
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
        tokens, sure = most_probable(logits)
        start = 0
        for piece in pieces:
            stop = start + len(piece.asked)
            if stop > start:
                known = tokens[start:stop], sure[start:stop]
                try:
                    _session(piece).pick(piece, exit, logits[start:stop], read[start:stop], known)
                except RuyiFlowError as error:
                    piece.work.error = error
            start = stop


def _session(piece: Piece) -> ShardSession:
    session = piece.work.session
    assert isinstance(session, ShardSession)
    return session


class ShardSession(Session):
    """A session on a `Shard`: its tensors, and how its tokens are picked."""

    shard: Shard

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
        vocab_size = shard.config.vocab_size
        super().__init__(shard, session_id, run, vocab_size, policy, params, prompt_length, max_positions, stands_in)
        self.sampler = Sampler(params, prompt_length)
        branches = shard.model.branch_at
        self._confidence = {p: Confidence(policy.scale, p, branches[p].probe) for p in self.exits}
        self._memory = shard.memory[:, :, :, run.positions]
        self._attention = CachedAttention(self._memory, 0, 0, shard.flash)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        return self.shard.model.embed(torch.tensor(token_ids, device=self.shard.memory.device))

    def join(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(states))

    def attention(self, start: int, count: int) -> CachedAttention:
        """For a block at these positions; stages after the first go over the same ones."""
        last = self._attention
        if last.start != start or last.count != count:
            last = self._attention = CachedAttention(self._memory, start, count, self.shard.flash)
        return last

    def pick(self, piece: Piece, exit: int, logits: Tensor, read: Tensor, known: tuple[list[int], list[float]]) -> None:
        """Pick tokens from a block's (rows, vocab) logits, and from the (rows, hidden) states that the head read."""
        work, stop = piece.work, piece.stop
        begins = self.begins(work.stage, stop)
        if begins:
            following = torch.tensor(self.token_ids[stop - len(logits) + 1 : stop], device=logits.device)
            loss, entropy = loss_and_entropy(logits[:-1], following)
            logits, read, known = logits[-1:], read[-1:], (known[0][-1:], known[1][-1:])
        confidence = self._confidence[exit]
        tokens, sure = self.sampler.pick(
            logits, piece.wants, self.token_ids, confidence=confidence, head_input=read, known=known
        )
        if begins:
            self.begin(Reading(self.prompt_length, loss, entropy, sure[0]))
        assert work.found is not None
        work.found += zip(tokens, sure, strict=True)
