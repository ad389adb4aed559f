"""One session's connection to the next node: opens it lazily, asks it, and uploads states to it in advance. Pure."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from ruyi_flow.errors import (
    CapacityError,
    DeadlineExceeded,
    NodeUnavailable,
    RequestCancelled,
    RuyiFlowError,
    WireError,
)
from ruyi_flow.loop.clock import REAL_CLOCK, Clock, Pending
from ruyi_flow.loop.session import Session, States
from ruyi_flow.routing.policy import Policy
from ruyi_flow.types import MIN_UPLOAD_POSITIONS, Block, Likelihood, Reason, Stage, Verdict

__all__ = ["NextStage", "Uplink"]

_MAX_UPLOAD_POSITIONS = 32
"""Decided positions in one upload at most: more would delay the question that comes after them."""


_LOST = (NodeUnavailable, DeadlineExceeded, CapacityError, WireError, RequestCancelled)
"""Errors of a next node that is as good as gone: it is lost, stuck or full, answers garbage, or has dropped the call.

A bug in the next node and a handshake that does not fit are not among them: they would be there at every try.
"""


@dataclass(slots=True)
class Uplink:
    """The messages that all sessions of a node have in flight to the next node."""

    questions: int = 0
    """Number of questions that have not been answered."""
    uploader: NextStage | None = None
    """The session that is uploading states in advance, until they are known to have arrived."""

    @property
    def idle(self) -> bool:
        """Whether a session may upload states in advance."""
        return not self.questions and self.uploader is None

    def free(self, next_stage: NextStage) -> None:
        """End a session's upload, which has arrived or is given up."""
        if self.uploader is next_stage:
            self.uploader = None


