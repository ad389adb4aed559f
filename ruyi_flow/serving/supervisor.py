"""All nodes of a topology on this machine: one process each, watched, their logs told apart, none left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError

__all__ = ["Supervisor", "supervise"]

logger = logging.getLogger(__name__)

_RESTARTS = 3
"""A node that ends by itself is started again this many times in a row, each after a longer wait."""

_STABLE_S = 60.0
"""A node that has run for this long starts with a clean slate."""

_LINE_BYTES = 2**20
"""Longest line of a node's log."""


class Supervisor:
    """The processes of a topology's nodes.

    Args:
        path: the topology file, which every node reads for itself.
        topology: the same, loaded.
        log: called with (node name, line) for every line that a node prints.
    """

    def __init__(self, path: Path, topology: Topology, log: Callable[[str, str], None]) -> None:
        self._path, self._topology, self._log = path, topology, log
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._last_lines: dict[str, str] = {}
        self._failed: asyncio.Future[NodeError] = asyncio.get_running_loop().create_future()

    async def start(self, *, timeout_s: float = 120.0) -> float:
        """Start every node and wait until all of them serve.

        Returns:
            The seconds it took.

        Raises:
            NodeError: a node ended, or does not serve in time.
        """
        began = time.monotonic()
        await self._check_ports()
        self._tasks = [asyncio.create_task(self._keep(node.name)) for node in self._topology.nodes]
        for task in self._tasks:
            task.add_done_callback(self._kept)
        async with AsyncClient(self._topology) as client:
            while time.monotonic() - began < timeout_s:
                if self._failed.done():
                    raise self._failed.result()
                status = await client.status(timeout_s=1.0)
                if not any(isinstance(answer, NodeError) for answer in status.values()):
                    return time.monotonic() - began
                await asyncio.sleep(0.1)
        waiting = [name for name, answer in status.items() if isinstance(answer, NodeError)]
        raise NodeError(f"not serving after {timeout_s:g} s: {', '.join(waiting)}; their logs say why")

    async def wait(self) -> None:
        """Wait for good; ends only with a node that cannot be kept up.

        Raises:
            NodeError: that node.
        """
        raise await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """End every node: politely, then by force after its grace time."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        grace_s = max(node.limits.grace_s for node in self._topology.nodes) + 5
        await asyncio.gather(*(_end(process, grace_s) for process in self._processes.values()))

    async def _check_ports(self) -> None:
        """A node that is there already would answer in place of the one that is started, and fail it."""
        for node in self._topology.nodes:
            host, _, port = str(node.address).rpartition(":")
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 1.0)
            except (OSError, TimeoutError):
                continue
            writer.close()
            raise NodeError(
                f"{node.address} is in use already; node {node.name!r} cannot listen there: end that process, "
                "or give the node another address",
                node=node.name,
            )

    async def _keep(self, name: str) -> None:
        """Run a node's process, again when it crashes."""
        crashes = 0
        while True:
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ruyi_flow.cli", "node", name, "--topology", str(self._path)),
                *("--parent", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LINE_BYTES,
                start_new_session=True,  # Ctrl-C in a terminal reaches this process only, which ends the nodes in order
            )
            self._processes[name] = process
            assert process.stdout is not None
            while line := await _line_of(process.stdout):
                text = line.decode(errors="replace").rstrip()
                self._last_lines[name] = text
                self._log(name, text)
            code = await process.wait()
            crashes = 1 if time.monotonic() - began > _STABLE_S else crashes + 1
            if code in (0, 2) or crashes > _RESTARTS:  # 2: it said what is wrong; trying again cannot help
                break
            self._log(name, f"ended with {code}; starting it again")
            await asyncio.sleep(0.25 * 2**crashes)
        said = self._last_lines.get(name, "").removeprefix("error: ")
        self._fail(NodeError(f"node {name!r} ended with {code}: {said}", node=name))

    def _kept(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(NodeError(f"a node's process cannot be run: {error}"))

    def _fail(self, error: NodeError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)


@asynccontextmanager
async def supervise(path: Path, topology: Topology, log: Callable[[str, str], None]) -> AsyncIterator[Supervisor]:
    """A supervisor whose nodes are all gone when the block is left."""
    supervisor = Supervisor(path, topology, log)
    try:
        yield supervisor
    finally:
        await asyncio.shield(asyncio.ensure_future(supervisor.stop()))


async def _line_of(stream: asyncio.StreamReader) -> bytes:
    """The next line; of one that is too long, what comes after the part that was dropped."""
    while True:
        try:
            return await stream.readline()
        except ValueError:
            continue


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    if process.stdout is not None:  # nobody reads its log any more: a full pipe must not hold it up
        drain = asyncio.create_task(process.stdout.read())
    try:
        await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        process.kill()
        await process.wait()
    finally:
        await drain
