"""Calibration of mode `token`: thresholds from a trace, with a bound on disagreement or within a budget.

`bounds.py` has the test. It goes prompt by prompt, since tokens of one answer are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration.bounds import Sample, check_fractions, choose_boldest, split_prompts
from ruyi_flow.calibration.budget import Budget, Deployment, DeploymentCost, bytes_on_link, deployment_cost
from ruyi_flow.calibration.curves import Bools, Floats, calibration_errors, confidences, fit_curves, raw_confidences
from ruyi_flow.calibration.trace import Scorer, Trace
from ruyi_flow.config.policy_file import PolicyFile, curve_points
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.types import Encoding

__all__ = ["UNREACHABLE", "Outcome", "Point", "Replay", "TokenCalibration", "calibrate_token", "choose_thresholds"]

UNREACHABLE = 1.1
"""A threshold that no confidence reaches, as policy files contain it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of thresholds along a trace."""

    decided: dict[int, float]
    """Share of the tokens that each exit decides, the last one included."""
    disagreement: float
    """Share of the tokens decided early that differ from the last exit's."""
    agreement: float
    """Share of all tokens that equal the last exit's."""
    cost: float
    """Mean over the tokens of the cost of the exits that decide them."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace that thresholds can decide again: the shallowest exit whose confidence reaches its threshold decides."""

    trace: Trace
    confidence: Mapping[int, Floats]
    """(N,) confidence of each early exit in its tokens."""
    costs: Mapping[int, float]
    """Cost of deciding a token at each exit, the last one included; any unit."""

    def select(self, prompts: Sequence[int]) -> Replay:
        """Return the replay of some prompts, given by ascending numbers."""
        chosen = np.isin(self.trace.prompt, prompts)
        confidence = {p: values[chosen] for p, values in self.confidence.items()}
        return Replay(self.trace.select(prompts), confidence, self.costs)

    def decide(self, thresholds: Mapping[int, float]) -> tuple[NDArray[np.int64], Bools, Bools]:
        """Return (N,) the exit that decides each token, whether it is early, and whether it then differs."""
        n = len(self.trace.prompt)
        early, wrong = np.zeros(n, bool), np.zeros(n, bool)
        exits = np.full(n, self.trace.header.exits[-1])
        for p, agrees in self.trace.agrees.items():
            decides = (self.confidence[p] >= thresholds[p]) & ~early
            wrong |= decides & ~agrees
            early |= decides
            exits[decides] = p
        return exits, early, wrong

    def outcome(self, thresholds: Mapping[int, float]) -> Outcome:
        """Decide every token and summarise the result."""
        exits, early, wrong = self.decide(thresholds)
        n, differing = len(exits), float(wrong.sum())
        decided = {p: float((exits == p).sum()) / n for p in self.trace.header.exits}
        cost = sum(share * self.costs[p] for p, share in decided.items())
        return Outcome(decided, differing / max(1, int(early.sum())), 1.0 - differing / n, cost)

    def cost(self, thresholds: Mapping[int, float], deployment: Deployment) -> DeploymentCost:
        """Decide every token and compute what that costs in a deployment."""
        return deployment_cost(self.decide(thresholds)[0], self.trace, deployment)

    def bound_sample(self, thresholds: Mapping[int, float], bound: float) -> Sample:
        """Return one number for each prompt, whose mean shows whether disagreement stays within its bound.

        Disagreement is sum(differing) / sum(decided early) over all prompts there are. It is at most the bound where
        the mean of `differing - bound * early` is at most 0; that is scaled by the longest possible answer.
        """
        longest = self.trace.header.max_new_tokens
        _, prompt = np.unique(self.trace.prompt, return_inverse=True)
        early, wrong = (np.bincount(prompt, weights=found) / longest for found in self.decide(thresholds)[1:])
        return Sample(wrong - bound * (early - 1), bound)

    def candidates(self, prices: int = 240) -> list[dict[int, float]]:
        """Find thresholds from cautious to bold: the cheapest ones at each of many prices of a differing token.

        Each price takes a coordinate descent, which is exact for one exit's threshold when the others are given.
        """
        exits, last = list(self.trace.agrees), self.trace.header.exits[-1]
        n, confidence = len(self.trace.prompt), self.confidence
        order = {p: np.argsort(-confidence[p], kind="stable") for p in exits}
        found: dict[tuple[float, ...], float] = {}
        thresholds = dict.fromkeys(exits, UNREACHABLE)
        for price in np.geomspace(3e3, 0.3, prices) * max(self.costs.values()):
            losses = {p: self.costs[p] + price * ~self.trace.agrees[p] for p in exits}
            for _ in range(4):
                before = dict(thresholds)
                later = {exits[-1]: np.full(n, self.costs[last])}
                for p, q in zip(exits[-2::-1], exits[:0:-1], strict=True):
                    later[p] = np.where(confidence[q] >= thresholds[q], losses[q], later[q])
                reached = np.ones(n, bool)
                for p in exits:
                    gain = np.where(reached, later[p] - losses[p], 0.0)
                    thresholds[p] = _best_threshold(confidence[p][order[p]], gain[order[p]])
                    reached &= confidence[p] < thresholds[p]
                if thresholds == before:
                    break
            _, early, wrong = self.decide(thresholds)
            if early.any():
                found[tuple(thresholds.values())] = float(wrong.sum()) / float(early.sum())
        return [dict(zip(exits, values, strict=True)) for values in sorted(found, key=found.__getitem__)]


