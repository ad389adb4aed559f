"""Calibrating mode `cascade`: which exit begins, and how sure it must stay, so that answers keep their worth.

What is bounded is the mean, over prompts, of what the cascade's answers are worth less than the last exit's: by the
test of `bets.py`, over settings from timid to bold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ruyi_flow.calibration.bounds import best_bet, check_shares, grown, lacking, split
from ruyi_flow.calibration.budget import frame
from ruyi_flow.calibration.curves import Floats, apply, best_score, confidences, ece, fit, raw_confidences
from ruyi_flow.calibration.trace import Header, Record, Scorer, Trace
from ruyi_flow.config.policy_file import PolicyFile, StartRule, curve_points
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Calibration, Curve, Score
from ruyi_flow.routing.policy import NEVER, WINDOW
from ruyi_flow.routing.start import READ_TOKENS, Reading, Start
from ruyi_flow.types import Encoding, Mode

__all__ = ["CascadeChoice", "Part", "Setting", "Worth", "calibrate_cascade", "flops", "follow"]

_CHANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
_BOUNDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98)
_PRICES = tuple(0.1 * 1.15**i for i in range(26))
"""Of all the last exit's compute, in worth."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an answer that one exit decides: tokens start … stop-1."""

    exit: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen: how likely as good an exit's answer must be to begin, and how sure it must stay."""

    chance: float
    """0 begins with the exit `first`, whatever the prompt; above 1 with the last one."""
    bound: float
    """0 never leaves an answer to a deeper exit."""
    first: int = 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What a setting does on some prompts: means over them."""

    setting: Setting
    score: float
    """What its answers are worth."""
    last: float
    """What the last exit's are."""
    compute: float
    """Its floating-point operations, over those of answering with the last exit."""
    decided: Mapping[int, float]
    """Share of the tokens that each exit decides."""
    bytes_per_token: float
    """Upwards, in bfloat16, where a first node has the first exit and another one all others."""


@dataclass(frozen=True, slots=True)
class CascadeChoice:
    """A policy for mode cascade, and what is known of it."""

    policy: PolicyFile
    tested: Worth
    """On the prompts that the bound was tested on."""
    prompts: int
    """In the test."""
    frontier: list[Worth]
    """Settings from timid to bold on these prompts, which did not choose them; the policy's own is among them."""
    baselines: dict[str, list[Worth]]
    """What they must beat there: `always` the same exit; `random`, each prompt by the first or the last exit;
    `uncalibrated`, from the first exit on by the mean of the likeliest token's own probability. And what they could
    reach at best: `oracle`, see `_Prompts.oracle`.
    (Where a setting has its chance, `random` has a share and `oracle` a price.)"""
    errors: dict[int, tuple[float, float]]
    unseen: tuple[Trace, dict[int, Floats]]
    """See `Calibrated`."""


def follow(header: Header, sure: Mapping[int, Floats], bound: float, window: int, first: int) -> list[Part]:
    """Which exit decides which part of an answer.

    Args:
        header: of the trace.
        sure: by exit, the confidence along its answer.
        bound: that the mean over the window must reach.
        window: tokens; missing ones count as sure.
        first: the exit that begins.
    """
    parts: list[Part] = []
    start = 0
    for p in header.exits[header.exits.index(first) :]:
        rest = sure[p][start:]
        stop = start + len(rest)
        if p != header.exits[-1]:
            total = np.cumsum(np.concatenate([[0.0], np.ones(window), rest]))
            below = np.flatnonzero((total[window + 1 :] - total[1:-window]) / window < bound)
            if len(below):
                stop = start + int(below[0])
                parts.append(Part(p, start, stop))
                start = stop
                continue
        return [*parts, Part(p, start, stop)]
    raise AssertionError("the last exit leaves nothing")


