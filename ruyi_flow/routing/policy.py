"""The routing policy: at which exit a token is decided. Pure: no torch, clock, socket or randomness.

Every mode is a threshold per early exit and the deepest exit that may be asked, which is always sure. In `cascade` the
threshold is of a running confidence, and an exit that fell below it leaves the rest of the answer to deeper ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ruyi_flow.errors import RequestError
from ruyi_flow.routing.confidence import Scale
from ruyi_flow.routing.start import Start
from ruyi_flow.types import Mode, Reason, is_token_id

__all__ = ["NEVER", "WINDOW", "Judge", "Policy", "Routing", "pays"]

NEVER = math.inf
"""A threshold that no confidence reaches."""

WINDOW = 8
"""Tokens of a running confidence, unless a policy says otherwise."""


@dataclass(frozen=True, slots=True)
class Routing:
    """What a request asks for; `Policy.resolve` turns it into thresholds for a family's exits."""

    mode: Mode = Mode.EXACT
    exit: int | None = None
    """`fixed` only: the exit that decides; None takes the last one."""
    threshold: float | None = None
    """`token` and `cascade`: the confidence that every early exit needs."""
    thresholds: Mapping[int, float] | None = None
    """`token` and `cascade`: the confidence that each early exit needs; an exit that is not named is never sure."""
    window: int = WINDOW
    """`cascade` only: the confidence that counts is the mean over this many tokens, missing ones counted as sure."""
    back: float | None = None
    """`cascade` only: an exit that fell below its threshold decides again when its mean over a whole window is this
    high; None is never."""
    start: Start | None = None
    """`cascade` only: which exit begins, from the prompt; None begins with the shallowest."""
    fallback: bool = False
    """When the next node cannot be reached, hangs or is full, the deepest exit before it decides: no error."""
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
        if isinstance(self.window, bool) or not isinstance(self.window, int) or not 1 <= self.window <= 1024:
            raise RequestError(f"window is {self.window!r}; it must be a whole number of tokens from 1 to 1024")
        if not isinstance(self.fallback, bool):
            raise RequestError(f"fallback is {self.fallback!r}; it must be True or False")
        if not isinstance(self.start, Start | None) or not isinstance(self.scale, Scale | None):
            raise RequestError("start and scale must be a Start and a Scale; a policy file has both")
        thresholds = [value for value in (self.threshold, self.back) if value is not None]
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
    window: int = WINDOW
    back: float | None = None
    start: Start | None = None
    """For the entry node, which goes on with `starting_at`."""
    fallback: bool = False
    limited: bool = False
    """Whether a node's operator forbids what is deeper than `deepest`."""

    @classmethod
    def resolve(cls, routing: Routing, exits: Sequence[int]) -> Policy:
        """The policy that a request means for a family with these exits.

        Raises:
            RequestError: an exit that the family does not have, or parameters that the mode does not take.
        """
        mode = routing.mode
        if routing.exit is not None and mode is not Mode.FIXED:
            raise RequestError(f"exit={routing.exit} goes with mode 'fixed', not with '{mode}'")
        thresholded = mode in (Mode.TOKEN, Mode.CASCADE)
        if not thresholded and (routing.threshold is not None or routing.thresholds is not None):
            raise RequestError(f"thresholds go with modes 'token' and 'cascade', not with '{mode}'")
        if mode is not Mode.CASCADE and (routing.back is not None or routing.start is not None):
            raise RequestError(f"back and start go with mode 'cascade', not with '{mode}'")
        if mode is not Mode.CASCADE and routing.window != WINDOW:
            raise RequestError(f"window goes with mode 'cascade', not with '{mode}'")
        for p in () if routing.scale is None else routing.scale.curves:
            _check_exit(p, exits)
        deepest = exits[-1]
        if mode is Mode.FIXED and routing.exit is not None:
            deepest = routing.exit
            _check_exit(deepest, exits)
        shallower = [p for p in exits if p < deepest]
        same = {name: getattr(routing, name) for name in ("draft", "scale", "window", "back", "start", "fallback")}
        if not thresholded:
            return cls(mode, dict.fromkeys(shallower, NEVER), deepest, **same)
        if routing.thresholds is None and routing.threshold is None:
            raise RequestError(f"mode '{mode}' needs a threshold (0 … 1), one for all exits or one an exit")
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
        if routing.start is not None:
            for p in routing.start.weights:
                _check_exit(p, exits)
        return cls(mode, chosen, deepest, **same)

    def starting_at(self, exit: int) -> Policy:
        """With no exit shallower than this one ever sure; the choice is made, so `start` is gone."""
        chosen = {p: NEVER if p < exit else t for p, t in self.thresholds.items()}
        return replace(self, thresholds=chosen, start=None)

    def limited_to(self, exit: int) -> Policy:
        """With this exit as the deepest, by order of a node's operator."""
        if exit >= self.deepest:
            return self
        chosen = {p: t for p, t in self.thresholds.items() if p < exit}
        return replace(self, thresholds=chosen, deepest=exit, limited=True)

    def looks(self, exit: int) -> bool:
        """Whether the branch at this exit can ever be sure, so that it is worth running."""
        return exit == self.deepest or self.thresholds[exit] <= 1.0


class Judge:
    """One exit's say in one session.

    In `cascade` it remembers what it saw, position by position, so that a rewind takes it back.

    Args:
        policy: the session's.
        exit: one that the policy may ask.
    """

    __slots__ = ("_always", "_back", "_moves", "_seen", "_threshold", "_window", "exit", "retired")

    def __init__(self, policy: Policy, exit: int) -> None:
        self.exit = exit
        self._always: Reason | None = None
        if exit == policy.deepest:
            fixed = Reason.FIXED if policy.mode is Mode.FIXED else Reason.DEEPEST
            self._always = Reason.LIMIT if policy.limited else fixed
        self._threshold = policy.thresholds.get(exit, NEVER)
        runs = policy.mode is Mode.CASCADE and self._always is None and self._threshold <= 1.0
        self._window, self._back = policy.window if runs else 0, policy.back
        self._seen: list[tuple[int, float]] = []
        self._moves: list[int] = []
        """Positions where it left the answer to deeper exits, took it back, left it again, …"""
        self.retired = False
        """Whether it will never be sure again, unless it is rewound."""

    def sure(self, position: int, confidence: float) -> Reason | None:
        """Why the branch may decide the token after a position, or None when it must be asked deeper.

        To be called once for each position, in order; after a rewind, again.
        """
        if self._always is not None:
            return self._always
        if not self._window:
            return Reason.CONFIDENT if confidence >= self._threshold else None
        self._seen.append((position, confidence))
        recent = self._seen[-self._window :]
        missing = self._window - len(recent)
        running = (sum([c for _, c in recent]) + missing) / self._window
        if len(self._moves) % 2 == 0:
            if running < self._threshold:
                self._moves.append(position)
                self.retired = self._back is None
        elif self._back is not None and not missing and running >= self._back:
            self._moves.append(position)
        return Reason.CONFIDENT if len(self._moves) % 2 == 0 else None

    @property
    def silent(self) -> bool:
        """Whether it cannot decide the next token, whatever its confidence."""
        return self._always is None and (self._threshold > 1.0 or self.retired)

    def rewind(self, position: int) -> None:
        """Forget what it saw from `position` on."""
        while self._seen and self._seen[-1][0] >= position:
            self._seen.pop()
        while self._moves and self._moves[-1] >= position:
            self._moves.pop()
            self.retired = False  # who has a way back never was


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
