"""Every exception that Ruyi Flow raises on purpose.

    RuyiFlowError
    ├── ConfigError            a topology, or a command line, that cannot work
    ├── CheckpointError        a family that is missing, truncated or not what it says
    ├── TrainingError          a training run that cannot go on
    ├── RequestError           a request that no node could serve
    │   └── ContextLengthError the prompt does not fit the family's context
    └── NodeError              something between this process and a node, or inside a node
        ├── HandshakeError     the two sides of a hop disagree (family, stages, hidden size, version)
        ├── CapacityError      a limit of the node: sessions, positions, message size
        ├── NodeUnavailable    the node is down, draining, or went away
        ├── DeadlineExceeded   no answer before the deadline
        ├── RequestCancelled   the caller, or the node's shutdown, cancelled the call
        ├── WireError          a message that cannot be what the protocol says
        └── NodeFault          a bug inside a node; its log has the details

A command line prints the message and exits with 2; it never shows a stack trace of these. On the wire each class below
`RequestError` and `NodeError` is one gRPC status (`transport/status.py` has the table).
"""

from collections.abc import Sequence
from difflib import get_close_matches

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DeadlineExceeded",
    "HandshakeError",
    "NodeError",
    "NodeFault",
    "NodeUnavailable",
    "RequestCancelled",
    "RequestError",
    "RuyiFlowError",
    "TrainingError",
    "WireError",
    "did_you_mean",
]


class RuyiFlowError(Exception):
    """Base of all of them; `str(error)` is one message a user can act on."""


class ConfigError(RuyiFlowError):
    """A topology or a command line that cannot work: names the file, the key, the value and the fix."""


class CheckpointError(RuyiFlowError):
    """A family that is missing, truncated, or not what its config says."""


class TrainingError(RuyiFlowError):
    """A training run that cannot go on: names the step and the data."""


class RequestError(RuyiFlowError):
    """A request that no node could serve, whatever its state: bad parameter, empty prompt, unknown exit."""


class ContextLengthError(RequestError):
    """The prompt does not fit the family's context."""


class NodeError(RuyiFlowError):
    """Something between this process and a node, or inside a node.

    Args:
        message: what happened and what to do about it.
        node: the name of the node it is about, where known.
    """

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class HandshakeError(NodeError):
    """The two sides of a hop disagree; the message names both values."""


class CapacityError(NodeError):
    """A limit of the node is reached: sessions, positions or message size."""


class NodeUnavailable(NodeError):
    """The node is down, draining, or went away in the middle."""


class DeadlineExceeded(NodeError):
    """No answer before the deadline."""


class RequestCancelled(NodeError):
    """The caller, or the node's shutdown, cancelled the call."""


class WireError(NodeError):
    """A message that cannot be what the protocol says it is."""


class NodeFault(NodeError):
    """A bug inside a node; its log has the details."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` when a known word is close to a mistyped one, else the empty string."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
