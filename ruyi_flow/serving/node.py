"""The daemon: an engine behind a gRPC server, from start to drained stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import psutil

from ruyi_flow.config import topology
from ruyi_flow.config.addresses import as_tuple
from ruyi_flow.config.security import node_identity
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.extras import needed_by
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.serving.answering import Answering
from ruyi_flow.serving.attributes import model_name
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.heap import tidy_heap
from ruyi_flow.telemetry.request_log import RequestEntry
from ruyi_flow.telemetry.spans import NO_TRACER, Tracer, current_span
from ruyi_flow.transport.addresses import check_keyless, check_listen
from ruyi_flow.transport.security import server_context
from ruyi_flow.transport.server import Access, Server
from ruyi_flow.types import Event, NodeStatus, Stage, Tokenized

__all__ = ["Node", "access_to", "serve", "stay_on_cores"]

logger = logging.getLogger(__name__)

_LAST_STEP_S = 30.0
"""Seconds that a step on the compute thread may take to end after its session was cancelled."""


class Node:
    """A node's answers to its callers (`transport.server.Service`).

    Args:
        engine: the loaded node.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name, self._model = engine, engine.name, model_name(engine.topology.family)
        self.dtype, self.device = engine.shard.memory.dtype, engine.shard.memory.device
        with tidy_heap():  # parsing a tokenizer's file leaves holes in the heap
            self._answering = engine.answering() if engine.shard.is_entry else None

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> Stage:
        """Open a session for the previous node; see `Service.open_session`."""
        return await self.engine.open_session(opening, timeout_s)

    async def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """Answer a user's request; see `Answering.generate`.

        Raises:
            RequestError: this is not the entry node.
        """
        answering, trace = self._entry, current_span.get().trace_id
        entry = RequestEntry(self._model, id=trace, trace=trace)
        try:
            async with aclosing(answering.generate(request, timeout_s)) as events:
                async for event in events:
                    entry.saw(event)
                    yield event
        except Exception as error:
            entry.failed(error)
            raise
        finally:
            entry.write()

    async def tokenize(self, request: GenerateRequest) -> Tokenized:
        """Return the tokens of a request's prompt; see `Answering.tokenize`.

        Raises:
            RequestError: this is not the entry node, or the prompt is refused.
        """
        return await self._entry.tokenize(request)

    @property
    def _entry(self) -> Answering:
        """The answers to users, on the entry node."""
        if self._answering is None:
            entry = self.engine.topology.entry
            where = ", ".join(entry.addresses)
            raise RequestError(f"node {self.name!r} is not the entry node; send requests to {entry.name!r} at {where}")
        return self._answering

    def load(self) -> float | None:
        """Return the share of the KV cache that is reserved, or None while the compute thread is stuck."""
        pool = self.engine.shard.capacity.pool
        return None if self.engine.worker.is_stuck else 1 - pool.free / pool.num_pages

    async def status(self, *, measure_link: bool) -> NodeStatus:
        """Return what the node contains and does; see `Service.status`."""
        if measure_link:
            return await self.engine.status_with_link()
        return self.engine.status()


def stay_on_cores(node: topology.Node, where: str) -> None:
    """Pin this process to the node's cores. Call it before any thread starts, since threads inherit the pinning.

    Args:
        node: the node.
        where: the topology file's name, for error messages.

    Raises:
        ConfigError: this process may not use one of the cores, or the system cannot pin processes.
    """
    if node.cores is None:
        return
    key = f"{where}: node {node.name!r}: cores"
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):  # macOS
        raise ConfigError(f"{key}: this system cannot pin a process to cores; remove the key")
    there = process.cpu_affinity()
    if not set(there).issuperset(node.cores):
        raise ConfigError(f"{key}: {list(node.cores)} are not all among this process's cores, {sorted(there)}")
    process.cpu_affinity(list(node.cores))


@asynccontextmanager
async def serve(
    engine: Engine, *, address: str | None = None, tracer: Tracer = NO_TRACER, insecure: bool = False
) -> AsyncIterator[Server]:
    """Serve an engine; leaving the block drains and stops the server.

    While it drains, the node takes no new sessions and gives running ones its grace time; then it cancels the rest.

    Args:
        engine: the loaded node.
        address: host:port to listen on. Default: the topology's. Of several, it is the first one.
        tracer: records requests and sessions.
        insecure: whether a node without keys may listen on an address that other machines reach.

    Raises:
        NodeError: the node cannot listen there.
        ConfigError: the node has no keys and would listen beyond loopback, or its keys cannot be used.
    """
    node = engine.node
    address = address or as_tuple(node.listen or node.address)[0]
    await check_listen(address, node.name)
    if engine.topology.security is None and not insecure:
        metrics = as_tuple(node.metrics)[:1]
        await check_keyless(node.name, address, *metrics)
    service = await asyncio.to_thread(Node, engine)  # it reads the tokenizer's files
    access = await asyncio.to_thread(access_to, engine.topology, node.name)
    async with _metrics(engine):
        server = Server(service, address, max_message_bytes=node.limits.max_message_bytes, tracer=tracer, access=access)
        engine.worker.lend()
        await server.start()
        try:
            yield server
        finally:
            await _stop(engine, server)


def access_to(topology: topology.Topology, name: str) -> Access | None:
    """Return who may call a node; None for a topology without keys.

    Args:
        topology: the topology.
        name: the node's name in it.
    """
    keys = topology.keys_of(name)
    if keys is None:
        return None
    identities = [node_identity(node.name, keys.deployment) for node in topology.nodes]
    place = [node.name for node in topology.nodes].index(name)
    return Access(keys, identities[place], frozenset(identities[:place]), is_entry=place == 0)


@asynccontextmanager
async def _metrics(engine: Engine) -> AsyncIterator[None]:
    """Serve the node's metrics while the block lasts, if the topology says where."""
    node = engine.node
    if node.metrics is None:
        yield
        return
    with needed_by("metrics of a node"):
        from ruyi_flow.telemetry.exposition import make_registry, node_metrics, serve_page

    registry = make_registry(node_metrics(engine.counters, engine.status))
    keys = engine.topology.keys_of(node.name)
    context = None if keys is None else await asyncio.to_thread(server_context, keys, asks_caller=True)
    serving = serve_page(as_tuple(node.metrics)[0], registry, f"node {node.name!r}: metrics", context)
    await asyncio.to_thread(serving.__enter__)  # starting and ending its thread takes a moment
    try:
        yield
    finally:
        await asyncio.to_thread(serving.__exit__, None, None, None)


async def _stop(engine: Engine, server: Server) -> None:
    """Drain a node and stop its server."""
    node, leases = engine.node, engine.shard.capacity.leases
    engine.front_door.draining = True
    await server.refuse()
    if not await _idle(engine, node.limits.grace_s):
        logger.warning("cancelling %d sessions after %g s of grace", len(leases), node.limits.grace_s)
    await server.stop()
    await _idle(engine, _LAST_STEP_S)  # a cancelled session ends with the step that is running
    await engine.close()
    engine.front_door.forget_parked()
    engine.shard.capacity.check_integrity()


async def _idle(engine: Engine, timeout_s: float) -> bool:
    """Wait for the sessions to end, and return whether they did."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    leases = engine.shard.capacity.leases
    while leases and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # sessions end on the compute thread, which sets no event
    return not leases
