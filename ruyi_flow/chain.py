"""The one loop, at every depth: run, look, answer what is sure, escalate the rest, rewind to what it decided.

A `Chain` is a node's consecutive stages and, where there is one, the stage beyond them, which may be on another
machine. It is itself a `Stage`. Only the entry node's chain `propose`s: it drafts with its first branch.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ruyi_flow.errors import CapacityError, DeadlineExceeded, NodeError, NodeUnavailable, WireError
from ruyi_flow.routing.pace import Length, Pace, gains
from ruyi_flow.routing.policy import Judge, Policy
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.routing.walk import Look, Walk
from ruyi_flow.runtime.scheduler import WHOLE
from ruyi_flow.runtime.session import Session, States
from ruyi_flow.runtime.steps import Task, Worker
from ruyi_flow.runtime.times import REAL, Pending, Time
from ruyi_flow.topology import LEAST_AHEAD
from ruyi_flow.types import Block, Decision, Hop, Reason, Stage, Verdict

__all__ = ["Chain", "Round", "Uplink", "decode"]

PART = 128
"""Positions of a prompt that go to the next node together, so that it can start before all of them are computed."""

_MOST_AHEAD = 32
"""Decided positions that go up together ahead of a question: more would hold up the question that comes after them."""

_BRIEF_ROWS = 16
"""Positions in a step that may be brief."""

T = TypeVar("T")


@dataclass(slots=True)
class _Descent:
    """How far down this node's stages a block went, and what is left to ask beyond them."""

    walks: list[Walk]
    left: Block | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What one proposal of the entry node settled."""

    decisions: tuple[Decision, ...]
    hops: tuple[Hop, ...]
    drafted: int = 0
    """Tokens drafted past the first position that was asked deeper."""
    accepted: int = 0
    """Those of them that hold."""


@dataclass(slots=True)
class Uplink:
    """What all sessions of a node have under way to the node beyond it."""

    questions: int = 0
    uploader: Chain | None = None
    """Whose states go up ahead, or have not been told to have arrived."""

    @property
    def idle(self) -> bool:
        """Whether states may go up that nobody asked about."""
        return not self.questions and self.uploader is None

    def free(self, chain: Chain) -> None:
        """What a session sent ahead is there, or is given up."""
        if self.uploader is chain:
            self.uploader = None


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
        self._session, self._worker, self._node, self._make_beyond = session, worker, node, beyond
        self._gate, self._time = gate, time
        self._beyond: Stage | None = None
        self._lost: Reason | None = None
        """Why the stage beyond is not asked any more."""
        self._since = time.now()
        """When what this node does for the session now came to it; all of a prompt's parts came with the first."""
        self._may_upload, self._uplink = ahead, uplink or Uplink()
        self._uploading: Pending[None] | None = None
        self._arriving: Pending[None] | None = None
        """What waits for the word that it has arrived."""
        self._unasked: list[States] = []
        """What went up before the stage beyond has answered anything, to go up once more if that session is lost."""
        self._sent = 0
        """Positions that the stage beyond holds."""
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
        session, count = self._session, len(block.token_ids)
        held = session.positions[0]
        if block.start != held:
            raise WireError(f"a block starts at position {block.start}, but this session holds {held}")
        if block.states.shape[0] != count or any(not held <= p < held + count for p in block.wants):
            raise WireError(f"a block of {count} positions has {block.states.shape[0]} states, wants {block.wants}")
        if max(block.token_ids) >= session.vocab_size:
            raise WireError(f"a block has token ids up to {max(block.token_ids)}, past {session.vocab_size - 1}")
        if held + count > session.max_positions:
            raise WireError(f"a block ends at position {held + count}; the session asked for {session.max_positions}")
        session.token_ids.extend(block.token_ids)
        if held >= session.prompt_length:
            self._since = self._time.now()
        hop = Hop(self._node)
        if not block.wants and self._passes_on:
            await self._pass_on(hop, block)
            return Verdict((), (hop,))
        descent = await self._step(hop, count, self._descend([], 0, block))
        return await self._conclude(descent, hop)

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
        token_ids = await self._begin(hop, token_ids)
        began, brief = self._time.now(), len(token_ids) == 1
        weighed = brief and draft > 0 and self._may_be_quiet()
        quiet = weighed and not self._ahead and not self._pace.drafts()  # drafts that are there cost nothing more
        if quiet:
            descent, drafting_s = await self._step(hop, 1, self._do_not_draft(token_ids[0])), 0.0
        else:
            descent, drafting_s = await self._step(hop, len(token_ids) + draft, self._draft(token_ids, draft))
        verdict = await self._conclude(descent, hop, ahead=draft > 0 and not quiet)
        walk = descent.walks[0]
        took = self._time.now() - began
        if weighed:
            self._pace.settled(not quiet, took, len(verdict.decisions))
        if brief and walk.unsure and not quiet:
            self._pace.asked(max(0.0, took - drafting_s))
        if not walk.unsure:
            return Round(verdict.decisions, verdict.hops)
        past = next(i for i, look in enumerate(walk.looks) if look.reason is None) + 1
        return Round(verdict.decisions, verdict.hops, len(walk.looks) - past, len(verdict.decisions) - past)

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        self._session.rewind(position)
        self._ahead.clear()
        if self._beyond is not None and self._sent > position:
            await self._uploaded()
            await self._beyond.rewind(position)
        if self._unasked:
            self._unasked = [self._session.join(self._unasked)[:position]]
        self._sent = min(self._sent, position)

    async def close(self) -> None:
        """See `Stage.close`; the cache is free once the step that may be running has ended."""
        self._worker.submit(self._session.close)
        try:
            if self._uploading is not None:
                await self._uploading.drop()
            if self._arriving is not None:
                await self._arriving.drop()
        finally:  # this one may be cancelled meanwhile; the deeper caches must be freed all the same
            self._uplink.free(self)
            if self._beyond is not None:
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
        elif session.policy.start is not None and len(token_ids) > WHOLE:
            count = len(token_ids) - READ_TOKENS - 1
            await self._step(hop, count, self._take(token_ids[:count]))
            token_ids = token_ids[count:]
        return token_ids

    @property
    def _passes_on(self) -> bool:
        """Whether the next node will be asked about every position, whatever the branches here say of it."""
        session = self._session
        may = self._make_beyond is not None and self._gate is None and not session.stands_in
        return may and session.policy.deepest not in session.exits and all(judge.silent for judge in session.judges)

    async def _pass_on(self, hop: Hop, block: Block) -> None:
        """Run this node's layers on a part of a prompt, and feed it to the next node."""
        onward = await self._step(hop, len(block.token_ids), self._fill(block))
        await self._next_node().feed(onward)
        self._sent = onward.start + len(onward.token_ids)

    def _fill(self, block: Block) -> Task[Block]:
        """Fill the caches of all stages here; gives what the next node gets."""
        session, stop = self._session, block.start + len(block.token_ids)
        states = block.states
        for stage in range(len(session.exits)):
            yield from session.through(stage, states, ())
            start, states = session.unseen_start(stage), session.take_unseen(stage, stop)
        return Block(start, states, tuple(session.token_ids[start:stop]), ())

    def _take(self, token_ids: Sequence[int]) -> Task[None]:
        """Fill the first stage's caches with a part of the prompt."""
        session = self._session
        session.token_ids.extend(token_ids)
        yield from session.through(0, session.embed(token_ids), ())

    def _may_be_quiet(self) -> bool:
        """Whether the first branch is here for its drafts alone, whose worth is measured."""
        session = self._session
        alone = session.stands_in and len(session.exits) == 1
        return session.policy.scale is not None and session.judges[0].silent and not alone

    def _do_not_draft(self, token_id: int) -> Task[_Descent]:
        """Ask deeper at once: the first branch keeps its keys and values, and is not looked at."""
        session = self._session
        session.token_ids.append(token_id)
        yield from session.through(0, session.embed((token_id,)), ())
        walk = Walk(session.exits[0], [Look(len(session.token_ids) - 1, None)])
        return (yield from self._descend([walk], 1, self._question(0, walk)))

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
                found = yield from session.through(0, session.embed(ids), (position,))
                now = self._time.now()
                length.stepped(now - then)
                then = now
            look = _look(session.judges[0], position, found)
            asked = asked or look.reason is None
            enough = draft == 0 or look.token is None or look.token in eos
            if asked and not enough and policy.scale is not None:
                enough = not length.goes_on(look.confidence)
            if not asked or enough:
                walk.looks.append(look)
                break
            assert look.token is not None
            walk.looks.append(Look(position, look.token, look.token, look.confidence, look.reason))
            draft, ids = draft - 1, (look.token,)
        if not walk.unsure or self._held_back(0, walk):
            return _Descent([walk]), length.drafting_s
        return (yield from self._descend([walk], 1, self._question(0, walk))), length.drafting_s

    def _descend(self, walks: list[Walk], stage: int, block: Block) -> Task[_Descent]:
        """Run stage after stage, until all is sure or the next one is beyond this node."""
        session = self._session
        while stage < len(session.exits):
            stop = block.start + len(block.token_ids)
            found = yield from session.through(stage, block.states, block.wants)
            drafts = [session.token_ids[p + 1] if p + 1 < stop else None for p in block.wants]
            walk = Walk.of(session.judges[stage], block.wants, drafts, found)
            walks.append(walk)
            if not walk.unsure or self._held_back(stage, walk):
                return _Descent(walks)
            block = self._question(stage, walk)
            stage += 1
        return _Descent(walks, block)

    def _held_back(self, stage: int, walk: Walk) -> bool:
        """Whether the stage beyond this node may not be asked what is unsure, which is decided here then."""
        session = self._session
        if stage + 1 < len(session.exits) or not session.stands_in:
            return False
        reason = self._lost
        if reason is None and self._gate is not None:
            reason = self._gate(walk.unsure[-1] + 1 - session.unseen_start(stage))
        if reason is None:
            return False
        walk.force(reason)
        return True

    def _question(self, stage: int, walk: Walk) -> Block:
        """What the stage after this one is asked: its unsure positions, with every state that it has not seen."""
        session, unsure = self._session, walk.unsure
        start, stop = session.unseen_start(stage), unsure[-1] + 1
        return Block(start, session.take_unseen(stage, stop), tuple(session.token_ids[start:stop]), unsure)

    async def _conclude(self, descent: _Descent, hop: Hop, *, ahead: bool = False) -> Verdict:
        """Ask what is left beyond this node, drafting ahead meanwhile; settle upwards, and rewind to what holds."""
        decisions: tuple[Decision, ...] = ()
        hops: tuple[Hop, ...] = ()
        verdict = None
        if descent.left is not None:
            asking = self._ask(descent.left, descent.walks[-1])
            verdict = await (self._meanwhile(asking, descent.walks[0], hop) if ahead else asking)
        if descent.left is not None and verdict is not None:
            decisions, hops = verdict.decisions, verdict.hops
            if any(d.token >= self._session.vocab_size for d in decisions):
                raise WireError(f"the stage beyond decided a token past {self._session.vocab_size - 1}", node=hop.node)
            policy = self._session.policy
            if any(d.exit != policy.deepest and d.exit not in policy.thresholds for d in decisions):
                raise WireError("the stage beyond decided at an exit that the policy does not have", node=hop.node)
            self._sent = descent.left.start + len(descent.left.token_ids)
        walks = descent.walks
        for walk in reversed(walks):
            decisions = walk.settle(decisions)
        if walks[0].looks:
            if not decisions:
                raise WireError("the stage beyond answered none of the positions it was asked for", node=hop.node)
            last = walks[0].looks[len(decisions) - 1]
            holds = last.position
            if not self._ahead or last is not walks[0].looks[-1] or decisions[-1].token != last.token:
                self._ahead.clear()
                self._session.rewind(holds + 1)
            self._sent = min(self._sent, holds + 1)
            if self._may_upload > 0:
                self._upload(holds + 1)
        return Verdict(decisions, (hop, *hops))

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
        found = yield from session.through(0, session.embed((token,)), (len(session.token_ids) - 1,))
        assert found is not None
        return found[0]

    async def _ask(self, block: Block, walk: Walk) -> Verdict | None:
        """The answer from beyond this node; None when there is none and this node decides in its place."""
        self._uplink.questions += 1
        try:
            await self._uploaded()
            if self._unasked and self._beyond is None:  # the session that was for them alone is lost
                states = self._session.join([*self._unasked, block.states])
                stop = block.start + len(block.token_ids)
                block = Block(0, states, tuple(self._session.token_ids[:stop]), block.wants)
                self._unasked.clear()
            beyond = self._next_node()
            verdict = await beyond.advance(block)
            self._unasked.clear()
            return verdict
        except (NodeUnavailable, DeadlineExceeded, CapacityError):
            if not self._unasked and not self._session.policy.fallback:
                raise
            self._beyond = None
            await beyond.close()
        finally:
            self._uplink.questions -= 1
        if self._unasked:
            return await self._ask(block, walk)
        self._lost = Reason.UNREACHABLE
        walk.force(self._lost)
        return None

    def _upload(self, decided: int) -> None:
        """Send states of decided positions up, if the link is idle and there are enough of them.

        Only what the last stage here has run: no layers are run for this alone.
        """
        session, last = self._session, len(self._session.exits) - 1
        if self._lost is not None or session.policy.deepest in session.exits or not self._uplink.idle:
            return
        start = session.unseen_start(last)
        stop = min(decided, session.positions[last], start + min(self._may_upload, _MOST_AHEAD))
        if stop - start < LEAST_AHEAD or (self._gate is not None and self._gate(stop - start) is not None):
            return
        self._may_upload -= stop - start
        states = session.take_unseen(last, stop)
        if self._unasked or not start:
            self._unasked.append(states)
        self._sent, self._uplink.uploader = stop, self
        self._uploading = self._time.start(self._feed(Block(start, states, tuple(session.token_ids[start:stop]), ())))

    async def _feed(self, block: Block) -> None:
        """Send states ahead; see `_quietly`."""
        stage = self._next_node()
        if await self._quietly(stage.feed(block), stage):
            self._arriving = self._time.start(self._arrive(stage))
        else:
            self._uplink.free(self)

    async def _arrive(self, stage: Stage) -> None:
        await self._quietly(stage.arrived(), stage)
        self._uplink.free(self)

    async def _quietly(self, doing: Coroutine[None, None, None], stage: Stage) -> bool:
        """Do something ahead of any question, which must not fail for it; whether it went well.

        Where nothing has been answered yet, the next question begins a new session. Else it is told.
        """
        try:
            await doing
        except NodeError:
            self._may_upload = 0
            if self._unasked:
                self._beyond = None
                await stage.close()
            return False
        return True

    async def _uploaded(self) -> None:
        """Wait for what goes up: messages of a session stay in order. Whether it has arrived, the next answer tells."""
        if self._uploading is not None:
            uploading, self._uploading = self._uploading, None
            await uploading
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            await arriving.drop()
            self._uplink.free(self)

    def _next_node(self) -> Stage:
        if self._beyond is None:
            assert self._make_beyond is not None, "the policy's deepest exit is beyond the deepest node"
            self._beyond = self._make_beyond(self._session.policy)
        return self._beyond


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
        decisions = settled.decisions[:left]
        end = next((i for i, d in enumerate(decisions) if d.token in eos), None)
        if end is not None:
            decisions = decisions[: end + 1]
        count += len(decisions)
        new = (decisions[-1].token,)
        yield Round(decisions, settled.hops, settled.drafted, settled.accepted)
        if end is not None or count == max_new_tokens:
            return
