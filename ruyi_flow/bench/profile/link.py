"""What a link to a node gives."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.errors import NodeUnavailable

__all__ = ["LinkFigures", "measure_link"]


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What a link to a node gives."""

    round_trip_ms: float
    jitter_ms: float
    up_mbit: float


async def measure_link(address: str, *, rounds: int = 20, payload: int = 1_000_000) -> LinkFigures:
    """Measure a link by health checks: small ones for the round trip, a large one for the bandwidth upwards.

    Raises:
        NodeUnavailable: nobody answers there.
    """
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def check(size: int) -> float:
            began = time.perf_counter()
            try:
                await health.Check(health_pb2.HealthCheckRequest(service="x" * size), timeout=60)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise NodeUnavailable(f"{address}: no answer: {error.details()}") from None
            return time.perf_counter() - began

        await check(1)
        trips = [await check(1) for _ in range(rounds)]
        large = [await check(payload) for _ in range(3)]
    trip = statistics.median(trips)
    return LinkFigures(1e3 * trip, 1e3 * statistics.pstdev(trips), 8e-6 * payload / max(1e-6, min(large) - trip))
