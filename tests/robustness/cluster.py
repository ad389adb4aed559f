"""The nodes of the trials: real processes, each behind a relay, started again after whatever ends them."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import yaml

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.security import Keys
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.testing import Relay, cut_topology, with_keys
from ruyi_flow.transport.peer import Peer
from ruyi_flow.types import NodeStatus
from tests.robustness.traffic import TINY, Family

__all__ = ["LINK_DELAY_S", "Cluster", "Node", "running_cluster"]

START_S = 60.0
"""Seconds in which a node must serve, on a busy machine."""

LINK_DELAY_S = 0.0005
"""Delay of every link in each direction, so that a fault meets messages that are on their way."""

_PORTS = range(20_000, 32_000)
"""Ports for the nodes: below those that a system gives to outgoing connections, which could take a dead node's port."""

_STARTS = multiprocessing.get_context("forkserver")
"""Starts a node in 0.3 s: the new process is a copy of one that has imported torch, and has done nothing else."""

_STARTS.set_forkserver_preload(["ruyi_flow.cli.commands", "ruyi_flow.serving.engine", "ruyi_flow.serving.node"])


class Node:
    """The process of one replica of a node.

    Args:
        name: the node's name.
        replica: the replica's number, from 1.
        address: where it listens.
        file: the topology file.
        log: the file that its log is added to.
        keys: the keys of whoever asks it for its state. Default: connections are not encrypted.
    """

    def __init__(self, name: str, replica: int, address: str, file: Path, log: Path, keys: Keys | None = None) -> None:
        self.name, self.address, self.log, self._keys = f"{name}/{replica}", address, log, keys
        self._command = ["node", name, "--replica", str(replica), "--topology", str(file)]
        self._process: Any = None
        self._stdin: Connection | None = None
        self._is_to_end = False
        """Whether it was sent a signal that ends it."""
        self._read = 0
        """Bytes of the log that `new_log` has returned."""

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None, "the node has been started"
        return int(self._process.pid)

    @property
    def exit_code(self) -> int | None:
        """The exit status; None while the process runs."""
        code: int | None = self._process.exitcode
        return code

    @property
    def crashed(self) -> bool:
        """Whether the process has ended by itself."""
        return self.exit_code is not None and not self._is_to_end

    def start(self) -> None:
        """Start a process, which serves some time later."""
        theirs, ours = _STARTS.Pipe(duplex=False)
        process = _STARTS.Process(target=_run_node, args=(self._command, str(self.log), theirs))
        process.start()
        theirs.close()
        if self._stdin is not None:
            self._stdin.close()
        self._process, self._stdin, self._is_to_end = process, ours, False

    async def restart(self, pid: int) -> None:
        """Start a new process once the one of this id has ended, unless somebody else did it before."""
        if self.pid == pid:
            await self.ended()
        if self.pid == pid:
            self.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.exit_code is None:
            self._is_to_end |= number in (signal.SIGKILL, signal.SIGTERM)
            os.kill(self.pid, number)

    async def ended(self) -> None:
        """Wait until the process has ended."""
        await asyncio.to_thread(self._process.join)

    async def status(self) -> NodeStatus:
        """Ask the node for its state, not through the relay.

        Raises:
            NodeError: it does not answer, or it does not serve in time.
        """
        deadline = time.monotonic() + START_S
        while True:
            peer = Peer(self.name, self.address, max_message_bytes=2**20, keys=self._keys)
            try:
                return await peer.status(timeout_s=5.0)
            except NodeError as error:
                if self.exit_code is not None:
                    raise NodeError(f"node {self.name} ended with {self.exit_code}: {self.new_log()}") from error
                if time.monotonic() > deadline:
                    raise
            finally:
                await peer.close()
            await asyncio.sleep(0.02)

    def num_fds(self) -> int:
        """Return the number of open file descriptors of the process."""
        return int(psutil.Process(self.pid).num_fds())

    def new_log(self) -> str:
        """Return what was logged since the last call."""
        data = self.log.read_bytes()[self._read :] if self.log.exists() else b""
        self._read += len(data)
        return data.decode(errors="replace")


