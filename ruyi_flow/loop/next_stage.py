"""One session's connection to the next node: asks it, uploads states to it in advance, and takes the session up again
when it is lost (docs/design/0010-recovery.md). Pure."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    DeadlineExceeded,
    NodeError,
    NodeUnavailable,
    RequestCancelled,
    RuyiFlowError,
    WireError,
    loss_cause,
)
from ruyi_flow.loop.clock import REAL_CLOCK, Clock, Pending
from ruyi_flow.loop.session import Session
from ruyi_flow.routing.policy import Policy
from ruyi_flow.types import MIN_UPLOAD_POSITIONS, Block, Likelihood, Mode, Reason, Recovery, Stage, Verdict

__all__ = ["NO_RECOVERY", "NextStage", "Recoveries", "Uplink"]

_MAX_UPLOAD_POSITIONS = 32
"""Decided positions in one upload at most: more would delay the question that comes after them."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
"""Seconds between attempts to take up a lost session; each pause is twice as long as the one before."""

_MOST_DAMAGED = 2
"""Answers to one question that may be garbage; after more, it is not the connection that damages them."""

_LOST = (NodeUnavailable, DeadlineExceeded, CapacityError, WireError, RequestCancelled)
"""Errors of a next node that is as good as gone: it is lost, stuck or full, answers garbage, or has dropped the call.

A bug in the next node and a handshake that does not fit are not among them: they would be there at every try.
"""


class Recoveries(Protocol):
    """What a caller knows of the next node that decides whether a lost session can be taken up again."""

    timeout_s: float
    """Seconds after which a question is not asked again."""

    def left_s(self, error: NodeError, *, began: bool, waited_s: float) -> float:
        """Return the seconds for which another attempt makes sense; 0 if the loss is final.

        Args:
            error: why the session was lost.
            began: whether the answer has begun, so that something would be lost.
            waited_s: seconds since the session was first lost with the present question.
        """
        ...

    def lost(self, node: str, cause: str) -> None:
        """Count a loss of the next node."""
        ...

    def recovered(self, node: str, recovery: Recovery) -> None:
        """Count a session that was taken up again."""
        ...


class _NoRecovery:
    """Every loss is final."""

    timeout_s = 0.0

    def left_s(self, error: NodeError, *, began: bool, waited_s: float) -> float:
        return 0.0

    def lost(self, node: str, cause: str) -> None:
        pass

    def recovered(self, node: str, recovery: Recovery) -> None:
        pass


