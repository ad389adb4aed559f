"""Calibration of mode `cascade`: which exit begins an answer, and how confident it must stay to go on.

The bound is on the mean quality that answers lose against the last exit's, over prompts; `bounds.py` has the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ruyi_flow.calibration.bounds import Sample, check_fractions, choose_boldest, split_prompts
from ruyi_flow.calibration.budget import bytes_on_link
from ruyi_flow.calibration.curves import Floats, best_score, calibration_errors, confidences, evaluate_curve, fit_curves
from ruyi_flow.calibration.thresholds import UNREACHABLE
from ruyi_flow.calibration.trace import Header, Record, Scorer, Trace
from ruyi_flow.config.policy_file import PolicyFile, StartRule, curve_points
from ruyi_flow.routing.confidence import Curve, Score
from ruyi_flow.routing.policy import NEVER, WINDOW
from ruyi_flow.routing.start import READ_TOKENS, Reading, Start
from ruyi_flow.types import Encoding, Mode

__all__ = ["CascadeCalibration", "CascadeOutcome", "Segment", "answer_flops", "calibrate_cascade", "segment_answer"]

_CHANCES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
_BOUNDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98)
_PRICES = tuple(0.1 * 1.15**i for i in range(26))
"""Prices of the last exit's whole compute, in units of quality, for the oracle."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an answer that one exit decides: tokens start … stop-1."""

    exit: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a cascade."""

    chance: float
    """Probability of being as good as the last exit that an exit needs to begin an answer. 0 begins with `first`,
    whatever the prompt; above 1 the last exit begins."""
    bound: float
    """Mean confidence that an exit needs to keep deciding; 0 never moves to a deeper exit."""
    first: int = 0
    """Exit that begins when `chance` is 0."""


@dataclass(frozen=True, slots=True)
class CascadeOutcome:
    """The results of a setting, as means over some prompts."""

    setting: Setting
    score: float
    """Quality of the setting's answers, by the trace's scorer."""
    last: float
    """Quality of the last exit's answers."""
    compute: float
    """Floating-point operations, relative to answering with the last exit."""
    decided: Mapping[int, float]
    """Share of the tokens that each exit decides."""
    bytes_per_token: float
    """Bytes sent upward in bfloat16, where the first node has the first exit and a second node all others."""


@dataclass(frozen=True, slots=True)
class CascadeCalibration:
    """A policy for mode `cascade`, with what is known of it."""

    policy: PolicyFile
    tested: CascadeOutcome
    """Outcome of the policy on the prompts that tested the bound."""
    prompts: int
    """Number of prompts in the test."""
    frontier: list[CascadeOutcome]
    """Outcomes of settings from cautious to bold on these prompts, which did not choose them; includes `tested`."""
    baselines: dict[str, list[CascadeOutcome]]
    """Outcomes to compare with: `always` the same exit; `random`, each prompt by the first or the last exit;
    `uncalibrated`, from the first exit on by the mean of the most probable token's own probability; and the best
    possible `oracle`, see `_PromptSet.oracle`. A setting's chance is a share for `random` and a price for `oracle`."""
    errors: dict[int, tuple[float, float]]
    unseen: tuple[Trace, dict[int, Floats]]
    """See `TokenCalibration` for this and `errors`."""


def segment_answer(
    header: Header, confidence: Mapping[int, Floats], *, bound: float, window: int, first: int
) -> list[Segment]:
    """Divide an answer into the segments that each exit decides.

    Args:
        header: header of the trace.
        confidence: confidence of every exit along its answer.
        bound: mean confidence over the window that an exit needs to keep deciding.
        window: tokens in the mean; those before the answer count as 1.
        first: exit that begins.
    """
    segments: list[Segment] = []
    start = 0
    for p in header.exits[header.exits.index(first) :]:
        rest = confidence[p][start:]
        stop = start + len(rest)
        if p != header.exits[-1]:
            total = np.cumsum(np.concatenate([[0.0], np.ones(window), rest]))
            below = np.flatnonzero((total[window + 1 :] - total[1:-window]) / window < bound)
            if len(below):
                stop = start + int(below[0])
                segments.append(Segment(p, start, stop))
                start = stop
                continue
        return [*segments, Segment(p, start, stop)]
    raise AssertionError("the last exit ends every answer")


