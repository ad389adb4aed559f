"""Benchmarks of routing: the cost of a decision, whether bounds hold, the gains of probes, cascades and drafts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ruyi_flow.bench.nodes import PROMPTS, running_nodes
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
    """Microseconds of the policy for one token at one exit: calibration curve, verdict and walk."""
    file, found, n = PolicyFile.load(POLICY), dict[str, Any](), 20_000
    scale = Routing().updated(file.options({})).scale
    assert scale is not None
    exits = (*file.thresholds, 29)
    curve, first = scale.curves[exits[0]], exits[0]
    scores = np.random.default_rng(0).random(n).tolist()
    for name, routing in (
        ("token", Routing().updated(file.options({}))),
        ("cascade", Routing(Mode.CASCADE, threshold=0.2, window=16)),
    ):
        policy, times = Policy.resolve(routing, exits), []
        for _ in range(rounds):
            judge = Judge(policy, first)
            began = time.perf_counter()
            for position, score in enumerate(scores):
                Walk.of(judge, Block(position, torch.empty(0), (0,), (position,)), ((7, curve(score)),))
            times.append((time.perf_counter() - began) / n)
        found[f"{name}_us_a_token"] = 1e6 * statistics.median(times)
    return found | {"goal": "<= 20"}


def bench_bound(rounds: int, traces: Sequence[Path]) -> dict[str, Any]:
    """Bounds over 40 random splits: how often they hold and how much of them is used; calibration errors; probes.

    Three quarters of the prompts choose the thresholds, nine tenths for the bound of 0.02, which needs more prompts.
    """
    trace = _trace(traces, Scorer.AGREEMENT)
    costs = {p: float(p + 1) for p in trace.header.exits}
    scores = [Score(name) for name in trace.header.scores]
    found: dict[str, Any] = {"prompts": len(trace.records), "tokens": len(trace.prompt)}

    def parts(seed: int, share: float) -> list[Trace]:
        order = np.random.default_rng(1000 + seed).permutation(len(trace.records))
        return [trace.select(sorted(part.tolist())) for part in np.split(order, [int(share * len(order))])]

    for bound, share in ((0.02, 0.9), (0.05, 0.75), (0.1, 0.75)):
        kept, used, early, without = 0, [], [], 0
        for seed in range(40):
            known, new = parts(seed, share)
            curves = fit_curves(_tuned(known, seed))
            score = scores[-1]
            confidence = confidences(known, curves, score)
            try:
                replay = Replay(known, confidence, costs)
                chosen = choose_thresholds(replay, max_disagreement=bound, seed=seed).thresholds
            except ConfigError:
                without += 1
                kept += 1
                continue
            o = Replay(new, confidences(new, curves, score), costs).outcome(chosen)
            kept += o.disagreement <= bound
            used.append(o.disagreement / bound)
            early.append(1 - o.decided[trace.header.exits[-1]])
        name = f"bound_{bound:g}"
        found |= {f"{name}_kept_in_40": kept, f"{name}_no_policy": without}
        if used:
            found |= {f"{name}_mean_used": statistics.mean(used), f"{name}_decided_early": statistics.mean(early)}
    errors: dict[str, list[float]] = {}
    fewer: dict[str, list[float]] = {}
    for known, new in (parts(seed, 0.75) for seed in range(10)):
        curves, raw = fit_curves(known), raw_confidences(new)
        uncalibrated = Replay(new, raw, costs)
        shared = [(t, uncalibrated.outcome(dict.fromkeys(raw, t))) for t in np.linspace(0.2, 0.999, 120)]
        for score in scores:
            confidence = confidences(new, curves, score)
            for p, agrees in new.agrees.items():
                errors.setdefault(f"ece_{score}_exit_{p}", []).append(ece(confidence[p], agrees))
                errors.setdefault(f"auc_{score}_exit_{p}", []).append(_auc(confidence[p], agrees))
            for device in (trace.header.exits[1], trace.header.exits[-2]):
                for level in (0.8, 0.85, 0.9, 0.95):
                    base = min(_escalated(o, device) for _, o in shared if o.agreement >= level)
                    mine = _fewest_escalated(
                        known, confidences(known, curves, score), new, confidence, device=device, level=level
                    )
                    key = f"{score}_asks_beyond_{device}_at_{level:g}"
                    fewer.setdefault(key, []).append(1 - mine / base)
    found |= {name: statistics.mean(values) for name, values in errors.items()}
    return found | {f"fewer_{name}": statistics.mean(values) for name, values in fewer.items()}


def bench_cascade(rounds: int, traces: Sequence[Path]) -> dict[str, Any]:
    """Quality and compute of cascades relative to the last exit, on prompts that were not used for calibration."""
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
    """Adaptive drafts against constant ones in mode exact, with round trips of 20, 50 and 100 ms."""
    found: dict[str, Any] = {}
    for round_trip_ms in (20, 50, 100):
        relay = Relay(delay_s=round_trip_ms / 2000)
        times: dict[str, list[float]] = {}
        answers: dict[str, set[tuple[int, ...]]] = {prompt: set() for prompt in PROMPTS}
        # In float32 drafts never change an answer; in bfloat16 a near tie may be decided differently.
        async with running_nodes(
            [[5, 11], [17, 23, 29]], dtype="float32", encoding="f32", relay_to={1: relay}
        ) as client:
            for i in range(max(2, rounds)):
                for name in ("0", "1", "2", "4", "8", "adaptive"):
                    seconds = [await _seconds_per_token(client, name, prompt, answers) for prompt in PROMPTS]
                    if i:
                        times.setdefault(name, []).append(statistics.mean(seconds))
        assert all(len(different) == 1 for different in answers.values()), "drafts changed an answer"
        for name, seconds in times.items():
            found[f"{round_trip_ms}_ms_draft_{name}_ms_per_token"] = 1e3 * statistics.median(seconds)
        best = min((statistics.median(t), name) for name, t in times.items() if name != "adaptive")[1]
        ratios = [a / b for a, b in zip(times[best], times["adaptive"], strict=True)]
        found[f"{round_trip_ms}_ms_adaptive_against_best_constant_{best}"] = statistics.median(ratios)
    return found | {"goal": ">= 1 at each round trip"}


async def _seconds_per_token(
    client: AsyncClient, name: str, prompt: str, answers: dict[str, set[tuple[int, ...]]]
) -> float:
    options: dict[str, Any] = {"mode": "exact", "draft": 16, "policy": POLICY}
    if name != "adaptive":
        options = {"mode": "exact", "draft": int(name)}
    reply = await client.generate(prompt, max_new_tokens=48, min_new_tokens=48, timeout_s=300, **options)
    answers[prompt].add(tuple(reply.token_ids))
    return reply.stats.token_s


def _trace(traces: Sequence[Path], scorer: Scorer) -> Trace:
    fitting = [file for file in traces if Trace.load(file).header.scorer == scorer]
    if not fitting:
        raise ConfigError(f"this benchmark needs --trace FILE, a trace with scorer {scorer} (ruyi-flow trace)")
    return Trace.load(*fitting)


def _auc(confidence: Floats, agrees: Any) -> float:
    """Area under the ROC curve: how often a token that agrees has the higher confidence of two."""
    values, ranks = np.unique(confidence, return_inverse=True)
    counts = np.bincount(ranks)
    middle = np.cumsum(counts) - (counts - 1) / 2
    yes = int(agrees.sum())
    return float((middle[ranks][agrees].sum() - yes * (yes + 1) / 2) / (yes * (len(agrees) - yes)))


def _tuned(trace: Trace, seed: int) -> Trace:
    """The prompts that `choose_thresholds` tunes on."""
    return trace.select(split_prompts(len(trace.records), seed)[0])


def _escalated(o: Any, device: int) -> float:
    """Share of tokens that escalate beyond the device's last exit."""
    return float(sum(share for p, share in o.decided.items() if p > device))


def _fewest_escalated(
    known: Trace,
    known_confidence: dict[int, Floats],
    new: Trace,
    new_confidence: dict[int, Floats],
    *,
    device: int,
    level: float,
) -> float:
    """Smallest share of tokens that escalate beyond a device at this agreement, with thresholds from other prompts."""
    costs = {p: 1.0 if p > device else 0.001 * p for p in known.header.exits}
    replay = Replay(new, new_confidence, costs)
    tried = [replay.outcome(thresholds) for thresholds in Replay(known, known_confidence, costs).candidates()]
    return min((_escalated(o, device) for o in tried if o.agreement >= level), default=1.0)
