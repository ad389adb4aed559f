"""Nodes, and terminals, for the commands that ask nodes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ruyi_flow.config.topology import Topology
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology

SHELL = {
    name: value for name, value in os.environ.items() if not name.startswith(("PYTHONUNBUF", "NO_COLOR", "COLUMNS"))
}
"""The environment of a user's shell."""

COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]


@dataclass(frozen=True)
class Nodes:
    """Two nodes that run in this process, n0 with exit 2 and n1 with 4 and 6, and what is between them."""

    file: Path
    relay: Relay
    cluster: Cluster

    def sessions(self) -> int:
        return sum(len(engine.shard.capacity.leases) for engine in self.cluster.engines.values())


@contextmanager
def serving(topology: Topology, folder: Path) -> Iterator[Nodes]:
    """Run two nodes on a thread of their own, so that a test can run commands meanwhile."""
    ready, stop, relay = threading.Event(), asyncio.Event(), Relay()
    running: list[Cluster] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        try:
            async with cluster(topology, {"n1": relay}) as nodes:
                running.append(nodes)
                ready.set()
                await stop.wait()
        finally:
            ready.set()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        ready.wait()
        nodes = [{"name": n.name, "address": n.address, "exits": list(n.exits)} for n in running[0].topology.nodes]
        file = folder / "two.yaml"
        data = {"family": topology.family, "nodes": nodes, "links": [{"from": "n0", "to": "n1"}]}
        file.write_text(yaml.safe_dump(data))
        yield Nodes(file, relay, running[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.fixture(scope="session")
def shared(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with serving(cut_topology(spoken, [[2], [4, 6]], encoding="bf16"), tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


@pytest.fixture
def nodes(shared: Nodes) -> Iterator[Nodes]:
    """Two nodes with a fast connection."""
    yield shared
    shared.relay.delay_s, shared.relay.frozen = 0.0, False


@pytest.fixture
def spent(spoken: Path, tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, the first of which may send one position a minute to the other."""
    made = cut_topology(spoken, [[2], [4, 6]], encoding="bf16")
    limits = made.entry.limits.model_copy(update={"bytes_up_per_minute": 100})
    first = made.entry.model_copy(update={"limits": limits})
    with serving(made.model_copy(update={"nodes": (first, *made.nodes[1:])}), tmp_path) as nodes:
        yield nodes


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 80, **environment: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, *COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=SHELL | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment,
            start_new_session=True,
        )
        os.close(slave)
        self._bytes, self._shown = b"", 0

    @property
    def output(self) -> str:
        """What the command has printed."""
        return self._bytes.decode(errors="replace").replace("\r\n", "\n")

    @property
    def text(self) -> str:
        """The same without colours and other sequences."""
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", self.output)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def echoes(self) -> bool:
        """Return whether the terminal itself prints the keys that are pressed."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    def until(self, condition: Callable[[], object]) -> None:
        """Read what is printed until the condition holds. The timeout of the test ends a wait for what never comes."""
        while not condition():
            if select.select([self._master], [], [], 0.05)[0] and not self._read():
                assert condition(), self.output
                return

    def shows(self, text: str) -> None:
        """Wait until the text has been printed after what the last call waited for."""
        self.until(lambda: text in self.text[self._shown :])
        self._shown += self.text[self._shown :].index(text) + len(text)

    def end(self) -> int:
        """Read until the command ends; return its exit status."""
        while self._read():
            pass
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> bytes:
        try:
            read = os.read(self._master, 65536)
        except OSError:  # the command has ended
            return b""
        self._bytes += read
        return read


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Run a command in a terminal."""
    opened: list[Terminal] = []

    def run(*arguments: str, columns: int = 80, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, columns=columns, **environment))
        return opened[-1]

    yield run
    for one in opened:
        one.close()


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds. The timeout of the test ends a wait for what never comes."""
    while not condition():
        time.sleep(0.01)
