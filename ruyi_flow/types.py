"""The words of the system as values: what travels between stages, and the one interface that all stages share.

Nothing here imports torch or grpc; tensors are only named.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ruyi_flow.errors import RequestError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Block",
    "Decision",
    "Encoding",
    "Final",
    "FinishReason",
    "Hop",
    "MAX_COUNT",
    "MIN_UPLOAD_POSITIONS",
    "Mode",
    "NodeStatus",
    "Reason",
    "Stage",
    "Stats",
    "Token",
    "Upload",
    "Verdict",
    "Weights",
    "is_token_id",
    "parse_mode",
]


MAX_COUNT = 2**31 - 1
"""Largest count or token id that a request may contain; the wire has 32 bits for them."""

MIN_UPLOAD_POSITIONS = 8
"""Smallest number of positions that a node uploads ahead of a question; fewer would not repay the message."""


def is_token_id(value: object) -> bool:
    """Return whether a value can be a token id of some family."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


class Mode(StrEnum):
    """What decides a token; all of them are one mechanism with different thresholds."""

    FIXED = "fixed"
    """Always the branch at one exit."""
    TOKEN = "token"
    """Each token by the shallowest branch that is confident enough."""
    EXACT = "exact"
    """Always the last branch; shallower branches only draft."""
    CASCADE = "cascade"
    """One branch decides until its running confidence falls too low; then a deeper one, while shallower ones draft."""


def parse_mode(value: object) -> Mode:
    """A mode from its name.

    Raises:
        RequestError: there is none of that name.
    """
    try:
        return Mode(value)  # type: ignore[arg-type]
    except ValueError:
        raise RequestError(f"mode is {value!r}; known: {', '.join(Mode)}") from None


class Reason(StrEnum):
    """Why a token was decided where it was and went no deeper."""

    CONFIDENT = "confident"
    """The branch's confidence reached its threshold."""
    FIXED = "fixed"
    """The request fixed this exit."""
    DEEPEST = "deepest"
    """There is no deeper branch."""
    LIMIT = "limit"
    """A node's operator lets nothing go deeper."""
    BUDGET = "budget"
    """A node had spent the bytes that it may send upwards."""
    UNREACHABLE = "unreachable"
    """The next node could not be reached, hung or was full, and the request said `fallback`."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


class Encoding(StrEnum):
    """How boundary states are written on a link."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"
    """One byte a value and one float32 scale a token."""

    def row_bytes(self, hidden_size: int) -> int:
        """Bytes of one boundary state, its scale included."""
        sizes = {Encoding.F32: 4 * hidden_size, Encoding.INT8: hidden_size + 4}
        return sizes.get(self, 2 * hidden_size)


class Upload(StrEnum):
    """When a node sends its boundary states to the next one."""

    ON_DEMAND = "on-demand"
    """With a question: nothing goes up that is not needed."""
    AHEAD = "ahead"
    """While the link is idle, so that a question finds its catch-up done."""


class Weights(StrEnum):
    """How a node holds the weights of its products; everything else keeps the node's number format."""

    BF16 = "bf16"
    """As they are, in bfloat16."""
    INT8 = "int8"
    """8 bits, a scale and a zero for 32 values."""
    INT4 = "int4"
    """4 bits, a scale and a zero for 32 values; heads, which are worth more, in 8 bits."""


class Block(NamedTuple):
    """New boundary states for the next stage, and the question about them."""

    start: int
    """Position of the first state: what the receiver holds already."""
    states: torch.Tensor
    """(n, hidden) boundary states of positions start … start+n-1."""
    token_ids: tuple[int, ...]
    """The n token ids at these positions; token i+1 is the draft for position i."""
    wants: tuple[int, ...]
    """Positions, ascending, whose next token is asked for; may be empty (only fill caches)."""


class Decision(NamedTuple):
    """One decided token."""

    token: int
    exit: int
    """The exit whose branch decided it."""
    confidence: float
    """That branch's confidence, 0 … 1."""
    reason: Reason


