"""The supervisor of node processes; tests/e2e/test_daemons.py runs it with real nodes."""

import socket
from pathlib import Path

import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.serving.supervisor import Supervisor


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "[::1]")])
async def test_a_port_in_use_is_found_before_a_node_starts(family: socket.AddressFamily, host: str) -> None:
    with socket.socket(family) as taken:
        try:
            taken.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        taken.listen()
        address = f"{host}:{taken.getsockname()[1]}"
        topology = Topology.parse({"family": "none", "nodes": [{"name": "n0", "address": address, "exits": [2]}]})
        with pytest.raises(NodeError, match="is in use already; node 'n0' cannot listen there") as caught:
            await Supervisor(Path("none.yaml"), topology, lambda name, line: None).start()
    assert str(caught.value).startswith(address)