def flops(header: Header, prompt_tokens: int, parts: Sequence[Part], *, reads: bool) -> float:
    """Floating-point operations of a prompt and an answer, without drafts.

    Every position goes through the trunk as far as the last part's exit; through an exit's branch up to where the exit
    leaves the answer; and through the head where a token is looked at.

    Args:
        header: of the trace, with the family's costs.
        prompt_tokens: of the prompt.
        parts: of the answer.
        reads: the first branch reads the prompt, to choose where to begin.
    """
    total, end = 0.0, parts[-1].stop
    depth = dict(zip(header.exits, header.branch_layers, strict=True))
    layer = header.layer_flops + header.attention_flops * (prompt_tokens + end) / 2
    total += (prompt_tokens + end - 1) * parts[-1].exit * layer
    for i, part in enumerate(parts):
        left = i + 1 < len(parts)
        total += (prompt_tokens + part.stop - 1 + left) * depth[part.exit] * layer
        total += (part.stop - part.start + left) * header.head_flops
    if reads:
        first = header.exits[0]
        total += min(READ_TOKENS, prompt_tokens - 1) * header.head_flops
        if parts[0].exit != first:
            total += prompt_tokens * depth[first] * layer + header.head_flops
    return total


def calibrate_cascade(
    trace: Trace,
    *,
    max_loss: float,
    sureness: float = 0.95,
    score: Score | None = None,
    window: int = WINDOW,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> CascadeChoice:
    """A policy for mode `cascade` from a trace: the cheapest whose answers lose at most a share of their worth.

    Some of the prompts fit the curves and the rule for the start, and order the settings; the others test them.

    Args:
        trace: prompts of the kind that is to come. Its scorer says what an answer is worth.
        max_loss: share of the last exit's worth that may be lost, on average over prompts.
        sureness: the probability, over the draw of the prompts, with which that holds.
        score: what confidence is made of; left out, what predicts agreement best.
        window: tokens of the running confidence; no more than an answer has.
        seed: of the split.
        report: told how many settings are tried, and of how many.

    Raises:
        ConfigError: numbers that cannot be, or prompts that are too few for the bound.
    """
    check_shares({"the bound on loss": max_loss, "the sureness": sureness})
    header, count = trace.header, len(trace.records)
    window = min(window, header.max_new_tokens)
    tuned, tested_on = split(count, seed)
    tune = trace.of_prompts(tuned)
    curves = fit(tune)
    score = score or best_score(tune, curves)
    tuning, testing = (_Prompts(trace, part, curves, score, window) for part in (tuned, tested_on))
    weights = tuning.regression()
    settings = [Setting(c, b) for c in _CHANCES for b in _BOUNDS] + [Setting(NEVER, 0.0)]
    settings += [Setting(0.0, b, p) for p in header.exits[:-1] for b in _BOUNDS]
    found: list[Worth] = []
    for i, setting in enumerate(settings):
        found.append(tuning.worth(setting, weights))
        report(i + 1, len(settings))
    path = [worth.setting for worth in _timid_to_bold(found)]
    tried = [best_bet(*tuning.lost(setting, weights, max_loss)) for setting in path]
    # The first to be tested is the one that is likeliest to pass; after it come the bolder ones.
    first = max(range(len(path)), key=lambda i: tried[i][1])
    best = None
    for setting, (bet, _) in zip(path[first:], tried[first:], strict=True):
        x, null = testing.lost(setting, weights, max_loss)
        if grown(bet, x, null, seed) < -math.log(1 - sureness):
            break
        best = setting
    if best is None:
        known = np.concatenate([part.lost(path[first], weights, max_loss)[0] for part in (tuning, testing)])
        raise ConfigError(
            f"{count} prompts cannot show that at most {max_loss:.1%} of the last exit's worth is lost with a sureness "
            f"of {sureness:g}: {lacking(known, null, sureness)}"
        )
    tested = testing.worth(best, weights)
    policy = PolicyFile(
        family=header.family,
        mode=Mode.CASCADE,
        score=score,
        thresholds={p: best.bound if p >= best.first and best.chance <= 1 else 1.1 for p in header.exits[:-1]},
        curves=curve_points(curves.curves[score]),
        window=window,
        start=None if best.chance in (0.0, NEVER) else StartRule(weights=weights, chance=best.chance),
        promise={
            "max_loss": max_loss,
            "sureness": sureness,
            "scorer": str(header.scorer),
            "prompts": count,
            "tested_on": len(tested_on),
            "score": round(tested.score, 4),
            "last_score": round(tested.last, 4),
            "compute": round(tested.compute, 4),
            "dtype": header.dtype,
            "max_new_tokens": header.max_new_tokens,
        },
    )
    test = trace.of_prompts(tested_on)
    said, raw = confidences(test, curves, score), raw_confidences(test)
    errors = {p: (ece(raw[p], agrees), ece(said[p], agrees)) for p, agrees in test.agrees.items()}
    frontier = [testing.worth(setting, weights) for setting in path]
    return CascadeChoice(
        policy, tested, len(tested_on), frontier, _baselines(trace, tested_on, testing), errors, (test, said)
    )


def _baselines(trace: Trace, numbers: Sequence[int], testing: _Prompts) -> dict[str, list[Worth]]:
    """See `CascadeChoice.baselines`."""
    early, score = trace.header.exits[:-1], Score.MAX_PROBABILITY
    always = [testing.worth(Setting(0.0, 0.0, p), {}) for p in early] + [testing.worth(Setting(NEVER, 0.0), {})]
    curves = {score: {p: Curve(1.0, (0.0, 1.0), (0.0, 1.0)) for p in early}}
    own = _Prompts(trace, numbers, Calibration(trace.header.family, curves), score, testing.window)
    shares = [i / 10 for i in range(11)]
    return {
        "always": always,
        "random": [_mixed(always[0], always[-1], share) for share in shares],
        "uncalibrated": [own.worth(Setting(0.0, bound, early[0]), {}) for bound in _BOUNDS],
        "oracle": testing.oracle(),
    }


def _mixed(one: Worth, other: Worth, share: float) -> Worth:
    """The mean of what both do, where this share of the prompts is for the other."""

    def mean(a: float, b: float) -> float:
        return (1 - share) * a + share * b

    return Worth(
        Setting(share, 0.0),
        mean(one.score, other.score),
        one.last,
        mean(one.compute, other.compute),
        {p: mean(one.decided[p], other.decided[p]) for p in one.decided},
        mean(one.bytes_per_token, other.bytes_per_token),
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one setting makes of one prompt."""

    parts: list[Part]
    score: float
    last: float
    flops: float
    bytes: int


class _Prompts:
    """Some of a trace's prompts, as a cascade meets them."""

    def __init__(self, trace: Trace, numbers: Sequence[int], curves: Calibration, score: Score, window: int) -> None:
        self.header, self.window = trace.header, window
        self._row_bytes = frame(trace.header.boundary_bytes[Encoding.BF16])
        self.records = [trace.records[i] for i in numbers]
        s = trace.header.scores.index(score)
        at = {p: trace.header.temperatures.index(c.temperature) for p, c in curves.curves[score].items()}
        self.sure: list[dict[int, Floats]] = []
        self.readings: list[Reading] = []
        for record in self.records:
            mine: dict[int, Floats] = {}
            for p, e in record.exits.items():
                scores = e.scores if e.own is None else e.own.scores
                mine[p] = (
                    apply(curves.curves[score][p], scores[:, s, at[p]].astype(np.float64))
                    if p in at
                    else np.ones(len(scores))
                )
            self.sure.append(mine)
            first = record.exits[trace.header.exits[0]]
            begins = curves.curves[score][trace.header.exits[0]](float(first.scores[0, s, at[trace.header.exits[0]]]))
            self.readings.append(Reading(record.prompt_tokens, first.prompt_loss, first.prompt_entropy, begins))
        self._known: dict[tuple[int, int, float, bool], _Answer] = {}

    def regression(self) -> dict[int, tuple[float, ...]]:
        """By early exit: what predicts, from the reading of a prompt, the worth of its answer over the last one's."""
        x = np.array([reading.features() for reading in self.readings])
        out: dict[int, tuple[float, ...]] = {}
        for p in self.header.exits[:-1]:
            alone = [[Part(p, 0, len(sure[p]))] for sure in self.sure]
            pairs = [_worth(record, parts) for record, parts in zip(self.records, alone, strict=True)]
            out[p] = _logistic(x, np.array([1.0 - max(0.0, last - mine) for mine, last in pairs]))
        return out

    def worth(self, setting: Setting, weights: Mapping[int, tuple[float, ...]]) -> Worth:
        """What a setting does on these prompts."""
        return self._mean(setting, [self._answer(i, setting, weights) for i in range(len(self.records))])

    def oracle(self) -> list[Worth]:
        """What one exit a prompt gives at best, to who knows beforehand what each will say, at some prices of compute.

        Routers that never move back can hardly do better: an answer that moves on takes at least what the exit that
        ends it would have taken for all of it, and gains only where the one before was right by itself.
        """
        count, exits = len(self.records), self.header.exits
        alone = [[self._answer(i, Setting(0.0, 0.0, p), {}) for p in exits] for i in range(count)]
        mean = sum(answers[-1].flops for answers in alone) / count

        def at(price: float) -> Worth:
            best = [max(answers, key=lambda a: a.score - price * a.flops / mean) for answers in alone]
            return self._mean(Setting(price, 0.0), best)

        return [at(price) for price in _PRICES]

    def _mean(self, setting: Setting, answers: Sequence[_Answer]) -> Worth:
        whole = sum(self._answer(i, Setting(NEVER, 0.0), {}).flops for i in range(len(self.records)))
        decided = dict.fromkeys(self.header.exits, 0)
        for part in (part for answer in answers for part in answer.parts):
            decided[part.exit] += part.stop - part.start
        tokens = max(1, sum(decided.values()))
        return Worth(
            setting,
            float(np.mean([a.score for a in answers])),
            float(np.mean([a.last for a in answers])),
            sum(a.flops for a in answers) / whole,
            {p: n / tokens for p, n in decided.items()},
            sum(a.bytes for a in answers) / tokens,
        )

    def lost(self, setting: Setting, weights: Mapping[int, tuple[float, ...]], most: float) -> tuple[Floats, float]:
        """(P,) a number in 0 … 1 for each prompt, and the mean that they have where the loss is the bound."""
        answers = [self._answer(i, setting, weights) for i in range(len(self.records))]
        x = np.array([(1 - most) * a.last - a.score for a in answers])
        low = -most if self.header.scorer == Scorer.AGREEMENT else -1.0
        high = 1.0 - most
        return (x - low) / (high - low), -low / (high - low)

    def _answer(self, i: int, setting: Setting, weights: Mapping[int, tuple[float, ...]]) -> _Answer:
        exits, record = self.header.exits, self.records[i]
        reads = 0 < setting.chance <= 1
        start = Start(weights, setting.chance) if reads else None
        first = (
            start.exit(self.readings[i], exits[-1]) if start else setting.first if setting.chance == 0 else exits[-1]
        )
        key = (i, first, setting.bound, reads)
        if key not in self._known:
            parts = follow(self.header, self.sure[i], setting.bound, self.window, first)
            spent = flops(self.header, record.prompt_tokens, parts, reads=reads)
            up = 0 if parts[-1].exit == exits[0] else self._row_bytes * (record.prompt_tokens + parts[-1].stop - 1)
            self._known[key] = _Answer(parts, *_worth(record, parts), spent, up)
        return self._known[key]


def _worth(record: Record, parts: Sequence[Part]) -> tuple[float, float]:
    """What an answer in these parts is worth, and what the last exit's is.

    With a scorer, an answer that moves deeper is taken to be worth what the exit that ends it says by itself: a trace
    cannot know better.
    """
    last = record.exits[max(record.exits)]
    if last.own is not None:
        ends = record.exits[parts[-1].exit].own
        assert ends is not None
        return ends.right, last.own.right
    agrees = sum(
        int((record.exits[x.exit].tokens[x.start : x.stop] == record.answer[x.start : x.stop]).sum()) for x in parts
    )
    return agrees / max(1, len(record.answer)), 1.0


def _timid_to_bold(found: Sequence[Worth]) -> list[Worth]:
    """Settings that nothing else beats in both worth and compute, from most worth to least compute."""
    path: list[Worth] = []
    for worth in sorted(found, key=lambda w: (w.last - w.score, w.compute)):
        if not path or worth.compute < path[-1].compute:
            path.append(worth)
    return path


def _logistic(x: Floats, y: Floats, ridge: float = 1e-2) -> tuple[float, ...]:
    """Weights of a logistic regression to targets in 0 … 1, by Newton's method with a small ridge."""
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        gradient = x.T @ (p - y) / len(y) + ridge * w
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + ridge * np.eye(len(w))
        w -= np.linalg.solve(hessian, gradient)
    return tuple(float(value) for value in w)
