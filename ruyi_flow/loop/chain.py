"""The loop, the same at every depth: run the layers, look, decide what is confident, escalate the rest, rewind.

A `Chain` is a node's consecutive stages and the next stage, which may be on another machine. It is itself a `Stage`.
Only the entry node's chain proposes: it drafts with its first branch.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from ruyi_flow.errors import WireError
from ruyi_flow.loop.clock import REAL_CLOCK, Clock
from ruyi_flow.loop.next_stage import NextStage
from ruyi_flow.loop.scheduler import SHORT_ROWS
from ruyi_flow.loop.session import Found, Pass, Session
from ruyi_flow.loop.steps import Task, Worker
from ruyi_flow.routing.drafting import DraftCosts, DraftLength, ahead_pays
from ruyi_flow.routing.policy import Judge
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.routing.walk import Look, Walk
from ruyi_flow.telemetry import spans
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.telemetry.spans import NO_SPAN, Attribute, Span
from ruyi_flow.types import Block, Decision, Hop, Likelihood, Mode, Reason, Verdict

__all__ = ["PART", "Chain", "Round", "decode"]

PART = 128
"""Positions of a prompt that are sent to the next node together, so that it can start before all are computed."""

_BRIEF_ROWS = 16
"""Largest number of positions in a task that may run on the event loop."""

T = TypeVar("T")


class Round(NamedTuple):
    """The result of one proposal of the entry node."""

    decisions: tuple[Decision, ...]
    """The decided tokens, in order; at least one."""
    hops: tuple[Hop, ...]
    """Time and traffic of each node, the entry node first."""
    drafted: int = 0
    """Number of tokens drafted past the first position that was escalated."""
    accepted: int = 0
    """Number of those drafts that were accepted."""
    prompt: tuple[Likelihood, ...] = ()
    """Likelihoods of the prompt's tokens after the first, where the session asks for them."""