def answer_flops(header: Header, prompt_tokens: int, segments: Sequence[Segment], *, reads: bool) -> float:
    """Count the floating-point operations of a prompt and its answer, without drafts.

    Every position runs through the trunk as far as the last segment's exit, through an exit's branch up to where that
    exit stops deciding, and through the LM head where vocabulary logits are needed.

    Args:
        header: header of the trace, with the family's costs.
        prompt_tokens: length of the prompt.
        segments: segments of the answer.
        reads: whether the first branch reads the prompt to choose the exit that begins.
    """
    total, end = 0.0, segments[-1].stop
    depth = dict(zip(header.exits, header.branch_layers, strict=True))
    layer = header.layer_flops + header.attention_flops * (prompt_tokens + end) / 2
    total += (prompt_tokens + end - 1) * segments[-1].exit * layer
    for i, segment in enumerate(segments):
        moves_on = i + 1 < len(segments)
        total += (prompt_tokens + segment.stop - 1 + moves_on) * depth[segment.exit] * layer
        total += (segment.stop - segment.start + moves_on) * header.head_flops
    if reads:
        first = header.exits[0]
        total += min(READ_TOKENS, prompt_tokens - 1) * header.head_flops
        if segments[0].exit != first:
            total += prompt_tokens * depth[first] * layer + header.head_flops
    return total


def calibrate_cascade(
    trace: Trace,
    *,
    max_loss: float,
    confidence_level: float = 0.95,
    score: Score | None = None,
    window: int = WINDOW,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> CascadeCalibration:
    """Calibrate a policy for mode `cascade`: the cheapest one whose answers lose at most a share of the quality.

    Some prompts fit the curves and the start rule and order the settings; the others test the settings.

    Args:
        trace: prompts of the expected kind; its scorer measures the quality of answers.
        max_loss: most of the last exit's quality that may be lost, as a share, on average over prompts.
        confidence_level: probability, over the draw of the prompts, with which the bound holds.
        score: score that confidence is computed from. Default: the one that predicts agreement best.
        window: tokens of the running mean of confidence, at most those of an answer.
        seed: seed of the split into prompts that choose and prompts that test.
        report: called with the number of settings tried and their total.

    Raises:
        ConfigError: a number is out of range, or there are too few prompts; the message estimates how many more.
    """
    check_fractions({"the bound on loss": max_loss, "the confidence level": confidence_level})
    header, count = trace.header, len(trace.records)
    window = min(window, header.max_new_tokens)
    choosing, unseen = (trace.select(part) for part in split_prompts(count, seed))
    fitted = fit_curves(choosing)
    score = score or best_score(choosing, fitted)
    curves = fitted.curves[score]
    tune = _PromptSet(choosing, score=score, curves=curves, window=window)
    test = _PromptSet(unseen, score=score, curves=curves, window=window, weights=tune.weights)
    settings = [Setting(c, b) for c in _CHANCES for b in _BOUNDS] + [Setting(NEVER, 0.0)]
    settings += [Setting(0.0, b, p) for p in header.exits[:-1] for b in _BOUNDS]
    tried: list[CascadeOutcome] = []
    for i, setting in enumerate(settings):
        tried.append(tune.outcome(setting))
        report(i + 1, len(settings))
    candidates = [outcome.setting for outcome in _pareto_front(tried)]
    chosen = choose_boldest(
        [tune.loss_sample(setting, max_loss) for setting in candidates],
        lambda i: test.loss_sample(candidates[i], max_loss),
        failure=f"{count} prompts cannot show that at most {max_loss:.1%} of the last exit's quality is lost",
        confidence_level=confidence_level,
        seed=seed,
    )
    best, tested = candidates[chosen], test.outcome(candidates[chosen])
    policy = PolicyFile(
        family=header.family,
        mode=Mode.CASCADE,
        score=score,
        thresholds={p: best.bound if p >= best.first and best.chance <= 1 else UNREACHABLE for p in curves},
        curves=curve_points(curves),
        window=window,
        start=None if best.chance in (0.0, NEVER) else StartRule(weights=dict(tune.weights), chance=best.chance),
        promise={
            "max_loss": max_loss,
            "confidence_level": confidence_level,
            "scorer": str(header.scorer),
            "prompts": count,
            "tested_on": len(unseen.records),
            "score": round(tested.score, 4),
            "last_score": round(tested.last, 4),
            "compute": round(tested.compute, 4),
            "dtype": header.dtype,
            "max_new_tokens": header.max_new_tokens,
        },
    )
    confidence = confidences(unseen, fitted, score)
    return CascadeCalibration(
        policy,
        tested,
        len(unseen.records),
        [test.outcome(setting) for setting in candidates],
        _baselines(unseen, test),
        calibration_errors(unseen, confidence),
        (unseen, confidence),
    )


def _pareto_front(outcomes: Sequence[CascadeOutcome]) -> list[CascadeOutcome]:
    """Return outcomes that no other beats in both quality and compute, from the best to the cheapest."""
    front: list[CascadeOutcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.last - o.score, o.compute)):
        if not front or outcome.compute < front[-1].compute:
            front.append(outcome)
    return front


