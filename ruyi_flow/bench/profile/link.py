"""Measurement of a link to a node: round trip, jitter and upward bandwidth."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.errors import NodeUnavailable

__all__ = ["LinkMeasurement", "measure_link"]


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """The measured round trip and bandwidth of a link to a node."""

    round_trip_ms: float
    """Median round trip of a small message, in milliseconds."""
    jitter_ms: float
    """Standard deviation of the round trips, in milliseconds."""
    up_mbit: float
    """Bandwidth toward the node, in Mbit/s."""


async def measure_link(address: str, *, rounds: int = 20, payload: int = 1_000_000) -> LinkMeasurement:
    """Measure the link to host:port with gRPC health checks.

    Args:
        address: host:port of the node.
        rounds: number of small checks, for the round trip.
        payload: bytes of the large checks, for the bandwidth toward the node.

    Raises:
        NodeUnavailable: no node answers at the address.
    """
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def check(size: int) -> float:
            began = time.perf_counter()
            try:
                await health.Check(health_pb2.HealthCheckRequest(service="x" * size), timeout=60)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:  # the answer of a node: it has no such service
                    raise NodeUnavailable(f"{address}: no answer: {error.details()}") from None
            return time.perf_counter() - began

        await check(1)
        round_trips = [await check(1) for _ in range(rounds)]
        large = [await check(payload) for _ in range(3)]
    median = statistics.median(round_trips)
    up_mbit = 8e-6 * payload / max(1e-6, min(large) - median)
    return LinkMeasurement(1e3 * median, 1e3 * statistics.pstdev(round_trips), up_mbit)
