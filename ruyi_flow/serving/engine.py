"""One node's stages at work: loads them, opens sessions on them, reaches the node beyond. No server, no text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import CheckpointError, ConfigError, HandshakeError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.chain import Chain
from ruyi_flow.loop.front_door import Sessions
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.transport.blocks import rows_in
from ruyi_flow.transport.peer import Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.types import Encoding, NodeStatus, SamplingParams, Stage

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
        self._next = topology.next_of(name)
        self._peer: Peer | None = None
        self._started = time.monotonic()
        self._parameters = shard.model.num_parameters()
        self._weights = checkpoint.weights or self.node.weights
        hidden = checkpoint.config.hidden_size
        hops = [hop for node in topology.nodes if (hop := topology.next_of(node.name)) is not None]
        rows = [rows_in(target.limits.max_message_bytes, hidden, link.encoding) for target, link in hops]
        row = 0 if self._next is None else self._next[1].row_bytes(hidden)
        way = None if self._next is None else self._way
        self.sessions = Sessions(name, self.node.limits, shard, worker, way, row, topology.ahead_of(name, row))
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
        topology.check_bytes(checkpoint.config.hidden_size, where=where)
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
        return await self.sessions.open(opening, timeout_s), self.shard.memory

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
        return await self.sessions.open(opening, timeout_s)

    def status(self) -> NodeStatus:
        """What the node holds and does."""
        model, pool, node = self.shard.model, self.shard.pool, self.node
        return NodeStatus(
            node=self.name,
            tier=node.label,
            state="draining" if self.sessions.draining else "serving",
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
            max_sessions=node.limits.max_sessions,
            waiting=self.sessions.waiting,
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

    def _way(self, opening: SessionOpen, timeout_s: float | None) -> Callable[[Policy], Stage]:
        """See `sessions.Way`."""
        assert self._next is not None
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

        return beyond


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