def _baselines(trace: Trace, test: _PromptSet) -> dict[str, list[CascadeOutcome]]:
    """Compute `CascadeCalibration.baselines` on the prompts of the test."""
    early = trace.header.exits[:-1]
    always = [test.outcome(Setting(0.0, 0.0, p)) for p in early] + [test.outcome(Setting(NEVER, 0.0))]
    identity = {p: Curve(1.0, (0.0, 1.0), (0.0, 1.0)) for p in early}
    raw = _PromptSet(trace, score=Score.MAX_PROBABILITY, curves=identity, window=test.window, weights={})
    return {
        "always": always,
        "random": [test.mixed(always[0].setting, always[-1].setting, i / 10) for i in range(11)],
        "uncalibrated": [raw.outcome(Setting(0.0, bound, early[0])) for bound in _BOUNDS],
        "oracle": test.oracle(),
    }


@dataclass(frozen=True, slots=True)
class _Answer:
    """One setting's answer to one prompt: segments, quality, the last exit's quality, operations and bytes sent up."""

    segments: list[Segment]
    score: float
    last: float
    flops: float
    bytes: int


class _PromptSet:
    """The prompts of a trace, with the confidences that a cascade sees on them.

    `curves` are the early exits' for `score`; `weights` are the start rule's, fitted on these prompts if None.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        score: Score,
        curves: Mapping[int, Curve],
        window: int,
        weights: Mapping[int, tuple[float, ...]] | None = None,
    ) -> None:
        header = trace.header
        self.header, self.window, self._records = header, window, trace.records
        self._position_bytes = bytes_on_link(header.boundary_bytes[Encoding.BF16])
        s = header.scores.index(score)
        at = {p: header.temperatures.index(curve.temperature) for p, curve in curves.items()}
        self._confidence: list[dict[int, Floats]] = []
        self._readings: list[Reading] = []
        first, last = header.exits[0], header.exits[-1]
        for record in self._records:
            scores = {p: (said if said.own is None else said.own).scores for p, said in record.exits.items()}
            along = {p: evaluate_curve(curve, scores[p][:, s, at[p]].astype(float)) for p, curve in curves.items()}
            self._confidence.append({**along, last: np.ones(len(scores[last]))})
            said = record.exits[first]
            begins = curves[first](float(said.scores[0, s, at[first]]))
            self._readings.append(Reading(record.prompt_tokens, said.prompt_loss, said.prompt_entropy, begins))
        self._known: dict[tuple[int, int, float, bool], _Answer] = {}
        self.weights = self._fit_start() if weights is None else weights

    def _fit_start(self) -> dict[int, tuple[float, ...]]:
        """Fit, for each early exit, how the reading of a prompt predicts its quality relative to the last exit."""
        x = np.array([reading.features() for reading in self._readings])
        weights: dict[int, tuple[float, ...]] = {}
        for p in self.header.exits[:-1]:
            whole = [[Segment(p, 0, len(along[p]))] for along in self._confidence]
            scores = [_score_answer(record, segments) for record, segments in zip(self._records, whole, strict=True)]
            weights[p] = _logistic(x, np.array([1.0 - max(0.0, last - score) for score, last in scores]))
        return weights

    def outcome(self, setting: Setting) -> CascadeOutcome:
        """Run a setting on all these prompts."""
        return self._mean(setting, [self._answer(i, setting) for i in range(len(self._records))])

    def mixed(self, one: Setting, other: Setting, share: float) -> CascadeOutcome:
        """Return what to expect when a random share of these prompts uses the other setting."""
        answers = [self._answer(i, setting) for setting in (one, other) for i in range(len(self._records))]
        return self._mean(Setting(share, 0.0), answers, np.repeat([1 - share, share], len(self._records)))

    def oracle(self) -> list[CascadeOutcome]:
        """Choose the best single exit for each prompt, knowing all answers beforehand, at some prices of compute.

        Routers that never move back can hardly do better: an answer that moves deeper takes at least what the exit that
        ends it would have taken for all of it, and gains only where the earlier exit was right by itself.
        """
        count, exits = len(self._records), self.header.exits
        alone = [[self._answer(i, Setting(0.0, 0.0, p)) for p in exits] for i in range(count)]
        mean = sum(answers[-1].flops for answers in alone) / count

        def best_at(price: float) -> CascadeOutcome:
            best = [max(answers, key=lambda a: a.score - price * a.flops / mean) for answers in alone]
            return self._mean(Setting(price, 0.0), best)

        return [best_at(price) for price in _PRICES]

    def loss_sample(self, setting: Setting, max_loss: float) -> Sample:
        """Return one number for each prompt, whose mean shows whether the loss stays within its bound."""
        answers = [self._answer(i, setting) for i in range(len(self._records))]
        excess = np.array([(1 - max_loss) * a.last - a.score for a in answers])
        low = -max_loss if self.header.scorer == Scorer.AGREEMENT else -1.0
        high = 1.0 - max_loss
        return Sample((excess - low) / (high - low), -low / (high - low))

    def _mean(self, setting: Setting, answers: Sequence[_Answer], weights: Floats | None = None) -> CascadeOutcome:
        """Average answers; `weights` says how often each is given, and adds up to the number of prompts."""
        whole = sum(self._answer(i, Setting(NEVER, 0.0)).flops for i in range(len(self._records)))
        weights = np.ones(len(answers)) if weights is None else weights
        decided = dict.fromkeys(self.header.exits, 0.0)
        for answer, weight in zip(answers, weights.tolist(), strict=True):
            for segment in answer.segments:
                decided[segment.exit] += weight * (segment.stop - segment.start)
        tokens = max(1.0, sum(decided.values()))
        return CascadeOutcome(
            setting,
            float(np.average([a.score for a in answers], weights=weights)),
            float(np.average([a.last for a in answers], weights=weights)),
            float(weights @ [a.flops for a in answers]) / whole,
            {p: n / tokens for p, n in decided.items()},
            float(weights @ [a.bytes for a in answers]) / tokens,
        )

    def _answer(self, i: int, setting: Setting) -> _Answer:
        record, last = self._records[i], self.header.exits[-1]
        reads = 0 < setting.chance <= 1
        if reads:
            first = Start(self.weights, setting.chance).exit(self._readings[i], last)
        else:
            first = setting.first if setting.chance == 0 else last
        key = (i, first, setting.bound, reads)
        if key not in self._known:
            segments = segment_answer(
                self.header, self._confidence[i], bound=setting.bound, window=self.window, first=first
            )
            flops = answer_flops(self.header, record.prompt_tokens, segments, reads=reads)
            deeper = segments[-1].exit != self.header.exits[0]
            sent = self._position_bytes * (record.prompt_tokens + segments[-1].stop - 1) if deeper else 0
            self._known[key] = _Answer(segments, *_score_answer(record, segments), flops, sent)
        return self._known[key]


def _score_answer(record: Record, segments: Sequence[Segment]) -> tuple[float, float]:
    """Return the quality of an answer with these segments, and of the last exit's answer.

    With a scorer, an answer that moves deeper counts as the own answer of the exit that ends it: a trace contains
    nothing better.
    """
    last = record.exits[max(record.exits)]
    if last.own is not None:
        ends = record.exits[segments[-1].exit].own
        assert ends is not None
        return ends.right, last.own.right
    agrees = sum(
        int((record.exits[x.exit].tokens[x.start : x.stop] == record.answer[x.start : x.stop]).sum()) for x in segments
    )
    return agrees / max(1, len(record.answer)), 1.0


def _logistic(x: Floats, y: Floats, ridge: float = 1e-2) -> tuple[float, ...]:
    """Fit a logistic regression to targets in 0 … 1, by Newton's method with a small ridge, and return its weights."""
    w = np.zeros(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-(x @ w).clip(-30, 30)))
        gradient = x.T @ (p - y) / len(y) + ridge * w
        hessian = (x.T * (p * (1 - p))) @ x / len(y) + ridge * np.eye(len(w))
        w -= np.linalg.solve(hessian, gradient)
    return tuple(float(value) for value in w)
