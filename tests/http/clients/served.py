"""A topology that is served over HTTP: nodes in this process, and `ruyi-flow serve` as a process of its own."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ruyi_flow.config.topology import Topology
from ruyi_flow.testing import Cluster, Relay, cluster
from tests.conftest import write_topology

__all__ = ["Served", "http_server", "running_nodes", "serve_topology"]

START_S = 40.0
"""Seconds in which the server must say where it listens, on a machine that is busy with other tests."""

COMMAND = (sys.executable, "-m", "ruyi_flow.cli")


@dataclass
class Served:
    """A server, and the nodes that it asks."""

    url: str
    """Where the server listens, without a path."""
    cluster: Cluster
    """The nodes."""
    loop: asyncio.AbstractEventLoop
    """The event loop of the nodes and of the relays before them."""
    log: list[str] = field(default_factory=list)
    """Lines that the server wrote."""

    @property
    def base_url(self) -> str:
        """The address that clients of OpenAI's API are given."""
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        """The name of the family."""
        return Path(str(self.cluster.topology.family)).name

    def sessions(self) -> dict[str, int]:
        """Return the number of sessions that each node has."""
        return {name: len(engine.shard.capacity.leases) for name, engine in self.cluster.engines.items()}

    def cut(self, relay: Relay, target: str | None = None) -> None:
        """Abort every connection of a relay, which from then on may lead to another target.

        Args:
            relay: a relay before one of the nodes.
            target: host:port that new connections are relayed to. Default: the same.
        """

        async def cut() -> None:
            if target is not None:
                host, _, port = target.rpartition(":")
                relay._target = (host, int(port))
            relay.cut()

        asyncio.run_coroutine_threadsafe(cut(), self.loop).result()

    def seconds_until_idle(self, limit_s: float = 10.0) -> float:
        """Wait until no node has a session, and return how long that took."""
        began = time.monotonic()
        while any(self.sessions().values()):
            assert time.monotonic() - began < limit_s, self.sessions()
            time.sleep(0.005)
        return time.monotonic() - began


@contextmanager
def running_nodes(
    topology: Topology, relays: dict[str, Relay] | None = None
) -> Iterator[tuple[Cluster, asyncio.AbstractEventLoop]]:
    """Run all nodes of a topology on an event loop of their own, so that clients may block."""
    ready: Future[tuple[Cluster, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        stop = asyncio.Event()
        async with cluster(topology, relays) as nodes:
            ready.set_result((nodes, asyncio.get_running_loop(), stop))
            await stop.wait()
            await nodes.settle()

    failures: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failures.append(error)
            if not ready.done():
                ready.set_exception(error)

    thread = threading.Thread(target=work, name="nodes")
    thread.start()
    try:
        nodes, loop, stop = ready.result(timeout=START_S)
        try:
            yield nodes, loop
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def http_server(*arguments: str) -> Iterator[tuple[str, list[str], subprocess.Popen[str]]]:
    """Run a command of `ruyi-flow` that starts an HTTP server: yield its address, the lines that it writes, and itself.

    Args:
        arguments: the command, `serve` or `up --serve`, and its arguments.
    """
    command = [*COMMAND, *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    fresh: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            fresh.put(line)
        fresh.put(None)

    reader = threading.Thread(target=read, name="log of the server")
    reader.start()
    try:
        yield _address(fresh, lines), lines, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def serve_topology(
    topology: Topology, folder: Path, *arguments: str, relays: dict[str, Relay] | None = None
) -> Iterator[Served]:
    """Run the nodes of a topology and an HTTP server for them; every session must have ended when the block does.

    Args:
        topology: the topology; port 0 in an address picks a free port.
        folder: where to write the topology's file.
        arguments: further ones of `ruyi-flow serve`.
        relays: relays in front of nodes, by the node's name.
    """
    with running_nodes(topology, relays) as (nodes, loop):
        file = write_topology(nodes.topology, folder / "topology.yaml")
        with http_server("serve", "--topology", str(file), *arguments) as (url, lines, _):
            yield Served(url, nodes, loop, lines)


def _address(fresh: SimpleQueue[str | None], lines: Sequence[str]) -> str:
    """Return the address that the server says it listens on."""
    end = time.monotonic() + START_S
    while True:
        try:
            line = fresh.get(timeout=max(0.01, end - time.monotonic()))
        except Empty:
            line = None
        if line is None:
            raise AssertionError("the server did not say where it listens:\n" + "\n".join(lines))
        if found := re.search(r"http://[\w.\[\]:-]+:\d+", line):
            return found[0]


def events(text: str) -> list[Any]:
    """Return what follows `data: ` in each server-sent event of a reply."""
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
