"""The one loop, at every depth: run, look, answer what is sure, escalate the rest, rewind to what it decided.

A `Chain` is a node's consecutive stages and, where there is one, the stage beyond them, which may be on another
machine. It is itself a `Stage`. Only the entry node's chain `propose`s: it drafts with its first branch.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import NamedTuple, TypeVar

from ruyi_flow.errors import WireError
from ruyi_flow.loop.clock import REAL, Time
from ruyi_flow.loop.next_stage import Beyond, Uplink
from ruyi_flow.loop.scheduler import WHOLE
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.loop.steps import Task, Worker
from ruyi_flow.routing.drafting import Length, Pace, gains
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.routing.walk import Look, Walk
from ruyi_flow.types import Block, Decision, Hop, Reason, Stage, Verdict

__all__ = ["Chain", "Round", "decode"]

PART = 128
"""Positions of a prompt that go to the next node together, so that it can start before all of them are computed."""

_BRIEF_ROWS = 16
"""Positions in a step that may be brief."""

T = TypeVar("T")

_Descent = tuple[list[Walk], Block | None]
"""A block's walks down this node's stages, and what is left to ask beyond them."""


class Round(NamedTuple):
    """What one proposal of the entry node settled."""

    decisions: tuple[Decision, ...]
    hops: tuple[Hop, ...]
    drafted: int = 0
    """Tokens drafted past the first position that was asked deeper."""
    accepted: int = 0
    """Those of them that hold."""


class Chain:
    """A node's stages for one session, and the stage beyond.

    Args:
        session: the caches; this chain closes it.
        worker: where steps run.
        node: the node's name, for the times it reports.
        beyond: makes the stage beyond this node's, when it is first needed, for the policy that the session has by
            then; None on the deepest node.
        gate: asked before so many positions go beyond this node: why they may not. The session must stand in then.
        pace: the entry node's; one of its own when left out.
        ahead: decided positions that may go up before anything is asked about them.
        time: where it waits.
        uplink: to the stage beyond, which other sessions use too; one of its own when left out.
    """

    def __init__(
        self,
        session: Session,
        worker: Worker,
        node: str,
        beyond: Callable[[Policy], Stage] | None = None,
        gate: Callable[[int], Reason | None] | None = None,
        pace: Pace | None = None,
        ahead: int = 0,
        time: Time = REAL,
        uplink: Uplink | None = None,
    ) -> None:
        self._session, self._worker, self._node, self._time = session, worker, node, time
        self._beyond = Beyond(session, beyond, gate, ahead, time, uplink or Uplink())
        self._since = time.now()
        """When what this node does for the session now came to it; all of a prompt's parts came with the first."""
        self._pace = pace or Pace()
        self._ahead: list[tuple[int, float]] = []
        """The first branch's token and confidence at the last positions that it has run: drafted past what was asked,
        while the answer was awaited."""

    @property
    def session(self) -> Session:
        """The session's state on this node."""
        return self._session

    async def advance(self, block: Block) -> Verdict:
        """See `Stage.advance`.

        Raises:
            WireError: the block does not continue what this session holds.
        """
        start, states, token_ids, wants = block
        session, count = self._session, len(token_ids)
        held = session.positions[0]
        if start != held:
            raise WireError(f"a block starts at position {start}, but this session holds {held}")
        if states.shape[0] != count or any(not held <= p < held + count for p in wants):
            raise WireError(f"a block of {count} positions has {states.shape[0]} states, wants {wants}")
        if max(token_ids) >= session.vocab_size:
            raise WireError(f"a block has token ids up to {max(token_ids)}, past {session.vocab_size - 1}")
        if held + count > session.max_positions:
            raise WireError(f"a block ends at position {held + count}; the session asked for {session.max_positions}")
        session.token_ids.extend(token_ids)
        if held >= session.prompt_length:
            self._since = self._time.now()
        hop = Hop(self._node)
        if not wants and self._passes_on:
            await self._pass_on(hop, block)
            return Verdict((), (hop,))
        descent = await self._step(hop, count, self._descend([], 0, block))
        return Verdict(*await self._conclude(descent, hop))

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`; in one process there is nothing to gain from not waiting."""
        await self.advance(block)

    async def arrived(self) -> None:
        """See `Stage.arrived`."""

    async def propose(self, token_ids: Sequence[int], draft: int) -> Round:
        """Entry node: take in decided tokens, and settle what comes next.

        Args:
            token_ids: tokens that are final and not yet held: the prompt, or the last decided one.
            draft: at most this many tokens are drafted past an unsure position.

        Returns:
            At least one decision, for the positions from the last given one on.
        """
        hop = Hop(self._node)
        self._since = self._time.now()
        if len(token_ids) > WHOLE:
            token_ids = await self._begin(hop, token_ids)
        if not draft and not self._ahead:
            descent = await self._step(hop, len(token_ids), self._ask_first(token_ids))
            decisions, hops = await self._conclude(descent, hop)
            return Round(decisions, hops)
        began, brief = self._time.now(), len(token_ids) == 1
        weighed = brief and draft > 0 and self._may_be_quiet()
        quiet = weighed and not self._ahead and not self._pace.drafts()  # drafts that are there cost nothing more
        if quiet:
            descent, drafting_s = await self._step(hop, 1, self._do_not_draft(token_ids[0])), 0.0
        else:
            descent, drafting_s = await self._step(hop, len(token_ids) + draft, self._draft(token_ids, draft))
        decisions, hops = await self._conclude(descent, hop, ahead=draft > 0 and not quiet)
        walk = descent[0][0]
        took = self._time.now() - began
        if weighed:
            self._pace.settled(not quiet, took, len(decisions))
        if brief and walk.unsure and not quiet:
            self._pace.asked(max(0.0, took - drafting_s))
        if not walk.unsure:
            return Round(decisions, hops)
        past = next(i for i, look in enumerate(walk.looks) if look.reason is None) + 1
        return Round(decisions, hops, len(walk.looks) - past, len(decisions) - past)

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        self._session.rewind(position)
        self._ahead.clear()
        await self._beyond.rewind(position)

    async def close(self) -> None:
        """See `Stage.close`; the cache is free once the step that may be running has ended."""
        self._worker.submit(self._session.close)
        await self._beyond.close()

    async def _step(self, hop: Hop, rows: int, task: Task[T]) -> T:
        """Run a task of so many positions, and count its time."""
        brief = rows <= _BRIEF_ROWS and self._session.alone
        result, queue_s, compute_s = await self._worker.run(task, brief=brief, since=self._since)
        hop.queue_s += queue_s
        hop.compute_s += compute_s
        return result

    async def _begin(self, hop: Hop, token_ids: Sequence[int]) -> Sequence[int]:
        """Take in the front of a long prompt, and give what is left of it.

        Where all of it goes deeper anyway, it goes in parts, so that deeper nodes compute the first ones while this one
        computes the next. Where the exit that answers is chosen by the prompt's end, that stays together.
        """
        session = self._session
        if self._passes_on:
            while len(token_ids) > PART:
                part, token_ids = token_ids[:PART], token_ids[PART:]
                start = len(session.token_ids)
                session.token_ids.extend(part)
                await self._pass_on(hop, Block(start, session.embed(part), tuple(part), ()))
        elif session.policy.start is not None:
            count = len(token_ids) - READ_TOKENS - 1
            await self._step(hop, count, self._take(token_ids[:count]))
            token_ids = token_ids[count:]
        return token_ids

    @property
    def _passes_on(self) -> bool:
        """Whether the next node will be asked about every position, whatever the branches here say of it."""
        session = self._session
        return (
            self._beyond.always
            and session.policy.deepest not in session.exits
            and all(judge.silent for judge in session.judges)
        )

    async def _pass_on(self, hop: Hop, block: Block) -> None:
        """Run this node's layers on a part of a prompt, and feed it to the next node."""
        onward = await self._step(hop, len(block.token_ids), self._fill(block))
        await self._beyond.feed(onward)

    def _fill(self, block: Block) -> Task[Block]:
        """Fill the caches of all stages here; gives what the next node gets."""
        session, stop = self._session, block.start + len(block.token_ids)
        states = block.states
        for stage in range(len(session.exits)):
            yield Pass(session, stage, states, ())
            start, states = session.unseen_start(stage), session.take_unseen(stage, stop)
        return Block(start, states, tuple(session.token_ids[start:stop]), ())

    def _take(self, token_ids: Sequence[int]) -> Task[None]:
        """Fill the first stage's caches with a part of the prompt."""
        session = self._session
        session.token_ids.extend(token_ids)
        yield Pass(session, 0, session.embed(token_ids), ())

    def _may_be_quiet(self) -> bool:
        """Whether the first branch is here for its drafts alone, whose worth is measured."""
        session = self._session
        alone = session.stands_in and len(session.exits) == 1
        return session.policy.scale is not None and session.judges[0].silent and not alone

    def _do_not_draft(self, token_id: int) -> Task[_Descent]:
        """Ask deeper at once: the first branch keeps its keys and values, and is not looked at."""
        session = self._session
        session.token_ids.append(token_id)
        yield Pass(session, 0, session.embed((token_id,)), ())
        walk = Walk(session.exits[0])
        walk.add(Look(len(session.token_ids) - 1, None))
        return (yield from self._descend([walk], 1, self._question(0, walk)))

    def _ask_first(self, token_ids: Sequence[int]) -> Task[_Descent]:
        """Ask the first stage what comes next, and deeper ones if it is unsure."""
        session = self._session
        start = len(session.token_ids)
        session.token_ids.extend(token_ids)
        block = Block(start, session.embed(token_ids), tuple(token_ids), (len(session.token_ids) - 1,))
        return (yield from self._descend([], 0, block))

    def _draft(self, token_ids: Sequence[int], draft: int) -> Task[tuple[_Descent, float]]:
        """The first stage's walk, position by position: its own tokens are the drafts. And what that took."""
        session, length = self._session, Length(self._pace)
        policy, eos = session.policy, session.params.eos_token_ids or ()
        walk, asked = Walk(session.exits[0]), False
        ids: Sequence[int] = token_ids
        then = self._time.now()
        while True:
            found: Sequence[tuple[int, float]] | None
            if self._ahead:  # it ran while the last answer was awaited
                position, found = len(session.token_ids) - len(self._ahead), (self._ahead.pop(0),)
            else:
                session.token_ids.extend(ids)
                position = len(session.token_ids) - 1
                found = yield Pass(session, 0, session.embed(ids), (position,))
                now = self._time.now()
                length.stepped(now - then)
                then = now
            look = _look(session.judges[0], position, found)
            asked = asked or look.reason is None
            enough = draft == 0 or look.token is None or look.token in eos
            if asked and not enough and policy.scale is not None:
                enough = not length.goes_on(look.confidence)
            if not asked or enough:
                walk.add(look)
                break
            assert look.token is not None
            walk.add(Look(position, look.token, look.token, look.confidence, look.reason))
            draft, ids = draft - 1, (look.token,)
        if not walk.unsure or self._held_back(0, walk):
            return ([walk], None), length.drafting_s
        return (yield from self._descend([walk], 1, self._question(0, walk))), length.drafting_s

    def _descend(self, walks: list[Walk], stage: int, block: Block) -> Task[_Descent]:
        """Run stage after stage, until all is sure or the next one is beyond this node."""
        session = self._session
        while stage < len(session.exits):
            found = yield Pass(session, stage, block.states, block.wants)
            walk = Walk.of(session.judges[stage], block, found)
            walks.append(walk)
            if not walk.unsure or self._held_back(stage, walk):
                return walks, None
            block = self._question(stage, walk)
            stage += 1
        return walks, block

    def _held_back(self, stage: int, walk: Walk) -> bool:
        """Whether the stage beyond this node may not be asked what is unsure, which is decided here then."""
        session = self._session
        if stage + 1 < len(session.exits) or not session.stands_in:
            return False
        reason = self._beyond.refuses(walk.unsure[-1] + 1 - session.unseen_start(stage))
        if reason is None:
            return False
        walk.force(reason)
        return True

    def _question(self, stage: int, walk: Walk) -> Block:
        """What the stage after this one is asked: its unsure positions, with every state that it has not seen."""
        session, unsure = self._session, tuple(walk.unsure)
        start, stop = session.unseen_start(stage), unsure[-1] + 1
        return Block(start, session.take_unseen(stage, stop), tuple(session.token_ids[start:stop]), unsure)

    async def _conclude(
        self, descent: _Descent, hop: Hop, *, ahead: bool = False
    ) -> tuple[tuple[Decision, ...], tuple[Hop, ...]]:
        """Ask what is left beyond this node, drafting ahead meanwhile; settle upwards, and rewind to what holds."""
        decisions: tuple[Decision, ...] = ()
        hops: tuple[Hop, ...] = (hop,)
        walks, left = descent
        if left is not None:
            asking = self._beyond.ask(left)
            verdict = await (self._meanwhile(asking, walks[0], hop) if ahead else asking)
            if verdict is not None:
                self._check(verdict)
                decisions, hops = verdict.decisions, (hop, *verdict.hops)
            else:
                assert self._beyond.lost is not None
                walks[-1].force(self._beyond.lost)
        for walk in reversed(walks):
            decisions = walk.settle(decisions)
        looks = walks[0].looks
        if looks:
            if not decisions:
                raise WireError("the stage beyond answered none of the positions it was asked for", node=hop.node)
            last = looks[len(decisions) - 1]
            holds = last.position + 1
            if not self._ahead or last is not looks[-1] or decisions[-1].token != last.token:
                self._ahead.clear()
                self._session.rewind(holds)
            self._beyond.decided(holds)
        return decisions, hops

    def _check(self, verdict: Verdict) -> None:
        """Refuse an answer from beyond that cannot be."""
        size, policy = self._session.vocab_size, self._session.policy
        for decision in verdict.decisions:
            if decision.token >= size:
                raise WireError(f"the stage beyond decided a token past {size - 1}", node=self._node)
            if decision.exit != policy.deepest and decision.exit not in policy.thresholds:
                raise WireError("the stage beyond decided at an exit that the policy does not have", node=self._node)

    async def _meanwhile(self, asking: Coroutine[None, None, Verdict | None], walk: Walk, hop: Hop) -> Verdict | None:
        """The answer; until it is there, the first branch drafts past what is asked, as long as that should gain."""
        session, eos = self._session, self._session.params.eos_token_ids or ()
        kept = math.prod(look.confidence for look in walk.looks if look.reason is None)
        kept *= math.prod(confidence for _, confidence in self._ahead)
        own = self._ahead[-1][0] if self._ahead else walk.looks[-1].token
        most = min(session.max_positions, walk.looks[-1].position + 1 + session.policy.draft)
        if own is None or not gains(kept):
            return await asking
        token, answer = own, self._time.start(asking)
        try:
            while token not in eos and len(session.token_ids) < most and gains(kept) and not answer.done():
                token, confidence = await self._step(hop, 1, self._go_ahead(token))
                self._ahead.append((token, confidence))
                kept *= confidence
                await self._time.pause()  # a brief step leaves the event loop no time to see the answer
            return await answer
        except BaseException:  # this one may be cancelled or fail while the answer is still on its way
            await answer.drop()
            raise

    def _go_ahead(self, token: int) -> Task[tuple[int, float]]:
        """The first branch's token and confidence after one more."""
        session = self._session
        session.token_ids.append(token)
        found = yield Pass(session, 0, session.embed((token,)), (len(session.token_ids) - 1,))
        assert found is not None
        return found[0]


def _look(judge: Judge, position: int, found: Sequence[tuple[int, float]] | None) -> Look:
    """What a branch says of one position that no draft follows yet."""
    if found is None:
        return Look(position, None)
    token, confidence = found[0]
    return Look(position, None, token, confidence, judge.sure(position, confidence))


async def decode(chain: Chain, prompt: Sequence[int], max_new_tokens: int) -> AsyncGenerator[Round, None]:
    """Settle round after round, from an entry node's new chain, until an end of sequence or the length limit.

    Both count for decided tokens only, in order; what was drafted or decided past the end is dropped with the chain,
    which the caller closes.

    Args:
        prompt: token ids.
        max_new_tokens: 1 or more.
    """
    session = chain.session
    eos, draft = session.params.eos_token_ids or (), session.policy.draft
    count, new = 0, prompt
    while True:
        left = max_new_tokens - count
        settled = await chain.propose(new, min(draft, left - 1))
        decided = settled[0]
        decisions = decided[:left]
        if eos:
            end = next((i for i, d in enumerate(decisions) if d.token in eos), left)
            decisions = decisions[: end + 1]
        count += len(decisions)
        new = (decisions[-1].token,)
        yield settled if decisions is decided else settled._replace(decisions=decisions)
        if new[0] in eos or count == max_new_tokens:
            return