@dataclass(slots=True)
class Hop:
    """What one node spent: added up over a request, or of one verdict."""

    node: str
    compute_s: float = 0.0
    """Running layers and branches."""
    queue_s: float = 0.0
    """Waiting for the node's one compute thread."""
    wire_s: float = 0.0
    """Round trip as the sender saw it, less all the time the receiver had the message."""
    messages: int = 0
    """Blocks sent up to this node."""
    positions: int = 0
    """Positions in them."""
    bytes_up: int = 0
    """Serialized bytes of the messages sent up to this node."""
    bytes_down: int = 0
    """Serialized bytes of its replies."""

    def add(self, other: Hop) -> None:
        """Add another count of the same node to this one."""
        self.compute_s += other.compute_s
        self.queue_s += other.queue_s
        if not other.messages:  # nothing was sent there
            return
        self.wire_s += other.wire_s
        self.messages += other.messages
        self.positions += other.positions
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down


class Verdict(NamedTuple):
    """A stage's answer to a block."""

    decisions: tuple[Decision, ...]
    """For the wanted positions in order, up to the first that contradicts its draft (or all of them)."""
    hops: tuple[Hop, ...] = ()
    """What every node on the way spent, the answering stage's node first."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    id: int
    text: str
    """What it adds to the text; empty in the middle of a character, or inside a possible stop string."""
    exit: int
    node: str
    confidence: float
    reason: Reason
    after_s: float = 0.0
    """When it was decided, from the request's arrival at the entry node."""
    bytes_up: int = 0
    """That all links carried upwards for the round that decided it; at the first token of the round."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer took."""

    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    """From the request's arrival at the entry node to its first token."""
    total_s: float
    """From the request's arrival to the last token."""
    seed: int
    """0 for a greedy answer that was asked without one."""
    drafted: int
    """Tokens drafted past a position that was asked deeper."""
    accepted: int
    """Those of them that the deeper branch confirmed."""
    escalations: int
    """Questions asked beyond the entry node, each one round trip."""
    hops: tuple[Hop, ...]
    """What each node spent in all, the entry node first."""

    @property
    def token_s(self) -> float:
        """Time per token after the first, in seconds."""
        return (self.total_s - self.first_token_s) / max(1, self.new_tokens - 1)


@dataclass(frozen=True, slots=True)
class Final:
    """The end of an answer."""

    finish_reason: FinishReason
    text: str
    """The whole answer."""
    stats: Stats


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node holds and does."""

    node: str
    tier: str
    state: str
    """serving or draining"""
    family: str
    """Fingerprint."""
    exits: tuple[int, ...]
    first_layer: int
    last_layer: int
    parameters: int
    tensor_bytes: int
    resident_bytes: int
    """Of the whole process."""
    dtype: str
    device: str
    sessions: int
    max_sessions: int
    waiting: int
    """Sessions that wait for room."""
    used_positions: int
    max_positions: int
    uptime_s: float
    next_node: str
    next_state: str
    """Of the connection to the next node: idle, connecting, ready, transient_failure."""
    process_id: int


class Stage(Protocol):
    """The one seam: a stage in this process, behind a wire, or a fake in a test."""

    async def advance(self, block: Block) -> Verdict:
        """Run the layers on the block's new states, look where a decision is wanted, answer or escalate.

        Raises:
            NodeError: the stage, or one beyond it, cannot answer.
        """
        ...

    async def feed(self, block: Block) -> None:
        """Take in a block that wants nothing, without waiting until its layers have run; `advance` follows.

        Raises:
            NodeError: it cannot be taken in. What fails later is told by the next `advance`.
        """
        ...

    async def arrived(self) -> None:
        """Wait until everything that was fed has been taken in; may be cancelled.

        Raises:
            NodeError: it was not.
        """
        ...

    async def rewind(self, position: int) -> None:
        """Forget every position from `position` on, here and deeper."""
        ...

    async def close(self) -> None:
        """End the session and free its cache, here and deeper."""
        ...
