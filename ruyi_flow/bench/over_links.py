"""Benchmarks of a family that is cut over several nodes: the cost of a hop, early exits, drafts over a slow link."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ruyi_flow.bench import engines
from ruyi_flow.bench.in_process import seconds_per_token
from ruyi_flow.bench.measurement import Measurement, Report, Setup, available_cores, interleaved, no_report, ratios
from ruyi_flow.bench.nodes import PROMPT, PROMPTS, generate_exactly, running_nodes, tokenize_prompts
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.local import Family, load_family
from ruyi_flow.testing import Relay
from ruyi_flow.types import Token

__all__ = ["exits", "hop", "wan"]

_WARM_UP_TOKENS = 16
_TEMPLATES = ("Why is the {0} blue?", "Write two sentences about the {0}.", "List three facts about the {0}.")
_LONGEST_DRAFT = 16
"""Limit of adaptive drafts, which end earlier once a longer draft is not expected to save time."""


async def hop(setup: Setup, *, report: Report = no_report) -> Measurement:
    """Measure the time a hop adds: three node processes against one node process and the whole family in one process.

    The last exit decides every token, with one round trip per token. All run on the same cores, as many as threads, so
    that they share the same load and clock; `three_free` is three nodes that the operating system may place anywhere.

    Raises:
        ConfigError: the family has fewer than three exits.
    """
    family, cuts = _three_way(setup)
    ids, engine = tokenize_prompts(family.checkpoint, [PROMPT])[0], engines.ruyi_flow(family)
    cores = available_cores()[: setup.threads] or None
    times: dict[str, list[float]] = {"process": [], "node": [], "three": [], "three_free": []}
    parts: dict[str, list[float]] = {"compute": [], "queue": [], "wire": []}
    report("starting nodes", 0, 0)
    async with (
        running_nodes(cuts, cores=cores, **setup.node_options) as three,
        running_nodes([family.exits], cores=cores, **setup.node_options) as one,
        running_nodes(cuts, **setup.node_options) as free,
    ):
        clients = {"three": three, "node": one, "three_free": free}
        for name, is_measured in interleaved([*times], setup.rounds, report):
            # A short answer first: the others' runs have evicted this one's code and weights from the CPU caches.
            if name == "process":
                with _pinned_to(cores):
                    seconds_per_token(engine, ids, _WARM_UP_TOKENS)
                    seconds = seconds_per_token(engine, ids, setup.tokens)
            else:
                await generate_exactly(clients[name], ids, _WARM_UP_TOKENS)
                stats = (await generate_exactly(clients[name], ids, setup.tokens)).stats
                seconds = stats.token_s
                for part in parts if is_measured and name == "three" else ():
                    parts[part].append(sum(getattr(h, f"{part}_s") for h in stats.hops) / setup.tokens)
            if is_measured:
                times[name].append(seconds)
    results = _ms_per_token(times)
    for name, base in (("three", "process"), ("three", "node"), ("three_free", "process")):
        extra = [(a - b) / 2 for a, b in zip(times[name], times[base], strict=True)]
        results[name][f"beyond_{base}_ms_per_hop"] = 1e3 * statistics.median(extra)
    results["three"] |= {f"{part}_ms_per_token": 1e3 * statistics.median(values) for part, values in parts.items()}
    return _measurement("hop", setup, {"cuts": cuts, "cores": cores}, results=results, times=times)


async def exits(setup: Setup, *, policy: Path, report: Report = no_report) -> Measurement:
    """Measure early exits on one machine: three nodes in mode token against the whole family in one process.

    Every process may use all threads, so both sides compute on the same cores. `compute` is the operations of the
    answers, catch-up and branches included, as a share of those of the whole family up to its last exit.

    Args:
        setup: settings of the benchmark.
        policy: a policy file of `ruyi-flow calibrate`.
        report: called with the progress.

    Raises:
        ConfigError: the family has fewer than three exits, or the policy file is not valid.
    """
    PolicyFile.load(policy)
    family, cuts = _three_way(setup)
    config, engine = family.config, engines.ruyi_flow(family)
    texts = [template.format(topic) for template in _TEMPLATES for topic in ("sky", "sea")]
    prompts = tokenize_prompts(family.checkpoint, texts)
    times: dict[str, list[float]] = {"process": [], "three": []}
    decided = dict.fromkeys(family.exits, 0)
    flops = 0.0
    report("starting nodes", 0, 0)
    async with running_nodes(cuts, **setup.node_options) as client:
        for name, is_measured in interleaved([*times], setup.rounds, report):
            seconds = 0.0
            for ids in prompts:
                if name == "process":
                    seconds += seconds_per_token(engine, ids, setup.tokens)
                    continue
                reply = await generate_exactly(client, ids, setup.tokens, mode="token", draft=0, policy=policy)
                seconds += reply.stats.token_s
                if is_measured:
                    for token in reply.tokens:
                        decided[token.exit] += 1
                    flops += _answer_flops(config, reply.tokens)
            if is_measured:
                times[name].append(seconds / len(prompts))
    tokens = sum(decided.values())
    whole_flops = tokens * (config.num_layers * config.layer_flops(0) + config.head_flops)
    results = _ms_per_token(times)
    results["three"] |= ratios("speedup", times["process"], times["three"])
    results["three"] |= {f"exit_{p}": n / tokens for p, n in decided.items()} | {"compute": flops / whole_flops}
    return _measurement("exits", setup, {"cuts": cuts, "policy": str(policy)}, results=results, times=times)


def _three_way(setup: Setup) -> tuple[Family, list[list[int]]]:
    """Load the whole family, and divide its exits among three nodes."""
    family = load_family(setup.family, dtype=setup.dtype, weights=setup.weights)
    if len(family.exits) < 3:
        raise ConfigError(f"family {setup.family!r} has exits {list(family.exits)}; three nodes need three exits")
    torch.set_num_threads(setup.threads)
    return family, [part.tolist() for part in np.array_split(family.exits, 3)]


def _answer_flops(config: FamilyConfig, tokens: Sequence[Token]) -> float:
    """Operations of an answer after prefill: layers run for all positions up to the last one that reaches them."""
    layer, flops = config.layer_flops(0), 0.0
    for (first, exit), depth in zip(config.stages(config.exits), config.branch_layers, strict=True):
        reached = [i for i, token in enumerate(tokens) if token.exit >= exit]
        if reached:
            flops += (reached[-1] + 1) * (exit - first) * layer + len(reached) * (depth * layer + config.head_flops)
    return flops


async def wan(
    setup: Setup,
    *,
    round_trip_ms: float = 50,
    drafts: Sequence[int] = (1, 4),
    policy: Path | None = None,
    report: Report = no_report,
) -> Measurement:
    """Measure drafts in mode exact over a slow link between two nodes: none, of constant length, and adaptive.

    Each variant answers several prompts; the mean over the prompts counts.

    Args:
        setup: settings of the benchmark.
        round_trip_ms: round trip time of the link, in milliseconds.
        drafts: lengths of the constant drafts, in tokens.
        policy: a policy file of `ruyi-flow calibrate`, which adaptive drafts need. Default: no adaptive drafts.
        report: called with the progress.

    Raises:
        ConfigError: the family has only one exit, or the policy file is not valid.
    """
    checkpoint = Checkpoint(store.locate(setup.family))
    exits, prompts = checkpoint.config.exits, tokenize_prompts(checkpoint, PROMPTS)
    if len(exits) < 2:
        raise ConfigError(f"family {setup.family!r} has exits {list(exits)}; two nodes need two exits")
    cuts = [[*exits[: len(exits) // 2]], [*exits[len(exits) // 2 :]]]
    variants: dict[str, dict[str, Any]] = {f"draft_{n}": {"draft": n} for n in (0, *drafts)}
    if policy is not None:
        PolicyFile.load(policy)  # reports errors before the nodes start
        variants["adaptive"] = {"draft": _LONGEST_DRAFT, "policy": policy}
    relay = Relay(delay_s=round_trip_ms / 2000)
    times: dict[str, list[float]] = {name: [] for name in variants}
    drafted, accepted = dict.fromkeys(variants, 0), dict.fromkeys(variants, 0)
    report("starting nodes", 0, 0)
    async with running_nodes(cuts, **setup.node_options, relay_to={1: relay}) as client:
        for name, is_measured in interleaved([*variants], setup.rounds, report):
            stats = [(await generate_exactly(client, ids, setup.tokens, **variants[name])).stats for ids in prompts]
            if is_measured:
                times[name].append(statistics.mean(one.token_s for one in stats))
                drafted[name] += sum(one.drafted for one in stats)
                accepted[name] += sum(one.accepted for one in stats)
    results = _ms_per_token(times)
    for name in variants:
        if name != "draft_0":
            results[name] |= ratios("speedup", times["draft_0"], times[name])
            results[name]["held"] = accepted[name] / max(1, drafted[name])
    more = {"cuts": cuts, "round_trip_ms": round_trip_ms, "policy": policy and str(policy)}
    return _measurement("wan", setup, more, results=results, times=times)


def _ms_per_token(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {name: {"ms_per_token": 1e3 * statistics.median(seconds)} for name, seconds in times.items()}


def _measurement(
    bench: str,
    setup: Setup,
    more: Mapping[str, Any],
    *,
    results: dict[str, dict[str, float]],
    times: Mapping[str, Sequence[float]],
) -> Measurement:
    samples = {name: [1e3 * s for s in seconds] for name, seconds in times.items()}
    return Measurement(bench, asdict(setup) | dict(more), results, {"ms per token": samples})


@contextmanager
def _pinned_to(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep this process on some cores while the block lasts; None changes nothing."""
    if cores is None:
        yield
        return
    process, before = psutil.Process(), available_cores()
    process.cpu_affinity(list(cores))
    try:
        yield
    finally:
        process.cpu_affinity(before)