def _best_threshold(confidence: Floats, gain: Floats) -> float:
    """Find the threshold above which the gain is largest, in falling order of confidence; equal ones stay together."""
    total = np.cumsum(gain)
    ends = np.append(confidence[1:] < confidence[:-1], True)
    total[~ends] = -np.inf
    best = int(np.argmax(total))
    return float(confidence[best]) if total[best] > 0 else UNREACHABLE


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen thresholds and their outcomes."""

    thresholds: dict[int, float]
    """Threshold of every early exit on its calibrated confidence; above 1 it never decides."""
    expected: Outcome
    """Outcome on all prompts of the trace."""
    tested: Outcome
    """Outcome on the prompts that tested the thresholds."""
    prompts: int
    """Number of prompts in the test."""


def choose_thresholds(
    replay: Replay,
    *,
    max_disagreement: float | None,
    confidence_level: float = 0.95,
    candidates: Sequence[Mapping[int, float]] | None = None,
    seed: int = 0,
) -> Choice:
    """Choose the boldest thresholds that keep a bound on new prompts.

    Args:
        replay: prompts of the expected kind. For the confidences to be honest, their curves must not be fitted on the
            prompts that test; the bound holds whatever the confidences are.
        max_disagreement: most tokens decided early that may differ from the last exit's, as a share of all tokens
            decided early. None chooses the candidate that agrees most, without a test.
        confidence_level: probability, over the draw of the prompts, with which the bound holds.
        candidates: thresholds from cautious to bold. Default: made from the prompts that choose.
        seed: seed of the split into prompts that choose and prompts that test.

    Raises:
        ConfigError: a number is out of range, or there are too few prompts; the message estimates how many more.
    """
    check_fractions({"the bound on disagreement": max_disagreement, "the confidence level": confidence_level})
    count = len(replay.trace.records)
    tune, test = (replay.select(part) for part in split_prompts(count, seed))
    candidates = candidates or tune.candidates()
    if max_disagreement is None:
        best = max(candidates, key=lambda thresholds: tune.outcome(thresholds).agreement)
    else:
        chosen = choose_boldest(
            [tune.bound_sample(thresholds, max_disagreement) for thresholds in candidates],
            lambda i: test.bound_sample(candidates[i], max_disagreement),
            failure=f"{count} prompts cannot show a disagreement of at most {max_disagreement:g}",
            confidence_level=confidence_level,
            seed=seed,
        )
        best = candidates[chosen]
    return Choice(dict(best), replay.outcome(best), test.outcome(best), len(test.trace.records))


@dataclass(frozen=True, slots=True)
class Point:
    """One setting between always deciding at the first exit and always at the last one."""

    policy: str
    """Kind of decision: "calibrated", "uncalibrated", "random" or "always"."""
    setting: str
    """Thresholds, share or exit of this point."""
    outcome: Outcome
    cost: DeploymentCost


@dataclass(frozen=True, slots=True)
class TokenCalibration:
    """A policy for mode `token`, with what is known of it."""

    policy: PolicyFile
    choice: Choice
    errors: dict[int, tuple[float, float]]
    """Expected calibration error of each early exit's own probability and of its calibrated score, on the prompts that
    the curves have not seen."""
    unseen: tuple[Trace, dict[int, Floats]]
    """The prompts that the curves have not seen, and the early exits' calibrated confidences there."""
    frontier: list[Point]
    cost: DeploymentCost
    """Cost of the policy on these prompts."""


