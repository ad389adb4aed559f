"""One node's stages at work: loads them, opens sessions on them, reaches the node beyond. No server, no text."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from ruyi_flow.chain import Chain
from ruyi_flow.errors import CapacityError, CheckpointError, ConfigError, HandshakeError, NodeUnavailable
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, load_slice, parse_dtype
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.pace import Pace
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.admission import Admission
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.topology import Topology
from ruyi_flow.transport.blocks import row_bytes, rows_in
from ruyi_flow.transport.client import Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.types import Encoding, NodeStatus, Reason, SamplingParams, Stage

__all__ = ["Engine", "find_device"]


class Engine:
    """A node of a topology, loaded.

    Args:
        topology: where it stands.
        name: which node it is.
        checkpoint: the family, or the node's shard.
        shard: its stages.
        worker: where they run.
    """

    def __init__(
        self, topology: Topology, name: str, checkpoint: Checkpoint, shard: Shard, worker: ThreadWorker
    ) -> None:
        self.topology, self.name, self.checkpoint, self.shard, self.worker = topology, name, checkpoint, shard, worker
        self.node = topology.node(name)
        self.draining = False
        self._next = topology.next_of(name)
        self._peer: Peer | None = None
        self._started = time.monotonic()
        self._parameters = shard.model.num_parameters()
        self._weights = checkpoint.weights or self.node.weights
        hidden = checkpoint.config.hidden_size
        hops = [hop for node in topology.nodes if (hop := topology.next_of(node.name)) is not None]
        rows = [rows_in(target.limits.max_message_bytes, hidden, link.encoding) for target, link in hops]
        self._pace = Pace()
        self._admission = Admission(shard, self.node.limits.max_waiting, self.node.limits.max_wait_s)
        self._allowance: _Allowance | None = None
        if self._next is not None and self.node.limits.bytes_up_per_minute is not None:
            a_row = row_bytes(hidden, self._next[1].encoding) + 16  # its token id and its part of the frame
            self._allowance = _Allowance(self.node.limits.bytes_up_per_minute, a_row)
        self.max_draft = min(rows, default=2**31) - 1
        """Drafts and the position before them are asked in one message, on every link."""

    @classmethod
    def load(cls, topology: Topology, name: str, *, where: str = "topology") -> Engine:
        """Read a node's own tensors, and nothing else of the family.

        Args:
            where: the topology file's name, for messages.

        Raises:
            ConfigError, CheckpointError: what is wrong with the topology or the files.
        """
        node = topology.node(name)
        if node.shard is None:
            checkpoint = Checkpoint(store.locate(topology.family), topology.exits)
        else:
            try:
                checkpoint = Checkpoint(node.shard)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: node {name!r}: shard: {error}") from None
        topology.check_family(checkpoint.config.exits, where=where)
        missing = [p for p in node.exits if p not in checkpoint.exits]
        if missing:
            raise ConfigError(
                f"{where}: node {name!r}: shard {checkpoint.folder} holds exits {list(checkpoint.exits)}, "
                f"not {missing[0]}; cut it again (ruyi-flow shard)"
            )
        device = find_device(node.device, f"{where}: node {name!r}: device")
        try:
            model = load_slice(
                checkpoint,
                node.exits,
                dtype=parse_dtype(node.dtype),
                device=device,
                weights=node.weights,
                compiled=node.compile,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{where}: node {name!r}: {error}") from None
        _ = checkpoint.fingerprint, checkpoint.eos_token_ids  # read while the files are open
        checkpoint.close()
        limits, threads = node.limits, node.threads or (len(node.cores) if node.cores else None)
        if node.compile:
            if threads:
                torch.set_num_threads(threads)  # as the steps will, or they would compile once more
            try:
                model.compile_layers()
            except ConfigError as error:
                raise ConfigError(f"{where}: node {name!r}: compile: {error}") from None
        try:
            shard = Shard(model, max_positions=limits.max_positions, max_sessions=limits.max_sessions)
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise the first
            raise ConfigError(
                f"{where}: node {name!r}: limits.max_positions: no memory for the keys and values of "
                f"{limits.max_positions} positions: {str(error).splitlines()[0]}"
            ) from None
        worker = ThreadWorker(threads, limits.max_step_positions)
        return cls(topology, name, checkpoint, shard, worker)

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> tuple[Stage, Tensor]:
        """A session for the node before this one; see `transport.server.Service`."""
        config, ours = self.checkpoint.config, self.shard.model.first_layer
        for what, theirs, mine in (
            ("family fingerprint", opening.family, self.checkpoint.fingerprint),
            ("hidden size", opening.hidden_size, config.hidden_size),
            ("first layer", opening.first_layer, ours),
        ):
            if theirs != mine:
                raise HandshakeError(
                    f"{what}: the caller has {theirs}, node {self.name!r} has {mine}; "
                    "both must run shards of one family, cut by one topology",
                    node=self.name,
                )
        policy = opening.policy
        needed = [p for p in config.exits if p < policy.deepest]
        if policy.deepest not in config.exits or any(p not in policy.thresholds for p in needed):
            raise HandshakeError(
                f"the caller's policy is for exits {[*policy.thresholds, policy.deepest]}; "
                f"the family's are {list(config.exits)}",
                node=self.name,
            )
        if policy.deepest <= ours:
            raise HandshakeError(
                f"the caller's policy ends at exit {policy.deepest}; node {self.name!r} begins after it", node=self.name
            )
        return await self._open(opening, timeout_s), self.shard.memory

    async def open_entry(
        self, policy: Policy, sampling: SamplingParams, prompt_length: int, max_positions: int, timeout_s: float | None
    ) -> Chain:
        """A session for a user's request, on the entry node.

        Raises:
            NodeError: why not.
        """
        opening = SessionOpen(
            family=self.checkpoint.fingerprint,
            first_layer=0,
            hidden_size=self.checkpoint.config.hidden_size,
            encoding=Encoding.F32,  # nothing encoded comes in here; each link sets its own
            max_positions=max_positions,
            prompt_length=prompt_length,
            sampling=sampling,
            policy=policy,
        )
        return await self._open(opening, timeout_s)

    def status(self) -> NodeStatus:
        """What the node holds and does."""
        model, pool, node = self.shard.model, self.shard.pool, self.node
        return NodeStatus(
            node=self.name,
            tier=node.label,
            state="draining" if self.draining else "serving",
            family=self.checkpoint.fingerprint,
            exits=model.exits,
            first_layer=model.first_layer,
            last_layer=model.last_layer,
            parameters=self._parameters,
            tensor_bytes=model.tensor_bytes(),
            resident_bytes=psutil.Process().memory_info().rss,
            dtype=node.dtype if self._weights is None else f"{node.dtype}, {self._weights} weights",
            device=node.device,
            sessions=len(self.shard.sessions),
            max_sessions=self.shard.max_sessions,
            used_positions=pool.num_positions - pool.free_positions,
            max_positions=pool.num_positions,
            uptime_s=time.monotonic() - self._started,
            next_node="" if self._next is None else self._next[0].name,
            next_state="" if self._next is None else "idle" if self._peer is None else self._peer.state,
            process_id=os.getpid(),
        )

    async def close(self) -> None:
        """Let go of the compute thread and the connection to the next node."""
        if self._peer is not None:
            await self._peer.close()
        self.worker.shutdown()

    def _check_open(self) -> None:
        if self.draining:
            raise NodeUnavailable(f"node {self.name!r} is shutting down and takes no new session", node=self.name)

    async def _open(self, opening: SessionOpen, timeout_s: float | None) -> Chain:
        self._check_open()
        if self.node.limits.deepest is not None:
            opening = replace(opening, policy=opening.policy.limited_to(self.node.limits.deepest))
        gate = self._allowance
        policy, stands_in = opening.policy, opening.policy.fallback or gate is not None

        def open_session() -> ShardSession:
            return self.shard.open(
                policy, opening.sampling, opening.prompt_length, opening.max_positions, stands_in=stands_in
            )

        try:
            session = await self._admission.admit(open_session, opening.max_positions)
        except CapacityError as error:
            raise CapacityError(f"node {self.name!r} is full: {error}", node=self.name) from None
        try:
            self._check_open()  # it may have waited
        except NodeUnavailable:
            session.close()
            raise
        beyond = None
        if self._next is not None:
            target, link = self._next
            if self._peer is None:
                address = str(link.address or target.address)
                self._peer = Peer(target.name, address, max_message_bytes=target.limits.max_message_bytes)
            peer, deadline = self._peer, None if timeout_s is None else time.monotonic() + timeout_s
            onward = replace(opening, first_layer=self.shard.model.last_layer, encoding=link.encoding)

            def beyond(policy: Policy) -> Stage:
                left = None if deadline is None else max(0.001, deadline - time.monotonic())
                asked = replace(onward, policy=policy)
                return RemoteStage(peer, asked, timeout_s=link.timeout_s, session_timeout_s=left)

        return Chain(session, self.worker, self.name, beyond, None if gate is None else gate.spend, self._pace)


class _Allowance:
    """The bytes that a node may still send upwards: so many a minute, and at most a minute's worth at once.

    Args:
        bytes_per_minute: refilled evenly.
        row_bytes: of a position.
    """

    def __init__(self, bytes_per_minute: int, row_bytes: int) -> None:
        self._most, self._row_bytes = float(bytes_per_minute), row_bytes
        self._left, self._then = self._most, time.monotonic()

    def spend(self, positions: int) -> Reason | None:
        """Take what so many positions need, or say why they may not go."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._then) * self._most / 60)
        self._then = now
        need = positions * self._row_bytes
        if need > self._left:
            return Reason.BUDGET
        self._left -= need
        return None


def find_device(name: str, where: str) -> torch.device:
    """A device that is really there.

    Raises:
        ConfigError: it is not; `where` says where it was named.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {name!r} cannot be used here: {reason}") from None
    return device
