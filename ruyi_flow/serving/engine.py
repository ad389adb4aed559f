"""One node's engine: loads its stages, opens sessions on them, and connects to the next node. No server, no text."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from ruyi_flow import __version__
from ruyi_flow.config.security import check_unwritable
from ruyi_flow.config.topology import Link, Node, Topology
from ruyi_flow.errors import CheckpointError, ConfigError, HandshakeError, NodeError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.devices import find_device
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.tokenizer import PromptEncoder, end_tokens, load_tokenizer
from ruyi_flow.loop.chain import Chain
from ruyi_flow.loop.front_door import FrontDoor
from ruyi_flow.loop.next_stage import NO_RECOVERY
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.serving.answering import Answering
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.telemetry.spans import current_span
from ruyi_flow.transport.blocks import rows_in
from ruyi_flow.transport.link import FRAME_BYTES, LinkMeter
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.transport.replicas import Replicas
from ruyi_flow.types import NodeStatus, Stage

__all__ = ["Engine"]

_METER_SHARE = 25
"""The operator's bytes per minute over a message of a measurement: three are sent, six times a minute at the most."""


class Engine:
    """A loaded node of a topology.

    Args:
        topology: the topology.
        name: the node's name in it.
        checkpoint: the family, or the node's shard.
        shard: the node's stages.
        worker: runs them.
        counters: what the node counts.
    """

    def __init__(
        self,
        topology: Topology,
        name: str,
        *,
        checkpoint: Checkpoint,
        shard: Shard,
        worker: ThreadWorker,
        counters: NodeCounters,
    ) -> None:
        self.counters = counters
        self.topology, self.name, self.checkpoint, self.shard, self.worker = topology, name, checkpoint, shard, worker
        self.node = topology.node(name)
        self._next = topology.next_of(name)
        self._meter: LinkMeter | None = None
        self.is_insecure = False
        """Whether the node was started with `--insecure`, which its status tells."""
        self._started = time.monotonic()
        self._parameters = shard.model.num_parameters()
        self._weights = checkpoint.weights or self.node.weights
        hidden = checkpoint.config.hidden_size
        hops = [hop for node in topology.nodes if (hop := topology.next_of(node.name)) is not None]
        rows = [rows_in(target.limits.max_message_bytes, hidden, link.encoding) for target, link in hops]
        row_bytes = 0 if self._next is None else self._next[1].row_bytes(hidden)
        self._replicas = None if self._next is None else self._make_replicas(*self._next)
        self.front_door = FrontDoor(
            name,
            self.node.limits,
            shard,
            worker,
            connect=None if self._next is None else self._connect,
            recoveries=self._replicas or NO_RECOVERY,
            row_bytes=row_bytes,
            ahead=topology.ahead_of(name, row_bytes),
            counters=counters,
        )
        self._max_draft = min(rows, default=2**31) - 1  # drafts and the position before them travel in one message

    @classmethod
    def load(cls, topology: Topology, name: str, *, where: str = "topology") -> Engine:
        """Load a node: its own tensors, and nothing else of the family.

        Args:
            topology: the topology.
            name: the node's name in it.
            where: the topology file's name, for error messages.

        Raises:
            ConfigError: the topology does not fit the family or this machine.
            CheckpointError: the files cannot be read.
        """
        node = topology.node(name)
        if node.shard is None:
            checkpoint = Checkpoint(store.locate(topology.family), topology.exits)
        else:
            if topology.security is not None:
                for path in (node.shard, *node.shard.glob("*")):
                    check_unwritable(path, "this shard")
            try:
                checkpoint = Checkpoint(node.shard)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: node {name!r}: shard: {error}") from None
        topology.check_family(checkpoint.config.exits, where=where)
        topology.check_bytes(checkpoint.config.hidden_size, where=where)
        if checkpoint.exits not in (checkpoint.config.exits, node.exits):
            raise ConfigError(
                f"{where}: node {name!r}: exits: the topology gives it {list(node.exits)}, but its shard "
                f"{checkpoint.folder} was cut for {list(checkpoint.exits)}; correct exits, or cut the shard again "
                "with ruyi-flow shard"
            )
        if not set(topology.exits or ()) <= set(checkpoint.config.exits):
            raise ConfigError(
                f"{where}: exits: the topology names {list(topology.exits or ())}, but {checkpoint.folder} is of a "
                f"family with exits {list(checkpoint.config.exits)}; correct exits, or cut the shard again with "
                "ruyi-flow shard"
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
                torch.set_num_threads(threads)  # the same number as in the steps, or they would compile again
            try:
                model.compile_layers()
            except ConfigError as error:
                raise ConfigError(f"{where}: node {name!r}: compile: {error}") from None
        try:
            shard = Shard(model, max_positions=limits.max_positions, max_sessions=limits.max_sessions)
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise the first
            raise ConfigError(
                f"{where}: node {name!r}: limits.max_positions: there is not enough memory for the KV cache of "
                f"{limits.max_positions} positions: {str(error).splitlines()[0]}"
            ) from None
        counters = NodeCounters()
        worker = ThreadWorker(threads, limits.max_step_positions, counters.steps)
        return cls(topology, name, checkpoint=checkpoint, shard=shard, worker=worker, counters=counters)

    def answering(self) -> Answering:
        """Return the answers of this node to users; it must be the entry node.

        Raises:
            CheckpointError: the tokenizer files cannot be read.
        """
        checkpoint = self.checkpoint
        tokenizer = load_tokenizer(checkpoint)
        return Answering(
            self.front_door.open,
            PromptEncoder(tokenizer, checkpoint.config, family=self.topology.family),
            fingerprint=checkpoint.fingerprint,
            eos_token_ids=end_tokens(checkpoint, tokenizer),
            routing=self.topology.routing(),
            node_of={p: node.name for node in self.topology.nodes for p in node.exits},
            max_draft=self._max_draft,
            tier_of={node.name: node.label for node in self.topology.nodes},
            counters=self.counters,
            family=self.topology.family,
        )

    async def open_session(self, opening: SessionOpen, timeout_s: float | None) -> Chain:
        """Open a session for the previous node.

        Raises:
            HandshakeError: the two nodes do not fit together.
            CapacityError, NodeUnavailable, RequestError: see `FrontDoor.open`.
        """
        config, first_layer = self.checkpoint.config, self.shard.model.first_layer
        for what, theirs, mine in (
            ("family fingerprint", opening.family, self.checkpoint.fingerprint),
            ("hidden size", opening.hidden_size, config.hidden_size),
            ("first layer", opening.first_layer, first_layer),
            ("node", opening.node, self.name),
            ("exits of this node", list(opening.exits), list(self.node.exits)),
        ):
            if theirs != mine:
                raise HandshakeError(
                    f"{what}: the caller has {theirs}, node {self.name!r} has {mine}; "
                    "both must run shards of one family, cut by one topology: compare their topology files",
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
        if policy.deepest <= first_layer:
            raise HandshakeError(
                f"the caller's policy ends at exit {policy.deepest}; node {self.name!r} begins after it", node=self.name
            )
        return await self.front_door.open(opening, timeout_s)

    def status(self) -> NodeStatus:
        """Return what the node contains and does."""
        model, capacity, node = self.shard.model, self.shard.capacity, self.node
        pool = capacity.pool
        return NodeStatus(
            node=self.name,
            tier=node.label,
            state="draining" if self.front_door.draining else "serving",
            family=self.checkpoint.fingerprint,
            exits=model.exits,
            first_layer=model.first_layer,
            last_layer=model.last_layer,
            parameters=self._parameters,
            tensor_bytes=model.tensor_bytes(),
            resident_bytes=psutil.Process().memory_info().rss,
            dtype=node.dtype if self._weights is None else f"{node.dtype}, {self._weights} weights",
            device=node.device,
            sessions=len(capacity.leases),
            max_sessions=node.limits.max_sessions,
            waiting=self.front_door.waiting,
            used_positions=pool.num_positions - pool.free_positions,
            max_positions=pool.num_positions,
            uptime_s=time.monotonic() - self._started,
            next_node="" if self._next is None else self._next[0].name,
            next_state="" if self._next is None else "idle" if self._replicas is None else self._replicas.state,
            process_id=os.getpid(),
            version=__version__,
            next_address="" if self._replicas is None else ", ".join(self._replicas.addresses),
            next_encoding=None if self._next is None else self._next[1].encoding,
            context=self.checkpoint.config.max_positions,
            parked=self.front_door.parked,
            cache_bytes=self.shard.memory.nbytes,
            log_bytes=self.shard.log.nbytes,
            insecure=self.is_insecure,
        )

    async def status_with_link(self) -> NodeStatus:
        """Return the same with a measurement of the link to the next node, or why there is none."""
        if self._next is None or self._replicas is None:
            return self.status()
        if self.front_door.draining:
            return replace(self.status(), link_error=f"node {self.name!r} is draining and measures no link")
        if self._meter is None:
            limits, per_minute = self._next[0].limits, self.node.limits.bytes_up_per_minute
            most = [limits.max_message_bytes - FRAME_BYTES] + (
                [] if per_minute is None else [max(1, per_minute // _METER_SHARE)]
            )
            self._meter = LinkMeter(
                self._replicas.addresses[0],
                max_bytes=min(most),
                node=self._next[0].name,
                keys=self.topology.keys_of(self.name),
            )
        try:
            return replace(self.status(), link=await self._meter.measure())
        except NodeError as error:
            return replace(self.status(), link_error="".join(c if c.isprintable() else " " for c in str(error)[:500]))

    async def close(self) -> None:
        """Close the connection to the next node, and end the compute thread."""
        if self._replicas is not None:
            await self._replicas.close()
        if self._meter is not None:
            await self._meter.close()
        await asyncio.to_thread(self.worker.shutdown)  # it waits for the step that is running

    def _make_replicas(self, target: Node, link: Link) -> Replicas:
        """Return the replicas of the next node."""
        return Replicas(
            target.name,
            link.addresses or target.addresses,
            max_message_bytes=target.limits.max_message_bytes,
            recover_s=link.recover_s,
            timeout_s=link.timeout_s,
            counters=self.counters.link,
            keys=self.topology.keys_of(self.name),
        )

    def _connect(self, opening: SessionOpen, timeout_s: float | None) -> Callable[[Policy, int], Stage]:
        """Return the function that opens a session on the next node; see `loop.front_door.Connect`."""
        assert self._next is not None and self._replicas is not None
        target, link = self._next
        replicas, deadline = self._replicas, None if timeout_s is None else time.monotonic() + timeout_s
        config, model, traceparent = self.checkpoint.config, self.shard.model, current_span.get().traceparent
        onward = replace(
            opening,
            family=self.checkpoint.fingerprint,
            first_layer=model.last_layer,
            node=target.name,
            exits=target.exits,
            hidden_size=config.hidden_size,
            encoding=link.encoding,
            sampling=replace(opening.sampling, stop=()),  # only the entry node looks at the text
        )

        def make(policy: Policy, position: int) -> Stage:
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            asked = replace(onward, policy=policy, position=position)
            return RemoteStage(
                replicas.pick(asked.key),
                asked,
                timeout_s=link.timeout_s,
                session_timeout_s=left,
                traceparent=traceparent,
                counters=self.counters.link,
            )

        return make
