"""Benches of a family that is cut: what a hop costs on this machine, and what drafts are worth on a slow link."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ruyi_flow.bench.engines import ours
from ruyi_flow.bench.in_process import per_token
from ruyi_flow.bench.nodes import PROMPT, PROMPTS, ask, daemons, prompts
from ruyi_flow.bench.report import Measured, Report, Setup, ratio, settings, turns, unseen
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.local import load_family
from ruyi_flow.testing import Relay
from ruyi_flow.types import Token

__all__ = ["exits", "hop", "wan"]

_WARM_TOKENS = 16
_TEXTS = ("Why is the {0} blue?", "Write two sentences about the {0}.", "List three facts about the {0}.")
_LONGEST_DRAFT = 16
"""Of adaptive drafts, which end where they do not pay."""


async def hop(setup: Setup, *, report: Report = unseen) -> Measured:
    """Three node processes, last exit, one token a round trip, against the same stages in one process and in one node.

    All of them stay on the same cores, as many as threads, so that what is compared has the same neighbours and clock.
    `three_free` is three nodes that run where the kernel puts them.

    Raises:
        ConfigError: a family with fewer than three exits.
    """
    family = load_family(setup.family, dtype=setup.dtype, weights=setup.weights)
    if len(family.exits) < 3:
        raise ConfigError(f"family {setup.family!r} has exits {list(family.exits)}; three nodes need three")
    ids, engine = prompts(family.checkpoint, [PROMPT])[0], ours(family)
    torch.set_num_threads(setup.threads)
    cores = _cores()[: setup.threads] or None
    cuts = [part.tolist() for part in np.array_split(family.exits, 3)]
    nodes: dict[str, Any] = {
        "family": setup.family,
        "dtype": setup.dtype,
        "weights": setup.weights,
        "threads": setup.threads,
    }
    spent: dict[str, list[float]] = {"process": [], "node": [], "three": [], "three_free": []}
    parts: dict[str, list[float]] = {"compute": [], "queue": [], "wire": []}
    report("starting nodes", 0, 1)
    async with (
        daemons(cuts, cores=cores, **nodes) as three,
        daemons([family.exits], cores=cores, **nodes) as one,
        daemons(cuts, **nodes) as free,
    ):
        report("starting nodes", 1, 1)
        clients = {"three": three, "node": one, "three_free": free}
        for name, counts in turns([*spent], setup.rounds, report):
            # The others' turns have pushed this one's code out of the caches.
            if name == "process":
                with _staying_on(cores):
                    per_token(engine, ids, _WARM_TOKENS)
                    took = per_token(engine, ids, setup.tokens)
            else:
                await ask(clients[name], ids, _WARM_TOKENS)
                stats = (await ask(clients[name], ids, setup.tokens)).stats
                took = stats.token_s
                for part in parts if counts and name == "three" else ():
                    parts[part].append(sum(getattr(h, f"{part}_s") for h in stats.hops) / setup.tokens)
            if counts:
                spent[name].append(took)
    results = {name: {"ms_per_token": 1e3 * statistics.median(times)} for name, times in spent.items()}
    for name, base in (("three", "process"), ("three", "node"), ("three_free", "process")):
        extra = [(a - b) / 2 for a, b in zip(spent[name], spent[base], strict=True)]
        results[name][f"beyond_{base}_ms_per_hop"] = 1e3 * statistics.median(extra)
    results["three"] |= {f"{part}_ms_per_token": 1e3 * statistics.median(values) for part, values in parts.items()}
    samples = {"ms a token": {name: [1e3 * t for t in times] for name, times in spent.items()}}
    return Measured("hop", settings(setup, cuts=cuts, cores=cores), results, samples)


async def exits(setup: Setup, *, policy: Path, report: Report = unseen) -> Measured:
    """Mode token at a policy, three node processes on loopback, against the whole family's last exit in one process.

    Every process may use all threads, so all of the work is counted on the same cores. `compute` is the share of the
    whole family's operations that answers took, by the exits that decided: catch-up, drafts and branches included.

    Raises:
        ConfigError: a family with fewer than three exits, or a file that is no policy.
    """
    PolicyFile.load(policy)
    family = load_family(setup.family, dtype=setup.dtype, weights=setup.weights)
    config = family.config
    if len(family.exits) < 3:
        raise ConfigError(f"family {setup.family!r} has exits {list(family.exits)}; three nodes need three")
    texts = [text.format(thing) for text in _TEXTS for thing in ("sky", "sea")]
    asked, engine = prompts(family.checkpoint, texts), ours(family)
    torch.set_num_threads(setup.threads)
    cuts = [part.tolist() for part in np.array_split(family.exits, 3)]
    spent: dict[str, list[float]] = {"process": [], "three": []}
    decided = dict.fromkeys(family.exits, 0)
    computed = 0.0
    report("starting nodes", 0, 1)
    async with daemons(
        cuts, family=setup.family, dtype=setup.dtype, weights=setup.weights, threads=setup.threads
    ) as client:
        report("starting nodes", 1, 1)
        for name, counts in turns([*spent], setup.rounds, report):
            took = 0.0
            for ids in asked:
                if name == "process":
                    took += per_token(engine, ids, setup.tokens)
                    continue
                reply = await ask(client, ids, setup.tokens, mode="token", draft=0, policy=policy)
                took += reply.stats.token_s
                if counts:
                    for token in reply.tokens:
                        decided[token.exit] += 1
                    computed += _computed(config, reply.tokens)
            if counts:
                spent[name].append(took / len(asked))
    tokens = sum(decided.values())
    whole = tokens * (config.num_layers * config.layer_flops(0) + config.head_flops)
    results = {name: {"ms_per_token": 1e3 * statistics.median(times)} for name, times in spent.items()}
    results["three"] |= ratio("speedup", spent["process"], spent["three"])
    results["three"] |= {f"exit_{p}": n / tokens for p, n in decided.items()} | {"compute": computed / whole}
    samples = {"ms a token": {name: [1e3 * t for t in times] for name, times in spent.items()}}
    return Measured("exits", settings(setup, cuts=cuts, policy=str(policy)), results, samples)


def _computed(config: FamilyConfig, tokens: Sequence[Token]) -> float:
    """Operations of an answer after its prompt: layers run for every position up to the last one asked, branches for
    those that are asked."""
    layer, spent = config.layer_flops(0), 0.0
    for (first, exit), depth in zip(config.stages(config.exits), config.branch_layers, strict=True):
        asked = [i for i, token in enumerate(tokens) if token.exit >= exit]
        if asked:
            spent += (asked[-1] + 1) * (exit - first) * layer + len(asked) * (depth * layer + config.head_flops)
    return spent


async def wan(
    setup: Setup,
    *,
    round_trip_ms: float = 50,
    drafts: Sequence[int] = (1, 4),
    policy: Path | None = None,
    report: Report = unseen,
) -> Measured:
    """Two nodes with a slow link between them, mode exact: no drafts, drafts of constant length, adaptive ones.

    Each answers a few prompts, of which the mean counts.

    Args:
        round_trip_ms: of the link.
        policy: a file of `ruyi-flow calibrate`, by which adaptive drafts know where to end; without it there are none.

    Raises:
        ConfigError: a family with one exit, or a file that is no policy.
    """
    checkpoint = Checkpoint(store.locate(setup.family))
    exits, asked = checkpoint.config.exits, prompts(checkpoint, PROMPTS)
    if len(exits) < 2:
        raise ConfigError(f"family {setup.family!r} has exits {list(exits)}; two nodes need two")
    cuts = [[*exits[: len(exits) // 2]], [*exits[len(exits) // 2 :]]]
    kinds: dict[str, dict[str, Any]] = {f"draft_{n}": {"draft": n} for n in (0, *drafts)}
    if policy is not None:
        PolicyFile.load(policy)  # what is wrong with it is told before the nodes start
        kinds["adaptive"] = {"draft": _LONGEST_DRAFT, "policy": policy}
    relay = Relay(delay_s=round_trip_ms / 2000)
    spent: dict[str, list[float]] = {name: [] for name in kinds}
    drafted, held = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    report("starting nodes", 0, 1)
    async with daemons(
        cuts,
        family=setup.family,
        dtype=setup.dtype,
        weights=setup.weights,
        threads=setup.threads,
        relay_to={1: relay},
    ) as client:
        report("starting nodes", 1, 1)
        for name, counts in turns([*kinds], setup.rounds, report):
            made = [(await ask(client, ids, setup.tokens, **kinds[name])).stats for ids in asked]
            if counts:
                spent[name].append(statistics.mean(stats.token_s for stats in made))
                drafted[name] += sum(stats.drafted for stats in made)
                held[name] += sum(stats.accepted for stats in made)
    results = {name: {"ms_per_token": 1e3 * statistics.median(times)} for name, times in spent.items()}
    for name in kinds:
        if name != "draft_0":
            results[name] |= ratio("speedup", spent["draft_0"], spent[name])
            results[name]["held"] = held[name] / max(1, drafted[name])
    samples = {"ms a token": {name: [1e3 * t for t in times] for name, times in spent.items()}}
    more = {"cuts": cuts, "round_trip_ms": round_trip_ms, "policy": policy and str(policy)}
    return Measured("wan", settings(setup, **more), results, samples)


def _cores() -> list[int]:
    """The cores that this process may run on; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def _staying_on(cores: Sequence[int] | None) -> Iterator[None]:
    """Keep this thread on some cores for as long as the block lasts."""
    if cores is None:
        yield
        return
    before = _cores()
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
