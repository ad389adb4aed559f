"""The supervisor of node processes; tests/e2e/test_daemons.py runs it with real nodes."""

import socket
from pathlib import Path

import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.serving.supervisor import Supervisor
from ruyi_flow.transport.addresses import check_listen


@pytest.mark.parametrize(
    ("taken", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("127.0.0.1", "localhost"),
        ("::1", "localhost"),
        ("127.0.0.2", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.1"),
        ("127.0.0.2", "[::]"),
        ("::", "127.0.0.1"),
    ],
)
async def test_a_port_in_use_is_found_before_a_node_starts(taken: str, host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in taken else socket.AF_INET) as other:
        try:
            other.bind((taken, 0))
        except OSError:
            pytest.skip(f"this machine has no {taken}")
        other.listen()
        port = other.getsockname()[1]
        if host == "localhost" and taken not in {found[4][0] for found in socket.getaddrinfo("localhost", port)}:
            pytest.skip(f"localhost is not {taken} here")
        with pytest.raises(NodeError, match="is in use already; node 'n0' cannot listen there") as caught:
            await supervisor_of(f"{host}:{port}").start()
    assert str(caught.value).startswith(f"{host}:{port}")
    await check_listen(f"{host}:{port}", "n0")  # the port is free again


def supervisor_of(address: str) -> Supervisor:
    node = {"name": "n0", "address": "n0.example:7101", "listen": address, "exits": [2]}
    topology = Topology.parse({"family": "none", "nodes": [node]})
    return Supervisor(Path("none.yaml"), topology, lambda name, line: None)
