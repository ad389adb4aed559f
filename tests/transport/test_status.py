"""Each exception that can cross the wire is one gRPC status, and comes back as itself."""

import re
from urllib.parse import quote

import grpc
import pytest

from ruyi_flow import errors
from ruyi_flow.errors import NodeError, NodeUnavailable, RequestError, RuyiFlowError, shown
from ruyi_flow.transport.peer import Peer
from ruyi_flow.transport.status import NODE_KEY, STATUS_OF, error_of, error_of_call, short_text, status_of
from ruyi_flow.types import Reason, Token

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, (RequestError, NodeError)) and kind is not NodeError
]


def test_the_table_has_every_exception_once() -> None:
    assert set(STATUS_OF) == set(KINDS)
    assert len(set(STATUS_OF.values())) == len(STATUS_OF)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_exception_comes_back_as_itself(kind: type[RuyiFlowError]) -> None:
    metadata = grpc.aio.Metadata((NODE_KEY, "cloud"))
    failure = grpc.aio.AioRpcError(status_of(kind("what happened")), grpc.aio.Metadata(), metadata, "what happened")
    back = error_of_call(failure, "edge", "127.0.0.1:1")
    assert type(back) is kind and str(back) == "what happened"
    if isinstance(back, NodeError):
        assert back.node == "cloud"


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_every_status_of_grpc_itself_names_the_peer(code: grpc.StatusCode) -> None:
    failure = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "details")
    error = error_of_call(failure, "edge", "127.0.0.1:1")
    assert isinstance(error, NodeError) and error.node == "edge" and "127.0.0.1:1" in str(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        assert isinstance(error, NodeUnavailable) and "is it running?" in str(error)


def test_a_deadline_blames_no_node_that_may_have_waited_for_another() -> None:
    empty = grpc.aio.Metadata()
    failure = grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, empty, empty, "Deadline Exceeded")
    for timeout_s, limit in ((7.9996, "8"), (0.4, "0.4"), (599.98, "600"), (1e6, "1000000")):
        assert str(error_of_call(failure, "device", "127.0.0.1:1", timeout_s=timeout_s)) == (
            f"no complete answer within {limit} s (timeout_s): node 'device' at 127.0.0.1:1 or a deeper node is stuck "
            "or too slow; ruyi-flow doctor shows which"
        )
    alone = error_of_call(failure, "device", "127.0.0.1:1", timeout_s=3, needs_deeper=False)
    assert str(alone) == "node 'device' at 127.0.0.1:1 did not answer within 3 s (timeout_s)"


@pytest.mark.parametrize(
    ("details", "cause"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7101: Failed to connect to remote "
            "host: connect: Connection refused (111)",
            "connection refused",
        ),
        ("failed to connect to all addresses; last error: … connect: No route to host (113)", "no route to host"),
        ("Stream removed (Socket closed)", "the connection was lost"),
        ("recvmsg:Connection reset by peer", "the connection was lost"),
        ("keepalive watchdog timeout", "no answer"),
        ("x" * 5000, shown("x" * 5000)),
    ],
    ids=["refused", "no route", "closed", "reset", "silent", "other"],
)
def test_a_node_that_cannot_be_reached_gets_a_short_cause(details: str, cause: str) -> None:
    failure = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    assert str(error_of_call(failure, "device", "127.0.0.1:7101")) == (
        f"node 'device' at 127.0.0.1:7101 cannot be reached: {cause}; is it running? "
        "(ruyi-flow up, or ruyi-flow node device)"
    )


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        ("127.0.0.1:9", "connection refused; is it running? (ruyi-flow up, or ruyi-flow node device)"),
        ("nothing.invalid:9", "the name in its address cannot be resolved; correct its address"),
    ],
)
async def test_the_causes_are_those_that_this_version_of_grpc_reports(address: str, cause: str) -> None:
    peer = Peer("device", address, max_message_bytes=2**20)
    try:
        with pytest.raises(NodeUnavailable) as caught:
            await peer.status(timeout_s=20)
    finally:
        await peer.close()
    assert str(caught.value) == f"node 'device' at {address} cannot be reached: {cause}"


def test_a_write_that_meets_a_lost_connection_is_a_lost_connection() -> None:
    empty = grpc.aio.Metadata()
    failure = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, empty, empty, "Internal error from Core")
    assert isinstance(error_of_call(failure, "edge", "127.0.0.1:1"), NodeUnavailable)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN], ids=lambda code: code.name)
def test_a_damaged_connection_is_no_bug_of_the_node(code: grpc.StatusCode) -> None:
    failure = grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(), "Metadata keys cannot be zero length"
    )
    error = error_of_call(failure, "edge", "127.0.0.1:1")
    assert isinstance(error, NodeUnavailable) and "the connection to node 'edge' at 127.0.0.1:1 is broken" in str(error)


def test_a_text_is_cut_to_what_a_status_can_carry() -> None:
    for text in ("plain", "é", "100 %", "界" * 100):
        assert short_text(RequestError(text)) == text
    for character in ("a", "%", "é", "界", "😀", "\n"):
        cut = short_text(RequestError(character * 10_000))
        encoded = quote(cut, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")
        assert set(cut) == {character} and 4096 - 12 <= len(encoded) <= 4096


def test_what_had_arrived_does_not_travel() -> None:
    """Each hop sends the message alone; the client adds what arrived there."""
    tokens = (Token(1, "a", 2, "n0", 0.5, Reason.CONFIDENT),)
    error: RuyiFlowError = NodeUnavailable("gone", node="cloud", tokens=tokens)
    for _ in range(3):
        error = error_of(status_of(error).value[0], short_text(error), "cloud")
        assert isinstance(error, NodeUnavailable)
        error.tokens = tokens
    assert str(error) == "gone; 1 token had arrived before" and error.message == "gone"


def test_the_name_of_a_node_can_travel_on() -> None:
    error = error_of(14, "gone", "n1\n界" + "x" * 10_000)
    assert isinstance(error, NodeError) and error.node is not None and error.node.isascii()
    assert error.node.startswith("n1x") and len(error.node) <= 200


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Each line's indentation in the docstring gives the parent of its class."""
    drawn: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if (
            found := re.match(
                r"([ │├└─]*)(\w+Error|NodeUnavailable|Unauthenticated|\w+Denied|MissingExtra|\w+Exceeded|\w+Cancelled"
                r"|NodeFault|CacheMiss)\b",
                line,
            )
        ) is None:
            continue
        indent, name = len(found[1]), found[2]
        parents = [(depth, parent) for depth, parent in parents if depth < indent]
        drawn[name] = parents[-1][1] if parents else "Exception"
        parents.append((indent, name))
    classes = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in classes}
