"""Profiles for the simulator: what a family's stages take on this machine, or on running nodes; what a link gives."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ruyi_flow.bench.nodes import ask, daemons
from ruyi_flow.bench.report import Report, machine, unseen
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import ConfigError, NodeUnavailable
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, parse_dtype
from ruyi_flow.family.loading import load_slice
from ruyi_flow.requests import SessionOpen
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.session import Pass, Session
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.runtime.steps import Task
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.testing import Relay
from ruyi_flow.topology import Topology
from ruyi_flow.transport import codec
from ruyi_flow.transport.blocks import BlockCodec
from ruyi_flow.types import Block, Decision, Encoding, Hop, Mode, Reason, SamplingParams, Stats, Verdict, Weights

__all__ = ["LinkFigures", "measure_link", "message_sizes", "profile_family", "profile_nodes"]

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_NEAR, _FAR = 64, 1024
"""Contexts that the cost of attention is taken from."""
_MANY = 128
"""Rows that show what each of them attends to, beside what reading the context takes."""
_SESSIONS = 8
"""In a step, for what each further one costs."""
_DELAYS_S = (0.0, 0.01, 0.04)
"""Of links, for what steps take after pauses of different lengths."""
_AT_ONCE = 3
"""Processes that show how nodes share a machine's cores."""
_TURNS_S = 12.0
"""How long their steps are counted."""


