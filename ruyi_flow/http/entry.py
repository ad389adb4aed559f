"""The one class that reaches entry nodes, through the SDK, which recovers answers and knows replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.replicas import node_of
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError, NodeUnavailable, RuyiFlowError
from ruyi_flow.requests import PromptInput
from ruyi_flow.types import Event, NodeStatus, Tokenized

if TYPE_CHECKING:
    from ruyi_flow.serving.engine import Engine

__all__ = ["AT_ONCE", "Ask", "EntryNodes"]

AT_ONCE = 16
"""Largest number of sessions that one request has open at once; its other answers wait for them."""

_STATUS_S = 2.5
"""Seconds that a node may take to tell its state."""

_END_S = 3.0
"""Seconds that answers may take to end when the server does."""

Ask = tuple[PromptInput, Mapping[str, Any]]
"""A prompt and the options of its answer."""


class EntryNodes:
    """The entry node of a topology, or its one node in this process.

    Args:
        topology: the topology.
        timeout_s: seconds that an answer may take.
    """

    def __init__(self, topology: Topology, *, timeout_s: float) -> None:
        self._topology = topology
        # The nodes have queues, and clients of HTTP retry by themselves: a full node is told at once.
        self._client = AsyncClient(topology, timeout_s=timeout_s, max_retries=0)
        self._answering: set[asyncio.Task[Any]] = set()
        """The tasks that wait for an answer's events."""
        self._closing = False
        self._status: NodeStatus | None = None
        self._learning: asyncio.Task[NodeStatus | None] | None = None

    async def start(self) -> None:
        """Connect; a topology of one node without an address is loaded."""
        await self._client.__aenter__()

    async def events(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Event], None]:
        """Answer prompts at once; yield each answer's events with its index. Closing it ends all of them on the nodes.

        Raises:
            RuyiFlowError: one of the answers failed; the others have been ended.
        """
        if len(asks) == 1:
            async with aclosing(self._answer(asks[0])) as events:
                async for event in events:
                    yield 0, event
            return
        # Without a bound: a queue holds at most the answers, and a full one would keep sessions open at their end.
        arrived: asyncio.Queue[tuple[int, Event] | Exception | None] = asyncio.Queue()
        places = asyncio.Semaphore(AT_ONCE)

        async def answer(index: int, ask: Ask) -> None:
            async with places, aclosing(self._answer(ask)) as events:
                async for event in events:
                    arrived.put_nowait((index, event))

        async def answer_all() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, ask in enumerate(asks):
                        group.create_task(answer(index, ask))
            except ExceptionGroup as failed:
                arrived.put_nowait(failed.exceptions[0])
            else:
                arrived.put_nowait(None)

        answers = asyncio.create_task(answer_all())
        try:
            while (item := await arrived.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            answers.cancel()
            await asyncio.wait({answers})

    @property
    def engine(self) -> Engine | None:
        """The node that runs in this process, if the topology's one node has no address."""
        return self._client.engine

    async def _answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer.

        Raises:
            NodeUnavailable: the server ended the answer.
            RuyiFlowError: it failed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        prompt, options = ask
        try:
            async with aclosing(self._client.events(prompt, **options)) as events:
                async for event in events:
                    yield event
        except asyncio.CancelledError:
            if not self._closing:
                raise
            task.uncancel()
            raise NodeUnavailable("the server is shutting down; ask again in a moment") from None
        finally:
            self._answering.discard(task)

    async def tokenize(self, prompt: PromptInput, *, raw: bool) -> Tokenized:
        """Return a prompt's tokens.

        Raises:
            RuyiFlowError: the prompt is refused, or the entry node cannot be asked.
        """
        return await self._client.tokenize(prompt, raw=raw)

    async def states(self) -> dict[str, str]:
        """Return what each replica says of itself, serving or draining, or the error of one that does not answer."""
        answers = await self._client.status(timeout_s=_STATUS_S)
        for name, answer in answers.items():
            if node_of(name) == self._topology.entry.name and isinstance(answer, NodeStatus):
                self._status = answer
        return {name: str(a) if isinstance(a, NodeError) else a.state for name, a in answers.items()}

    async def about(self) -> NodeStatus | None:
        """Return a status of the entry node, which tells the family and its context; None while it does not answer."""
        if self._status is None:
            with suppress(RuyiFlowError):
                await self.states()
        return self._status

    def learn(self) -> None:
        """Ask the entry node about the family in the background, unless that is known."""
        if self._status is None and (self._learning is None or self._learning.done()):
            self._learning = asyncio.create_task(self.about())

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the family, as replies tell it; None until the entry node has told it."""
        return None if self._status is None else f"fp_{self._status.family[:12]}"

    def tier_of(self, node: str) -> str:
        """Return a node's tier, or its name if it has none."""
        return self._topology.label_of(node)

    async def close(self) -> None:
        """End the answers that are under way, which fail as if the node had gone, and close the connections."""
        self._closing = True
        for task in self._answering:
            task.cancel()
        waits = {*self._answering, *({self._learning} if self._learning else ())}
        if waits:  # so that the sessions are free, and the clients told
            await asyncio.wait(waits, timeout=_END_S)
        await self._client.close()
