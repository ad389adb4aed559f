"""The exceptions of Ruyi Flow.

    RuyiFlowError
    ├── ConfigError            a topology or a command line cannot work
    ├── CheckpointError        a family is missing, truncated or inconsistent
    ├── TrainingError          a training run cannot continue
    ├── MissingExtra           a library is not installed; an ImportError too
    ├── RequestError           no node could serve the request
    │   └── ContextLengthError the prompt does not fit the family's context
    └── NodeError              a node, or the connection to it, fails
        ├── Unauthenticated    the caller has not proven who it is
        ├── PermissionDenied   the caller may not make this call
        ├── HandshakeError     two nodes do not fit together (family, stages, version)
        ├── CapacityError      a limit of the node is reached: sessions, positions
        ├── CacheMiss          the caches of an earlier turn are gone; the caller sends their states again
        ├── NodeUnavailable    the node is down, draining, or went away, or the connection is broken
        ├── DeadlineExceeded   the deadline passed without an answer
        ├── RequestCancelled   the caller or a shutdown cancelled the call
        ├── WireError          a message violates the protocol
        └── NodeFault          a bug in a node; its log has the details

The command line prints the message without a stack trace and exits with status 2. On the wire, `RequestError` and each
class below it and below `NodeError` is one gRPC status (`transport/status.py`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ruyi_flow.types import Token

__all__ = [
    "CacheMiss",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DeadlineExceeded",
    "HandshakeError",
    "MissingExtra",
    "NodeError",
    "NodeFault",
    "NodeUnavailable",
    "PermissionDenied",
    "RequestCancelled",
    "RequestError",
    "RuyiFlowError",
    "TrainingError",
    "Unauthenticated",
    "WireError",
    "did_you_mean",
    "loss_cause",
    "shown",
]


class RuyiFlowError(Exception):
    """The base class. `str(error)` is a message that a user can act on."""

    @property
    def message(self) -> str:
        """What happened, and what to do, without what the error's text adds about an answer."""
        return super().__str__()


class ConfigError(RuyiFlowError):
    """A topology or a command line cannot work. The message names the file, the key, the value and the fix."""


class CheckpointError(RuyiFlowError):
    """A family is missing, truncated, or inconsistent with its config."""


class TrainingError(RuyiFlowError):
    """A training run cannot continue. The message names the step and the data."""


class MissingExtra(RuyiFlowError, ImportError):
    """A library is not installed that this needs. The message names the extra of this package that brings it."""


class RequestError(RuyiFlowError):
    """No node could serve the request, whatever its state: wrong parameter, empty prompt, unknown exit."""


class ContextLengthError(RequestError):
    """The prompt does not fit the family's context."""


class NodeError(RuyiFlowError):
    """A node, or the connection to it, fails.

    Args:
        message: what happened, and what to do.
        node: name of the node that the error is about, if it is known.
        tokens: the tokens of an answer that arrived before the error.
        cause: in one word, why the node was lost, if the class of the error does not say it.
    """

    def __init__(
        self, message: str, *, node: str | None = None, tokens: Sequence[Token] = (), cause: str | None = None
    ) -> None:
        super().__init__(message)
        self.node, self.cause = node, cause
        self.tokens = tuple(tokens)

    @property
    def text(self) -> str:
        """The text of an answer that arrived before the error."""
        return "".join(token.text for token in self.tokens)

    def __str__(self) -> str:
        count = len(self.tokens)
        return f"{self.message}; {count} token{'s' * (count > 1)} had arrived before" if count else self.message


class Unauthenticated(NodeError):
    """The caller has not proven who it is."""


class PermissionDenied(NodeError):
    """The caller is known, and may not make this call."""


class HandshakeError(NodeError):
    """Two nodes do not fit together. The message names both values."""


class CapacityError(NodeError):
    """A limit of the node is reached: sessions, positions or message size."""


class CacheMiss(NodeError):
    """A node has not, or no longer, as much of a parked session as the caller wants to reuse.

    Args:
        message: what happened.
        node: name of the node.
        position: number of positions that it can reuse.
    """

    def __init__(self, message: str, *, node: str | None = None, position: int = 0) -> None:
        super().__init__(message, node=node)
        self.position = position


class NodeUnavailable(NodeError):
    """The node is down, draining, or went away, or the connection to it is broken."""


class DeadlineExceeded(NodeError):
    """The deadline passed without an answer."""


class RequestCancelled(NodeError):
    """The caller or the node's shutdown cancelled the call."""


class WireError(NodeError):
    """A message violates the protocol."""


class NodeFault(NodeError):
    """A bug in a node; its log has the details."""


_CAUSES: dict[type[NodeError], str] = {
    DeadlineExceeded: "late",
    CapacityError: "full",
    WireError: "damaged",
    RequestCancelled: "left",
}


def loss_cause(error: NodeError) -> str:
    """Return in one word why a node was lost: reset, silent, dropped, damaged, left, full or late."""
    return error.cause or next((cause for kind, cause in _CAUSES.items() if isinstance(error, kind)), "reset")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` when a known word is close to a mistyped one, else the empty string."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Return a value as an error message shows it: shortened, before a long text is made of it."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # repr is the caller's code; Python's own refuses integers of more than 4,300 digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120
