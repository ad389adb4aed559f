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

import numpy as np

from ruyi_flow.calibration.curves import Floats
from ruyi_flow.errors import ConfigError

__all__ = ["Sample", "check_fractions", "choose_boldest", "explain_failure", "max_log_wealth", "split_prompts"]

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

    def best_bet(self) -> tuple[float, float]:
        """Return the bet of a grid that grows the wealth most on this sample (Kelly's), and the final log wealth."""
        bets = np.linspace(0.05, 0.95, 19) / (1 - self.null_mean)  # 1 / (1 - null_mean) could lose everything
        gains = self.null_mean - self.values
        return max(((float(b), float(np.log1p(b * gains).sum())) for b in bets), key=lambda pair: pair[1])


def split_prompts(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split prompt numbers into those that choose curves and thresholds and those that test; both ascending.

    More prompts test: how far below the bound a rate must be to pass shrinks with the square root of their number,
    while curves and thresholds are fitted on tokens, of which a few hundred prompts have plenty.

    Raises:
        ConfigError: there are fewer than two prompts.
    """
    if count < 2:
        raise ConfigError("one prompt cannot both choose thresholds and test them; trace several hundred")
    order = np.random.default_rng(seed).permutation(count).tolist()
    first = max(1, round(_TUNING_SHARE * count))
    return sorted(order[:first]), sorted(order[first:])


def check_fractions(given: Mapping[str, float | None]) -> None:
    """Raise a ConfigError if one of these named numbers does not lie between 0 and 1."""
    for name, value in given.items():
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{name} is {value:g}; it must lie between 0 and 1")


def choose_boldest(
    tuning: Sequence[Sample], testing: Callable[[int], Sample], *, failure: str, confidence_level: float, seed: int
) -> int:
    """Test candidates from cautious to bold until one fails, and return the number of the boldest that passed.

    The first candidate to be tested is the one most likely to pass.

    Args:
        tuning: each candidate's sample of the prompts that choose its bet, from cautious to bold.
        testing: returns a candidate's sample of the prompts that test it.
        failure: start of the error message when no candidate passes.
        confidence_level: probability, over the draw of the prompts, with which the bound holds.
        seed: seed of the order of the prompts.

    Raises:
        ConfigError: no candidate passes; the message estimates how many more prompts are needed.
    """
    bets = [sample.best_bet() for sample in tuning]
    start = stop = max(range(len(bets)), key=lambda i: bets[i][1])
    while stop < len(bets) and max_log_wealth(bets[stop][0], testing(stop), seed) >= -math.log(1 - confidence_level):
        stop += 1
    if stop == start:
        known = Sample(np.concatenate([tuning[start].values, testing(start).values]), tuning[start].null_mean)
        reason = explain_failure(known, confidence_level)
        raise ConfigError(f"{failure} with a confidence of {confidence_level:g}: {reason}")
    return stop - 1


def max_log_wealth(bet: float, sample: Sample, seed: int) -> float:
    """Bet on a sample prompt by prompt, in a random order, and return the logarithm of the largest wealth.

    By Ville's inequality exp(-log wealth) is a p-value of the mean being `null_mean` or more, for prompts in an order
    that is independent of their values. A file may list the easy ones first, so they are shuffled.
    """
    values = np.random.default_rng(seed).permutation(sample.values)
    return float(np.cumsum(np.log1p(bet * (sample.null_mean - values))).max(initial=0.0))


def explain_failure(sample: Sample, confidence_level: float) -> str:
    """Explain what a failed test needs, from all prompts that there are: log wealth grows in proportion to them."""
    count = len(sample.values)
    growth, needed_wealth = sample.best_bet()[1] / count, -math.log(1 - confidence_level)
    if growth <= 0:
        opposite = Sample(1 - sample.values, 1 - sample.null_mean)
        if opposite.best_bet()[1] >= needed_wealth:
            return "they contradict it, so more prompts of the same kind will not help; relax the bound"
        least = Sample(np.zeros(1), sample.null_mean).best_bet()[1]  # the growth if no prompt spoke against it
        needed = math.ceil(needed_wealth / least / (1 - _TUNING_SHARE))
        return f"they are too few to tell: trace several times {max(needed, count):,} of the same kind"
    needed = math.ceil(needed_wealth / growth / (1 - _TUNING_SHARE))
    more = max(needed - count, math.ceil(count / 10))
    if more > _MOST_TIMES_MORE * count:
        return f"they barely support it, so over {_MOST_TIMES_MORE:,} times as many are needed; relax the bound"
    return f"trace about {more:,} more of the same kind, or relax the bound"