def calibrate_token(
    trace: Trace,
    *,
    max_disagreement: float | None,
    confidence_level: float = 0.95,
    scores: Sequence[Score] | None = None,
    budget: Budget | None = None,
    deployment: Deployment | None = None,
    seed: int = 0,
) -> TokenCalibration:
    """Calibrate a policy for mode `token`.

    The prompts that choose thresholds also fit the curves and choose the score; only the winner is tested.

    Args:
        trace: prompts of the expected kind.
        max_disagreement, confidence_level: see `choose_thresholds`.
        scores: scores to choose from. Default: all of the trace's.
        budget: what the thresholds may cost on the prompts that choose them. Default: no limit.
        deployment: where the family is cut. Default: the first node has the first exit, a second one all others.
        seed: seed of the split into prompts that choose and prompts that test.

    Raises:
        ConfigError: see `choose_thresholds`; or no thresholds stay within the budget; or the trace compares options.
    """
    if trace.header.scorer == Scorer.CHOICE:
        raise ConfigError("the trace compares options (scorer choice), not tokens; calibrate mode cascade with it")
    if max_disagreement is None and (budget is None or budget == Budget()):
        raise ConfigError("neither a bound on disagreement nor a budget is given; give one of them")
    header, count = trace.header, len(trace.records)
    deployment = deployment or Deployment(
        (header.exits[0], header.exits[-1]), (bytes_on_link(header.boundary_bytes[Encoding.BF16]),)
    )
    tune, test = (trace.select(part) for part in split_prompts(count, seed))
    fitted = fit_curves(tune)
    costs = {p: float(p + 1) for p in header.exits}  # layers of the trunk, and about one of the branch

    def replay_of(prompts: Trace, score: Score) -> Replay:
        return Replay(prompts, confidences(prompts, fitted, score), costs)

    def affordable(replay: Replay, prices: int) -> list[dict[int, float]]:
        found = replay.candidates(prices)
        if budget is None:
            return found
        found.append(dict.fromkeys(header.exits[:-1], 0.0))
        return [thresholds for thresholds in found if budget.allows(replay.cost(thresholds, deployment))]

    def rank(score: Score) -> float:
        """Return the cost of a score's best thresholds, or without a bound their disagreement."""
        replay = replay_of(tune, score)
        outcomes = [replay.outcome(thresholds) for thresholds in affordable(replay, 60)]
        if max_disagreement is None:
            return min((1 - o.agreement for o in outcomes), default=math.inf)
        return min((o.cost for o in outcomes if o.disagreement <= max_disagreement), default=math.inf)

    score = min(scores or [Score(name) for name in header.scores], key=rank)
    candidates = affordable(replay_of(tune, score), 240)
    if not candidates:
        raise ConfigError("no thresholds stay within the budget, not even the first exit alone; raise the budget")
    replay, unseen = replay_of(trace, score), replay_of(test, score)
    choice = choose_thresholds(
        replay, max_disagreement=max_disagreement, confidence_level=confidence_level, candidates=candidates, seed=seed
    )
    policy = PolicyFile(
        family=header.family,
        score=score,
        thresholds=choice.thresholds,
        curves=curve_points(fitted.curves[score]),
        promise={
            "max_disagreement": max_disagreement,
            "confidence_level": confidence_level if max_disagreement is not None else None,
            "budget": asdict(budget) if budget is not None else None,
            "prompts": count,
            "tested_on": choice.prompts,
            "disagreement": round(choice.tested.disagreement, 4),
            "decided_early": round(1 - choice.expected.decided[header.exits[-1]], 4),
            "dtype": header.dtype,
            "max_new_tokens": header.max_new_tokens,
        },
    )
    return TokenCalibration(
        policy,
        choice,
        calibration_errors(test, unseen.confidence),
        (test, dict(unseen.confidence)),
        _frontier(replay_of(tune, score), unseen, deployment, seed),
        unseen.cost(choice.thresholds, deployment),
    )


def _frontier(tune: Replay, test: Replay, deployment: Deployment, seed: int) -> list[Point]:
    """Compare what agreement costs with calibrated thresholds and without, on the prompts that test.

    The baselines are one threshold for all exits on the branches' own probability, a random exit for each token, and
    always the same exit.
    """
    exits, last, n = list(test.trace.agrees), test.trace.header.exits[-1], len(test.trace.prompt)
    points: list[Point] = []

    def add(policy: str, setting: str, thresholds: Mapping[int, float], confidence: Mapping[int, Floats]) -> None:
        tried = Replay(test.trace, confidence, test.costs)
        points.append(Point(policy, setting, tried.outcome(thresholds), tried.cost(thresholds, deployment)))

    for thresholds in tune.candidates(60):
        setting = " ".join(f"{p}={t:.3f}" for p, t in thresholds.items())
        add("calibrated", setting, thresholds, test.confidence)
    raw = raw_confidences(test.trace)
    for t in np.linspace(0.3, 1.0, 71).tolist():
        add("uncalibrated", f"{t:.2f}", dict.fromkeys(exits, t), raw)
    noise = np.random.default_rng(seed).random(n)
    for share in np.linspace(0, 1, 21).tolist():
        first = {exits[0]: np.where(noise < share, 1.0, 0.0)}
        add("random", f"{share:.2f}", dict.fromkeys(exits, 0.5), dict.fromkeys(exits, np.zeros(n)) | first)
    for p in exits:
        always = {q: np.full(n, float(q == p)) for q in exits}
        add("always", str(p), dict.fromkeys(exits, 0.5), always)
    add("always", str(last), dict.fromkeys(exits, UNREACHABLE), test.confidence)
    return points
