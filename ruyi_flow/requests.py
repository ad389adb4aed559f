"""What is asked of a node: a session on a hop, and an answer to a user's prompt."""

from __future__ import annotations

from dataclasses import dataclass

from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import Encoding, SamplingParams

__all__ = ["GenerateRequest", "SessionOpen"]


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """The handshake of a hop: what the sender holds and expects of the receiver."""

    family: str
    """Fingerprint of the family."""
    first_layer: int
    """The first trunk layer that the receiver must run."""
    hidden_size: int
    encoding: Encoding
    """Of every boundary state of the session."""
    max_positions: int
    """The session never holds more."""
    prompt_length: int
    sampling: SamplingParams
    """With seed and eos_token_ids filled in."""
    policy: Policy


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a user asks of the entry node."""

    prompt: str | tuple[tuple[str, str], ...] | tuple[int, ...]
    """A text, (role, content) messages, or token ids."""
    raw: bool = False
    """Take a text as it is, not as one user turn through the chat template."""
    sampling: SamplingParams = SamplingParams()
    routing: Routing | None = None
    """None takes the topology's."""
    draft: int | None = None
    """Overrides the routing's."""
    fallback: bool | None = None
    """Overrides the routing's."""
