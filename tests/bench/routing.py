"""Benches of routing: what a decision costs, whether bounds hold, what probes, cascades and drafts are worth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ruyi_flow.bench.nodes import PROMPTS, daemons
from ruyi_flow.calibration.bounds import split_prompts
from ruyi_flow.calibration.cascade import CascadeOutcome, calibrate_cascade
from ruyi_flow.calibration.curves import Floats, confidences, ece, fit_curves, raw_confidences
from ruyi_flow.calibration.thresholds import Replay, choose_thresholds
from ruyi_flow.calibration.trace import Scorer, Trace
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Judge, Policy, Routing
from ruyi_flow.routing.walk import Walk
from ruyi_flow.testing import Relay
from ruyi_flow.types import Block, Mode

__all__ = ["bench_bound", "bench_cascade", "bench_drafts", "bench_policy"]

POLICY = Path("configs/policies/smollm2-5-percent.yaml")


def bench_policy(rounds: int) -> dict[str, Any]:
    """What the policy takes for one token at one exit: its curve, its judgment, the walk; microseconds."""
    file, found, n = PolicyFile.load(POLICY), dict[str, Any](), 20_000
    scale = Routing().updated(file.options({})).scale
    assert scale is not None
    exits = (*file.thresholds, 29)
    curve, first = scale.curves[exits[0]], exits[0]
    numbers = np.random.default_rng(0).random(n).tolist()
    for name, routing in (
        ("token", Routing().updated(file.options({}))),
        ("cascade", Routing(Mode.CASCADE, threshold=0.2, window=16)),
    ):
        policy, spent = Policy.resolve(routing, exits), []
        for _ in range(rounds):
            judge = Judge(policy, first)
            began = time.perf_counter()
            for position, score in enumerate(numbers):
                Walk.of(judge, Block(position, None, (0,), (position,)), ((7, curve(score)),))
            spent.append((time.perf_counter() - began) / n)
        found[f"{name}_us_a_token"] = 1e6 * statistics.median(spent)
    return found | {"goal": "<= 20"}


def bench_bound(rounds: int, traces: Sequence[Path]) -> dict[str, Any]:
    """40 random splits: does the bound hold, how much of it is used; calibration errors; probes.

    Three prompts in four choose; for the bound of 0.02, which takes more prompts to show, nine in ten.
    """
    trace = _trace(traces, Scorer.AGREEMENT)
    costs = {p: float(p + 1) for p in trace.header.exits}
    scores = [Score(name) for name in trace.header.scores]
    found: dict[str, Any] = {"prompts": len(trace.records), "tokens": len(trace.prompt)}

    def parts(seed: int, share: float) -> list[Trace]:
        order = np.random.default_rng(1000 + seed).permutation(len(trace.records))
        return [trace.select(sorted(part.tolist())) for part in np.split(order, [int(share * len(order))])]

    for bound, share in ((0.02, 0.9), (0.05, 0.75), (0.1, 0.75)):
        held, used, early, without = 0, [], [], 0
        for seed in range(40):
            known, new = parts(seed, share)
            curves = fit_curves(_tuned(known, seed))
            sure, score = confidences(known, curves, scores[-1]), scores[-1]
            try:
                replay = Replay(known, sure, costs)
                chosen = choose_thresholds(replay, max_disagreement=bound, seed=seed).thresholds
            except ConfigError:
                without += 1
                held += 1
                continue
            o = Replay(new, confidences(new, curves, score), costs).outcome(chosen)
            held += o.disagreement <= bound
            used.append(o.disagreement / bound)
            early.append(1 - o.decided[trace.header.exits[-1]])
        name = f"bound_{bound:g}"
        found |= {f"{name}_kept_in_40": held, f"{name}_no_policy": without}
        if used:
            found |= {f"{name}_mean_used": statistics.mean(used), f"{name}_decided_early": statistics.mean(early)}
    errors: dict[str, list[float]] = {}
    fewer: dict[str, list[float]] = {}
    for known, new in (parts(seed, 0.75) for seed in range(10)):
        curves, raw = fit_curves(known), raw_confidences(new)
        uncalibrated = Replay(new, raw, costs)
        shared = [(t, uncalibrated.outcome(dict.fromkeys(raw, t))) for t in np.linspace(0.2, 0.999, 120)]
        for score in scores:
            sure = confidences(new, curves, score)
            for p, agrees in new.agrees.items():
                errors.setdefault(f"ece_{score}_exit_{p}", []).append(ece(sure[p], agrees))
                errors.setdefault(f"auc_{score}_exit_{p}", []).append(_auc(sure[p], agrees))
            for device in (trace.header.exits[1], trace.header.exits[-2]):
                for level in (0.8, 0.85, 0.9, 0.95):
                    base = min(_beyond(o, device) for _, o in shared if o.agreement >= level)
                    mine = _least(known, confidences(known, curves, score), new, sure, device, level)
                    key = f"{score}_asks_beyond_{device}_at_{level:g}"
                    fewer.setdefault(key, []).append(1 - mine / base)
    found |= {name: statistics.mean(values) for name, values in errors.items()}
    return found | {f"fewer_{name}": statistics.mean(values) for name, values in fewer.items()}


def bench_cascade(rounds: int, traces: Sequence[Path]) -> dict[str, Any]:
    """What cascades keep of the last exit's worth, and of its compute, on prompts that did not choose them."""
    found: dict[str, Any] = {}
    for file in traces:
        trace = Trace.load(file)
        name = f"{file.stem}_{trace.header.scorer}"
        for loss in (0.03, 0.05, 0.1, 0.2):
            try:
                made = calibrate_cascade(trace, max_loss=loss)
            except ConfigError as error:
                found[f"{name}_{loss:g}"] = str(error)
                continue
            t = made.tested
            found[f"{name}_{loss:g}"] = f"{t.score:.3f} of {t.last:.3f} at {t.compute:.1%} of the compute"
            if loss == 0.03 or f"{name}_frontier" not in found:
                found[f"{name}_frontier"] = _points(made.frontier)
                found[f"{name}_oracle"] = _points(made.baselines["oracle"])
    return found


