"""Helpers for tests of code that uses this package: a tiny family, nodes in this process, a slow or broken network."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ruyi_flow.config.security import OPERATOR, Security
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.family.checkpoint import save_weights
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.transformer import Probe
from ruyi_flow.requests import SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.telemetry.spans import NO_TRACER, Tracer

__all__ = ["Cluster", "Relay", "cluster", "cut_topology", "free_ports", "open_session", "tiny_family", "with_keys"]


def tiny_family(
    folder: str | Path,
    *,
    base: str = "qwen3",
    exits: Sequence[int] = (2, 4, 6),
    shared_heads: bool = False,
    ordinary: bool = False,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changes: Any,
) -> Path:
    """Write a family with random weights; a small one, unless `changes` sets other sizes.

    Args:
        folder: folder to write to; it is made if missing.
        base: architecture: llama, qwen2 or qwen3.
        exits: numbers of trunk layers at the exits; one more layer follows the last exit, as its branch.
        shared_heads: whether all branches use one LM head.
        ordinary: write an ordinary Hugging Face checkpoint instead, which gets exits when it is opened.
        tied: whether the LM head is the embedding.
        seed: seed of the random weights, which differ between devices.
        dtype: number format of the weights.
        device: torch device that draws them; a GPU draws billions in seconds.
        changes: keys of config.json to set or replace.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder contains a family already.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder}: has a family already; remove it or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    num_layers = exits[-1] + 1
    raw: dict[str, Any] = {
        "model_type": base if ordinary else f"ruyi_{base}",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if base == "qwen3" else 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }
    if not ordinary:
        raw |= {"early_exit_points": list(exits), "shared_heads": shared_heads or tied}
    raw |= changes
    config = FamilyConfig.parse(raw)
    h, m, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (normal(*shape).mul_(1.5 / shape[-1] ** 0.5) * scale).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + 0.1 * normal(size)).to(dtype)

    tensors = {"model.embed_tokens.weight": random(v, h, scale=4)}
    layers = [f"model.layers.{i}" for i in range(num_layers)]
    if not ordinary:
        layers += [prefix for p in exits[:-1] for prefix in config.branch_prefixes(p)]
    for prefix in layers:
        for part, rows, columns, bias in (
            ("self_attn.q_proj", q, h, config.attention_bias),
            ("self_attn.k_proj", kv, h, config.attention_bias),
            ("self_attn.v_proj", kv, h, config.attention_bias),
            ("self_attn.o_proj", h, q, config.output_bias),
            ("mlp.gate_proj", m, h, config.mlp_bias),
            ("mlp.up_proj", m, h, config.mlp_bias),
            ("mlp.down_proj", h, m, config.mlp_bias),
        ):
            tensors[f"{prefix}.{part}.weight"] = random(rows, columns)
            if bias:
                tensors[f"{prefix}.{part}.bias"] = random(rows, scale=0.3)
        norms = {"input_layernorm": h, "post_attention_layernorm": h}
        if base == "qwen3":
            norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
        for part, size in norms.items():
            tensors[f"{prefix}.{part}.weight"] = norm(size)
    for name in ["model.norm"] if ordinary else [f"model.norms.{i}" for i in range(len(exits))]:
        tensors[f"{name}.weight"] = norm(h)
    size = config.probe_size
    up, down = (size, h + Probe.TOP), (1, size)
    shapes: dict[str, tuple[int, ...]] = {"up.weight": up, "down.weight": down, "up.bias": (size,), "down.bias": (1,)}
    for i in range(len(exits) - 1) if size else ():
        tensors |= {f"model.probes.{i}.{part}": random(*shape, scale=2) for part, shape in shapes.items()}
    if not config.tied_head:
        for name in ["lm_head"] if config.shared_heads else [f"lm_head.{i}" for i in range(len(exits))]:
            tensors[f"{name}.weight"] = random(v, h, scale=2)
    save_weights(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def cut_topology(
    family: str | Path,
    cuts: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    weights: str | None = None,
    encoding: str = "f32",
    exits: Sequence[int] | None = None,
    threads: int | None = 1,
    limits: dict[str, Any] | None = None,
    timeout_s: float = 30.0,
    recover_s: float = 10.0,
) -> Topology:
    """Make a topology of nodes n0, n1, … on free ports of loopback; each cut lists the exits of one node."""
    names = [f"n{i}" for i in range(len(cuts))]
    return Topology.parse(
        {
            "family": str(family),
            "exits": exits,
            "nodes": [
                {
                    "name": name,
                    "address": "127.0.0.1:0",
                    "exits": list(cut),
                    "dtype": dtype,
                    "weights": weights,
                    "threads": threads,
                    "limits": limits or {"max_positions": 2048, "grace_s": 1},
                }
                for name, cut in zip(names, cuts, strict=True)
            ],
            "links": [
                {"from": a, "to": b, "encoding": encoding, "timeout_s": timeout_s, "recover_s": recover_s}
                for a, b in itertools.pairwise(names)
            ],
        }
    )


def free_ports(count: int) -> list[int]:
    """Return TCP ports of loopback that are not in use at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def open_session(
    shard: Shard,
    policy: Policy,
    params: SamplingParams,
    *,
    prompt_length: int,
    max_positions: int,
    covers_next: bool = False,
) -> ShardSession:
    """Open a session on a shard, without admission.

    Args:
        shard: the stages.
        policy: the session's policy.
        params: how tokens are picked.
        prompt_length: positions of the prompt.
        max_positions: largest number of positions.
        covers_next: whether the last branch must be able to decide in place of the next node.

    Raises:
        CapacityError: the shard is full.
    """
    opening = SessionOpen(policy=policy, sampling=params, prompt_length=prompt_length, max_positions=max_positions)
    return shard.open(opening, shard.capacity.lease(max_positions), covers_next=covers_next)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that run in this process."""

    topology: Topology
    """The topology, with the addresses that clients connect to."""
    engines: dict[str, Engine]
    """Engines of the nodes, by name; replicas are named n1/1, n1/2 and so on."""

    def check_idle(self) -> None:
        """Raise AssertionError unless every node's KV cache is consistent and empty."""
        for name, engine in self.engines.items():
            engine.shard.capacity.check_integrity()
            assert engine.shard.capacity.pool.used == 0, f"node {name} still has pages in use"

    async def settle(self, timeout_s: float = 5.0) -> None:
        """Wait until no node has a session, then call `check_idle`."""
        for _ in range(int(timeout_s / 0.005)):
            if not any(engine.shard.capacity.leases for engine in self.engines.values()):
                break
            await asyncio.sleep(0.005)
        self.check_idle()


def with_keys(topology: Topology, folder: Path, *, days: int = 1) -> Topology:
    """Make a CA, a certificate of each node and one of the user `operator`, and return the topology with them.

    Args:
        topology: the topology.
        folder: folder for the files; a CA that is there is used.
        days: days for which the certificates are valid.
    """
    from ruyi_flow.keys.authority import Authority, hosts_of

    security = Security(deployment="test", ca=folder / "ca.pem")
    topology = topology.model_copy(update={"security": security})
    authority = Authority(security) if security.ca.exists() else Authority.create(security, days=days)
    for node in topology.nodes:
        authority.issue_node(topology, node.name, days=days)
    authority.issue_user(OPERATOR, hosts_of(topology, topology.entry.name), days=days)
    return topology


@asynccontextmanager
async def cluster(
    topology: Topology,
    relays: dict[str, Relay] | None = None,
    tracers: Mapping[str, Tracer] | None = None,
    replicas: Mapping[str, int] | None = None,
    keys: str | Path | None = None,
) -> AsyncIterator[Cluster]:
    """Run all nodes of a topology in this process while the block lasts, each with its gRPC server and compute thread.

    Args:
        topology: the topology; port 0 in an address picks a free port.
        relays: relays in front of nodes, by the node's name. Replicas are named n1/1, n1/2 and so on.
        tracers: tracers of nodes, by the node's name; the caller closes them.
        replicas: number of replicas of nodes that have several, by the node's name.
        keys: folder for new keys; every connection is TLS then. Default: none.
    """
    if keys is not None:
        topology = await asyncio.to_thread(with_keys, topology, Path(keys))
    engines: dict[str, Engine] = {}
    async with AsyncExitStack() as stack:
        for i in reversed(range(len(topology.nodes))):  # the deepest first: each needs the next one's address
            node = topology.nodes[i]
            count = (replicas or {}).get(node.name, 1)
            addresses = []
            for name in [node.name] if count == 1 else [f"{node.name}/{number}" for number in range(1, count + 1)]:
                engine = engines[name] = await asyncio.to_thread(Engine.load, topology, node.name)
                tracer = (tracers or {}).get(name, NO_TRACER)
                address = (await stack.enter_async_context(serve(engine, tracer=tracer))).address
                if relays and name in relays:
                    address = await stack.enter_async_context(relays[name].run(address))
                addresses.append(address)
            nodes = list(topology.nodes)
            nodes[i] = node.model_copy(update={"address": addresses[0] if count == 1 else tuple(addresses)})
            topology = topology.model_copy(update={"nodes": tuple(nodes)})
        yield Cluster(topology, dict(reversed(engines.items())))


class Relay:
    """A TCP relay that delays, limits or breaks connections: it emulates a wide-area link without netem.

    Delay, rate and every kind of damage may be changed while it runs. A subclass may override `relayed`.

    Args:
        delay_s: delay in each direction, in seconds; a round trip takes twice as long.
        bytes_per_s: rate in each direction, in bytes per second. Default: no limit.
    """

    def __init__(self, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s
        self.bytes_up = self.bytes_down = 0
        """Bytes relayed to the target and back."""
        self.frozen = False
        """While true, nothing is relayed and no connection is closed, as if the target hung."""
        self.refuses = False
        """While true, new connections are closed at once, as if the target were not running."""
        self._sinks: dict[asyncio.StreamWriter, bool] = {}
        """Where data is written, and whether that is towards the target."""
        self._dropped: set[asyncio.StreamWriter] = set()
        """Sinks that nothing is written to any more."""
        self._kept: set[asyncio.StreamWriter] = set()
        """Sinks that are not closed either, whatever their source does."""
        self._flips: list[tuple[bool, int, int]] = []
        """Bytes to change: direction, number of bytes that were relayed before, bits to flip."""
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._target = ("", 0)

    @asynccontextmanager
    async def run(self, target: str) -> AsyncIterator[str]:
        """Relay to `target` (host:port) while the block lasts; yield the address to connect to instead."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.cut()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return (len(self._sinks) + 1) // 2

    def cut(self) -> None:
        """Close every connection at once, as if the target died."""
        self._kept.clear()
        for sink in list(self._sinks):
            sink.transport.abort()

    def reset(self) -> None:
        """Reset every connection (TCP RST), as a host does that has restarted."""
        for sink in list(self._sinks):
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # closing drops what was not sent
            sink.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.cut()

    def blackhole(self) -> None:
        """Drop what the open connections send from now on, and keep them open, as a NAT that forgot them.

        New connections work. `cut` ends those in the hole.
        """
        self._dropped |= self._sinks.keys()
        self._kept |= self._sinks.keys()

    def half_close(self, *, up: bool) -> None:
        """End one direction of every open connection, while the other one still works.

        Args:
            up: whether it is the direction towards the target, which then sees the end of its input.
        """
        for sink, is_up in list(self._sinks.items()):
            if is_up == up and not sink.transport.is_closing():
                self._dropped.add(sink)
                sink.write_eof()

    def flip(self, offset: int, *, up: bool, bits: int = 1) -> None:
        """Change one byte that is still to come.

        Args:
            offset: number of bytes in this direction, over all connections, that pass unchanged before.
            up: whether it is the direction towards the target.
            bits: bits of the byte to flip, 1 to 255.
        """
        self._flips.append((up, (self.bytes_up if up else self.bytes_down) + offset, bits))

    def flip_nothing(self) -> None:
        """Take back every `flip` whose byte has not come yet."""
        self._flips.clear()

    def relayed(self, connection: int, data: bytes, *, up: bool) -> bytes:
        """Return what to deliver of data that has arrived; a subclass may watch it, change it or drop it.

        Args:
            connection: number of the connection, counted from 0.
            data: some bytes of it, in order.
            up: whether they go to the target.
        """
        return data

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.refuses:
                raise ConnectionRefusedError
            up_reader, up_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        number = next(self._numbers)
        self._sinks |= {up_writer: True, writer: False}
        for source, sink in ((reader, up_writer), (up_reader, writer)):
            task = asyncio.create_task(self._pump(number, source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Copy bytes through a queue that they leave when due, so that the delay does not limit throughput."""
        loop, up = asyncio.get_running_loop(), self._sinks[sink]
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                while self.frozen or (not data and sink in self._kept):  # noqa: ASYNC110 (plain attributes are simpler)
                    await asyncio.sleep(0.01)
                if not data:
                    break
                if sink not in self._dropped:
                    sink.write(data)
                    await sink.drain()

        delivery = asyncio.create_task(deliver())
        free_at = 0.0
        try:
            while True:
                data = await source.read(64 * 1024)
                free_at = max(free_at, loop.time()) + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0)
                passed = self._pass(number, data, up)
                if passed or not data:  # the end of the source is passed on as nothing
                    await queue.put((free_at + self.delay_s, passed))
                if not data:
                    break
            await delivery
        except OSError:
            pass  # one side broke; the other one is closed below
        finally:
            delivery.cancel()
            await asyncio.gather(delivery, return_exceptions=True)
            sink.transport.abort()
            self._dropped.discard(sink)
            self._kept.discard(sink)
            del self._sinks[sink]

    def _pass(self, number: int, data: bytes, up: bool) -> bytes:
        """Count some bytes, change those that are to be changed, and return what to deliver."""
        before = self.bytes_up if up else self.bytes_down
        if up:
            self.bytes_up += len(data)
        else:
            self.bytes_down += len(data)
        for flip in list(self._flips):
            is_up, at, bits = flip
            if is_up == up and at < before + len(data):
                self._flips.remove(flip)
                data = b"".join((data[: at - before], bytes([data[at - before] ^ bits]), data[at - before + 1 :]))
        return self.relayed(number, data, up=up) if data else data
