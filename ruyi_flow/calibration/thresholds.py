"""From traces to confidences that mean something, and to thresholds that keep a bound on new prompts.

The bound is Learn then Test's (Angelopoulos, Bates, Candès, Jordan and Lei 2021): thresholds are put in an order, from
timid to bold, on some of the prompts (as in Pareto Testing, Laufer-Goldshtein et al. 2023), and tested in that
order on the others until a test fails. A test bets on a mean being below its bound (Waudby-Smith and Ramdas 2024),
prompt by prompt, since tokens of one answer hang together; how much it bets is learned on the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration.bounds import best_bet, check_shares, grown, lacking, split
from ruyi_flow.calibration.budget import Budget, Deployment, Spent, frame, spent
from ruyi_flow.calibration.curves import Bools, Floats, confidences, ece, fit, raw_confidences
from ruyi_flow.calibration.trace import Scorer, Trace
from ruyi_flow.config.policy_file import PolicyFile, curve_points
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.types import Encoding

__all__ = ["Calibrated", "Choice", "Outcome", "Point", "calibrate", "choose", "frontier", "outcome", "path"]

_NEVER = 1.1
"""A threshold that no confidence reaches."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What thresholds would have done along a trace."""

    decided: dict[int, float]
    """Share of the tokens that each exit decides, the last one included."""
    disagreement: float
    """Share of the tokens decided early that are not the last exit's."""
    agreement: float
    """Share of all tokens that are the last exit's."""
    cost: float
    """Mean over tokens of what deciding at an exit costs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Thresholds, and what is known of them."""

    thresholds: dict[int, float]
    """Of every early exit, on calibrated confidence; above 1 is never."""
    expected: Outcome
    """On all prompts of the trace."""
    tested: Outcome
    """On those that the bound was tested on."""
    prompts: int
    """In the test."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A policy, and how it came about."""

    policy: PolicyFile
    choice: Choice
    errors: dict[int, tuple[float, float]]
    """By early exit: the expected calibration error of the branch's own probability, and of the calibrated score, on
    prompts that the curves have not seen."""
    unseen: tuple[Trace, dict[int, Floats]]
    """Those prompts, and by early exit what the curves say of them."""
    frontier: list[Point]
    spent: Spent
    """What the policy costs on those prompts."""