class Cluster:
    """Three nodes, of one or several replicas, with a relay before each of them.

    Args:
        nodes: the processes: the first replicas of all nodes, the entry node first, and then the second ones.
        relays: the link to each of them; those of the entry node are the clients'.
        topology: what clients connect to.
        whole: a client of the same family in this process, to which nothing happens.
    """

    def __init__(self, nodes: list[Node], relays: list[Relay], topology: Topology, whole: AsyncClient) -> None:
        self.nodes, self.relays, self.topology, self.whole = nodes, relays, topology, whole
        self.fds: dict[str, int] = {}
        """Open file descriptors of each node at rest, by its name."""
        self.holes: set[Relay] = set()
        """Links with connections that carry nothing and do not end."""

    def mend(self) -> None:
        """Make every link as it was, let stopped processes continue, and start those that have ended."""
        for relay in self.relays:
            relay.frozen, relay.delay_s, relay.bytes_per_s = False, LINK_DELAY_S, None
            relay.flip_nothing()
        for relay in self.holes:
            relay.cut()
        self.holes.clear()
        for node in self.nodes:
            node.send(signal.SIGCONT)
            if node.exit_code is not None:
                node.start()


@asynccontextmanager
async def running_cluster(
    folder: Path,
    make_relay: type[Relay] = Relay,
    *,
    family: Family = TINY,
    replicas: int = 1,
    keys: bool = False,
    grace_s: float = 0.05,
) -> AsyncIterator[Cluster]:
    """Run the nodes while the block lasts.

    Args:
        folder: where the family, the topology file and the logs are written.
        make_relay: makes the relay of each link.
        family: the family that they serve.
        replicas: number of replicas of each node.
        keys: whether every connection is TLS, between parties that prove who they are.
        grace_s: seconds for which a node that is told to end serves the sessions that it has.
    """
    cuts, where = family.cuts, family.make(folder / "family")
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(replicas * len(cuts))]
    async with AsyncExitStack() as stack:
        relays = [make_relay(delay_s=LINK_DELAY_S) for _ in addresses]
        reached = [
            await stack.enter_async_context(relay.run(address))
            for relay, address in zip(relays, addresses, strict=True)
        ]
        limits = {"max_positions": 8192, "grace_s": grace_s}
        topology = cut_topology(where, cuts, limits=limits, timeout_s=20.0 * family.slowness).model_dump(
            mode="json", by_alias=True, exclude_none=True
        )
        for i, node in enumerate(topology["nodes"]):
            node["address"] = addresses[i :: len(cuts)]
        for i, link in enumerate(topology["links"], 1):
            link["address"] = reached[i :: len(cuts)]
            link["upload"] = "ahead" if i == 1 else "on-demand"
        if keys:
            keyed = await asyncio.to_thread(with_keys, Topology.parse(topology), folder / "keys")
            assert keyed.security is not None
            topology["security"] = keyed.security.model_dump(mode="json", exclude_none=True)
        file = folder / "topology.yaml"
        file.write_text(yaml.safe_dump(topology))
        topology["nodes"][0]["address"] = reached[:: len(cuts)]
        dialled = Topology.parse(topology)
        nodes = [
            Node(f"n{i % len(cuts)}", 1 + i // len(cuts), address, file, folder / f"{i}.log", dialled.user_keys)
            for i, address in enumerate(addresses)
        ]
        whole = await stack.enter_async_context(AsyncClient(family.whole(where)))
        cluster = Cluster(nodes, relays, dialled, whole)
        try:
            for node in nodes:
                node.start()
            yield cluster
        finally:
            for node in nodes:
                node.send(signal.SIGKILL)
            for node in nodes:
                await node.ended()


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def _run_node(command: list[str], log: str, stdin: Connection) -> None:
    """Be a node: the command line's own `node`, which drains when its standard input ends."""
    os.setsid()  # Ctrl-C is for the program that runs the trials
    os.dup2(stdin.fileno(), 0)
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    from ruyi_flow.cli import main

    sys.argv = ["ruyi-flow", *command, "--supervised", "--no-request-log"]
    main()
