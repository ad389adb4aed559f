"""The stages of one node: their weights, their sessions' caches, and one step of one session.

Everything here is synchronous and runs on the node's one compute thread (`runtime/worker.py`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.family.transformer import FamilySlice, Rope
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS, Reading
from ruyi_flow.runtime.attention import CachedAttention, flash_attention
from ruyi_flow.runtime.kv_cache import PagePool, Run
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.scores import Confidence, reading
from ruyi_flow.types import SamplingParams

__all__ = ["CHUNK", "Shard", "ShardSession"]

CHUNK = 512
"""Positions that go through the layers at once; a longer prompt goes in several steps, which bounds its memory."""


class Shard:
    """A node's consecutive stages and the memory for their keys and values.

    Args:
        model: the stages.
        max_positions: of keys and values, over all sessions. Memory is reserved, and used as positions fill.
        max_sessions: at once.
    """

    def __init__(self, model: FamilySlice, *, max_positions: int, max_sessions: int) -> None:
        config = model.config
        weight = next(model.parameters())
        self.model, self.exits, self.config = model, model.exits, config
        self.pool = PagePool(max_positions)
        self.max_sessions = max_sessions
        self.sessions: dict[int, ShardSession] = {}
        self.rope = Rope(config, weight.dtype, weight.device)
        self.flash = flash_attention() if weight.device.type == "cuda" else None
        self.memory = torch.empty(
            (model.num_slots, 2, config.num_kv_heads, self.pool.num_positions, config.head_dim),
            dtype=weight.dtype,
            device=weight.device,
        )
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

    def release(self, session: ShardSession) -> None:
        """Take a session's pages back; it must not be used any more. Releasing twice is fine."""
        with self._lock:
            if self.sessions.pop(session.session_id, None) is not None:
                self.pool.release(session.run)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool's pages and the open sessions agree."""
        with self._lock:
            self.pool.check_integrity()
            assert self.pool.used == sum(s.run.count for s in self.sessions.values()), "pages of a closed session"


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

    @torch.inference_mode()
    def advance(self, stage: int, states: Tensor, wants: Sequence[int]) -> list[tuple[int, float]] | None:
        """Run a stage on the states of the next positions; look where a token is wanted.

        Args:
            stage: index of the stage on this node.
            states: (n, hidden) boundary states that enter it; their token ids must be in `token_ids` already.
            wants: the positions among them whose next token is wanted, ascending.

        Returns:
            A token and a confidence for each wanted position; None where this stage never looks.
        """
        start, looks = self.positions[stage], self.looks(stage)
        found: list[tuple[int, float]] = []
        for first in range(start, start + len(states), CHUNK):
            count = min(CHUNK, start + len(states) - first)
            chunk = states if count == len(states) else states[first - start : first - start + count]
            asked = [p for p in wants if first <= p < first + count] if looks else []
            found += self._advance_chunk(stage, first, chunk, asked, looks)
        return found if looks else None

    def _advance_chunk(
        self, stage: int, start: int, states: Tensor, wants: Sequence[int], looks: bool
    ) -> list[tuple[int, float]]:
        shard, count = self.shard, len(states)
        model = shard.model
        rope = shard.rope.at(start, start + count)
        attention = self._attention
        if attention.start != start or attention.count != count:  # stages after the first go over the same positions
            attention = self._attention = CachedAttention(self._memory, start, count, shard.flash)
        first_layer, exit = model.stages[stage]
        boundary = model.run(states, first_layer, exit, rope, attention)
        self.positions[stage] = start + count
        if exit < self.policy.deepest:
            self._unseen[stage].append(boundary)
        if not looks:
            return []
        begins = stage == 0 and self.policy.start is not None and start + count == self._prompt_length
        rows: Sequence[int] = range(max(0, count - READ_TOKENS - 1), count) if begins else [p - start for p in wants]
        chosen = None if len(rows) == count else torch.tensor(rows, dtype=torch.int64, device=states.device)
        read = model.reading(exit, boundary, rope, attention, chosen)
        if read is None:
            return []
        logits = model.head_at[exit].forward(read)
        if begins:
            following = torch.tensor(self.token_ids[start + rows[0] + 1 : start + count], device=logits.device)
            loss, entropy = reading(logits[:-1], following)
            logits, read = logits[-1:], read[-1:]
        confidence = partial(self._confidence[exit], read=read)
        tokens, sure = self.sampler.pick(logits, wants, self.token_ids, confidence)
        if begins:
            self._begin(Reading(self._prompt_length, loss, entropy, sure[0]))
        return list(zip(tokens, sure, strict=True))

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
