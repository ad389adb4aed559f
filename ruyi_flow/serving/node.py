"""The daemon: an engine behind a gRPC server, from start to drained stop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ruyi_flow.config import topology
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.serving.answering import Entry
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.heap import tidy_heap
from ruyi_flow.transport.server import Server
from ruyi_flow.types import Final, NodeStatus, Stage, Token

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Node", "serve", "stay_on_cores"]

logger = logging.getLogger(__name__)

_LAST_STEP_S = 30.0
"""How long a step on the compute thread may take to end when its session is cancelled."""


class Node:
    """A node's answers to its callers (`transport.server.Service`).

    Args:
        engine: its stages.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name = engine, engine.name
        with tidy_heap():  # a tokenizer's file is parsed
            self._entry = Entry(engine) if engine.shard.is_entry else None

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> tuple[Stage, Tensor]:
        """See `transport.server.Service`."""
        return await self.engine.open_session(opening, timeout_s)

    def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Token | Final, None]:
        """See `transport.server.Service`."""
        if self._entry is None:
            entry = self.engine.topology.entry
            raise RequestError(
                f"node {self.name!r} has no embedding; send requests to {entry.name!r} at {entry.address}"
            )
        return self._entry.generate(request, timeout_s)

    def status(self) -> NodeStatus:
        """See `transport.server.Service`."""
        return self.engine.status()


def stay_on_cores(node: topology.Node, where: str) -> None:
    """Keep this process on the node's cores. Call it before any thread starts, since threads inherit it.

    Raises:
        ConfigError: one that this machine does not have, or a system that cannot do this.
    """
    if node.cores is None:
        return
    key = f"{where}: node {node.name!r}: cores"
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"{key}: this system cannot keep a process on cores; leave the key out")
    there = os.sched_getaffinity(0)
    if not there.issuperset(node.cores):
        raise ConfigError(f"{key}: {list(node.cores)} are not all among this process's cores, {sorted(there)}")
    os.sched_setaffinity(0, node.cores)


@asynccontextmanager
async def serve(engine: Engine, *, address: str | None = None) -> AsyncIterator[Server]:
    """Serve an engine; leaving the block drains and stops it.

    Draining takes no new session, gives running ones the node's grace time, then cancels what is left.

    Args:
        address: instead of the topology's.
    """
    node = engine.node
    server = Server(Node(engine), address or str(node.address), max_message_bytes=node.limits.max_message_bytes)
    engine.worker.lend()
    await server.start()
    try:
        yield server
    finally:
        engine.sessions.draining = True
        await server.refuse()
        if not await _idle(engine, node.limits.grace_s):
            logger.warning("%d sessions outlive %g s; ending them", len(engine.shard.sessions), node.limits.grace_s)
        await server.stop()
        await _idle(engine, _LAST_STEP_S)  # a cancelled session ends with the step that is running
        await engine.close()
        engine.shard.rooms.check_integrity()


async def _idle(engine: Engine, timeout_s: float) -> bool:
    """Wait for the sessions to end; whether they did."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while engine.shard.sessions and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # sessions end on the compute thread, which sets no event
    return not engine.shard.sessions
