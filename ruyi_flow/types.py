"""Shared values: what stages exchange, what an answer consists of, and the one interface that all stages share.

Nothing here imports torch or grpc; tensors occur only in type hints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from ruyi_flow.errors import RequestError, shown

if TYPE_CHECKING:
    import torch

__all__ = [
    "Block",
    "Decision",
    "Encoding",
    "Event",
    "Final",
    "FinishReason",
    "Hop",
    "Likelihood",
    "LinkMeasurement",
    "Logprobs",
    "MAX_COUNT",
    "MESSAGE_ROWS",
    "MIN_UPLOAD_POSITIONS",
    "Mode",
    "NodeStatus",
    "PromptToken",
    "PromptTokens",
    "Reason",
    "Stage",
    "Stats",
    "Token",
    "Tokenized",
    "TopToken",
    "Upload",
    "Verdict",
    "Weights",
    "check_number",
    "counted",
    "is_text",
    "parse_mode",
    "to_float",
    "to_int",
    "to_token_id",
]


MAX_COUNT = 2**31 - 1
"""Largest count or token id that a request may contain; the wire has 32 bits for them."""

MIN_UPLOAD_POSITIONS = 8
"""Smallest number of positions that a node uploads ahead of a question; fewer would not repay the message."""


def to_int(value: Any) -> int | None:
    """Return a whole number as an int, also one of numpy or torch; None for anything else, booleans included."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return index(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises each of them
        return None


def to_float(value: Any) -> float | None:
    """Return a real number as a float, also one of numpy or torch; None for anything else, booleans included."""
    if isinstance(value, (bool, str)) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return float(value) if hasattr(value, "__float__") or hasattr(value, "__index__") else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


N = TypeVar("N", int, float)


def check_number(name: str, value: Any, number: N | None, *, low: float, high: float, meaning: str) -> N:
    """Return an option's number if it is one within its bounds.

    Args:
        name: the option.
        value: what was given, for the error message.
        number: the number that it is, or None.
        low, high: the bounds.
        meaning: what the option must be, for the error message.

    Raises:
        RequestError: it is none, or out of bounds.
    """
    if number is None or not low <= number <= high:
        raise RequestError(f"{name} is {shown(value)}; it must be {meaning}")
    return number


def is_text(value: object) -> bool:
    """Return whether a value is a text that can be encoded as UTF-8, which half of a surrogate pair cannot."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def counted(number: int, what: str) -> str:
    """Return a number with its noun, such as "1 token" and "2 tokens"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def to_token_id(value: object) -> int | None:
    """Return a number that can be a token id or an exit of some family as an int; None for anything else."""
    number = to_int(value)
    return number if number is not None and 0 <= number <= MAX_COUNT else None


class Mode(StrEnum):
    """The routing mode, which determines what decides a token: one mechanism with different thresholds."""

    FIXED = "fixed"
    """The branch at one exit decides every token."""
    TOKEN = "token"
    """The shallowest branch that is confident enough decides each token."""
    EXACT = "exact"
    """The last branch decides every token; shallower branches only draft."""
    CASCADE = "cascade"
    """One branch decides until its mean confidence falls too low; then a deeper one does, and shallower ones draft."""


def parse_mode(value: object) -> Mode:
    """Return the mode of a name.

    Raises:
        RequestError: there is no such mode.
    """
    try:
        return Mode(value)  # type: ignore[arg-type]
    except ValueError:
        raise RequestError(f"mode is {shown(value)}; known: {', '.join(Mode)}") from None


class Reason(StrEnum):
    """Why a token was decided at its exit and not at a deeper one."""

    CONFIDENT = "confident"
    """The branch's confidence reached its threshold."""
    FIXED = "fixed"
    """The request fixed the exit."""
    DEEPEST = "deepest"
    """There is no deeper branch."""
    LIMIT = "limit"
    """A node's operator allows no deeper exit (limits.deepest)."""
    BUDGET = "budget"
    """A node had used up the bytes that it may send to the next one (limits.bytes_up_per_minute)."""
    UNREACHABLE = "unreachable"
    """The next node was unreachable, stuck or full, or answered garbage, and the request allows a fallback."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    EOS = "eos"
    """A token that ends the answer was decided."""
    STOP = "stop"
    """A stop string occurred."""
    LENGTH = "length"
    """The answer has `max_new_tokens`, or the family's context is full."""


