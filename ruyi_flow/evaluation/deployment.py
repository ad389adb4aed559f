"""The deployment that a topology describes, with times measured on its running nodes."""

from __future__ import annotations

import statistics
from dataclasses import replace

from ruyi_flow.calibration.budget import Deployment, bytes_on_link
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.requests import Options
from ruyi_flow.types import Mode

__all__ = ["deployment_of", "measure_deployment"]

_PROMPT = "Why is the sky blue?"
_TOKENS = 24


def deployment_of(topology: Topology, hidden_size: int) -> Deployment:
    """Return where a topology cuts its family, without times."""
    encodings = [hop[1].encoding for node in topology.nodes if (hop := topology.next_of(node.name)) is not None]
    position_bytes = tuple(bytes_on_link(encoding.row_bytes(hidden_size)) for encoding in encodings)
    return Deployment(tuple(node.exits[-1] for node in topology.nodes), position_bytes)


async def measure_deployment(topology: Topology, hidden_size: int, *, rounds: int = 5) -> Deployment:
    """Ask running nodes for tokens that every one of them computes, in `rounds` answers, and take the median times.

    Raises:
        NodeError: a node does not answer.
        ConfigError: a node is never asked.
    """
    steps: list[list[float]] = []
    hops: list[list[float]] = []
    asked: Options = {"mode": Mode.TOKEN, "threshold": 1.0, "draft": 0, "eos_token_ids": (), "max_new_tokens": _TOKENS}
    async with AsyncClient(topology) as client:
        for _ in range(rounds):
            reply = await client.generate(_PROMPT, **asked)
            if len(reply.stats.hops) < len(topology.nodes):
                continue
            # An entirely confident branch decides without asking, so a deeper node may see fewer tokens.
            each = [max(1, hop.messages) for hop in reply.stats.hops]
            each[0] = reply.stats.new_tokens
            steps.append([hop.compute_s / n for hop, n in zip(reply.stats.hops, each, strict=True)])
            hops.append([(hop.wire_s + hop.queue_s) / n for hop, n in zip(reply.stats.hops, each, strict=True)][1:])
    if not steps:
        raise ConfigError("the first nodes decided every token, so no deeper one was measured; use --max-escalation")
    medians = [tuple(map(statistics.median, zip(*rows, strict=True))) for rows in (steps, hops)]
    return replace(deployment_of(topology, hidden_size), step_s=medians[0], hop_s=medians[1])
