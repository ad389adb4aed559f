"""Names with several addresses, and which replica of a node a process of this machine is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from ruyi_flow.config.topology import Node
from ruyi_flow.errors import ConfigError, NodeError
from ruyi_flow.serving import placement
from ruyi_flow.serving.placement import choose, each_host, is_here, local_replicas, look_up
from ruyi_flow.testing import free_ports

ELSEWHERE = "203.0.113.1:7101"
"""An address that no machine has: it is reserved for documentation."""


def node(*addresses: str, **keys: Any) -> Node:
    return Node(name="cloud", address=addresses, exits=(6,), **keys)


@pytest.fixture
def here() -> list[str]:
    """Two free addresses of this machine."""
    return [f"127.0.0.1:{port}" for port in free_ports(2)]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address of this machine where something listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Hosts' names and their addresses, in place of a name server."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host in known:
            return [found for ip in known[host] for found in real(ip, port, *args, **kwargs)]
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


async def test_a_name_with_several_addresses_stands_for_several_replicas(names: dict[str, list[str]]) -> None:
    names["cloud.example"] = ["10.0.0.10", "10.0.0.9", "10.0.0.10", "::1"]
    assert await look_up(node("cloud.example:7101")) == {"cloud/1": "10.0.0.9:7101", "cloud/2": "10.0.0.10:7101"}
    assert await look_up(node("cloud.example:7101", "203.0.113.1:7102")) == {
        "cloud/1": "10.0.0.9:7101",
        "cloud/2": "10.0.0.10:7101",
        "cloud/3": "203.0.113.1:7102",
    }
    names["cloud.example"] = ["10.0.0.9", "::1"]  # of one machine
    assert await look_up(node("cloud.example:7101")) == {"cloud": "cloud.example:7101"}


async def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def getaddrinfo(*_: Any, **__: Any) -> Any:
        ended.wait()
        raise OSError

    monkeypatch.setattr(placement, "_LOOK_UP_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        assert await look_up(node("cloud.example:7101")) == {"cloud": "cloud.example:7101"}
    finally:
        ended.set()


async def test_a_name_that_cannot_be_resolved_stays() -> None:
    places = await look_up(node("no-such-machine.invalid:7101", ELSEWHERE))
    assert places == {"cloud/1": "no-such-machine.invalid:7101", "cloud/2": ELSEWHERE}
    assert each_host("[::1]:1", socket.getaddrinfo("::1", 1)) == ["[::1]:1"]


@pytest.mark.parametrize(
    ("host", "answer"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", True), ("203.0.113.1", False)]
)
def test_addresses_of_this_machine(host: str, answer: bool) -> None:
    assert is_here(socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)) is answer


async def test_replicas_of_other_machines_do_not_belong_here(here: list[str]) -> None:
    several = node(ELSEWHERE, here[0], "no-such-machine.invalid:7101", here[1])
    assert [replica.name for replica in await local_replicas(several)] == ["cloud/2", "cloud/4"]
    assert [replica.name for replica in await local_replicas(node(ELSEWHERE))] == ["cloud"], "it may be behind NAT"
    assert await local_replicas(node(ELSEWHERE, "203.0.113.2:7101")) == []


async def test_a_process_is_the_replica_that_is_here_and_free(here: list[str], taken: str) -> None:
    assert (await choose(node(ELSEWHERE), None)).name == "cloud"
    assert (await choose(node(ELSEWHERE, taken), None)).address == taken, "whoever listens there is told by the start"
    assert (await choose(node(ELSEWHERE, *here), None)).address == here[0]
    assert (await choose(node(ELSEWHERE, taken, *here), None)).address == here[0]
    listens = {"listen": (here[0], taken, here[1])}
    assert (await choose(node("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", **listens), None)).number == 1
    assert (await choose(node(ELSEWHERE, *here), 3)).address == here[1]
    assert (await choose(node(ELSEWHERE, taken), 1)).address == ELSEWHERE, "the user knows"


async def test_a_process_that_cannot_tell_which_replica_it_is_asks_the_user() -> None:
    with pytest.raises(ConfigError) as caught:
        await choose(node(ELSEWHERE, "203.0.113.2:7101", listen="0.0.0.0:7101"), None)
    for part in ("cannot tell which replica of node 'cloud' this is", ELSEWHERE, "--replica 1", "--listen"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="--replica 3: node 'cloud' has 2 addresses: .*; give a number up to 2"):
        await choose(node(ELSEWHERE, "203.0.113.2:7101"), 3)
    with pytest.raises(ConfigError, match="--replica 2: node 'cloud' has 1 address: "):
        await choose(node(ELSEWHERE), 2)


async def test_replicas_that_all_run_are_told() -> None:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
            one.listen()
        several = node(*(f"127.0.0.1:{one.getsockname()[1]}" for one in sockets))
        with pytest.raises(NodeError, match="all addresses of node 'cloud' on this machine are in use: 127.0.0.1:"):
            await choose(several, None)