NO_RECOVERY: Recoveries = _NoRecovery()
"""The recoveries of a node whose losses are final."""


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
        session: the session on this node, which has the log of boundary states.
        make: opens the connection with the policy that the session has by then, and the number of positions that the
            next node may still have of it; None on the deepest node.
        recoveries: whether and how long a lost session is taken up again. Default: never.
        gate: called with the number of positions to send; returns why they must not be sent, or None. It needs a
            session opened with `covers_next`.
        ahead: number of decided positions that may be uploaded before anything is asked about them.
        clock: where it waits.
        uplink: what all sessions of the node have in flight; default: this session alone.
    """

    def __init__(
        self,
        session: Session,
        make: Callable[[Policy, int], Stage] | None = None,
        *,
        recoveries: Recoveries = NO_RECOVERY,
        gate: Callable[[int], Reason | None] | None = None,
        ahead: int = 0,
        clock: Clock = REAL_CLOCK,
        uplink: Uplink | None = None,
    ) -> None:
        self._session, self._make, self._gate, self._clock = session, make, gate, clock
        self._recoveries = recoveries
        self._stage: Stage | None = None
        self.lost: Reason | None = None
        """Why the next stage is not asked any more."""
        self.sent = min(session.next_has, len(session.token_ids))
        """Number of rows of the log that the next stage has; of a stage that is not open yet, may have."""
        self._began = False
        """Whether a question has been answered."""
        self._only_uploads = False
        """Whether the stage was opened by an upload and has not been asked anything yet."""
        self._remembers = session.policy.routing.mode is Mode.CASCADE
        self._decided: list[tuple[int, int]] = []
        """Positions that deeper stages were asked about, and the exits that decided them; kept only in `cascade`."""
        self._told = 0
        """Number of these that the next stage knows, because it was asked or because they were replayed."""
        self._ahead, self._uplink = ahead, uplink or Uplink()
        self._uploading: Pending[None] | None = None
        self._arriving: Pending[None] | None = None
        """Waits until the upload is known to have arrived."""

    @property
    def is_certain(self) -> bool:
        """Whether there is a next stage, and this node never decides in its place."""
        return self._make is not None and self._gate is None and not self._session.covers_next

    @property
    def _has_begun(self) -> bool:
        return self._began or len(self._session.token_ids) > self._session.prompt_length

    def refusal(self, stop: int) -> Reason | None:
        """Return why the log may not be sent up to before `stop`, or None. The gate counts the rows as sent."""
        if self.lost is None and self._gate is not None:
            return self._gate(stop - self.sent)
        return self.lost

    def note_decided(self, decided: Sequence[tuple[int, int]]) -> None:
        """Remember positions that a lost stage was asked about, of a session that is taken up again."""
        if self._remembers:
            self._decided += decided

    async def feed(self) -> None:
        """Send the rows of the log that the next stage lacks, without questions; see `Stage.feed`.

        A connection that is lost is opened again by the next question, which sends everything again.
        """
        stop = self._session.log_length
        try:
            await self._connect(self.sent).feed(self._block(self.sent, stop))
        except CacheMiss as miss:
            await self._drop(miss.position)
        except _LOST as error:
            if self._recoveries.left_s(error, began=self._has_begun, waited_s=0.0) <= 0:
                raise
            await self._drop()
        else:
            self.sent = stop

    async def ask(self, wants: tuple[int, ...]) -> Verdict | Reason:
        """Ask about positions. Return why this node decides in the next stage's place, if it has to.

        A next stage that is lost meanwhile gets the log again, on another replica or once it is back.

        Raises:
            NodeError: the next stage is lost for good, and the session allows no fallback; or it has a bug.
            RequestError: the next stage refuses the session.
        """
        self._uplink.questions += 1
        asked, first = self._clock.now(), None
        pause_s, replayed, damaged = 0.0, 0, 0
        try:
            while True:
                try:
                    await self._finish_upload()
                    if first is not None:
                        replayed += wants[-1] + 1 - self.sent
                    verdict = await self._ask(wants)
                    break
                except CacheMiss as miss:
                    await self._drop(min(miss.position, max(0, self.sent - 1)))
                except _LOST as error:
                    cause, now = loss_cause(error), self._clock.now()
                    damaged += isinstance(error, WireError)
                    self._recoveries.lost(error.node or "", cause)
                    # A node that only lost the connection has parked its part, whose judges are lost, though.
                    is_new = self._remembers or self._only_uploads or isinstance(error, WireError)
                    await self._drop(0 if is_new else self.sent)
                    if self._only_uploads:  # which never fail an answer
                        self._only_uploads = False
                        continue
                    first = first or (cause, now)
                    left_s = min(
                        asked + self._recoveries.timeout_s - now,
                        self._recoveries.left_s(error, began=self._has_begun, waited_s=now - first[1]),
                    )
                    if left_s <= 0 or damaged > _MOST_DAMAGED:
                        if not self._session.policy.routing.fallback:
                            raise
                        self.lost = Reason.UNREACHABLE
                        return self.lost
                    await self._clock.sleep(min(pause_s, left_s))
                    pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s or _FIRST_PAUSE_S)
                    reason = self.refusal(wants[-1] + 1)  # what is sent again counts again
                    if reason is not None:
                        return reason
        finally:
            self._uplink.questions -= 1
        if first is not None:
            recovery = Recovery(first[0], self._clock.now() - first[1], replayed)
            verdict.hops[0].recoveries += (recovery,)
            self._recoveries.recovered(verdict.hops[0].node, recovery)
        return verdict

    async def _ask(self, wants: tuple[int, ...]) -> Verdict:
        stage = self._connect(self.sent)
        if self._told < len(self._decided):  # the stage is a new one
            decided = tuple(self._decided[self._told :])
            stop = max(self.sent, decided[-1][0] + 1)
            await stage.feed(self._block(self.sent, stop, decided=decided))
            self.sent, self._told = stop, len(self._decided)
        stop = wants[-1] + 1
        verdict = await stage.advance(self._block(self.sent, stop, wants))
        self._check(verdict, wants)
        self.sent = stop
        if self._remembers:
            self._decided += ((p, d.exit) for p, d in zip(wants, verdict.decisions, strict=False))
            self._told = len(self._decided)
        if self._began and verdict.prompt:  # the prompt was read again
            verdict = verdict._replace(prompt=())
        self._began, self._only_uploads = True, False
        return verdict

    def _block(
        self, start: int, stop: int, wants: tuple[int, ...] = (), decided: tuple[tuple[int, int], ...] = ()
    ) -> Block:
        session = self._session
        return Block(start, session.states(start, stop), tuple(session.token_ids[start:stop]), wants, decided)

    def settle(self, position: int) -> None:
        """Note that the positions before this one are decided and no later one is kept.

        If the link is idle, their states are uploaded in advance: only states that the last stage here has computed,
        since no layers run for this alone.
        """
        self.sent = min(self.sent, position)
        if self._ahead < MIN_UPLOAD_POSITIONS:
            return
        session, start = self._session, self.sent
        if self.lost is not None or session.policy.deepest in session.exits or not self._uplink.idle:
            return
        stop = min(position, session.log_length, start + min(self._ahead, _MAX_UPLOAD_POSITIONS))
        if stop - start < MIN_UPLOAD_POSITIONS or self._told < len(self._decided) or self.refusal(stop) is not None:
            return
        self._ahead -= stop - start
        self._only_uploads = self._only_uploads or self._stage is None
        self.sent, self._uplink.uploader = stop, self
        self._uploading = self._clock.start(self._upload(self._block(start, stop)))

    async def rewind(self, position: int) -> None:
        """Make the next stage forget every position from `position` on; see `Stage.rewind`."""
        while self._decided and self._decided[-1][0] >= position:
            self._decided.pop()
        self._told = min(self._told, len(self._decided))
        if self.sent > position:
            await self._finish_upload()  # which may open the connection
            if self._stage is not None:
                await self._stage.rewind(position)
        self.sent = min(self.sent, position)

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

    def _check(self, verdict: Verdict, wants: Sequence[int]) -> None:
        """Refuse a verdict that cannot be right.

        Raises:
            WireError: it cannot.
        """
        session, policy, decisions = self._session, self._session.policy, verdict.decisions
        if not 1 <= len(decisions) <= len(wants):
            raise WireError(f"the next stage answered {len(decisions)} of {len(wants)} questions")
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

    def _connect(self, position: int) -> Stage:
        """Return the stage; it is opened if it is not open yet, to go on from a position that it may have parked."""
        if self._stage is None:
            assert self._make is not None, "the policy's deepest exit is after the deepest node"
            self._stage = self._make(self._session.policy, position)
        return self._stage

    async def _drop(self, kept: int = 0) -> None:
        """Give up the stage, which has lost the session; the next question sends everything again after `kept`."""
        stage, self._stage = self._stage, None
        self.sent, self._told = kept, 0
        if stage is not None:
            await stage.close()

    async def _upload(self, block: Block) -> None:
        if await self._succeeds(self._feed_first(block)):
            assert self._stage is not None
            self._arriving = self._clock.start(self._await_arrival(self._stage))
        else:
            self._uplink.free(self)

    async def _feed_first(self, block: Block) -> None:
        await self._connect(block.start).feed(block)

    async def _await_arrival(self, stage: Stage) -> None:
        await self._succeeds(stage.arrived())
        self._uplink.free(self)

    async def _succeeds(self, upload: Coroutine[None, None, None]) -> bool:
        """Run a part of an upload, which must never fail an answer, and return whether it succeeded.

        The next question opens a new connection, and reports the error if that fails, too.
        """
        try:
            await upload
        except RuyiFlowError:
            self._ahead, self._only_uploads = 0, False
            await self._drop()
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
