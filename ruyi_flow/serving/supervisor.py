"""Runs the nodes of a topology on this machine, a process a replica: restarted after a crash or a hang, ended together.

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

from ruyi_flow.config.replicas import Replica, replicas_of
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.serving.placement import local_replicas
from ruyi_flow.transport.addresses import check_listen
from ruyi_flow.transport.peer import Peer

__all__ = ["Supervisor", "supervise"]

_MAX_CRASHES = 3
"""Crashes in a row after which a node is still restarted, each time after a longer pause."""

_STABLE_S = 60.0
"""A node that has run for this many seconds starts counting its crashes from zero again."""

_CHECK_S = 1.0
"""Seconds between two checks of a node's health, and that one check may take."""

_HANG_CHECKS = 10
"""Checks in a row that a node which has served may miss; then it is taken to hang. This needs no haste, since callers
give a silent node up after 1.5 s by themselves. And a node on a machine that swaps for some seconds comes back, while a
restart would load its weights again and lose all its caches."""

_MAX_LINE_BYTES = 2**20
"""Longest line of a node's log that is passed on."""


class Supervisor:
    """The processes of a topology's nodes: one for each replica whose address is on this machine.

    Args:
        path: the topology file, which every node process reads itself.
        topology: the same topology, loaded.
        log: called with (name, line) for every line that a node prints; a replica is called `cloud/2`.
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
        self.replicas: list[Replica] = []
        """The replicas that run on this machine, once `start` has found them."""
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._last_lines: dict[str, str] = {}
        self._serving = False
        """Whether all nodes have served."""
        self._failed: asyncio.Future[NodeError] = asyncio.get_running_loop().create_future()

    @property
    def elsewhere(self) -> list[Replica]:
        """The replicas of the topology that belong on other machines."""
        return [r for node in self._topology.nodes for r in replicas_of(node) if r not in self.replicas]

    async def start(self, *, timeout_s: float = 120.0) -> float:
        """Start every node and wait until all of them serve.

        Returns:
            The seconds it took.

        Raises:
            NodeError: a node ended, or did not serve within `timeout_s`.
        """
        began = time.monotonic()
        self.replicas = await self._find()
        for replica in self.replicas:  # something that listens there would answer in place of the new node
            await check_listen(
                replica.listen,
                replica.name,
                in_use="or start only the nodes that do not run yet: ruyi-flow node NAME; the nodes may be running "
                f"already: ruyi-flow generate -t {self._named} -p …",
            )
            if replica.metrics is not None:
                await check_listen(replica.metrics, replica.name, key="metrics")
        self._tasks = [asyncio.create_task(self._keep_running(replica)) for replica in self.replicas]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)
        for replica in self.replicas:
            peer = self._peer(replica)
            try:
                while not self._failed.done():
                    with suppress(NodeError):
                        await peer.status(timeout_s=1.0)
                        break
                    if time.monotonic() - began > timeout_s:
                        raise NodeError(f"node {replica.name!r} does not serve after {timeout_s:g} s; see its log")
                    await asyncio.sleep(0.1)
                else:
                    raise self._failed.result()
            finally:
                await peer.close()
        if self._failed.done():  # a node that had served already
            raise self._failed.result()
        self._serving = True
        return time.monotonic() - began

    async def _find(self) -> list[Replica]:
        """Return the replicas to run here.

        Raises:
            NodeError: a node has none on this machine, or two would listen at the same place.
        """
        found: list[Replica] = []
        for node in self._topology.nodes:
            here = await local_replicas(node)
            if not here:
                raise NodeError(
                    f"no network interface of this machine has an address of node {node.name!r}: "
                    f"{', '.join(node.addresses)}; start its replicas on their own machines with ruyi-flow node "
                    f"{node.name}, or correct its address in the topology",
                    node=node.name,
                )
            found += here
        taken: dict[str, str] = {}
        for replica in found:
            for place in (replica.listen, replica.metrics):
                if place is not None and place in taken:
                    raise NodeError(
                        f"nodes {taken[place]!r} and {replica.name!r} would both listen on {place} of this machine; "
                        "give them different ports, or start each on a machine of its own with ruyi-flow node NAME",
                        node=replica.node.name,
                    )
                if place is not None:
                    taken[place] = replica.name
        return found

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

    async def _keep_running(self, replica: Replica) -> None:
        """Run a node's process and restart it when it crashes, hangs or has drained."""
        name, crashes = replica.name, 0
        while True:
            began = time.monotonic()
            process = await self._spawn(replica)
            watching = asyncio.create_task(self._end_if_it_hangs(replica, process))
            watching.add_done_callback(self._task_ended)
            try:
                assert process.stdout is not None
                while line := await _read_line(process.stdout):
                    text = line.decode(errors="replace").rstrip()
                    self._last_lines[name] = text
                    self._log(name, text)
                code = await process.wait()
            finally:
                watching.cancel()
                await asyncio.wait({watching})
            if code == 0:  # it has drained, since somebody wants a new process in its place
                crashes = 0
            else:
                crashes = 1 if time.monotonic() - began > _STABLE_S else crashes + 1
            if code == 2 or crashes > _MAX_CRASHES:  # 2: the node reported an error that a restart cannot mend
                break
            self._log(name, f"ended with {code}; starting it again")
            await asyncio.sleep(0.25 * 2**crashes)
        reason = self._last_lines.get(name, "").removeprefix("error: ")
        self._fail(NodeError(f"node {name!r} ended with {code}: {reason}", node=replica.node.name))

    async def _spawn(self, replica: Replica) -> asyncio.subprocess.Process:
        """Start the process of a replica."""
        node = replica.node
        process = self._processes[replica.name] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ruyi_flow.cli", "node", node.name, "--topology", str(self._path), "--supervised"),
            *(("--replica", str(replica.number)) if len(node.addresses) > 1 else ()),
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
        return process

    async def _end_if_it_hangs(self, replica: Replica, process: asyncio.subprocess.Process) -> None:
        """Ask a process for a sign of life again and again, and kill it if it has served and gives none any more.

        Its event loop or its compute thread hangs then. Checks are counted rather than seconds: this process may have
        been stopped itself, and the node not at all.
        """
        peer, serves, missed = self._peer(replica), False, 0
        try:
            while missed < _HANG_CHECKS:
                began = time.monotonic()
                try:
                    sign = await peer.next_sign(timeout_s=_CHECK_S)
                    serves, missed = not sign.draining, 0
                except NodeError:
                    missed += serves  # before it serves it loads, and after that it drains: it ends by itself
                await asyncio.sleep(max(0.0, began + _CHECK_S - time.monotonic()))
        finally:
            await peer.close()
        self._log(replica.name, f"has given no sign of life for {_HANG_CHECKS * _CHECK_S:g} s: it hangs; ending it")
        process.kill()

    def _peer(self, replica: Replica) -> Peer:
        """Return a connection to a replica of this machine, with the keys of the replica itself."""
        keys, limit = self._topology.keys_of(replica.node.name), replica.node.limits.max_message_bytes
        return Peer(replica.name, replica.local_address, max_message_bytes=limit, keys=keys)

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