def calibrate(
    trace: Trace,
    *,
    max_disagreement: float | None,
    sureness: float = 0.95,
    scores: Sequence[Score] | None = None,
    budget: Budget | None = None,
    deployment: Deployment | None = None,
    seed: int = 0,
) -> Calibrated:
    """A policy for mode `token` from a trace.

    The curves are fitted on the prompts that the thresholds are tuned on. Several scores are a search on these too; the
    winner alone is tested.

    Args:
        trace: prompts of the kind that is to come.
        max_disagreement, sureness: see `choose`; without a bound, the thresholds that agree most within the budget.
        scores: to choose from; all of the trace's when left out.
        budget: what the thresholds may cost on the prompts that choose them.
        deployment: where; left out, a first node with the first exit and one with all others.
        seed: of the split.

    Raises:
        ConfigError: see `choose`; or no thresholds stay within the budget; or a trace of options.
    """
    if trace.header.scorer == Scorer.CHOICE:
        raise ConfigError("the trace compares options (scorer choice), not tokens; mode cascade can be judged by it")
    if max_disagreement is None and (budget is None or budget == Budget()):
        raise ConfigError("there is neither a bound on disagreement nor a budget to calibrate for")
    if max_disagreement is not None:
        check_shares({"the bound on disagreement": max_disagreement, "the sureness": sureness})
    header, count = trace.header, len(trace.records)
    deployment = deployment or Deployment(
        (header.exits[0], header.exits[-1]), (frame(header.boundary_bytes[Encoding.BF16]),)
    )
    tune, test = (trace.of_prompts(part) for part in split(count, seed))
    fitted = fit(tune)
    costs = {p: float(p + 1) for p in header.exits}  # trunk layers and a branch

    def affordable(inside: Mapping[int, Floats], prices: int) -> list[dict[int, float]]:
        found = path(tune, inside, costs, prices=prices)
        if budget is None:
            return found
        always = [dict.fromkeys(header.exits[:-1], 0.0)]
        return [t for t in found + always if budget.keeps(spent(_walk(t, inside, tune)[2], tune, deployment))]

    def rank(score: Score) -> float:
        """What a score's best thresholds cost; without a bound, how much they disagree."""
        inside = confidences(tune, fitted, score)
        tried = [outcome(thresholds, inside, tune, costs) for thresholds in affordable(inside, 60)]
        if max_disagreement is None:
            return min((1 - o.agreement for o in tried), default=math.inf)
        return min((o.cost for o in tried if o.disagreement <= max_disagreement), default=math.inf)

    score = min(scores or [Score(name) for name in header.scores], key=rank)
    inside, confidence = confidences(tune, fitted, score), confidences(trace, fitted, score)
    choices = affordable(inside, 240)
    if not choices:
        raise ConfigError("no thresholds stay within the budget, not even the shallowest exit alone; allow more")
    if max_disagreement is None:
        best = max(choices, key=lambda thresholds: outcome(thresholds, inside, tune, costs).agreement)
        unseen = confidences(test, fitted, score)
        tested = outcome(best, unseen, test, costs)
        choice = Choice(best, outcome(best, confidence, trace, costs), tested, len(test.records))
    else:
        choice = choose(
            trace,
            confidence,
            costs,
            max_disagreement=max_disagreement,
            sureness=sureness,
            choices=choices,
            seed=seed,
        )
    unseen, raw = confidences(test, fitted, score), raw_confidences(test)
    errors = {p: (ece(raw[p], agrees), ece(unseen[p], agrees)) for p, agrees in test.agrees.items()}
    promise = {
        "max_disagreement": max_disagreement,
        "sureness": sureness if max_disagreement is not None else None,
        "budget": asdict(budget) if budget is not None else None,
        "prompts": count,
        "tested_on": choice.prompts,
        "disagreement": round(choice.tested.disagreement, 4),
        "decided_early": round(1 - choice.expected.decided[header.exits[-1]], 4),
        "dtype": header.dtype,
        "max_new_tokens": header.max_new_tokens,
    }
    policy = PolicyFile(
        family=header.family,
        score=score,
        thresholds=choice.thresholds,
        curves=curve_points(fitted.curves[score]),
        promise=promise,
    )
    costing = spent(_walk(choice.thresholds, unseen, test)[2], test, deployment)
    points = frontier(trace, confidence, costs, deployment, seed=seed)
    return Calibrated(policy, choice, errors, (test, unseen), points, costing)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting on the way from always shallow to always deep."""

    policy: str
    setting: str
    outcome: Outcome
    spent: Spent


def frontier(
    trace: Trace,
    confidence: Mapping[int, Floats],
    costs: Mapping[int, float],
    deployment: Deployment,
    *,
    seed: int = 0,
) -> list[Point]:
    """What agreement costs with calibrated thresholds, and with what they must beat, on the prompts that test.

    The thresholds come from those that choose. Beside them: one threshold for all exits on the branches' own
    probability; deciding at random exits; and always the same exit.
    """
    tuning, testing = split(len(trace.records), seed)
    tune, tested = np.isin(trace.prompt, tuning), trace.of_prompts(testing)
    inside, raw = {p: c[~tune] for p, c in confidence.items()}, raw_confidences(tested)
    exits, last = list(trace.agrees), trace.header.exits[-1]

    def point(policy: str, setting: str, thresholds: Mapping[int, float], sure: Mapping[int, Floats]) -> Point:
        costing = spent(_walk(thresholds, sure, tested)[2], tested, deployment)
        return Point(policy, setting, outcome(thresholds, sure, tested, costs), costing)

    points = [
        point("calibrated", " ".join(f"{p}={t:.3f}" for p, t in thresholds.items()), thresholds, inside)
        for thresholds in path(trace, confidence, costs, tune, prices=60)
    ]
    for t in np.linspace(0.3, 1.0, 71).tolist():
        points.append(point("uncalibrated", f"{t:.2f}", dict.fromkeys(exits, t), raw))
    noise = np.random.default_rng(seed).random(len(tested.prompt))
    for share in np.linspace(0, 1, 21).tolist():
        dice = {p: np.where(noise < share, 1.0, 0.0) if p == exits[0] else np.zeros(len(noise)) for p in exits}
        points.append(point("random", f"{share:.2f}", dict.fromkeys(exits, 0.5), dice))
    for p in exits:
        always = {q: np.full(len(noise), float(q == p)) for q in exits}
        points.append(point("always", str(p), dict.fromkeys(exits, 0.5), always))
    points.append(point("always", str(last), dict.fromkeys(exits, _NEVER), inside))
    return points


def outcome(
    thresholds: Mapping[int, float], confidence: Mapping[int, Floats], trace: Trace, costs: Mapping[int, float]
) -> Outcome:
    """Walk the trace: every token is decided by the shallowest exit whose confidence reaches its threshold."""
    early, wrong, at = _walk(thresholds, confidence, trace)
    n, last = len(early), trace.header.exits[-1]
    decided = {p: float((at == p).sum()) / n for p in trace.header.exits}
    return Outcome(
        decided,
        float(wrong.sum()) / max(1, int(early.sum())),
        1.0 - float(wrong.sum()) / n,
        sum(decided[p] * costs[p] for p in (*trace.agrees, last)),
    )


def choose(
    trace: Trace,
    confidence: Mapping[int, Floats],
    costs: Mapping[int, float],
    *,
    max_disagreement: float,
    sureness: float = 0.95,
    choices: Sequence[Mapping[int, float]] | None = None,
    seed: int = 0,
) -> Choice:
    """The cheapest thresholds whose disagreement is at most the bound on new prompts, with this sureness.

    Args:
        trace: prompts of the kind that is to come.
        confidence: by early exit, (N,) calibrated; `fit` must not have seen the prompts that test to be honest
            about calibration, but the bound holds whatever the confidences are.
        costs: of deciding a token at each exit.
        max_disagreement: the bound: tokens decided early that are not the last exit's, over all tokens decided early.
        sureness: the probability, over the draw of the prompts, with which the bound holds.
        choices: thresholds to choose from, timid to bold, from the prompts that choose; made when left out.
        seed: of the split.

    Raises:
        ConfigError: numbers that cannot be, or prompts that are too few; it says how many it takes.
    """
    check_shares({"the bound on disagreement": max_disagreement, "the sureness": sureness})
    count = len(trace.records)
    tuning, testing = split(count, seed)
    tune, test = np.isin(trace.prompt, tuning), np.isin(trace.prompt, testing)
    choices = choices or path(trace, confidence, costs, tune)
    tried = [best_bet(*_bounded(t, confidence, trace, tune, max_disagreement)) for t in choices]
    # The first to be tested is the one that is likeliest to pass; after it come the bolder ones.
    start = max(range(len(choices)), key=lambda i: tried[i][1])
    best: dict[int, float] | None = None
    for thresholds, (bet, _) in zip(choices[start:], tried[start:], strict=True):
        x, null = _bounded(thresholds, confidence, trace, test, max_disagreement)
        if grown(bet, x, null, seed) < -math.log(1 - sureness):
            break
        best = dict(thresholds)
    if best is None:
        known = _bounded(choices[start], confidence, trace, tune | test, max_disagreement)
        raise ConfigError(
            f"{count} prompts cannot show a disagreement of at most {max_disagreement:g} with a sureness of "
            f"{sureness:g}: {lacking(*known, sureness)}"
        )
    tested = trace.of_prompts(testing)
    inside = {p: c[test] for p, c in confidence.items()}
    return Choice(
        best, outcome(best, confidence, trace, costs), outcome(best, inside, tested, costs), len(tested.records)
    )


def _bounded(
    thresholds: Mapping[int, float], confidence: Mapping[int, Floats], trace: Trace, chosen: Bools, bound: float
) -> tuple[Floats, float]:
    """What is tested: (P,) a number in 0 … 1 for each prompt, and the mean that they have where the rate is the bound.

    The rate is sum(differing) / sum(decided early) over all prompts there are. It is at most the bound where the mean
    of `differing - bound * early` is at most 0; that is scaled by the longest answer there can be.
    """
    early, wrong, _ = _walk(thresholds, confidence, trace, chosen)
    _, where = np.unique(trace.prompt[chosen], return_inverse=True)
    differing, decided = np.bincount(where, weights=wrong), np.bincount(where, weights=early)
    longest = trace.header.max_new_tokens
    return differing / longest - bound * (decided / longest - 1), bound


def _walk(
    thresholds: Mapping[int, float], confidence: Mapping[int, Floats], trace: Trace, chosen: Bools | None = None
) -> tuple[Bools, Bools, NDArray[np.int64]]:
    """(N,) whether a token is decided early, whether it then differs, and at which exit it is decided."""
    chosen = np.ones(len(trace.prompt), bool) if chosen is None else chosen
    n = int(chosen.sum())
    early, wrong = np.zeros(n, bool), np.zeros(n, bool)
    at = np.full(n, trace.header.exits[-1])
    for p, agrees in trace.agrees.items():
        sure = (confidence[p][chosen] >= thresholds[p]) & ~early
        wrong |= sure & ~agrees[chosen]
        early |= sure
        at[sure] = p
    return early, wrong, at


def path(
    trace: Trace,
    confidence: Mapping[int, Floats],
    costs: Mapping[int, float],
    tune: Bools | None = None,
    *,
    prices: int = 240,
) -> list[dict[int, float]]:
    """Thresholds from timid to bold: those that cost least at many prices of a differing token.

    At each price by coordinate descent, where an exit's best threshold, the others given, is exact.
    """
    exits, last = list(trace.agrees), trace.header.exits[-1]
    tune = np.ones(len(trace.prompt), bool) if tune is None else tune
    sure = {p: confidence[p][tune] for p in exits}
    wrong = {p: ~trace.agrees[p][tune] for p in exits}
    order = {p: np.argsort(-sure[p], kind="stable") for p in exits}
    found: dict[tuple[float, ...], float] = {}
    thresholds = dict.fromkeys(exits, _NEVER)
    for price in np.geomspace(3e3, 0.3, prices) * max(costs.values()):
        losses = {p: costs[p] + price * wrong[p] for p in exits}
        for _ in range(4):
            before = dict(thresholds)
            later = {exits[-1]: np.full(int(tune.sum()), costs[last])}
            for p, q in zip(exits[-2::-1], exits[:0:-1], strict=True):
                later[p] = np.where(sure[q] >= thresholds[q], losses[q], later[q])
            reached = np.ones(int(tune.sum()), bool)
            for p in exits:
                gain = np.where(reached, later[p] - losses[p], 0.0)
                thresholds[p] = _best_threshold(sure[p][order[p]], gain[order[p]])
                reached &= sure[p] < thresholds[p]
            if thresholds == before:
                break
        early, differs, _ = _walk(thresholds, confidence, trace, tune)
        if early.any():
            found[tuple(thresholds.values())] = float(differs.sum()) / float(early.sum())
    return [dict(zip(exits, values, strict=True)) for values in sorted(found, key=found.__getitem__)]


def _best_threshold(confidence: Floats, gain: Floats) -> float:
    """Where to stop down a list of falling confidence so that what is above gains most; tokens as sure as one another
    go together.
    """
    total = np.cumsum(gain)
    ends = np.append(confidence[1:] < confidence[:-1], True)
    total[~ends] = -np.inf
    best = int(np.argmax(total))
    return float(confidence[best]) if total[best] > 0 else _NEVER