class Chain:
    """A node's stages for one session, and the next stage.

    Args:
        session: the session on this node; the chain closes it.
        worker: runs the stages.
        node: the node's name, for the durations that it reports.
        next_stage: the connection to the next node; default: there is none.
        costs: the entry node's drafting costs; default: the session's own.
        clock: where it waits.
        park: keeps the session when it has ended, after its last step. Default: it is closed.
        span: the session's span on this node; its steps, hops and rounds become parts of it.
        counters: where tokens of branches here are counted that the family's last exit was asked about. Default:
            nowhere.
    """

    def __init__(
        self,
        session: Session,
        worker: Worker,
        node: str,
        *,
        next_stage: NextStage | None = None,
        costs: DraftCosts | None = None,
        clock: Clock = REAL_CLOCK,
        park: Callable[[Session], None] = Session.close,
        span: Span = NO_SPAN,
        counters: NodeCounters | None = None,
    ) -> None:
        # Calibration is about the most probable token, so sampled ones say nothing about it.
        self._counters = None if session.params.temperature else counters
        self._session, self._worker, self._node, self._clock = session, worker, node, clock
        self._park = park
        self.span = span
        """What the chain works for now: the session, or one of its rounds."""
        self._next, self._costs = next_stage or NextStage(session), costs or DraftCosts()
        self._since = clock.now()
        """Time of arrival of the current work at this node; all parts of a prompt arrived with the first."""
        self._ahead: list[tuple[int, float]] = []
        """The first branch's token and confidence at the last positions: drafted while an answer was awaited."""

    @property
    def session(self) -> Session:
        """The session's state on this node."""
        return self._session

    async def advance(self, block: Block) -> Verdict:
        """Run a block and answer its questions; see `Stage.advance`.

        Raises:
            WireError: the block does not continue the session.
        """
        start, states, token_ids, wants, decided = block
        session, count = self._session, len(token_ids)
        position = session.positions[0]
        if start != position:
            raise WireError(f"a block starts at position {start}; this session is at {position}")
        if states.shape[0] != count or any(not position <= p < position + count for p in wants):
            raise WireError(f"a block of {count} positions has {states.shape[0]} states and wants {wants}")
        if decided and not (wants == () and all(position <= p < position + count for p, _ in decided)):
            raise WireError(f"a block of {count} positions replays {len(decided)} decisions and wants {wants}")
        if max(token_ids) >= session.vocab_size:
            raise WireError(f"a block has token ids up to {max(token_ids)}; the largest is {session.vocab_size - 1}")
        if position + count > session.max_positions:
            raise WireError(f"a block ends at position {position + count}; the session has {session.max_positions}")
        session.token_ids.extend(token_ids)
        if position >= session.prompt_length:
            self._since = self._clock.now()
        hop = Hop(self._node)
        if decided:
            await self._run(hop, count, self._replay(block))
            return Verdict((), (hop,))
        if not wants and self._passes_on:
            await self._pass_on(hop, block)
            return Verdict((), (hop,))
        walks = await self._run(hop, count, self._descend([], block))
        return Verdict(*await self._conclude(walks, hop), session.take_prompt_likelihoods())

    async def feed(self, block: Block) -> None:
        """Run a block without questions; see `Stage.feed`. In one process there is nothing to gain from not waiting."""
        verdict = await self.advance(block)
        self._session.prompt_likelihoods += verdict.prompt  # the next answer has them

    async def arrived(self) -> None:
        """Return at once; see `Stage.arrived`."""

    async def propose(self, token_ids: Sequence[int], draft: int) -> Round:
        """Run decided tokens on the entry node, and settle what comes next.

        Args:
            token_ids: decided tokens that are not in the KV cache yet: the prompt, or the last decided token.
            draft: largest number of tokens to draft past an undecided position.

        Returns:
            At least one decision, for the positions from the last given one on.
        """
        hop, costs = Hop(self._node), self._costs
        self._since = self._clock.now()
        if len(token_ids) > SHORT_ROWS:
            token_ids = await self._begin_prompt(hop, token_ids)
        began, single = self._clock.now(), len(token_ids) == 1
        measured = single and draft > 0 and self._only_drafts
        looks = not measured or bool(self._ahead) or costs.next_round_drafts()  # drafts made ahead cost nothing more
        rows = len(token_ids) + (draft if looks else 0)
        walks, drafting_s = await self._run(hop, rows, self._draft(token_ids, draft, looks))
        decisions, hops = await self._conclude(walks, hop, drafts_ahead=draft > 0 and looks)
        walk, took_s = walks[0], self._clock.now() - began
        if measured:
            costs.add_round(looks, took_s, len(decisions))
        prompt = self._session.take_prompt_likelihoods()
        if not walk.undecided:
            return Round(decisions, hops, prompt=prompt)
        if single and draft > 0 and looks:
            costs.add_question(max(0.0, took_s - drafting_s))
        past = next(i for i, look in enumerate(walk.looks) if look.reason is None) + 1
        return Round(decisions, hops, len(walk.looks) - past, len(decisions) - past, prompt)

    async def resume(self, prompt: Sequence[int], token_ids: Sequence[int], exits: Sequence[int]) -> None:
        """Run a prompt and the tokens of its answer that were decided before the entry node was lost.

        The next proposal begins with the last of these tokens.

        Args:
            prompt: the prompt's token ids that the session does not have.
            token_ids: the tokens of the answer, at least one.
            exits: the exits that decided them.
        """
        session, hop = self._session, Hop(self._node)
        self._since = self._clock.now()
        decided = list(enumerate(exits, len(session.token_ids) + len(prompt) - 1))
        rest = await self._begin_prompt(hop, prompt) if len(prompt) > SHORT_ROWS else prompt
        # The exit that begins is chosen at the end of the prompt, before the other positions are judged.
        for ids, about in ((rest, decided[:1]), (token_ids[:-1], decided[1:])):
            start = len(session.token_ids)
            if ids:
                session.token_ids.extend(ids)
                block = Block(start, session.embed(ids), tuple(ids), (), tuple(about))
                await self._run(hop, len(ids), self._replay(block))

    async def propose_traced(self, token_ids: Sequence[int], draft: int) -> Round:
        """Do the same, and record it as a span with its steps and hops."""
        session = self._session
        whole, name = self.span, "round" if len(session.token_ids) >= session.prompt_length else "prefill"
        with whole.child(name) as self.span:
            try:
                settled = await self.propose(token_ids, draft)
                about: dict[str, Attribute] = {spans.DRAFTED: settled.drafted, spans.ACCEPTED: settled.accepted}
                about[spans.EXITS] = exits = tuple(decision.exit for decision in settled.decisions)
                self.span.set(**about, **{spans.TOKENS: len(exits)})
            finally:
                self.span = whole
        return settled

    async def rewind(self, position: int) -> None:
        """Forget every position from `position` on, here and deeper; see `Stage.rewind`."""
        self._session.rewind(position)
        self._ahead.clear()
        await self._next.rewind(position)

    async def close(self) -> None:
        """End the session here and deeper; its KV cache is free or parked after the step that may be running."""
        self._session.next_has = self._next.sent
        self._worker.submit(partial(self._park, self._session))
        await self._next.close()

    async def _run(self, hop: Hop, rows: int, task: Task[T]) -> T:
        """Run a task of so many positions, and count its time."""
        brief = rows <= _BRIEF_ROWS and self._session.alone
        result, queue_s, compute_s = await self._worker.run(task, brief=brief, since=self._since)
        hop.queue_s += queue_s
        hop.compute_s += compute_s
        if self.span:
            about = {spans.ROWS: rows, spans.QUEUE_S: queue_s, spans.COMPUTE_S: compute_s}
            self.span.child("step", ago_s=queue_s + compute_s, **about).end()
        return result

    async def _hop(self, sending: Coroutine[None, None, T], positions: int, asked: int = 0) -> T:
        """Send so many positions to the next node and record it as a span."""
        with self.span.child("hop", **{spans.POSITIONS: positions, spans.ASKED: asked}) as span:
            answer = await sending
            if isinstance(answer, Verdict):
                hop = answer.hops[0]
                span.set(**{spans.BYTES_UP: hop.bytes_up, spans.BYTES_DOWN: hop.bytes_down, spans.WIRE_S: hop.wire_s})
            return answer

    # ---- prompts ----

    async def _begin_prompt(self, hop: Hop, token_ids: Sequence[int]) -> Sequence[int]:
        """Run the front of a long prompt, and return the rest of it.

        If all of it goes to the next node anyway, it goes in parts, so that deeper nodes compute the first parts while
        this one computes the next. If the first exit is chosen from the prompt's end, that end stays in one piece.
        """
        session = self._session
        if self._passes_on:
            while len(token_ids) > PART:
                part, token_ids = token_ids[:PART], token_ids[PART:]
                start = len(session.token_ids)
                session.token_ids.extend(part)
                await self._pass_on(hop, Block(start, session.embed(part), tuple(part), ()))
        elif session.policy.routing.start is not None:
            count = len(token_ids) - READ_TOKENS - 1
            await self._run(hop, count, self._prefill(token_ids[:count]))
            token_ids = token_ids[count:]
        return token_ids

    @property
    def _passes_on(self) -> bool:
        """Whether the next node will be asked about every position, whatever the branches here predict."""
        session = self._session
        return (
            self._next.is_certain
            and session.policy.deepest not in session.exits
            and session.policy.routing.start is None  # the exit that begins is chosen first
            and all(judge.never_decides for judge in session.judges)
        )

    async def _pass_on(self, hop: Hop, block: Block) -> None:
        """Run this node's layers on a part of a prompt, and send it to the next node."""
        await self._run(hop, len(block.token_ids), self._prefill_all(block))
        feeding = self._next.feed()
        await (self._hop(feeding, self._session.log_length - self._next.sent) if self.span else feeding)

    def _prefill(self, token_ids: Sequence[int]) -> Task[None]:
        """Fill the first stage's KV cache with a part of the prompt."""
        session = self._session
        session.token_ids.extend(token_ids)
        yield Pass(session, 0, session.embed(token_ids), ())

    def _prefill_all(self, block: Block) -> Task[None]:
        """Fill the KV caches of all stages here."""
        session, stop = self._session, block.start + len(block.token_ids)
        states = block.states
        for stage in range(len(session.exits)):
            if stage:
                states = session.take_unsent(stage - 1, stop)
            yield Pass(session, stage, states, ())

    def _replay(self, block: Block) -> Task[None]:
        """Run positions of a session that was lost, and let judges and deeper stages see what they had seen.

        In `cascade`, each judge sees the positions that reached it: those that no shallower exit decided. The other
        modes remember nothing, and deeper stages catch up when they are asked.
        """
        session, decided = self._session, block.decided
        if session.policy.routing.mode is not Mode.CASCADE:
            yield Pass(session, 0, block.states, ())
            return
        for stage in range(len(session.exits)):
            found: Found | None = yield Pass(session, stage, block.states, tuple([p for p, _ in decided]))
            judge, exit = session.judges[stage], session.exits[stage]  # which the end of the prompt may have chosen
            for (position, _), (_, confidence) in zip(decided, found or (), strict=False):
                judge.decide(position, confidence)
            decided = tuple([one for one in decided if one[1] > exit])
            if not decided:
                return
            if stage + 1 < len(session.exits):
                block = self._question(stage, [p for p, _ in decided])
        self._next.note_decided(decided)

    # ---- one round ----

    @property
    def _only_drafts(self) -> bool:
        """Whether the first branch runs for its drafts alone, whose benefit is measured."""
        session = self._session
        covers = session.covers_next and len(session.exits) == 1
        return session.policy.routing.scale is not None and session.judges[0].never_decides and not covers

    def _draft(self, token_ids: Sequence[int], draft: int, looks: bool) -> Task[tuple[list[Walk], float]]:
        """Walk with the first branch, whose own tokens are the drafts; then ask the deeper stages here.

        Args:
            token_ids: decided tokens that are not in the KV cache yet.
            draft: largest number of tokens to draft past an undecided position.
            looks: whether the first branch runs; if not, the next stage is asked at once.

        Returns:
            The walks of the stages here, and the seconds of drafting.
        """
        session, length = self._session, DraftLength(self._costs)
        eos, calibrated = session.params.eos_token_ids or (), session.policy.routing.scale is not None
        walk, ids = Walk(session.exits[0]), token_ids
        then = self._clock.now()
        while True:
            found: Sequence[tuple[int, float]] | None
            if self._ahead:  # drafted while the last answer was awaited
                position, found = len(session.token_ids) - len(self._ahead), (self._ahead.pop(0),)
            else:
                session.token_ids.extend(ids)
                position = len(session.token_ids) - 1
                found = yield Pass(session, 0, session.embed(ids), (position,) if looks else ())
                now = self._clock.now()
                length.add_step(now - then)
                then = now
            look = _look(session.judges[0], position, found if looks else None)
            ends = draft == 0 or look.token is None or look.token in eos
            if walk.undecided or look.reason is None:
                if not ends and calibrated:
                    ends = not length.continues(look.confidence)
            else:
                ends = True
            if ends:
                walk.add(look)
                break
            assert look.token is not None
            walk.add(Look(position, look.token, *look[2:]))
            draft, ids = draft - 1, (look.token,)
        walks = [walk]
        if walk.undecided and len(session.exits) > 1:
            walks = yield from self._descend(walks, self._question(0, walk.undecided))
        return walks, length.drafting_s

    def _descend(self, walks: list[Walk], block: Block) -> Task[list[Walk]]:
        """Run the stages after those that have walked, until all is decided or the last stage here has run."""
        session = self._session
        for stage in range(len(walks), len(session.exits)):
            found: Found | None = yield Pass(session, stage, block.states, block.wants)
            walk = Walk.of(session.judges[stage], block, found)
            walks.append(walk)
            if not walk.undecided or stage + 1 == len(session.exits):
                break
            block = self._question(stage, walk.undecided)
        return walks

    def _question(self, stage: int, undecided: Sequence[int]) -> Block:
        """Return the question to the next stage here: the undecided positions, and all states that it lacks."""
        session, start, stop = self._session, self._session.unsent_start(stage), undecided[-1] + 1
        return Block(start, session.take_unsent(stage, stop), tuple(session.token_ids[start:stop]), tuple(undecided))

    async def _conclude(
        self, walks: list[Walk], hop: Hop, *, drafts_ahead: bool = False
    ) -> tuple[tuple[Decision, ...], tuple[Hop, ...]]:
        """Ask the next node what is undecided, drafting ahead meanwhile; merge, and rewind to what is kept."""
        session, first, last = self._session, walks[0], walks[-1]
        decisions: tuple[Decision, ...] = ()
        hops: tuple[Hop, ...] = (hop,)
        if last.undecided:
            reason, wants = None, tuple(last.undecided)
            if session.covers_next:
                reason = self._next.refusal(wants[-1] + 1)
            if reason is None:
                asking = self._next.ask(wants)
                if self.span:
                    asking = self._hop(asking, wants[-1] + 1 - self._next.sent, len(wants))
                answer = await (self._draft_ahead(asking, first, hop) if drafts_ahead else asking)
                if isinstance(answer, Reason):
                    reason = answer
                else:
                    decisions, hops = answer.decisions, (hop, *answer.hops)
                    session.prompt_likelihoods += answer.prompt
            if reason is not None:
                last.decide_all(reason)
        for walk in reversed(walks):
            is_deeper = bool(decisions)
            decisions = walk.merge(decisions)
            if is_deeper and self._counters is not None:
                self._compare(walk, decisions)
        if session.params.logprobs is not None and decisions:
            decisions = session.with_likelihoods(decisions, [look.position for look in first.looks])
        if first.looks:
            look = first.looks[len(decisions) - 1]
            kept = look.position + 1
            if not self._ahead or look is not first.looks[-1] or decisions[-1].token != look.token:
                self._ahead.clear()
                session.rewind(kept)
            self._next.settle(kept)
        return decisions, hops

    def _compare(self, walk: Walk, decisions: Sequence[Decision]) -> None:
        """Compare a branch's tokens with what the family's last exit decided in their places, where it did."""
        assert self._counters is not None
        is_calibrated = self._session.policy.routing.scale is not None
        for look, decision in zip(walk.looks, decisions, strict=False):
            if look.token is not None and decision.reason is Reason.DEEPEST and decision.exit != walk.exit:
                agrees = look.token == decision.token
                self._counters.verify(walk.exit, look.confidence, is_calibrated=is_calibrated, agrees=agrees)

    async def _draft_ahead(
        self, asking: Coroutine[None, None, Verdict | Reason], walk: Walk, hop: Hop
    ) -> Verdict | Reason:
        """Return the answer; until it arrives, draft past the question with the first branch while that pays."""
        session, eos = self._session, self._session.params.eos_token_ids or ()
        kept = math.prod(look.confidence for look in walk.looks if look.reason is None)
        kept *= math.prod(confidence for _, confidence in self._ahead)
        own = self._ahead[-1][0] if self._ahead else walk.looks[-1].token
        most = min(session.max_positions, walk.looks[-1].position + 1 + session.policy.routing.draft)
        if own is None or not ahead_pays(kept):
            return await asking
        token, answer = own, self._clock.start(asking)
        try:
            while token not in eos and len(session.token_ids) < most and ahead_pays(kept) and not answer.done():
                token, confidence = await self._run(hop, 1, self._draft_one(token))
                self._ahead.append((token, confidence))
                kept *= confidence
                await self._clock.pause()  # a brief step leaves the event loop no time to see the answer
            return await answer
        except BaseException:  # this coroutine may be cancelled or fail while the answer is still in flight
            await answer.drop()
            raise

    def _draft_one(self, token: int) -> Task[tuple[int, float]]:
        """Return the first branch's token and confidence after one more token."""
        session = self._session
        session.token_ids.append(token)
        found = yield Pass(session, 0, session.embed((token,)), (len(session.token_ids) - 1,))
        assert found is not None
        return found[0]