class Encoding(StrEnum):
    """The encoding of boundary states on a link."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"
    """One byte per value, and one float32 scale per position."""

    def row_bytes(self, hidden_size: int) -> int:
        """Return the bytes of one boundary state, including its scale."""
        sizes = {Encoding.F32: 4 * hidden_size, Encoding.INT8: hidden_size + 4}
        return sizes.get(self, 2 * hidden_size)


class Upload(StrEnum):
    """The time at which a node sends boundary states to the next one."""

    ON_DEMAND = "on-demand"
    """States are sent only with a question, so that nothing is sent in vain."""
    AHEAD = "ahead"
    """States are sent with a question and while the link is idle, so that a question has less to send."""


class Weights(StrEnum):
    """Number format of a node's weight matrices; everything else has the node's dtype."""

    BF16 = "bf16"
    """Unquantized bfloat16."""
    INT8 = "int8"
    """8 bits, with a scale and a zero point for each 32 values."""
    INT4 = "int4"
    """4 bits, with a scale and a zero point for each 32 values; LM heads, which matter more, have 8 bits."""


class Block(NamedTuple):
    """New boundary states for the next stage, and the positions that it is asked about."""

    start: int
    """Position of the first state, which is the number of positions that the receiver already has."""
    states: torch.Tensor
    """(n, hidden) boundary states of the positions start … start+n-1."""
    token_ids: tuple[int, ...]
    """The n token ids of these positions; the token of position i+1 is the draft for position i."""
    wants: tuple[int, ...]
    """Positions whose next token is wanted, ascending. Empty: the block only fills KV caches."""
    decided: tuple[tuple[int, int], ...] = ()
    """Only in a replay: positions that had been asked about, ascending, and the exit that decided each next token."""

    def parts(self, rows: int) -> Iterator[Block]:
        """Yield the block in parts of at most `rows` positions, where possible; the last part has all wanted ones."""
        count = len(self.token_ids)
        first_wanted = (self.wants[0] if self.wants else self.start + count - 1) - self.start
        start = 0
        while count - start > rows and start < first_wanted:
            stop = min(start + rows, first_wanted)
            yield self._replace(
                start=self.start + start,
                states=self.states[start:stop],
                token_ids=self.token_ids[start:stop],
                wants=(),
                decided=tuple(one for one in self.decided if start <= one[0] - self.start < stop),
            )
            start = stop
        if not start:
            yield self
            return
        yield self._replace(
            start=self.start + start,
            states=self.states[start:],
            token_ids=self.token_ids[start:],
            decided=tuple(one for one in self.decided if one[0] >= self.start + start),
        )


MESSAGE_ROWS = 512
"""Largest number of positions in a message, so that a node can start on a long prompt before all of it has arrived."""


class Likelihood(NamedTuple):
    """How probable a branch finds a token in its place, and which tokens it finds most probable there.

    The log-probabilities are natural logarithms, of the branch's logits before penalties and temperature.
    """

    logprob: float
    """Log-probability of the token."""
    top: tuple[tuple[int, float], ...]
    """Ids and log-probabilities of the most probable tokens, the most probable one first."""


class Decision(NamedTuple):
    """One decided token."""

    token: int
    """The token id."""
    exit: int
    """The exit whose branch decided it."""
    confidence: float
    """Confidence of that branch, 0 … 1."""
    reason: Reason
    """Why it was decided there."""
    likelihood: Likelihood | None = None
    """How probable the branch finds it; None unless the session asks for it."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A session that lost the next node, and was taken up again."""

    cause: str
    """Why it was lost: reset, silent, dropped, damaged, left, full or late."""
    seconds: float
    """Seconds from the loss until the answer to the question that was asked again."""
    positions: int
    """Number of positions that were sent again."""


@dataclass(slots=True)
class Hop:
    """Time and traffic of one node, for one verdict or for a whole answer."""

    node: str
    """Name of the node."""
    compute_s: float = 0.0
    """Seconds of running layers and branches."""
    queue_s: float = 0.0
    """Seconds of waiting for the node's compute thread."""
    wire_s: float = 0.0
    """Seconds of round trips that the sender measured, minus the time that the node had the messages."""
    messages: int = 0
    """Number of messages sent to the node."""
    positions: int = 0
    """Number of positions in these messages."""
    bytes_up: int = 0
    """Bytes of the messages sent to the node."""
    bytes_down: int = 0
    """Bytes of its replies."""
    recoveries: tuple[Recovery, ...] = ()
    """The times that the session lost the node and was taken up again there, or on another replica."""

    def add(self, other: Hop) -> None:
        """Add what the same node spent on something else."""
        self.compute_s += other.compute_s
        self.queue_s += other.queue_s
        if other.recoveries:
            self.recoveries += other.recoveries
        if not other.messages:  # nothing was sent to the node
            return
        self.wire_s += other.wire_s
        self.messages += other.messages
        self.positions += other.positions
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down


