"""Testing that a mean is below a bound, prompt by prompt, by betting on it (Waudby-Smith and Ramdas 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ruyi_flow.calibration.curves import Floats
from ruyi_flow.errors import ConfigError

__all__ = ["best_bet", "check_shares", "grown", "lacking", "split"]

_TUNING = 0.3
"""Share of the prompts that choose curves and thresholds."""

_FAR = 1000
"""Times as many prompts are more than anybody will trace."""


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the prompts that choose, and of those that test; ascending.

    Testing takes more of them: how far below the bound a rate must be to pass falls with the root of their number, and
    curves and thresholds are fitted on tokens, of which a few hundred prompts have plenty.

    Raises:
        ConfigError: there is one prompt only.
    """
    if count < 2:
        raise ConfigError("one prompt cannot both choose thresholds and test them; trace some hundreds")
    order = np.random.default_rng(seed).permutation(count).tolist()
    first = max(1, round(_TUNING * count))
    return sorted(order[:first]), sorted(order[first:])


def grown(bet: float, x: Floats, null: float, seed: int) -> float:
    """The logarithm of the most that betting on a mean below `null` has grown 1 to, prompt by prompt.

    By Ville's inequality exp(-grown) is a p-value of the mean being `null` or more, for prompts in an order that says
    nothing about them. A file may have the easy ones first, so they come in a random one.
    """
    x = np.random.default_rng(seed).permutation(x)
    return float(np.cumsum(np.log1p(bet * (null - x))).max(initial=0.0))


def best_bet(x: Floats, null: float) -> tuple[float, float]:
    """The bet that grows most on prompts for tuning, and the logarithm of what it grows to; Kelly's, out of a grid."""
    bets = np.linspace(0.05, 0.95, 19) / (1 - null)  # 1 / (1 - null) could lose everything
    return max(((float(b), float(np.log1p(b * (null - x)).sum())) for b in bets), key=lambda pair: pair[1])


def check_shares(given: Mapping[str, float]) -> None:
    """Refuse numbers that do not lie between 0 and 1.

    Raises:
        ConfigError: which.
    """
    for name, value in given.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name} is {value!r}; it must lie between 0 and 1")


def lacking(x: Floats, null: float, sureness: float) -> str:
    """What a test that failed lacks, by all prompts that there are: the capital's logarithm grows with their number."""
    growth = best_bet(x, null)[1] / len(x)
    if growth <= 0:
        return "these speak against it, so more of the same kind will not help; allow more"
    need = math.ceil(-math.log(1 - sureness) / growth / (1 - _TUNING))
    more = max(need - len(x), math.ceil(len(x) / 10))
    if more > _FAR * len(x):
        return "these hardly speak for it, so that it would take very many more of the same kind; allow more"
    return f"trace about {more:,} more of the same kind, or allow more"
