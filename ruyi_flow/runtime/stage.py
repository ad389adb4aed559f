"""The stages of one node: their weights, the KV caches of their sessions, and one step of several sessions.

Everything here is synchronous. It runs on the node's compute thread, or on the event loop while a session is alone
(`runtime/worker.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.family.transformer import Attention, FamilySlice, Rope
from ruyi_flow.loop.capacity import Capacity, Lease
from ruyi_flow.loop.pages import PageRun
from ruyi_flow.loop.session import Pass, Piece, Session
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.start import Reading
from ruyi_flow.runtime.attention import LONG_PAGE, BatchedAttention, CachedAttention, flash_attention
from ruyi_flow.runtime.cuda_graphs import Graphs
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.scores import Confidence, likelihoods, loss_and_entropy, most_probable

__all__ = ["Shard", "ShardSession"]


class Shard:
    """A node's consecutive stages, and the memory of their KV cache.

    Args:
        model: the stages' weights.
        max_positions: KV cache positions over all sessions. The memory is reserved, and used as positions fill.
        max_sessions: number of sessions at the same time.
        paged: whether short steps run padded, with every row as a sequence of its own, and on CUDA as graphs. Default:
            only on CUDA (docs/design/0003-cuda.md).
    """

    def __init__(self, model: FamilySlice, *, max_positions: int, max_sessions: int, paged: bool | None = None) -> None:
        config = model.config
        weight = next(model.parameters())
        self.model, self.exits, self.config = model, model.exits, config
        self.capacity = Capacity(max_positions, max_sessions, config.max_positions)
        self.rope = Rope(config, weight.dtype, weight.device)
        self.flash = flash_attention(weight.device, weight.dtype, config.head_dim)
        if paged is None:
            paged = weight.is_cuda
        pool = self.capacity.pool
        positions = pool.num_positions + (LONG_PAGE if paged else 0)
        self.memory = torch.empty(
            (model.num_slots, 2, config.num_kv_heads, positions, config.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
        self.log = torch.empty(
            (0 if model.exits[-1] == config.exits[-1] else pool.num_positions, config.hidden_size),
            dtype=weight.dtype,
            device=weight.device,
        )
        """(positions, hidden) states after the last stage, kept for the next node; empty on the deepest one."""
        self.graphs = Graphs(model, self.memory, pool.num_pages, self.flash) if paged else None

    @property
    def is_entry(self) -> bool:
        """Whether the first stage starts with the embedding."""
        return self.model.first_layer == 0

    def open(self, opening: SessionOpen, lease: Lease, *, covers_next: bool = False) -> ShardSession:
        """Start a session; see `Stages.open`.

        Raises:
            RequestError: the family cannot serve the policy.
        """
        return ShardSession(self, lease, opening, covers_next=covers_next)

    @torch.inference_mode()
    def run(self, parts: Sequence[tuple[Pass, int]]) -> None:
        """Run rows of several sessions through one stage together; see `Stages.run`.

        The others in a step change what a session sees only by how a matrix product of many rows is rounded. An error
        that concerns one session only becomes the error of its pass.
        """
        stage = parts[0][0].stage
        first_layer, exit = self.model.stages[stage]
        pieces = [piece for piece in (Piece(work, count) for work, count in parts) if piece.work.error is None]
        if not pieces:
            return
        one = pieces[0] if len(pieces) == 1 else None
        states = one.states if one else torch.cat([piece.states for piece in pieces])
        rope = self._rope(pieces)
        if self.graphs is not None and self.graphs.accepts(pieces):
            boundary = self.graphs.trunk(stage, pieces, states, rope)
        else:
            boundary = self.model.run(states, first_layer, exit, rope=rope, attention=self._attention(pieces))
        parted = [boundary] if one else boundary.split([piece.count for piece in pieces])
        for piece, states in zip(pieces, parted, strict=True):
            piece.work.session.add_boundary(stage, states, looks=piece.work.looks)
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
        first = [piece.pages.positions.start + piece.start for piece in pieces]
        at = [start + i for start, piece in zip(first, pieces, strict=True) for i in range(piece.count)]
        return BatchedAttention(blocks, self.memory, torch.tensor(at, device=self.memory.device), asked)

    def _look(self, exit: int, pieces: Sequence[Piece], boundary: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Run the branch at an exit on (rows, hidden) boundary states, and pick tokens where they are wanted."""
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
            normed = self.model.branch_states(exit, boundary, rope=rope, attention=attention, rows=chosen)
            if normed is None:
                return
            read, logits = normed, self.model.head_at[exit].run(normed)
        tokens, probabilities = most_probable(logits)
        start = 0
        for piece in pieces:
            stop = start + len(piece.asked)
            if stop > start:
                known = tokens[start:stop], probabilities[start:stop]
                try:
                    _session(piece).pick(piece, exit, logits[start:stop], read=read[start:stop], known=known)
                except RuyiFlowError as error:
                    piece.work.error = error
            start = stop


def _session(piece: Piece) -> ShardSession:
    session = piece.work.session
    assert isinstance(session, ShardSession)
    return session


