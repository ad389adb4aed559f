"""Addresses to listen on, and what is said of those where a node cannot; tests/serving/test_supervisor.py has more."""

import errno
import socket

import pytest

from ruyi_flow.errors import NodeError
from ruyi_flow.transport.addresses import check_listen, listen_problem, split_address


def test_hosts_are_split_from_ports() -> None:
    assert split_address("127.0.0.1:7101") == ("127.0.0.1", 7101)
    assert split_address("[::1]:7101") == ("::1", 7101)


async def test_an_address_of_another_machine_is_refused_in_one_sentence() -> None:
    with pytest.raises(NodeError, match=r"no network interface of this machine has this address; start the node on"):
        await check_listen("192.0.2.7:7101", "edge")  # TEST-NET-1 belongs to nobody


async def test_a_name_that_does_not_exist_is_refused_in_one_sentence() -> None:
    with pytest.raises(NodeError, match="the name 'no-such-machine.invalid' cannot be resolved"):
        await check_listen("no-such-machine.invalid:7101", "edge")


def test_one_address_of_a_name_that_this_machine_has_is_enough() -> None:
    here, there = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.7")]
    assert listen_problem([there]) == listen_problem([there, there]) == errno.EADDRNOTAVAIL
    assert listen_problem([there, here]) is None and listen_problem([here, there]) is None


async def test_a_port_in_use_is_refused_and_a_free_one_is_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(NodeError, match=f"{address} is in use already; node 'edge' cannot listen there: end that"):
            await check_listen(address, "edge")
    await check_listen(address, "edge")