class Verdict(NamedTuple):
    """A stage's answer to a block."""

    decisions: tuple[Decision, ...]
    """Decisions for the wanted positions in order, up to the first that contradicts its draft."""
    hops: tuple[Hop, ...] = ()
    """Time and traffic of every node on the way, the answering node first."""
    prompt: tuple[Likelihood, ...] = ()
    """Likelihoods of the prompt's tokens after the first, in order, as far as they are new."""


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the most probable tokens in a place."""

    id: int
    """The token id."""
    text: str
    """The text of this token alone."""
    logprob: float
    """Its log-probability."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How probable a branch finds a token, and which tokens it finds most probable in its place.

    The log-probabilities are natural logarithms, before penalties and temperature.
    """

    text: str
    """The text of this token alone, also of a special token; U+FFFD for a part of a character."""
    logprob: float
    """Log-probability of the token."""
    top: tuple[TopToken, ...]
    """The most probable tokens, the most probable one first."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt."""

    id: int
    """The token id."""
    text: str
    """The text of this token alone."""
    logprobs: Logprobs | None
    """How probable the deepest exit finds it after the tokens before; None for the first token."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of a prompt with their log-probabilities: the first event of an answer that was asked for them."""

    tokens: tuple[PromptToken, ...]
    """The prompt's tokens."""
    text: str
    """The text of all of them, with special tokens."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as tokens."""

    token_ids: tuple[int, ...]
    """The prompt's token ids."""
    texts: tuple[str, ...]
    """The text of each token alone."""
    context: int
    """The family's context: the largest number of tokens of a prompt and its answer."""


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """One token of an answer."""

    id: int
    """The token id."""
    text: str
    """The text that it adds; empty in the middle of a character, or inside a possible stop string."""
    exit: int
    """The exit whose branch decided it."""
    node: str
    """Name of the node that decided it."""
    confidence: float
    """Confidence of that branch, 0 … 1."""
    reason: Reason
    """Why it was decided there."""
    after_s: float = 0.0
    """Seconds from the request's arrival at the entry node until the token was decided."""
    bytes_up: int = 0
    """Bytes sent upward by the round that decided this token; 0 on the round's other tokens."""
    logprobs: Logprobs | None = None
    """Log-probabilities of the branch that decided it; None unless the request asks for them."""

    def __repr__(self) -> str:
        return f"Token({self.text!r}, {self.node}, exit {self.exit}, {self.confidence:.2f}, {self.reason})"