class ShardSession(Session):
    """A session on a `Shard`: its KV cache, and how its tokens are picked."""

    stages: Shard

    def __init__(self, shard: Shard, lease: Lease, opening: SessionOpen, *, covers_next: bool) -> None:
        super().__init__(shard, lease, opening, vocab_size=shard.config.vocab_size, covers_next=covers_next)
        self.use_pages(None)

    def begin(self, opening: SessionOpen, *, covers_next: bool) -> None:
        super().begin(opening, covers_next=covers_next)
        self.sampler = Sampler(opening.sampling, opening.prompt_length)
        scale, branches = opening.policy.routing.scale, self.stages.model.branch_at
        self._confidence = {p: Confidence(scale, p, branches[p].probe) for p in self.exits}
        self._unrated: Tensor | None = None
        """(1, vocab) logits after the last token of a part of a prompt, until the next part's first token is known."""

    @torch.inference_mode()
    def use_pages(self, moved_from: PageRun | None) -> None:
        """Use the pages that the lease has now, and copy the caches and the log there if it moved; see `Lease.resume`.

        Args:
            moved_from: the pages that hold them, which may overlap the new ones. None: they are there already.
        """
        memory, log, pages = self.stages.memory, self.stages.log, self.lease.pages.positions
        if moved_from is not None:
            shift, stop = pages.start - moved_from.positions.start, moved_from.positions.start + max(self.positions)
            # Steps as long as the distance never overlap; in this order each reads what no other has overwritten.
            starts = range(moved_from.positions.start, stop, abs(shift))
            for start in reversed(starts) if shift > 0 else starts:
                old = slice(start, min(start + abs(shift), stop))
                new = slice(old.start + shift, old.stop + shift)
                memory[:, :, :, new], log[new] = memory[:, :, :, old], log[old]
        self._memory, self._log = memory[:, :, :, pages], log[pages]
        self._attention = CachedAttention(self._memory, 0, 0, self.stages.flash)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> Tensor:
        return self.stages.model.embed(torch.tensor(token_ids, device=self.stages.memory.device))

    def states(self, start: int, stop: int) -> Tensor:
        return self._log[start:stop]

    def write_log(self, start: int, boundary: Tensor) -> None:
        self._log[start : start + boundary.shape[0]] = boundary

    def join(self, states: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(states))

    def compact(self, states: Tensor) -> Tensor:
        # A session's states are views of the step's, which others share. A copy of small ones frees the others' rows.
        small = 2 * states.numel() * states.element_size() < states.untyped_storage().nbytes()
        return states.clone() if small else states

    def attention(self, start: int, count: int) -> CachedAttention:
        """Return the attention of a piece at these positions; the stages after the first reuse it."""
        last = self._attention
        if last.start != start or last.count != count:
            last = self._attention = CachedAttention(self._memory, start, count, self.stages.flash)
        return last

    def pick(
        self, piece: Piece, exit: int, logits: Tensor, *, read: Tensor, known: tuple[list[int], list[float]]
    ) -> None:
        """Pick the wanted tokens of a piece.

        Args:
            piece: the rows.
            exit: the branch's exit.
            logits: (rows, vocab) logits of the rows that were read.
            read: (rows, hidden) states that the LM head read.
            known: the most probable token and its probability, per row.
        """
        work, stop = piece.work, piece.stop
        if self.reads_prompt(work.stage, piece.start):
            self._rate_prompt(logits, piece.start)
            rows = list(self.rows_to_pick(work.stage, piece.start, piece.count, work.wants))
            if not rows:
                return
            logits, read, known = logits[rows], read[rows], ([known[0][i] for i in rows], [known[1][i] for i in rows])
        rates_prompt = self.rates_prompt(work.stage, stop)
        if rates_prompt:
            rated = torch.tensor(self.token_ids[stop - len(logits) + 1 : stop], device=logits.device)
            loss, entropy = loss_and_entropy(logits[:-1], rated)
            logits, read, known = logits[-1:], read[-1:], (known[0][-1:], known[1][-1:])
        tokens, confidences = self.sampler.pick(
            logits, piece.wants, self.token_ids, confidence=self._confidence[exit], head_input=read, known=known
        )
        if self.params.logprobs is not None:
            for position, found in zip(piece.wants, likelihoods(logits, tokens, self.params.logprobs), strict=True):
                self.likelihoods[exit, position] = found
        if rates_prompt:
            self.choose_start(Reading(self.prompt_length, loss, entropy, confidences[0]))
        assert work.found is not None
        work.found += zip(tokens, confidences, strict=True)

    def _rate_prompt(self, logits: Tensor, start: int) -> None:
        """Add the likelihoods of the prompt's tokens that follow these (n, vocab) logits, of positions from `start`."""
        assert self.params.prompt_logprobs is not None
        if self._unrated is not None:
            logits, start = torch.cat([self._unrated, logits]), start - 1
        following = self.token_ids[start + 1 : min(start + 1 + len(logits), self.prompt_length)]
        self.prompt_likelihoods += likelihoods(logits[: len(following)], following, self.params.prompt_logprobs)
        ends_part = start + 1 + len(following) < self.prompt_length and len(following) < len(logits)
        self._unrated = logits[-1:].clone() if ends_part else None