def profile_family(
    family: str,
    *,
    dtype: str = "bfloat16",
    weights: Weights | None = None,
    threads: int = 1,
    rounds: int = 7,
    report: Report = unseen,
) -> Profile:
    """Measure every stage of a family in this process, and what goes on around steps with two node processes.

    Stages run in turn, from the first to the last, so that each finds the caches as serving leaves them.

    Args:
        rounds: of each number of rows, the median counts.
        threads: CPU threads of every process.
        report: told how far it is.

    Raises:
        CheckpointError: the family cannot be read.
        ConfigError: the machine cannot run it so.
    """
    checkpoint = Checkpoint(store.locate(family))
    config = checkpoint.config
    torch.set_num_threads(threads)
    model = load_slice(checkpoint, config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights)
    far = min(_FAR, config.max_positions - 2 * _ROWS[-1])
    if far <= _NEAR:
        raise ConfigError(f"family {family!r} has a context of {config.max_positions}; profiles need 1024 at the least")
    room = far + 2 * _ROWS[-1] + (_SESSIONS + 2) * (_NEAR + 2 * _ROWS[-1])
    shard = Shard(model, max_positions=room, max_sessions=_SESSIONS + 2)
    stages = _stages(shard, far, rounds, report)
    weight = sum(p.numel() * p.element_size() for p in model.parameters())
    found = Profile(
        kind="measured",
        source=f"ruyi-flow profile {family}",
        family=checkpoint.fingerprint,
        hidden_size=config.hidden_size,
        context=config.max_positions,
        stages=stages,
        dtype=dtype,
        weights="" if weights is None else str(weights),
        threads=threads,
        machine=machine(threads) | {"weight_bytes": weight},
        step_s=asyncio.run(_handover(shard, threads)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )
    del shard, model
    report("steps at once", 0, 2)
    alone = _at_once(family, dtype, weights, threads, 1)
    report("steps at once", 1, 2)
    found.machine["cores_for_nodes"] = round(_cores(alone, _at_once(family, dtype, weights, threads, _AT_ONCE)[0]), 3)
    report("steps at once", 2, 2)
    if len(config.exits) > 1:
        nodes: dict[str, Any] = {"family": family, "dtype": dtype, "weights": weights, "threads": threads}
        report("nodes", 0, 2)
        around = asyncio.run(_around(config.exits, nodes))
        report("nodes", 1, 2)
        found = replace(found, **around, **asyncio.run(_pauses(stages, nodes)))
        report("nodes", 2, 2)
    return found


# ---- stages ----


def _stages(shard: Shard, far: int, rounds: int, report: Report) -> tuple[StageCost, ...]:
    """Times of every stage, by rows and by what its branch does."""
    took: dict[tuple[str, int, int], list[list[float]]] = defaultdict(lambda: [[] for _ in shard.exits])
    with torch.inference_mode():
        one, scaled = _filled(shard, far), _filled(shard, _NEAR, _scale(shard))
        kinds = [("trunk", n, _NEAR) for n in _ROWS] + [("branch", n, _NEAR) for n in _ROWS]
        kinds += [("head", n, _NEAR) for n in _ROWS if n <= 64]
        kinds += [("scaled", 1, _NEAR), ("head", 1, _NEAR)] * 3  # a small difference, seen more often
        kinds += [("trunk", n, far) for n in (1, _MANY)] + [("head", n, far) for n in (1, 16)]
        total = (rounds + 1) * len(kinds)
        for done in range(total):
            kind = kinds[done % len(kinds)]
            what, rows, context = kind
            session = scaled if what == "scaled" else one
            session.rewind(context)
            for stage, seconds in enumerate(_sweep([session], rows, "head" if what == "scaled" else what)):
                if done >= len(kinds):  # the first round warms up
                    took[kind][stage].append(seconds)
            if done % 16 == 0:
                report("stages", done, total)
        report("stages", total, total)
        several = [_filled(shard, _NEAR) for _ in range(_SESSIONS)]
        for i in range(rounds + 1):
            for session in several:
                session.rewind(_NEAR)
            for stage, seconds in enumerate(_sweep(several, 1, "trunk")):
                if i:
                    took["sessions", _SESSIONS, _NEAR][stage].append(seconds)
        for session in (one, scaled, *several):
            session.close()
    middle = {kind: [statistics.median(times) for times in by_stage] for kind, by_stage in took.items()}
    return tuple(_cost(shard, stage, middle, far) for stage in range(len(shard.exits)))


def _cost(shard: Shard, stage: int, middle: Mapping[tuple[str, int, int], Sequence[float]], far: int) -> StageCost:
    """One stage's cost from medians."""

    def at(what: str, rows: int, context: int = _NEAR) -> float:
        return middle[what, rows, context][stage]

    def slopes(what: str, many: int) -> tuple[float, float]:
        """What a row's attending to a position takes, and what reading that position's keys and values does."""
        one, all = ((at(what, n, far) - at(what, n)) / (far - _NEAR) for n in (1, many))
        attending = max(0.0, (all - one) / (many - 1))
        return attending, max(0.0, one - attending)

    attended, context = slopes("trunk", _MANY)
    both = slopes("head", 16)
    reading = max(0.0, both[0] - attended), max(0.0, both[1] - context)
    trunk = [max(0.0, at("trunk", n) - attended * n * (_NEAR + n / 2) - context * (_NEAR + n)) for n in _ROWS]
    branch = [max(0.0, at("branch", n) - at("trunk", n)) for n in _ROWS]
    head = [
        max(0.0, at("head", n) - at("branch", n) - (reading[0] * n + reading[1]) * (_NEAR + n))
        for n in _ROWS
        if n <= 64
    ]
    while len(head) < len(_ROWS):  # nobody reads more rows than a draft has, or a prompt's end
        head.append(2 * head[-1])
    first, exit = shard.model.stages[stage]
    config = shard.config
    slot = 2 * config.num_kv_heads * config.head_dim * shard.memory.element_size()
    layers = exit - first + config.branch_layers[config.exits.index(exit)]
    return StageCost(
        exit=exit,
        first_layer=first,
        rows=_ROWS,
        trunk_s=_ascending(trunk),
        branch_s=_ascending(branch),
        head_s=_ascending(head),
        attended_s=attended,
        context_s=context,
        branch_attended_s=reading[0],
        branch_context_s=reading[1],
        session_s=max(0.0, (at("sessions", _SESSIONS) - at("trunk", _SESSIONS)) / (_SESSIONS - 1)),
        scale_s=max(0.0, at("scaled", 1) - at("head", 1)),
        weight_bytes=2 * layers * config.layer_parameters,
        kv_bytes=layers * slot,
    )


def _ascending(times: Sequence[float]) -> tuple[float, ...]:
    """More rows never take less; noise says so now and then."""
    out: list[float] = []
    for seconds in times:
        out.append(max(seconds, out[-1] if out else 0.0))
    return tuple(out)


def _scale(shard: Shard) -> Scale:
    """Calibrated confidence of the dearest kind that the family has."""
    score = Score.PROBE if shard.config.probe_size else Score.NEGATIVE_ENTROPY
    curve = Curve(1.2, tuple(i / 20 for i in range(20)), tuple(i / 20 for i in range(20)))
    return Scale(score, {p: curve for p in shard.config.exits[:-1]})


def _filled(shard: Shard, positions: int, scale: Scale | None = None) -> Session:
    """A session whose branches all look, with so many positions."""
    policy = Policy.resolve(Routing(mode=Mode.TOKEN, threshold=1.0, draft=0, scale=scale), shard.exits)
    params = SamplingParams(eos_token_ids=())
    session = shard.open(policy, params, 1, min(shard.config.max_positions, positions + _ROWS[-1]))
    while len(session.token_ids) < positions:
        list(_sweep([session], min(256, positions - len(session.token_ids)), "branch"))
    return session


def _sweep(sessions: Sequence[Session], rows: int, what: str) -> Iterator[float]:
    """Run every stage on so many rows of each session; gives what each took.

    Args:
        what: trunk: its branch does nothing; branch: takes rows in; head: and reads them all.
    """
    like = sessions[0].embed((0,))
    for session in sessions:
        session.token_ids.extend([1] * rows)
    for stage in range(len(sessions[0].exits)):
        states = torch.randn(rows, like.shape[1]).to(like.dtype)
        parts = []
        began = time.perf_counter()
        for session in sessions:
            start = session.positions[stage]
            entering = states if stage else session.embed([1] * rows)
            work = Pass(session, stage, entering, range(start, start + rows) if what == "head" else ())
            work.looks = what != "trunk"
            parts.append((work, rows))
        sessions[0].shard.run(parts)
        yield time.perf_counter() - began
        for work, _ in parts:
            if work.error is not None:
                raise work.error


# ---- around them ----


async def _handover(shard: Shard, threads: int) -> float:
    """What a task takes on its way to the compute thread and back."""
    worker = ThreadWorker(threads)
    session = shard.open(Policy.resolve(Routing(draft=0), shard.exits), SamplingParams(), 1, 256)
    took = []
    try:
        for position in range(60):
            session.token_ids.append(1)

            def task(position: int = position) -> Task[None]:
                yield Pass(session, 0, session.embed((1,)), ())

            began = time.perf_counter()
            _, _, ran = await worker.run(task())
            took.append(time.perf_counter() - began - ran)
    finally:
        worker.shutdown()
        session.close()
    return statistics.median(took)


def message_sizes(hidden: int, vocab: int, policy: Policy) -> dict[str, Any]:
    """Bytes of messages beyond their states; of a token id, those of one in the middle of the vocabulary."""
    encoding = Encoding.BF16
    opening = SessionOpen("0" * 16, 0, hidden, encoding, 512, 64, SamplingParams(eos_token_ids=(0, 2)), policy)
    blocks = BlockCodec(hidden, encoding)

    def question(rows: int) -> int:
        block = Block(300, torch.zeros(rows, hidden, dtype=torch.bfloat16), (vocab // 2,) * rows, (300 + rows - 1,))
        return len(blocks.to_bytes(block)) - rows * encoding.row_bytes(hidden)

    def answer(count: int) -> int:
        decisions = (Decision(vocab // 2, 9, 0.7, Reason.DEEPEST),) * count
        return int(codec.verdict_to_pb(Verdict(decisions, (Hop("edge", 0.01, 0.001),)), 0.01).ByteSize())

    return {
        "open_bytes": int(codec.open_to_pb(opening).ByteSize()),
        "position_bytes": round((question(101) - question(1)) / 100),
        "up_bytes": question(1) - round((question(101) - question(1)) / 100),
        "decision_bytes": answer(2) - answer(1),
        "down_bytes": 2 * answer(1) - answer(2),
    }


def _at_once(family: str, dtype: str, weights: Weights | None, threads: int, count: int) -> tuple[float, float]:
    """What a step takes where so many processes do steps with pauses, and a pause; means."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_take_turns, args=(family, dtype, weights, threads, i, together, results), daemon=True)
        for i in range(count)
    ]
    for process in processes:
        process.start()
    try:
        steps, pauses = zip(*(results.get(timeout=120) for _ in processes), strict=True)
        return statistics.mean(steps), statistics.mean(pauses)
    finally:
        for process in processes:
            process.join(10)


def _take_turns(
    family: str, dtype: str, weights: Weights | None, threads: int, seed: int, together: Any, results: Any
) -> None:
    """Steps with pauses between them that are about as long, as a node has them whose sessions are elsewhere."""
    torch.set_num_threads(threads)
    checkpoint, pause = Checkpoint(store.locate(family)), random.Random(seed).expovariate
    model = load_slice(
        checkpoint, checkpoint.config.exits, dtype=parse_dtype(dtype), device=torch.device("cpu"), weights=weights
    )
    shard = Shard(model, max_positions=1024, max_sessions=1)
    with torch.inference_mode():
        session = _filled(shard, _NEAR)
        length = sum(_sweep([session], 1, "trunk"))
        together.wait(120)
        end, steps, paused, count = time.perf_counter() + _TURNS_S, 0.0, 0.0, 0
        while time.perf_counter() < end:
            session.rewind(_NEAR)
            steps += sum(_sweep([session], 1, "trunk"))
            began = time.perf_counter()
            time.sleep(pause(1 / length))
            paused, count = paused + time.perf_counter() - began, count + 1
        results.put((steps / count, paused / count))


def _cores(alone: tuple[float, float], together_s: float) -> float:
    """How many cores it looks like to processes that do steps with pauses, by how much longer steps take at once; as
    many as there are processes at the most.

    With n of them in a step each is served at min(1, cores / n): the closed queue with one server of that rate (as for
    machines and their repairmen; Kleinrock 1975, 3.8), whose response time grows as the cores become fewer.
    """
    step_s, pause_s = alone

    def response(cores: float) -> float:
        share, shares, rates = 1.0, [1.0], [0.0]
        for n in range(1, _AT_ONCE + 1):
            rates.append(min(n, cores) / step_s)
            share *= (_AT_ONCE - n + 1) / pause_s / rates[n]
            shares.append(share)
        inside = sum(n * share for n, share in enumerate(shares))
        return inside / sum(share * rate for share, rate in zip(shares, rates, strict=True))

    tried = np.linspace(0.5, _AT_ONCE, 251)
    return float(min(tried, key=lambda cores: abs(response(cores) - together_s)))


async def _around(exits: Sequence[int], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What rounds, requests and exchanges take beyond steps: two node processes on loopback."""
    async with daemons([exits], **nodes) as client:
        await _asked(client, 16, 16)
        round_cpu = await _processor_time(client, 0.0)
    async with daemons([exits[:1], exits[1:]], **nodes) as client:
        await _asked(client, 16, 16)
        exchange_cpu = await _processor_time(client, round_cpu)
        many = [await _asked(client, 4, 33) for _ in range(5)]
        few = [await _asked(client, 4, 1) for _ in range(9)]
        long = [await _asked(client, 100, 1) for _ in range(9)]
    around = statistics.median(_rest(stats) / stats.new_tokens for stats in many)
    exchange = statistics.median(stats.hops[1].wire_s / stats.hops[1].messages for stats in many)
    more = statistics.median(s.hops[1].wire_s for s in long) - statistics.median(s.hops[1].wire_s for s in few)
    size = statistics.median(s.hops[1].bytes_up for s in long) - statistics.median(s.hops[1].bytes_up for s in few)
    return {
        "round_s": max(0.0, around),
        "request_s": max(0.0, statistics.median(map(_rest, few)) - around),
        "exchange_s": max(0.0, exchange),
        "exchange_byte_s": max(0.0, more / size),
        "round_cpu_s": round_cpu,
        "exchange_cpu_s": exchange_cpu,
    }


async def _pauses(stages: Sequence[StageCost], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """What steps take more after pauses: nodes behind links of some delays, whose steps wait for one another."""
    cuts = [part.tolist() for part in np.array_split([s.exit for s in stages], min(3, len(stages)))]
    known = []
    for part in cuts:
        of = [next(s for s in stages if s.exit == p) for p in part]
        known.append(sum(s.trunk_s[0] for s in of) + (part is cuts[-1]) * (of[-1].branch_s[0] + of[-1].head_s[0]))
    pauses, cold = [], []
    for delay in _DELAYS_S:
        relays = {i: Relay(delay_s=delay) for i in range(1, len(cuts))} if delay else None
        async with daemons(cuts, **nodes, relay_to=relays) as client:
            await _asked(client, 16, 16)
            found = [await _asked(client, 4, 33) for _ in range(3 if delay else 7)]
        token = statistics.median(stats.token_s for stats in found)
        took = [statistics.median(s.hops[i].compute_s / s.new_tokens for s in found) for i in range(len(cuts))]
        pauses.append(token - statistics.mean(took))
        cold.append(max(0.0, statistics.mean(a - b for a, b in zip(took, known, strict=True))))
    return {"pauses_s": tuple(pauses), "cold_s": _ascending(cold)}


async def _processor_time(client: AsyncClient, round_s: float) -> float:
    """Of a round, or beyond that of an exchange: all that nodes and this process take but for steps, of one thread."""
    status = [answer for answer in (await client.status()).values() if not isinstance(answer, Exception)]
    processes = [psutil.Process(), *(psutil.Process(answer.process_id) for answer in status)]
    took = []
    for _ in range(5):
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        stats = await _asked(client, 4, 65)
        spent = sum(sum(process.cpu_times()[:2]) for process in processes) - before
        spent -= sum(hop.compute_s for hop in stats.hops)
        took.append(spent / 65 - round_s)
    return max(0.0, statistics.median(took))


async def _asked(client: AsyncClient, prompt: int, tokens: int, **options: Any) -> Stats:
    ids = [3 + 7 * i % 50 for i in range(prompt)]  # in any vocabulary
    return (await ask(client, ids, tokens, **options)).stats


def _rest(stats: Stats) -> float:
    """Of an answer's time, what no node and no link accounts for."""
    return stats.total_s - sum(hop.compute_s + hop.queue_s + hop.wire_s for hop in stats.hops)


# ---- from outside ----


async def profile_nodes(topology: Topology, *, rounds: int = 5, report: Report = unseen) -> Profile:
    """Measure running nodes by what they say of the time that answers took them.

    A node does not tell its stages apart, so their time is shared out by their layers. What attention costs, and what
    several sessions in a step cost, is not seen from there: those figures are 0.

    Raises:
        NodeError: one of them does not answer.
    """
    checkpoint = Checkpoint(store.locate(topology.family), topology.exits)
    config, nodes = checkpoint.config, topology.nodes
    rows = tuple(n for n in _ROWS if n <= 64)
    found: dict[tuple[bool, int], list[list[float]]] = defaultdict(lambda: [[] for _ in nodes])
    turns = [(looks, n) for _ in range(rounds) for n in rows for looks in (False, True)]
    async with AsyncClient(topology) as client:
        await _asked(client, 16, 16)
        for done, (looks, n) in enumerate(turns):
            stats = await _asked(client, n, 1, **({"mode": "token", "threshold": 1.0} if looks else {}))
            if len(stats.hops) == len(nodes):  # a branch that is entirely sure leaves deeper nodes out
                for i, hop in enumerate(stats.hops):
                    found[looks, n][i].append(hop.compute_s)
            report("nodes", done, len(turns))
        around = [await _asked(client, 4, 17) for _ in range(rounds)]
        report("nodes", len(turns), len(turns))
    stages: list[StageCost] = []
    for i, node in enumerate(nodes):
        first = nodes[i - 1].exits[-1] if i else 0
        layers = [b - a for a, b in zip((first, *node.exits), node.exits, strict=False)]
        trunk = [statistics.median(found[False, n][i]) for n in rows]
        looking = statistics.median(found[True, 1][i] or [trunk[0]])
        for p, depth in zip(node.exits, layers, strict=True):
            part = depth / sum(layers)
            head = 0.0 if i + 1 == len(nodes) else max(0.0, looking - trunk[0]) / len(node.exits)
            spent = _ascending([part * t for t in trunk])
            stages.append(StageCost(p, p - depth, rows, spent, (0.0,) * len(rows), (head,) * len(rows)))
    return Profile(
        kind="measured",
        source=f"nodes {', '.join(node.name for node in nodes)}, from outside",
        family=checkpoint.fingerprint,
        hidden_size=config.hidden_size,
        context=config.max_positions,
        stages=tuple(stages),
        round_s=max(0.0, statistics.median(_rest(stats) / stats.new_tokens for stats in around)),
        **message_sizes(config.hidden_size, config.vocab_size, Policy.resolve(Routing(), config.exits)),
    )


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What a link to a node gives."""

    round_trip_ms: float
    jitter_ms: float
    up_mbit: float


async def measure_link(address: str, *, rounds: int = 20, payload: int = 1_000_000) -> LinkFigures:
    """Measure a link by health checks: small ones for the round trip, a large one for the bandwidth upwards.

    Raises:
        NodeUnavailable: nobody answers there.
    """
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def check(size: int) -> float:
            began = time.perf_counter()
            try:
                await health.Check(health_pb2.HealthCheckRequest(service="x" * size), timeout=60)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise NodeUnavailable(f"{address}: no answer: {error.details()}") from None
            return time.perf_counter() - began

        await check(1)
        trips = [await check(1) for _ in range(rounds)]
        large = [await check(payload) for _ in range(3)]
    trip = statistics.median(trips)
    return LinkFigures(1e3 * trip, 1e3 * statistics.pstdev(trips), 8e-6 * payload / max(1e-6, min(large) - trip))
