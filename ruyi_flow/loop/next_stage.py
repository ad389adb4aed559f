"""The stage beyond a node, as a session deals with it: made once it is needed, asked, and sent states ahead."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from ruyi_flow.config.topology import LEAST_AHEAD
from ruyi_flow.errors import CapacityError, DeadlineExceeded, NodeError, NodeUnavailable
from ruyi_flow.loop.clock import Pending, Time
from ruyi_flow.loop.session import Session, States
from ruyi_flow.routing.policy import Policy
from ruyi_flow.types import Block, Reason, Stage, Verdict

__all__ = ["Beyond", "Uplink"]

_MOST_AHEAD = 32
"""Decided positions that go up together ahead of a question: more would hold up the question that comes after them."""


@dataclass(slots=True)
class Uplink:
    """What all sessions of a node have under way to the node beyond it."""

    questions: int = 0
    uploader: Beyond | None = None
    """Whose states go up ahead, or have not been told to have arrived."""

    @property
    def idle(self) -> bool:
        """Whether states may go up that nobody asked about."""
        return not self.questions and self.uploader is None

    def free(self, beyond: Beyond) -> None:
        """What a session sent ahead is there, or is given up."""
        if self.uploader is beyond:
            self.uploader = None


class Beyond:
    """A session's way to the stage beyond its node.

    Args:
        session: the session.
        make: makes that stage, for the policy that the session has by then; None on the deepest node.
        gate: asked before so many positions go there: why they may not. The session must stand in then.
        ahead: decided positions that may go there before anything is asked about them.
        time: where it waits.
        uplink: what all sessions have under way there.
    """

    def __init__(
        self,
        session: Session,
        make: Callable[[Policy], Stage] | None,
        gate: Callable[[int], Reason | None] | None,
        ahead: int,
        time: Time,
        uplink: Uplink,
    ) -> None:
        self._session, self._make, self._gate, self._time = session, make, gate, time
        self._stage: Stage | None = None
        self.lost: Reason | None = None
        """Why it is not asked any more."""
        self._sent = 0
        """Positions that it holds."""
        self._ahead, self._uplink = ahead, uplink
        self._uploading: Pending[None] | None = None
        self._arriving: Pending[None] | None = None
        """What waits for the word that it has arrived."""
        self._unasked: list[States] = []
        """What went up before anything was answered, to go up once more if that session is lost."""

    @property
    def always(self) -> bool:
        """Whether it is there, and this node does not decide in its place whatever happens."""
        return self._make is not None and self._gate is None and not self._session.stands_in

    def refuses(self, positions: int) -> Reason | None:
        """Why so many positions may not go there."""
        if self.lost is None and self._gate is not None:
            return self._gate(positions)
        return self.lost

    async def feed(self, block: Block) -> None:
        """See `Stage.feed`."""
        await self._there().feed(block)
        self._sent = block.start + len(block.token_ids)

    async def ask(self, block: Block) -> Verdict | None:
        """What it says of a block; None when it is `lost` and this node decides in its place."""
        self._uplink.questions += 1
        try:
            await self._uploaded()
            stop = block.start + len(block.token_ids)
            if self._unasked and self._stage is None:  # the session that was for them alone is lost
                states = self._session.join([*self._unasked, block.states])
                block = Block(0, states, tuple(self._session.token_ids[:stop]), block.wants)
                self._unasked.clear()
            stage = self._there()
            verdict = await stage.advance(block)
            self._unasked.clear()
            self._sent = stop
            return verdict
        except (NodeUnavailable, DeadlineExceeded, CapacityError):
            if not self._unasked and not self._session.policy.fallback:
                raise
            self._stage = None
            await stage.close()
        finally:
            self._uplink.questions -= 1
        if self._unasked:
            return await self.ask(block)
        self.lost = Reason.UNREACHABLE
        return None

    def decided(self, position: int) -> None:
        """Positions before this one are decided, and none after it holds.

        Their states go up ahead, if the link is idle and there are enough of them: only what the last stage here has
        run, since no layers are run for this alone.
        """
        if self._sent > position:
            self._sent = position
        if self._ahead <= 0:
            return
        session, last = self._session, len(self._session.exits) - 1
        if self.lost is not None or session.policy.deepest in session.exits or not self._uplink.idle:
            return
        start = session.unseen_start(last)
        stop = min(position, session.positions[last], start + min(self._ahead, _MOST_AHEAD))
        if stop - start < LEAST_AHEAD or self.refuses(stop - start) is not None:
            return
        self._ahead -= stop - start
        states = session.take_unseen(last, stop)
        if self._unasked or not start:
            self._unasked.append(states)
        self._sent, self._uplink.uploader = stop, self
        self._uploading = self._time.start(self._upload(Block(start, states, tuple(session.token_ids[start:stop]), ())))

    async def rewind(self, position: int) -> None:
        """See `Stage.rewind`."""
        if self._stage is not None and self._sent > position:
            await self._uploaded()
            await self._stage.rewind(position)
        if self._unasked:
            self._unasked = [self._session.join(self._unasked)[:position]]
        self._sent = min(self._sent, position)

    async def close(self) -> None:
        """End the session there, and whatever is on its way."""
        try:
            if self._uploading is not None:
                await self._uploading.drop()
            if self._arriving is not None:
                await self._arriving.drop()
        finally:  # this one may be cancelled meanwhile; the deeper caches must be freed all the same
            self._uplink.free(self)
            if self._stage is not None:
                await self._stage.close()

    def _there(self) -> Stage:
        if self._stage is None:
            assert self._make is not None, "the policy's deepest exit is beyond the deepest node"
            self._stage = self._make(self._session.policy)
        return self._stage

    async def _upload(self, block: Block) -> None:
        """Send states ahead; see `_quietly`."""
        stage = self._there()
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
            self._ahead = 0
            if self._unasked:
                self._stage = None
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
