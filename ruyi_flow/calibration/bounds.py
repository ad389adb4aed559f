"""Tests that a mean stays below a bound on new prompts, by betting (Waudby-Smith and Ramdas 2024).

A test starts with a wealth of 1 and bets, prompt by prompt, that the mean is below the bound. When it is not, the
wealth seldom grows, so a large wealth shows that the bound holds. Candidates are tested from cautious to bold until one
fails (Learn then Test, Angelopoulos et al. 2021), in an order that other prompts chose (Pareto Testing,
Laufer-Goldshtein et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ruyi_flow.calibration.curves import Floats
from ruyi_flow.errors import ConfigError

__all__ = ["Sample", "check_fractions", "choose_boldest", "explain_failure", "max_log_wealth", "split_prompts"]

Candidate = TypeVar("Candidate")

_TUNING_SHARE = 0.3
"""Share of the prompts that choose curves and thresholds; the rest test them."""

_MOST_TIMES_MORE = 1000
"""Nobody traces more than this many times the prompts that there are."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One number for each prompt; the test is on their mean."""

    values: Floats
    """(P,) numbers in 0 … 1."""
    null_mean: float
    """The mean that the values have when the tested rate equals its bound; a lower mean keeps the bound."""

    def log_growth(self, bet: float) -> Floats:
        """Return (P,) the logarithm of the factor by which each prompt changes the wealth."""
        return np.asarray(np.log1p(bet * (self.null_mean - self.values)))

    def best_bet(self) -> tuple[float, float]:
        """Choose the bet that grows the wealth most on this sample (Kelly's), from a grid.

        Returns:
            The bet, and the logarithm of the wealth that it grows to.
        """
        bets = np.linspace(0.05, 0.95, 19) / (1 - self.null_mean)  # 1 / (1 - null_mean) could lose everything
        return max(((float(b), float(self.log_growth(b).sum())) for b in bets), key=lambda pair: pair[1])


def split_prompts(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split prompt numbers into those that choose curves and thresholds and those that test; both ascending.

    More prompts test than choose: how far below the bound a rate must be to pass shrinks with the square root of their
    number, while curves and thresholds are fitted on tokens, of which a few hundred prompts have plenty.

    Raises:
        ConfigError: there are fewer than two prompts.
    """
    if count < 2:
        raise ConfigError("one prompt cannot both choose thresholds and test them; trace several hundred")
    order = np.random.default_rng(seed).permutation(count).tolist()
    first = max(1, round(_TUNING_SHARE * count))
    return sorted(order[:first]), sorted(order[first:])


def check_fractions(given: Mapping[str, float]) -> None:
    """Check that named numbers lie between 0 and 1, both excluded.

    Raises:
        ConfigError: one does not; the message names it.
    """
    for name, value in given.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name} is {value!r}; it must lie between 0 and 1")


def choose_boldest(
    candidates: Sequence[Candidate],
    tuning: Callable[[Candidate], Sample],
    testing: Callable[[Candidate], Sample],
    *,
    failure: str,
    confidence_level: float,
    seed: int,
) -> Candidate:
    """Choose the boldest candidate that passes the test.

    The first candidate to be tested is the one most likely to pass; bolder ones follow until one fails.

    Args:
        candidates: what to choose from, ordered from cautious to bold.
        tuning: returns a candidate's sample of the prompts that choose its bet.
        testing: returns a candidate's sample of the prompts that test it.
        failure: start of the error message when no candidate passes.
        confidence_level: probability, over the draw of the prompts, with which the bound holds.
        seed: seed of the order of the prompts.

    Raises:
        ConfigError: no candidate passes; the message tells about how many more prompts are needed.
    """
    bets = [tuning(candidate).best_bet() for candidate in candidates]
    start = max(range(len(candidates)), key=lambda i: bets[i][1])
    best: Candidate | None = None
    for candidate, (bet, _) in zip(candidates[start:], bets[start:], strict=True):
        if max_log_wealth(bet, testing(candidate), seed) < -math.log(1 - confidence_level):
            break
        best = candidate
    if best is None:
        tuned, tested = tuning(candidates[start]), testing(candidates[start])
        known = Sample(np.concatenate([tuned.values, tested.values]), tuned.null_mean)
        reason = explain_failure(known, confidence_level)
        raise ConfigError(f"{failure} with a confidence of {confidence_level:g}: {reason}")
    return best


def max_log_wealth(bet: float, sample: Sample, seed: int) -> float:
    """Bet on a sample prompt by prompt, in a random order, and return the logarithm of the largest wealth.

    By Ville's inequality exp(-log wealth) is a p-value of the mean being `null_mean` or more, for prompts in an order
    that is independent of their values. A file may list the easy ones first, so they are shuffled.
    """
    values = np.random.default_rng(seed).permutation(sample.values)
    return float(np.cumsum(Sample(values, sample.null_mean).log_growth(bet)).max(initial=0.0))


def explain_failure(sample: Sample, confidence_level: float) -> str:
    """Explain what a failed test needs, from all prompts that there are: log wealth grows in proportion to them."""
    count = len(sample.values)
    growth = sample.best_bet()[1] / count
    if growth <= 0:
        return "they contradict it, so more prompts of the same kind will not help; relax the bound"
    needed = math.ceil(-math.log(1 - confidence_level) / growth / (1 - _TUNING_SHARE))
    more = max(needed - count, math.ceil(count / 10))
    if more > _MOST_TIMES_MORE * count:
        return f"they barely support it, so over {_MOST_TIMES_MORE:,} times as many are needed; relax the bound"
    return f"trace about {more:,} more of the same kind, or relax the bound"
