"""Runs all nodes of a topology on this machine: one process per node, restarted after a crash, ended together.

A node drains when its standard input ends. That needs no signals, which Windows lacks, and also ends the nodes of a
supervisor that was killed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.transport.addresses import check_listen
from ruyi_flow.transport.peer import Peer

__all__ = ["Supervisor", "supervise"]

_MAX_CRASHES = 3
"""Crashes in a row after which a node is still restarted, each time after a longer pause."""

_STABLE_S = 60.0
"""A node that has run for this many seconds starts counting its crashes from zero again."""

_MAX_LINE_BYTES = 2**20
"""Longest line of a node's log that is passed on."""


class Supervisor:
    """The processes of a topology's nodes.

    Args:
        path: the topology file, which every node process reads itself.
        topology: the same topology, loaded.
        log: called with (node name, line) for every line that a node prints.
        named: the topology as messages name it. Default: its path.
        options: further options of every node's command.
    """

    def __init__(
        self,
        path: Path,
        topology: Topology,
        log: Callable[[str, str], None],
        *,
        named: str = "",
        options: Sequence[str] = (),
    ) -> None:
        self._path, self._topology, self._log, self._named = path, topology, log, named or str(path)
        self._options = tuple(options)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._last_lines: dict[str, str] = {}
        self._serving = False
        """Whether all nodes have served."""
        self._failed: asyncio.Future[NodeError] = asyncio.get_running_loop().create_future()

    async def start(self, *, timeout_s: float = 120.0) -> float:
        """Start every node and wait until all of them serve.

        Returns:
            The seconds it took.

        Raises:
            NodeError: a node ended, or did not serve within `timeout_s`.
        """
        began = time.monotonic()
        for node in self._topology.nodes:  # something that listens there would answer in place of the new node
            await check_listen(
                str(node.address),
                node.name,
                in_use="or start only the nodes that do not run yet: ruyi-flow node NAME; the nodes may be running "
                f"already: ruyi-flow generate -t {self._named} -p …",
            )
            if node.metrics is not None:
                await check_listen(node.metrics, node.name, key="metrics")
        self._tasks = [asyncio.create_task(self._keep_running(node.name)) for node in self._topology.nodes]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        for node in self._topology.nodes:
            peer = Peer(node.name, str(node.address), max_message_bytes=node.limits.max_message_bytes)
            try:
                while not self._failed.done():
                    with suppress(NodeError):
                        await peer.status(timeout_s=1.0)
                        break
                    if time.monotonic() - began > timeout_s:
                        raise NodeError(f"node {node.name!r} does not serve after {timeout_s:g} s; see its log")
                    await asyncio.sleep(0.1)
                else:
                    raise self._failed.result()
            finally:
                await peer.close()
        if self._failed.done():  # a node that had served already
            raise self._failed.result()
        self._serving = True
        return time.monotonic() - began

    async def wait(self) -> None:
        """Wait until a node ends that cannot be restarted.

        Raises:
            NodeError: always; names the node that ended, and the reason.
        """
        raise await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Let every node drain, and kill it after its grace time; nodes that are still starting end at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        grace_s = max(node.limits.grace_s for node in self._topology.nodes) + 5
        if not self._serving:
            for process in self._running():
                process.terminate()
        await asyncio.gather(*(_end(process, grace_s) for process in self._processes.values()))

    def kill(self) -> None:
        """End every node at once, without letting it drain."""
        for process in self._running():
            process.kill()

    def _running(self) -> list[asyncio.subprocess.Process]:
        return [process for process in self._processes.values() if process.returncode is None]

    async def _keep_running(self, name: str) -> None:
        """Run a node's process and restart it when it crashes."""
        crashes = 0
        while True:
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "ruyi_flow.cli", "node", name, "--topology", str(self._path)),
                "--supervised",
                *self._options,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_MAX_LINE_BYTES,
                env=os.environ | {"PYTHONIOENCODING": "utf-8:backslashreplace"},  # of the lines that are read here
                # Ctrl-C in a terminal reaches this process only, which ends the nodes in order: POSIX, then Windows.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
            self._processes[name] = process
            assert process.stdout is not None
            while line := await _read_line(process.stdout):
                text = line.decode(errors="replace").rstrip()
                self._last_lines[name] = text
                self._log(name, text)
            code = await process.wait()
            crashes = 1 if time.monotonic() - began > _STABLE_S else crashes + 1
            if code in (0, 2) or crashes > _MAX_CRASHES:  # 2: the node reported an error that a restart cannot mend
                break
            self._log(name, f"ended with {code}; starting it again")
            await asyncio.sleep(0.25 * 2**crashes)
        reason = self._last_lines.get(name, "").removeprefix("error: ")
        self._fail(NodeError(f"node {name!r} ended with {code}: {reason}", node=name))

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(NodeError(f"a node's process cannot be run: {error}"))

    def _fail(self, error: NodeError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)


@asynccontextmanager
async def supervise(
    path: Path,
    topology: Topology,
    log: Callable[[str, str], None],
    *,
    named: str = "",
    options: Sequence[str] = (),
) -> AsyncIterator[Supervisor]:
    """Make a `Supervisor` for the block; all its nodes have ended when the block is left."""
    supervisor = Supervisor(path, topology, log, named=named, options=options)
    try:
        yield supervisor
    finally:
        await asyncio.shield(asyncio.ensure_future(supervisor.stop()))


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """Read the next line; of a line that is too long, only the end."""
    while True:
        try:
            return await stream.readline()
        except ValueError:
            continue


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    if process.returncode is not None:
        return
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    drain = asyncio.create_task(process.stdout.read())  # nobody reads its log any more: a full pipe must not block it
    try:
        await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        process.kill()
        await process.wait()
    finally:
        await drain