def _look(judge: Judge, position: int, found: Sequence[tuple[int, float]] | None) -> Look:
    """Return what a branch predicts at a position that no draft follows yet."""
    if found is None:
        return Look(position, None)
    token, confidence = found[0]
    return Look(position, None, token, confidence, judge.decide(position, confidence))


async def decode(
    chain: Chain, prompt: Sequence[int], max_new_tokens: int, resumed: Sequence[tuple[int, int]] = ()
) -> AsyncGenerator[Round, None]:
    """Settle round after round on an entry node's new chain, until an end of sequence or the length limit.

    Only decided tokens count, in order. Tokens that were drafted or decided past the end are dropped with the chain,
    which the caller closes.

    Args:
        chain: the entry node's chain for a session that has none of the prompt's tokens, or the first of them.
        prompt: the prompt's token ids that the session does not have.
        max_new_tokens: length limit, 1 or more.
        resumed: the first tokens of the answer with their exits, which were decided before the entry node was lost.
    """
    session = chain.session
    eos, draft = session.params.eos_token_ids or (), session.policy.routing.draft
    propose = chain.propose_traced if chain.span else chain.propose
    count, new = len(resumed), prompt
    if resumed:
        ids = [token for token, _ in resumed]
        if ids[-1] in eos or count == max_new_tokens:
            return
        await chain.resume(prompt, ids, [exit for _, exit in resumed])
        new = ids[-1:]
    while True:
        left = max_new_tokens - count
        settled = await propose(new, min(draft, left - 1))
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