@dataclass(frozen=True, slots=True, repr=False)
class Stats:
    """Statistics of an answer."""

    prompt_tokens: int
    """Number of tokens of the prompt."""
    new_tokens: int
    """Number of tokens of the answer."""
    first_token_s: float
    """Time to first token (TTFT): seconds from the request's arrival at the entry node."""
    total_s: float
    """Seconds from the request's arrival to the end of the answer."""
    seed: int | None
    """The sampling seed, with which the answer can be repeated; None when nothing was sampled."""
    drafted: int
    """Number of tokens drafted past a position that was escalated."""
    accepted: int
    """Number of drafts that a deeper branch accepted."""
    escalations: int
    """Number of questions that the entry node asked the next node, each of them one round trip."""
    hops: tuple[Hop, ...]
    """Time and traffic of each node for the whole answer, the entry node first."""
    reused: int = 0
    """Number of tokens of the prompt whose caches the entry node had from an earlier answer."""
    recoveries: tuple[Recovery, ...] = ()
    """The times that the client lost the entry node and took up the answer again; `hops` have those of deeper nodes."""

    @property
    def token_s(self) -> float:
        """Time per output token (TPOT): seconds per token after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.new_tokens - 1)

    @property
    def all_recoveries(self) -> tuple[Recovery, ...]:
        """The times that a node was lost and the answer was taken up again: the entry node's, then deeper ones'."""
        return (*self.recoveries, *(recovery for hop in self.hops for recovery in hop.recoveries))

    @property
    def summary(self) -> str:
        """One line: tokens, times, escalations, accepted drafts, bytes sent up, reused tokens, recoveries, seed."""
        up = sum(hop.bytes_up for hop in self.hops)
        drafts = f", {self.accepted} of {self.drafted} drafted tokens accepted" if self.drafted else ""
        return (
            f"{counted(self.new_tokens, 'token')}, first after {1000 * self.first_token_s:.0f} ms, "
            f"then {1000 * self.token_s:.1f} ms each · {counted(self.escalations, 'escalation')}{drafts} · "
            f"{up:,} bytes up"
            + (f" · {self.reused} of {self.prompt_tokens} prompt tokens reused" if self.reused else "")
            + (f" · {_recovered(self.all_recoveries)}" if self.all_recoveries else "")
            + ("" if self.seed is None else f" · seed {self.seed}")
        )

    def __repr__(self) -> str:
        return f"Stats({self.summary})"


def _recovered(recoveries: tuple[Recovery, ...]) -> str:
    """Say how often an answer was taken up again, and how long that took."""
    seconds, causes = sum(recovery.seconds for recovery in recoveries), {recovery.cause for recovery in recoveries}
    return f"recovered {counted(len(recoveries), 'time')} in {seconds:.1f} s ({', '.join(sorted(causes))})"


@dataclass(frozen=True, slots=True)
class Final:
    """The end of an answer."""

    finish_reason: FinishReason
    """Why the answer ended."""
    text: str
    """The complete answer."""
    stats: Stats
    """Statistics of the answer."""


Event = PromptTokens | Token | Final
"""What an answer arrives as: the prompt's tokens if they were asked for, then tokens, then one `Final`."""


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """The measured round trip and bandwidth of a link to a node."""

    round_trip_ms: float
    """Median round trip of a small message, in milliseconds."""
    jitter_ms: float
    """Standard deviation of the round trips, in milliseconds."""
    up_mbit: float
    """Bandwidth toward the node, in Mbit/s."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The state of a node."""

    node: str
    """Name of the node."""
    tier: str
    """Tier of the node."""
    state: str
    """State of the node: serving or draining."""
    family: str
    """Fingerprint of its family."""
    exits: tuple[int, ...]
    """Exits of its stages."""
    first_layer: int
    """Index of its first trunk layer."""
    last_layer: int
    """Index after its last trunk layer."""
    parameters: int
    """Number of its parameters."""
    tensor_bytes: int
    """Bytes of its weights."""
    resident_bytes: int
    """Resident memory of its process in bytes."""
    dtype: str
    """Number format of its layers and weights."""
    device: str
    """Torch device of the node."""
    sessions: int
    """Number of open sessions."""
    max_sessions: int
    """Largest number of open sessions."""
    waiting: int
    """Number of sessions that wait for capacity."""
    used_positions: int
    """Reserved KV cache positions."""
    max_positions: int
    """All KV cache positions."""
    uptime_s: float
    """Seconds since it was loaded."""
    next_node: str
    """Name of the next node; empty on the deepest one."""
    next_state: str
    """State of the connection to it: idle, connecting, ready, transient_failure, or shutdown if it was lost."""
    process_id: int
    """Process id of the daemon."""
    version: str = ""
    """Version of ruyi-flow that it runs; empty if the node does not report it."""
    next_address: str = ""
    """host:port that it dials for the next node; empty if the node does not report it."""
    next_encoding: Encoding | None = None
    """Encoding of boundary states on the link to the next node; None if the node does not report it."""
    link: LinkMeasurement | None = None
    """The link to the next node; None unless its measurement was asked for and succeeded."""
    link_error: str = ""
    """Why the link to the next node could not be measured."""
    context: int = 0
    """The family's context, in tokens; 0 if the node does not report it."""
    parked: int = 0
    """Number of parked sessions, whose positions count as free."""
    cache_bytes: int = 0
    """Bytes that are reserved for the KV cache."""
    log_bytes: int = 0
    """Bytes that are reserved for the log of boundary states, from which the next node can be restored."""
    insecure: bool = False
    """Whether it was started with `--insecure`: without keys, on an address that other machines may reach."""


class Stage(Protocol):
    """The interface of a stage: one in this process, one on another node, or a fake in a test."""

    async def advance(self, block: Block) -> Verdict:
        """Run the layers on a block's new states, and decide or escalate the wanted positions.

        Raises:
            NodeError: this stage or a deeper one cannot answer.
        """
        ...

    async def feed(self, block: Block) -> None:
        """Accept a block without questions, and do not wait until its layers have run. A call of `advance` follows.

        Raises:
            NodeError: the block cannot be accepted. The next `advance` raises what fails later.
        """
        ...

    async def arrived(self) -> None:
        """Wait until every block that was fed has run; the wait may be cancelled.

        Raises:
            NodeError: a block failed.
        """
        ...

    async def rewind(self, position: int) -> None:
        """Forget every position from `position` on, here and deeper."""
        ...

    async def close(self) -> None:
        """End the session and free its KV cache, here and deeper."""
        ...