def _points(outcomes: Sequence[CascadeOutcome]) -> str:
    return "; ".join(f"{w.score / max(w.last, 1e-9):.3f} at {w.compute:.3f}" for w in outcomes)


async def bench_drafts(rounds: int) -> dict[str, Any]:
    """Mode exact over 20, 50 and 100 ms round trips: drafts that stop where they do not pay, against constant ones."""
    found: dict[str, Any] = {}
    for round_trip_ms in (20, 50, 100):
        relay = Relay(delay_s=round_trip_ms / 2000)
        spent: dict[str, list[float]] = {}
        said: dict[str, set[tuple[int, ...]]] = {prompt: set() for prompt in PROMPTS}
        # In float32, where drafts never change an answer; in bfloat16 a near tie may fall otherwise.
        async with daemons([[5, 11], [17, 23, 29]], dtype="float32", encoding="f32", relay_to={1: relay}) as client:
            for i in range(max(2, rounds)):
                for name in ("0", "1", "2", "4", "8", "adaptive"):
                    times = [await _drafted(client, name, prompt, said) for prompt in PROMPTS]
                    if i:
                        spent.setdefault(name, []).append(statistics.mean(times))
        assert all(len(answers) == 1 for answers in said.values()), "drafts changed an answer"
        for name, times in spent.items():
            found[f"{round_trip_ms}_ms_draft_{name}_ms_per_token"] = 1e3 * statistics.median(times)
        best = min((statistics.median(t), name) for name, t in spent.items() if name != "adaptive")[1]
        ratios = [a / b for a, b in zip(spent[best], spent["adaptive"], strict=True)]
        found[f"{round_trip_ms}_ms_adaptive_against_best_constant_{best}"] = statistics.median(ratios)
    return found | {"goal": ">= 1 at each round trip"}


async def _drafted(client: AsyncClient, name: str, prompt: str, said: dict[str, set[tuple[int, ...]]]) -> float:
    options: dict[str, Any] = {"mode": "exact", "draft": 16, "policy": POLICY}
    if name != "adaptive":
        options = {"mode": "exact", "draft": int(name)}
    reply = await client.generate(prompt, max_new_tokens=48, min_new_tokens=48, timeout_s=300, **options)
    said[prompt].add(tuple(reply.token_ids))
    return reply.stats.token_s


def _trace(traces: Sequence[Path], scorer: Scorer) -> Trace:
    fitting = [file for file in traces if Trace.load(file).header.scorer == scorer]
    if not fitting:
        raise ConfigError(f"this bench needs --trace FILE with scorer {scorer} (ruyi-flow trace)")
    return Trace.load(*fitting)


def _auc(sure: Floats, agrees: Any) -> float:
    """Area under the ROC curve, of the raw order: how often a token that agrees is surer than one that does not."""
    values, ranks = np.unique(sure, return_inverse=True)
    counts = np.bincount(ranks)
    middle = np.cumsum(counts) - (counts - 1) / 2
    yes = int(agrees.sum())
    return float((middle[ranks][agrees].sum() - yes * (yes + 1) / 2) / (yes * (len(agrees) - yes)))


def _tuned(trace: Trace, seed: int) -> Trace:
    """The prompts that `choose_thresholds` tunes on."""
    return trace.select(split_prompts(len(trace.records), seed)[0])


def _beyond(o: Any, device: int) -> float:
    """Share of tokens that are asked beyond an exit."""
    return float(sum(share for p, share in o.decided.items() if p > device))


def _least(
    known: Trace, inside: dict[int, Floats], new: Trace, sure: dict[int, Floats], device: int, level: float
) -> float:
    """The least that calibrated thresholds ask beyond a device's exits at this agreement; chosen on other prompts."""
    costs = {p: 1.0 if p > device else 0.001 * p for p in known.header.exits}
    replay = Replay(new, sure, costs)
    tried = [replay.outcome(thresholds) for thresholds in Replay(known, inside, costs).candidates()]
    return min((_beyond(o, device) for o in tried if o.agreement >= level), default=1.0)
