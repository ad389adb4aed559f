"""Measurement of a link to a node: round trip, jitter and bandwidth toward the node."""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.config.security import Keys
from ruyi_flow.errors import NodeError, NodeUnavailable
from ruyi_flow.transport.security import open_channel
from ruyi_flow.types import LinkMeasurement

__all__ = ["FRAME_BYTES", "LinkMeter", "measure_link"]

FRAME_BYTES = 1024
"""Bytes that a message of a measurement may have beside its payload."""

_FIRST_BYTES = 48 * 1024
"""Payload of the first large message, from whose time the size of the others follows. Any node accepts it."""

_METER_BYTES = 500_000
"""Largest payload of a measurement that a node makes for somebody else; it sends it twice."""

_METER_S = 6.0
"""Seconds that such a measurement may take."""

_KEPT_S = 10.0
"""Seconds for which the result of such a measurement answers further requests."""


async def measure_link(
    address: str,
    *,
    rounds: int = 20,
    payload: int = 1_000_000,
    repeats: int = 3,
    limit_s: float = 180.0,
    node: str = "",
    keys: Keys | None = None,
) -> LinkMeasurement:
    """Measure the link to host:port with gRPC health checks.

    Args:
        address: host:port of the node.
        rounds: largest number of small checks, for the round trip.
        payload: largest payload in bytes of the large checks, for the bandwidth toward the node.
        repeats: largest number of large checks.
        limit_s: seconds that the measurement may take. On a slow link fewer and smaller checks are sent.
        node: the node's name, which its certificate must have if there are keys.
        keys: the caller's keys. Default: the connection is not encrypted.

    Raises:
        NodeUnavailable: no node answers at the address, or not in time.
    """
    began = time.perf_counter()
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, so that no session's messages wait
    ]
    async with open_channel(address, options, node=node, keys=keys) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def left_s() -> float:
            return began + limit_s - time.perf_counter()

        async def check(size: int) -> float:
            sent = time.perf_counter()
            request = health_pb2.HealthCheckRequest(service="x" * size)
            try:
                await health.Check(request, timeout=max(0.001, left_s()))
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    what = "a small message" if size == 1 else f"a message of {size:,} bytes"
                    raise NodeUnavailable(f"{address}: {what} was not answered within {limit_s:g} s") from None
                if error.code() is not grpc.StatusCode.NOT_FOUND:  # the answer of a node: it has no such service
                    reason = (error.details() or error.code().name).rpartition("connect: ")[2]
                    raise NodeUnavailable(f"{address}: no answer: {reason}") from None
            return time.perf_counter() - sent

        await check(1)  # it connects
        round_trips = [await check(1)]
        while len(round_trips) < rounds and left_s() > 0.75 * limit_s:
            round_trips.append(await check(1))
        median = statistics.median(round_trips)
        size = min(_FIRST_BYTES, payload)
        transfer_s = max(1e-6, await check(size) - median)
        bytes_per_s = size / transfer_s
        size = min(
            payload, max(size, int(bytes_per_s * left_s() / (2 * repeats)))
        )  # what half of the time suffices for
        for _ in range(repeats):
            if size / bytes_per_s + median > left_s():
                break
            bytes_per_s = max(bytes_per_s, size / max(1e-6, await check(size) - median))
    return LinkMeasurement(1e3 * median, 1e3 * statistics.pstdev(round_trips), 8e-6 * bytes_per_s)


class LinkMeter:
    """Measures a node's link to the next node for whoever asks, seldom and briefly enough to harm no other node.

    One measurement runs at a time, and everybody who asks meanwhile gets its result.

    Args:
        address: host:port of the next node.
        max_bytes: largest payload in bytes of a message.
        node: the next node's name.
        keys: this node's keys. Default: the connection is not encrypted.
    """

    def __init__(self, address: str, *, max_bytes: int, node: str = "", keys: Keys | None = None) -> None:
        self._payload = min(_METER_BYTES, max_bytes)
        self._measure = partial(measure_link, address, limit_s=_METER_S, node=node, keys=keys)
        self._running: asyncio.Task[LinkMeasurement] | None = None
        self._ended = 0.0

    async def measure(self) -> LinkMeasurement:
        """Measure the link, or return a result of the last seconds.

        Raises:
            NodeError: the next node does not answer.
        """
        if (kept := self._kept()) is not None:
            # The link may have broken since: one byte tells.
            await self._measure(rounds=1, payload=1, repeats=1)
            return kept
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._measure(rounds=10, payload=self._payload, repeats=2))
            self._running.add_done_callback(self._note_end)
        running = self._running
        try:
            return await asyncio.shield(running)  # a caller that goes away must not end it for the others
        except asyncio.CancelledError:
            if running.cancelled():
                raise NodeError("the measurement ended, because the node stops") from None
            raise

    async def close(self) -> None:
        """End the measurement that is running."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _kept(self) -> LinkMeasurement | None:
        """Return the result of the last seconds, if there is one. A failure is not kept: it may be mended by now."""
        last = self._running
        if last is None or not last.done() or last.cancelled() or last.exception() is not None:
            return None
        return last.result() if time.monotonic() <= self._ended + _KEPT_S else None

    def _note_end(self, task: asyncio.Task[LinkMeasurement]) -> None:
        self._ended = time.monotonic()
        if not task.cancelled():
            task.exception()  # nobody may be left who takes it
