"""The supervisor of node processes; tests/e2e/test_daemons.py runs it with real nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.serving import supervisor
from ruyi_flow.serving.supervisor import Supervisor
from ruyi_flow.testing import free_ports, tiny_family
from ruyi_flow.transport.addresses import check_listen
from ruyi_flow.types import NodeStatus
from tests.conftest import until


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


async def test_two_nodes_that_would_listen_at_one_place_are_refused() -> None:
    nodes = [
        {"name": f"n{i}", "address": f"n{i}.example:7101", "listen": "0.0.0.0:7101", "exits": [i + 2]} for i in (0, 1)
    ]
    topology = Topology.parse({"family": "none", "nodes": nodes, "links": [{"from": "n0", "to": "n1"}]})
    with pytest.raises(NodeError, match="'n0' and 'n1' would both listen on 0.0.0.0:7101 of this machine; give them"):
        await Supervisor(Path("none.yaml"), topology, lambda name, line: None).start()


async def test_a_node_with_no_replica_on_this_machine_is_told() -> None:
    node = {"name": "n0", "address": ["203.0.113.1:7101", "203.0.113.2:7101"], "exits": [2]}
    topology = Topology.parse({"family": "none", "nodes": [node]})
    with pytest.raises(
        NodeError, match="no network interface of this machine has an address of node 'n0': 203.0.113.1"
    ):
        await Supervisor(Path("none.yaml"), topology, lambda name, line: None).start()


class Running:
    """A supervisor of one node with two replicas on this machine and one elsewhere, and what it has logged."""

    def __init__(self, folder: Path, family: Path, **keys: Any) -> None:
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        addresses = [self.addresses[0], "203.0.113.1:7101", self.addresses[1]]
        node = {"name": "whole", "address": addresses, "exits": [2, 4, 6], "dtype": "float32", "threads": 1} | keys
        self.file = folder / "replicas.yaml"
        self.file.write_text(yaml.safe_dump({"family": str(family), "nodes": [node]}))
        self.topology = Topology.load(self.file)
        self.lines: list[tuple[str, str]] = []
        self.supervisor = Supervisor(self.file, self.topology, lambda name, line: self.lines.append((name, line)))

    def said(self, name: str, text: str) -> bool:
        return any(one == name and text in line for one, line in self.lines)

    async def processes(self) -> dict[str, int]:
        """Process ids of the replicas of this machine that answer."""
        async with AsyncClient(self.topology) as client:
            answers = await client.status(timeout_s=0.5)
        assert list(answers) == ["whole/1", "whole/2", "whole/3"] and isinstance(answers["whole/2"], NodeError)
        return {name: answer.process_id for name, answer in answers.items() if isinstance(answer, NodeStatus)}


@pytest.fixture
async def running(tmp_path: Path, tiny: Path) -> AsyncIterator[Running]:
    made = Running(tmp_path, tiny)
    try:
        await made.supervisor.start()
        yield made
    finally:
        await made.supervisor.stop()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop processes")
@pytest.mark.timeout(120)
async def test_a_replica_that_hangs_is_started_again_and_the_others_run_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_HANG_CHECKS", 3)
    assert [replica.name for replica in running.supervisor.replicas] == ["whole/1", "whole/3"]
    assert [replica.name for replica in running.supervisor.elsewhere] == ["whole/2"]
    before = await running.processes()
    assert before.keys() == {"whole/1", "whole/3"}
    await asyncio.sleep(2.5)  # the checks have seen it serve
    os.kill(before["whole/3"], signal.SIGSTOP)
    await until(lambda: running.said("whole/3", "it hangs; ending it"))
    await until(lambda: running.said("whole/3", "ended with -9; starting it again"))
    await until(lambda: sum("whole/3 serves exits" in line for name, line in running.lines if name == "whole/3") == 2)
    after = await running.processes()
    assert after["whole/1"] == before["whole/1"] and after["whole/3"] != before["whole/3"]
    assert not psutil.pid_exists(before["whole/3"])
    assert not [line for name, line in running.lines if name == "whole/1" and "serves exits" not in line]


@pytest.mark.timeout(120)
async def test_a_node_that_pauses_or_drains_is_not_taken_to_hang_and_one_that_has_drained_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_HANG_CHECKS", 4)
    family = tiny_family(tmp_path / "family", max_position_embeddings=16384)  # its answer is longer than the test
    made = Running(tmp_path, family, limits={"grace_s": 30})
    try:
        await made.supervisor.start()
        process = (await made.processes())["whole/1"]
        await asyncio.sleep(2.5)
        os.kill(process, signal.SIGSTOP)
        await asyncio.sleep(2)
        os.kill(process, signal.SIGCONT)
        only = made.topology.entry.model_copy(update={"address": made.addresses[0]})  # nowhere to move its sessions to
        async with AsyncClient(made.topology.model_copy(update={"nodes": (only,)})) as client:
            stream = client.stream([5, 6, 7], mode="exact", draft=0, max_new_tokens=16_000, eos_token_ids=())
            await anext(stream)
            os.kill(process, signal.SIGTERM)
            await until(lambda: made.said("whole/1", "draining: 1 sessions are running"))
            await asyncio.sleep(1.5)  # the health service says NOT_SERVING
            os.kill(process, signal.SIGSTOP)  # as the last step of a node that has closed its port
            await asyncio.sleep(6)
            os.kill(process, signal.SIGCONT)
            await stream.aclose()
        await until(lambda: made.said("whole/1", "stopped"))
        await until(lambda: made.said("whole/1", "ended with 0; starting it again"))
        await until(lambda: sum(name == "whole/1" and "serves exits" in line for name, line in made.lines) == 2)
        assert not any("it hangs" in line for _, line in made.lines)
    finally:
        await made.supervisor.stop()
