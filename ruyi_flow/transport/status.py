"""gRPC statuses and this package's exceptions: one table for both directions."""

from __future__ import annotations

import grpc

from ruyi_flow.errors import (
    CacheMiss,
    CapacityError,
    ContextLengthError,
    DeadlineExceeded,
    HandshakeError,
    NodeError,
    NodeFault,
    NodeUnavailable,
    PermissionDenied,
    RequestCancelled,
    RequestError,
    RuyiFlowError,
    Unauthenticated,
    WireError,
    shown,
)

__all__ = [
    "NODE_KEY",
    "STATUS_OF",
    "error_of",
    "error_of_call",
    "is_of_connection",
    "short_text",
    "status_of",
    "wrong_answer",
]

STATUS_OF: dict[type[RuyiFlowError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ContextLengthError: grpc.StatusCode.OUT_OF_RANGE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    HandshakeError: grpc.StatusCode.FAILED_PRECONDITION,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CacheMiss: grpc.StatusCode.ABORTED,
    NodeUnavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    WireError: grpc.StatusCode.DATA_LOSS,
    NodeFault: grpc.StatusCode.INTERNAL,
}
"""The status of each exception that can cross the wire; no two exceptions share one."""

NODE_KEY = "ruyi-flow-node"
"""Trailing metadata that names the node an error is about. If it is absent, gRPC itself made the status."""

_WRITE_FAILED = "Internal error from Core"
"""Details of the INTERNAL status that grpc.aio gives to a write on a connection that was just lost."""

_NO_NAME = ("errors resolving", "DNS resolution failed")
"""Parts of gRPC's details for a host whose name no name server knows."""

_UNTRUSTED = {
    "Hostname Verification": "its certificate is not one of this node in this deployment",
    "certificate has expired": "its certificate has expired",
    "WRONG_VERSION_NUMBER": "it speaks no TLS; its topology lacks the section security",
    "handshake failed": "its certificate is not of this deployment's CA, or has expired",
}
"""Parts of gRPC's details for a connection whose other end has not proven who it is, and what they mean."""

_CAUSES = {
    "Connection refused": "connection refused",
    "No route to host": "no route to host",
    "Network is unreachable": "the network is unreachable",
    "Connection reset": "the connection was lost",
    "Socket closed": "the connection was lost",
    "Broken pipe": "the connection was lost",
    "timed out": "no answer",
    "timeout": "no answer",
    _WRITE_FAILED: "the connection was lost",
}
"""Parts of gRPC's details, which differ between its versions and systems, and what they mean."""

_TEXT_BYTES = 4096
"""Largest encoded error text: gRPC replaces a status whose metadata has more than 8 KB by an error of its own."""

_TOO_LARGE = "larger than max"
"""Part of the details that grpc gives to a message of more than `grpc.max_receive_message_length` bytes."""

_NAME_LENGTH = 200
"""Longest name of a node in an error that crosses the wire."""

_ERROR_OF = {status.value[0]: error for error, status in STATUS_OF.items()}


def status_of(error: RuyiFlowError) -> grpc.StatusCode:
    """Return the gRPC status of an exception."""
    for kind in type(error).__mro__:
        if kind in STATUS_OF:
            return STATUS_OF[kind]
    return grpc.StatusCode.INTERNAL


def short_text(error: RuyiFlowError) -> str:
    """Return an error's message, cut to what a status can carry: a character that is not ASCII takes 6 to 12 bytes."""
    text, room = error.message, _TEXT_BYTES
    for i, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        room -= 1 if plain else 3 * len(character.encode(errors="replace"))  # percent-encoded
        if room < 0:
            return text[:i]
    return text


def error_of(status: int, details: str, about: str) -> RuyiFlowError:
    """Return the exception that a node sent: the number of its status, its text, and the node that it is about."""
    kind = _ERROR_OF.get(status, WireError)
    about = "".join(c for c in about[:_NAME_LENGTH] if " " <= c <= "~")  # it may travel on, in metadata
    return kind(details, node=about) if issubclass(kind, NodeError) else kind(details)


def error_of_call(
    error: grpc.aio.AioRpcError,
    node: str,
    address: str,
    *,
    timeout_s: float | None = None,
    needs_deeper: bool = True,
) -> RuyiFlowError:
    """Return the exception for a failed call to a node.

    Args:
        error: what gRPC reports.
        node: the node's name.
        address: the node's address.
        timeout_s: seconds that the call could take, if it had a limit.
        needs_deeper: whether the node may have waited for a deeper one.
    """
    code, details = error.code(), error.details() or ""
    about = dict(error.trailing_metadata() or ()).get(NODE_KEY)
    if about is not None:  # the node, or a deeper one, sent the error itself
        return error_of(code.value[0], details, str(about))
    # What gRPC itself reports otherwise is a connection that is lost or damaged, or a proxy in between.
    kind = _ERROR_OF.get(code.value[0], NodeUnavailable)
    peer = f"node {node!r} at {address}"
    if kind is DeadlineExceeded:
        limit = "before the deadline" if timeout_s is None else f"within {_seconds(timeout_s)} s (timeout_s)"
        if not needs_deeper:
            return DeadlineExceeded(f"{peer} did not answer {limit}", node=node)
        return DeadlineExceeded(
            f"no complete answer {limit}: {peer} or a deeper node is stuck or too slow; ruyi-flow doctor shows which",
            node=node,
        )
    if kind is CapacityError:
        if _TOO_LARGE in details:  # at every try, so it is no lack of capacity
            return RequestError(f"{peer} refused the message: it exceeds limits.max_message_bytes ({details})")
        return CapacityError(f"{peer}, or a proxy before it, is overloaded ({details})", node=node)
    if kind is RequestCancelled:
        return RequestCancelled(f"the call to {peer} was cancelled", node=node)
    if kind is NodeUnavailable and code is grpc.StatusCode.UNAVAILABLE or details == _WRITE_FAILED:
        if any(part in details for part in _NO_NAME):
            return NodeUnavailable(
                f"{peer} cannot be reached: the name in its address cannot be resolved; correct its address", node=node
            )
        doubt = next((words for part, words in _UNTRUSTED.items() if part in details), None)
        if doubt is not None:
            return NodeUnavailable(f"{peer} cannot be trusted: {doubt}; ruyi-flow keys check tells more", node=node)
        cause = next((words for part, words in _CAUSES.items() if part in details), shown(details))
        return NodeUnavailable(
            f"{peer} cannot be reached: {cause}; is it running? (ruyi-flow up, or ruyi-flow node {node})", node=node
        )
    return NodeUnavailable(f"the connection to {peer} is broken: {code.name} {details}", node=node)


def is_of_connection(error: grpc.aio.AioRpcError) -> bool:
    """Return whether gRPC itself reports that the connection failed, and not the node that something is wrong."""
    if NODE_KEY in dict(error.trailing_metadata() or ()):
        return False
    return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


def _seconds(timeout_s: float) -> str:
    """Return a time limit in words: of one that was sent on, a little has passed already."""
    return f"{timeout_s:.3g}" if timeout_s < 100 else f"{timeout_s:.0f}"


def wrong_answer(error: WireError, node: str) -> WireError:
    """Return the exception for an answer of a node that violates the protocol."""
    return WireError(f"node {node!r} answered: {error}", node=node)
