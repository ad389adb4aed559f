"""Costs of thresholds in a deployment: questions to deeper nodes, bytes on the links, time per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration.trace import Trace
from ruyi_flow.errors import ConfigError

__all__ = ["Budget", "Deployment", "DeploymentCost", "bytes_on_link", "deployment_cost"]


def bytes_on_link(state_bytes: int) -> int:
    """Return the bytes of one position on a link: its boundary state, its token id and its part of the message."""
    return state_bytes + 16


@dataclass(frozen=True, slots=True)
class Deployment:
    """The cut of a family into nodes, with the sizes and times of its links and nodes."""

    last_exits: tuple[int, ...]
    """Deepest exit of each node, from the first node on."""
    position_bytes: tuple[int, ...]
    """Bytes of one position on each link."""
    step_s: tuple[float, ...] = ()
    """Seconds per token of each node; empty when not measured."""
    hop_s: tuple[float, ...] = ()
    """Seconds that each link adds to a question, round trip and message handling; empty when not measured."""


@dataclass(frozen=True, slots=True)
class DeploymentCost:
    """The cost of deciding tokens in a deployment, as means over the tokens."""

    escalation: float
    """Share of the tokens for which the first node asks the next one."""
    bytes_per_token: float
    """Bytes sent upward on all links."""
    latency_s: float | None
    """Seconds per token without drafts; None when times were not measured."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper limits of a `DeploymentCost`; None is no limit."""

    escalation: float | None = None
    bytes_per_token: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"the budget of {name} is {value!r}; it must be above 0")
        if self.escalation is not None and self.escalation > 1:
            raise ConfigError(f"the budget of escalation is {self.escalation!r}; it is a share, 0 to 1")

    def allows(self, cost: DeploymentCost) -> bool:
        """Tell whether a cost stays within every limit; a time that was not measured does not."""
        pairs = [(getattr(self, name), getattr(cost, name)) for name in self.__slots__]
        return all(most is None or (value is not None and value <= most) for most, value in pairs)


def deployment_cost(exits: NDArray[np.int64], trace: Trace, deployment: Deployment) -> DeploymentCost:
    """Compute what it costs to decide a trace's tokens at given exits.

    A link carries each position once: those of the prompt, and those of the answer up to the last token that is decided
    behind the link.

    Args:
        exits: (N,) the exit that decides each token.
        trace: the N tokens.
        deployment: where the family is cut.
    """
    n, ends = len(exits), np.append(np.flatnonzero(np.diff(trace.prompt)) + 1, len(exits))
    starts = np.concatenate([[0], ends[:-1]])
    prompts = np.array([record.prompt_tokens for record in trace.records])
    sent, escalation, latency = 0.0, 0.0, deployment.step_s[0] if deployment.step_s else None
    for k, (last, size) in enumerate(zip(deployment.last_exits, deployment.position_bytes, strict=False)):
        escalated = exits > last
        reached = np.maximum.reduceat(np.where(escalated, np.arange(n), -1), starts)
        sent += size * float(np.where(reached >= 0, prompts + reached - starts, 0).sum())
        share = float(escalated.mean())
        escalation = share if k == 0 else escalation
        if latency is not None:
            latency += share * (deployment.hop_s[k] + deployment.step_s[k + 1])
    return DeploymentCost(escalation, sent / n, latency)
