"""What thresholds cost in a deployment: questions asked beyond the device, bytes on the links, time for a token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration.trace import Trace
from ruyi_flow.errors import ConfigError

__all__ = ["Budget", "Deployment", "Spent", "frame", "spent"]


def frame(state_bytes: int) -> int:
    """Bytes of a position on a link: its state, its token id and its part of the message."""
    return state_bytes + 16


@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a family is cut, and what its nodes and links take."""

    last_exits: tuple[int, ...]
    """Of each node, from the device on."""
    row_bytes: tuple[int, ...]
    """Of a position on each link."""
    step_s: tuple[float, ...] = ()
    """Each node's time for a token; empty where it was not measured, as the next one."""
    hop_s: tuple[float, ...] = ()
    """What each link adds to a question, in seconds: the round trip and its messages' handling."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Means over tokens."""

    escalation: float
    """Share that is asked beyond the first node."""
    bytes_per_token: float
    """Upwards, on all links."""
    latency_s: float | None
    """Without drafts; None where times were not measured."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent; None is no limit."""

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

    def keeps(self, found: Spent) -> bool:
        """Whether something stays within it."""
        pairs = [(getattr(self, name), getattr(found, name)) for name in self.__slots__]
        return all(most is None or (value is not None and value <= most) for most, value in pairs)


def spent(at: NDArray[np.int64], trace: Trace, deployment: Deployment) -> Spent:
    """What deciding a trace's tokens at these exits costs in a deployment.

    A link carries each position once: the prompt's and the answer's, up to the last one that is asked beyond it.

    Args:
        at: (N,) the exit that decides each token.
    """
    n, ends = len(at), np.append(np.flatnonzero(np.diff(trace.prompt)) + 1, len(at))
    starts = np.concatenate([[0], ends[:-1]])
    prompts = np.array([record.prompt_tokens for record in trace.records])
    sent, latency = 0.0, deployment.step_s[0] if deployment.step_s else None
    escalation = 0.0
    for k, (last, row) in enumerate(zip(deployment.last_exits, deployment.row_bytes, strict=False)):
        beyond = at > last
        reached = np.maximum.reduceat(np.where(beyond, np.arange(n), -1), starts)
        sent += row * float(np.where(reached >= 0, prompts + reached - starts, 0).sum())
        share = float(beyond.mean())
        escalation = share if k == 0 else escalation
        if latency is not None:
            latency += share * (deployment.hop_s[k] + deployment.step_s[k + 1])
    return Spent(escalation, sent / n, latency)