class NextStage:
    """One session's connection to the next node.

    Args:
        session: the session on this node.
        make: opens the connection with the policy that the session has by then; None on the deepest node.
        gate: called with the number of positions to send; returns why they must not be sent, or None. It needs a
            session opened with `covers_next`.
        ahead: number of decided positions that may be uploaded before anything is asked about them.
        clock: where it waits.
        uplink: what all sessions of the node have in flight; default: this session alone.
    """

    def __init__(
        self,
        session: Session,
        make: Callable[[Policy], Stage] | None = None,
        *,
        gate: Callable[[int], Reason | None] | None = None,
        ahead: int = 0,
        clock: Clock = REAL_CLOCK,
        uplink: Uplink | None = None,
    ) -> None:
        self._session, self._make, self._gate, self._clock = session, make, gate, clock
        self._stage: Stage | None = None
        self.lost: Reason | None = None
        """Why the next stage is not asked any more."""
        self._sent = 0
        """Number of positions that the next stage has."""
        self._ahead, self._uplink = ahead, uplink or Uplink()
        self._uploading: Pending[None] | None = None
        self._arriving: Pending[None] | None = None
        """Waits until the upload is known to have arrived."""
        self._unasked: list[States] = []
        """States that were uploaded before the first answer. They are sent again if that connection is lost."""

    @property
    def is_certain(self) -> bool:
        """Whether there is a next stage, and this node never decides in its place."""
        return self._make is not None and self._gate is None and not self._session.covers_next

    def refusal(self, positions: int) -> Reason | None:
        """Return why so many positions may not be sent, or None. The gate counts them as sent."""
        if self.lost is None and self._gate is not None:
            return self._gate(positions)
        return self.lost

    async def feed(self, block: Block) -> None:
        """Send a block without questions; see `Stage.feed`."""
        await self._connect().feed(block)
        self._sent = block.start + len(block.token_ids)

    async def ask(self, block: Block) -> Verdict | None:
        """Ask about a block. Return None when the next stage is `lost` and this node decides in its place."""
        self._uplink.questions += 1
        try:
            await self._finish_upload()
            stop = block.start + len(block.token_ids)
            if self._unasked and self._stage is None:  # the connection that only received uploads is lost
                states = self._session.join([*self._unasked, block.states])
                block = Block(0, states, tuple(self._session.token_ids[:stop]), block.wants)
                self._unasked.clear()
            stage = self._connect()
            verdict = await stage.advance(block)
            self._check(verdict, block)
            self._unasked.clear()
            self._sent = stop
            return verdict
        except _LOST:
            if not self._unasked and not self._session.policy.routing.fallback:
                raise
            self._stage = None
            await stage.close()
        finally:
            self._uplink.questions -= 1
        if self._unasked:
            return await self.ask(block)
        self.lost = Reason.UNREACHABLE
        return None

    def settle(self, position: int) -> None:
        """Note that the positions before this one are decided and no later one is kept.

        If the link is idle, their states are uploaded in advance: only states that the last stage here has computed,
        since no layers run for this alone.
        """
        self._sent = min(self._sent, position)
        if self._ahead < MIN_UPLOAD_POSITIONS:
            return
        session, last = self._session, len(self._session.exits) - 1
        if self.lost is not None or session.policy.deepest in session.exits or not self._uplink.idle:
            return
        start = session.unsent_start(last)
        stop = min(position, session.positions[last], start + min(self._ahead, _MAX_UPLOAD_POSITIONS))
        if stop - start < MIN_UPLOAD_POSITIONS or self.refusal(stop - start) is not None:
            return
        self._ahead -= stop - start
        states = session.take_unsent(last, stop)
        if self._unasked or not start:
            self._unasked.append(session.compact(states))
        self._sent, self._uplink.uploader = stop, self
        block = Block(start, states, tuple(session.token_ids[start:stop]), ())
        self._uploading = self._clock.start(self._upload(block))

    async def rewind(self, position: int) -> None:
        """Make the next stage forget every position from `position` on; see `Stage.rewind`."""
        if self._sent > position:
            await self._finish_upload()  # which may open the connection
            if self._stage is not None:
                await self._stage.rewind(position)
        if self._unasked:
            self._unasked = [self._session.compact(self._session.join(self._unasked)[:position])]
        self._sent = min(self._sent, position)

    async def close(self) -> None:
        """End the session on the next node, and whatever is in flight."""
        try:
            if self._uploading is not None:
                await self._uploading.drop()
            if self._arriving is not None:
                await self._arriving.drop()
        finally:  # this call may be cancelled meanwhile; the deeper KV caches must be freed all the same
            self._uplink.free(self)
            if self._stage is not None:
                await self._stage.close()

    def _check(self, verdict: Verdict, block: Block) -> None:
        """Refuse a verdict that cannot be right.

        Raises:
            WireError: it cannot.
        """
        session, policy, decisions = self._session, self._session.policy, verdict.decisions
        if not 1 <= len(decisions) <= len(block.wants):
            raise WireError(f"the next stage answered {len(decisions)} of {len(block.wants)} questions")
        for decision in decisions:
            exit = decision.exit
            if decision.token >= session.vocab_size:
                raise WireError(f"the next stage decided token {decision.token} of {session.vocab_size}")
            if exit <= session.exits[-1] or exit != policy.deepest and exit not in policy.thresholds:
                raise WireError(f"the next stage decided at exit {exit}, which it does not have")
            if decision.likelihood is not None:
                self._check_likelihood(decision.likelihood, session.params.logprobs)
        if len(verdict.prompt) >= session.prompt_length:
            raise WireError(f"the next stage rated {len(verdict.prompt)} tokens of a prompt of {session.prompt_length}")
        for likelihood in verdict.prompt:
            self._check_likelihood(likelihood, session.params.prompt_logprobs)

    def _check_likelihood(self, likelihood: Likelihood, asked: int | None) -> None:
        """Refuse a likelihood that nothing asked for, or with tokens that the family does not have."""
        vocab_size = self._session.vocab_size
        if asked is None or len(likelihood.top) > asked or any(token >= vocab_size for token, _ in likelihood.top):
            raise WireError("the next stage answered likelihoods that nothing asked for")

    def _connect(self) -> Stage:
        if self._stage is None:
            assert self._make is not None, "the policy's deepest exit is after the deepest node"
            self._stage = self._make(self._session.policy)
        return self._stage

    async def _upload(self, block: Block) -> None:
        stage = self._connect()
        if await self._succeeds(stage.feed(block), stage):
            self._arriving = self._clock.start(self._await_arrival(stage))
        else:
            self._uplink.free(self)

    async def _await_arrival(self, stage: Stage) -> None:
        await self._succeeds(stage.arrived(), stage)
        self._uplink.free(self)

    async def _succeeds(self, upload: Coroutine[None, None, None], stage: Stage) -> bool:
        """Run a part of an upload, which must never fail an answer, and return whether it succeeded.

        If nothing has been answered yet, the next question opens a new connection; otherwise it reports the error.
        """
        try:
            await upload
        except RuyiFlowError:
            self._ahead = 0
            if self._unasked:
                self._stage = None
                await stage.close()
            return False
        return True

    async def _finish_upload(self) -> None:
        """Wait until the upload is written, to keep messages in order; the next answer shows whether it arrived."""
        if self._uploading is not None:
            uploading, self._uploading = self._uploading, None
            await uploading
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            await arriving.drop()
            self._uplink.free(self)
