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
    "Mode",
    "NodeStatus",
    "Reason",
    "SamplingParams",
    "Stage",
    "Stats",
    "Token",
    "Upload",
    "Verdict",
    "Weights",
    "is_token_id",
    "parse_mode",
]


_MOST = 2**31 - 1
"""Largest count or token id in a request; the wire has 32 bits for them."""


def is_token_id(value: object) -> bool:
    """Whether a value can be a token id of some family."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and value == value.encode(errors="ignore").decode()


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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is picked from a branch's logits, and when the answer ends.

    A token is `argmax(processed logits / temperature + gumbel(seed, position, token))`: see `runtime/sampling.py`.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this much probability together."""
    repetition_penalty: float = 1.0
    """Divide (multiply, when negative) the logits of tokens already in the prompt or the answer; 1 is off."""
    no_repeat_ngram_size: int = 0
    """Never repeat an n-gram of this size, prompt included; 0 is off."""
    min_new_tokens: int = 0
    """No end of sequence before this many new tokens."""
    max_new_tokens: int = 256
    """The answer ends after this many new tokens at the latest."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    eos_token_ids: tuple[int, ...] | None = None
    """Tokens that end the answer; None takes the family's own, () takes none."""
    seed: int | None = None
    """Of the sampling noise; None lets the entry node pick one (`stats.seed` tells which)."""

    def __post_init__(self) -> None:
        for name, kind, low, high, meaning in (
            ("temperature", float, 0.0, 100.0, "a number from 0 (greedy) to 100"),
            ("top_k", int, 0, _MOST, "a whole number of 0 (off) or more"),
            ("top_p", float, 1e-9, 1.0, "a number above 0 and at most 1"),
            ("repetition_penalty", float, 1e-9, 1e9, "a number above 0, 1e9 at the most (1 is off)"),
            ("no_repeat_ngram_size", int, 0, _MOST, "a whole number of 0 (off) or more"),
            ("min_new_tokens", int, 0, _MOST, "a whole number of 0 or more"),
            ("max_new_tokens", int, 1, _MOST, "a whole number of 1 or more"),
            ("seed", int, 0, 2**63 - 1, "a whole number of 0 or more, below 2**63"),
        ):
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            right = isinstance(value, int) or (kind is float and isinstance(value, float))
            if isinstance(value, bool) or not right or not low <= value <= high:
                raise RequestError(f"{name} is {value!r}; it must be {meaning}")
            object.__setattr__(self, name, kind(value))
        if 0 < self.temperature < 1e-4:  # logits over it would not be finite any more
            raise RequestError(f"temperature is {self.temperature!r}; it must be 0 (greedy), or 0.0001 or more")
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(_is_text(text) for text in stop):
            raise RequestError(f"stop is {self.stop!r}; it must be texts, none of them empty")
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)
        if self.eos_token_ids is not None:
            eos = (self.eos_token_ids,) if isinstance(self.eos_token_ids, int) else self.eos_token_ids
            if not isinstance(eos, (tuple, list)) or not all(is_token_id(token) for token in eos):
                raise RequestError(f"eos_token_ids is {self.eos_token_ids!r}; it must be token ids")
            object.__setattr__(self, "eos_token_ids", tuple(eos))


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
