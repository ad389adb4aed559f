"""The routing policy: at which exit a token is decided. Pure: no torch, clock, socket or randomness.

Every mode is a threshold per early exit and the deepest exit that may be asked, which is always sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ruyi_flow.errors import RequestError
from ruyi_flow.routing.confidence import Scale
from ruyi_flow.types import Mode, Reason, is_token_id

__all__ = ["NEVER", "Policy", "Routing", "pays"]

NEVER = math.inf
"""A threshold that no confidence reaches."""


@dataclass(frozen=True, slots=True)
class Routing:
    """What a request asks for; `Policy.resolve` turns it into thresholds for a family's exits."""

    mode: Mode = Mode.EXACT
    exit: int | None = None
    """`fixed` only: the exit that decides; None takes the last one."""
    threshold: float | None = None
    """`token` only: the confidence that every early exit needs."""
    thresholds: Mapping[int, float] | None = None
    """`token` only: the confidence that each early exit needs; an exit that is not named is never sure."""
    draft: int = 4
    """At most this many tokens are drafted past an unsure position before it is asked deeper; 0 asks at once. With a
    scale, as many of them as are expected to pay."""
    scale: Scale | None = None
    """What the thresholds' confidence means; None is the likeliest token's probability, uncalibrated."""
    family: str | None = None
    """Fingerprint of the family that it was calibrated for; another one's entry node refuses it."""

    def __post_init__(self) -> None:
        if isinstance(self.draft, bool) or not isinstance(self.draft, int) or not 0 <= self.draft <= 1024:
            raise RequestError(f"draft is {self.draft!r}; it must be a whole number from 0 (ask at once) to 1024")
        if self.exit is not None and not is_token_id(self.exit):  # the wire has as many bits for both
            raise RequestError(f"exit is {self.exit!r}; it must be one of the family's exits, a whole number")
        thresholds = [] if self.threshold is None else [self.threshold]
        if self.thresholds is not None:
            if not isinstance(self.thresholds, Mapping) or not all(is_token_id(p) for p in self.thresholds):
                raise RequestError(f"thresholds is {self.thresholds!r}; it must map exits to numbers, as in {{5: 0.9}}")
            thresholds += self.thresholds.values()
        for value in thresholds:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 <= value <= 1e9 or value == NEVER):
                raise RequestError(
                    f"a threshold is {value!r}; it must be a number from 0 (always sure) to 1 (above it: never sure)"
                )


@dataclass(frozen=True, slots=True)
class Policy:
    """Thresholds for the exits of one session.

    A branch is sure when its confidence is at least its threshold: 0 is always sure, above 1 never.
    """

    mode: Mode
    thresholds: Mapping[int, float]
    """Of every exit above the deepest."""
    deepest: int
    """The exit that decides whatever comes to it."""
    draft: int
    scale: Scale | None = None
    """What confidence means; None is the likeliest token's probability, uncalibrated."""

    @classmethod
    def resolve(cls, routing: Routing, exits: Sequence[int]) -> Policy:
        """The policy that a request means for a family with these exits.

        Raises:
            RequestError: an exit that the family does not have, or parameters that the mode does not take.
        """
        mode = routing.mode
        if routing.exit is not None and mode is not Mode.FIXED:
            raise RequestError(f"exit={routing.exit} goes with mode 'fixed', not with '{mode}'")
        if mode is not Mode.TOKEN and (routing.threshold is not None or routing.thresholds is not None):
            raise RequestError(f"thresholds go with mode 'token', not with '{mode}'")
        deepest = exits[-1]
        if mode is Mode.FIXED and routing.exit is not None:
            deepest = routing.exit
            _check_exit(deepest, exits)
        shallower = [p for p in exits if p < deepest]
        if mode is not Mode.TOKEN:
            return cls(mode, dict.fromkeys(shallower, NEVER), deepest, routing.draft, routing.scale)
        if routing.thresholds is None and routing.threshold is None:
            raise RequestError("mode 'token' needs a threshold (0 … 1), one for all exits or one an exit")
        if routing.thresholds is not None and routing.threshold is not None:
            raise RequestError("give either threshold (for all exits) or thresholds (one an exit), not both")
        if routing.thresholds is None:
            chosen = dict.fromkeys(shallower, float(routing.threshold or 0.0))
        else:
            for p in routing.thresholds:
                _check_exit(p, exits)
                if p == deepest:
                    raise RequestError(
                        f"exit {p} is the last one: it decides whatever comes to it, without a threshold"
                    )
            chosen = {p: float(routing.thresholds.get(p, NEVER)) for p in shallower}
        return cls(mode, chosen, deepest, routing.draft, routing.scale)

    def looks(self, exit: int) -> bool:
        """Whether the branch at this exit can ever be sure, so that it is worth running."""
        return exit == self.deepest or self.thresholds[exit] <= 1.0

    def sure(self, exit: int, confidence: float) -> Reason | None:
        """Why the branch at this exit may decide, or None when it must be asked deeper."""
        if exit == self.deepest:
            return Reason.FIXED if self.mode is Mode.FIXED else Reason.DEEPEST
        return Reason.CONFIDENT if confidence >= self.thresholds[exit] else None


def pays(kept: float, expected: float, spent_s: float, likely: float, step_s: float) -> bool:
    """Whether drafting one token more is expected to settle more tokens a second than asking now.

    A round that drafts k tokens settles `1 + c1 + c1 c2 + …` of them, where c is each draft's chance to hold; one more
    pays where that, over the time it all takes, grows (as in Leviathan, Kalman and Matias 2023, section 3.5, but with
    the chance of each token and not their mean).

    Args:
        kept: chance that all drafts so far hold.
        expected: tokens that the round settles with them.
        spent_s: what the round takes with them.
        likely: chance that the next one holds, if those before it do.
        step_s: what drafting it takes.
    """
    return kept * likely * spent_s > expected * step_s


def _check_exit(exit: int, exits: Sequence[int]) -> None:
    if exit not in exits:
        raise RequestError(f"exit {exit} is not one of the family's exits {list(exits)}")
