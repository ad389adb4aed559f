"""A topology as calibration sees it, with the times that its running nodes take."""

from __future__ import annotations

import statistics

from ruyi_flow.calibration.budget import Deployment, bytes_on_link
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.types import Mode

__all__ = ["deployment_of", "measure"]

_PROMPT = "Why is the sky blue?"
_TOKENS = 24


def deployment_of(topology: Topology, hidden_size: int) -> Deployment:
    """Where a topology cuts its family; without times."""
    encodings = [hop[1].encoding for node in topology.nodes if (hop := topology.next_of(node.name)) is not None]
    return Deployment(
        tuple(node.exits[-1] for node in topology.nodes),
        tuple(bytes_on_link(encoding.row_bytes(hidden_size)) for encoding in encodings),
    )


async def measure(topology: Topology, hidden_size: int, *, rounds: int = 5) -> Deployment:
    """Ask running nodes for tokens that all of them look at, and take the times that they report: medians.

    Raises:
        NodeError: one of them does not answer.
        ConfigError: one of them is never asked.
    """
    steps: list[list[float]] = []
    hops: list[list[float]] = []
    asked = {"mode": Mode.TOKEN, "threshold": 1.0, "draft": 0, "eos_token_ids": ()}
    async with AsyncClient(topology) as client:
        for _ in range(rounds):
            reply = await client.generate(_PROMPT, max_new_tokens=_TOKENS, **asked)
            if len(reply.stats.hops) < len(topology.nodes):
                continue
            # Branches that are entirely sure leave a few tokens to shallow nodes.
            each = [max(1, hop.messages) for hop in reply.stats.hops]
            each[0] = reply.stats.new_tokens
            steps.append([hop.compute_s / n for hop, n in zip(reply.stats.hops, each, strict=True)])
            hops.append([(hop.wire_s + hop.queue_s) / n for hop, n in zip(reply.stats.hops, each, strict=True)][1:])
    if not steps:
        raise ConfigError("the shallow nodes are entirely sure of every token, so the deeper ones cannot be measured")
    plain = deployment_of(topology, hidden_size)
    medians = [tuple(map(statistics.median, zip(*rows, strict=True))) for rows in (steps, hops)]
    return Deployment(plain.last_exits, plain.position_bytes, *medians)
