"""The routing policy: which exit decides a token. Pure: no torch, clock, socket or randomness.

Every mode is one threshold per early exit, and the deepest exit that may be asked, which is always confident. In
`cascade` the threshold applies to a running mean, and an exit whose mean fell below it leaves the rest of the answer to
deeper exits.

A new routing option is a field of `Routing` and of its message in protos/, and the code that uses it. The command line,
the SDK, topology files and the wire take their options from the fields of `Routing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ruyi_flow.errors import RequestError, shown
from ruyi_flow.routing.confidence import Scale
from ruyi_flow.routing.start import Start
from ruyi_flow.types import MAX_COUNT, Mode, Reason, check_number, is_text, parse_mode, to_float, to_int, to_token_id

__all__ = ["NEVER", "WINDOW", "Judge", "Policy", "Routing"]

NEVER = math.inf
"""A threshold that no confidence reaches."""

WINDOW = 8
"""Default number of tokens over which `cascade` averages confidence."""

_OF_A_MODE = ("mode", "exit", "threshold", "thresholds", "window", "back", "start", "scale", "family")
"""Options that belong to a mode: a request that sets one of them replaces all of them."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Routing options: what decides the tokens of an answer. `Policy.resolve` turns them into thresholds.

    The command line shows the field docstrings as the help of its options.
    """

    mode: Mode = Mode.EXACT
    """Mode that decides a token: fixed, token, cascade or exact."""
    exit: int | None = None
    """Mode fixed, which this implies: the exit that decides every token. Default: the last one."""
    threshold: float | None = None
    """Modes token and cascade: the confidence (0 … 1) that an early exit needs to decide; above 1 is never reached."""
    thresholds: Mapping[int, float] | None = None
    """Modes token and cascade: the threshold of each early exit; an exit that is not named never decides."""
    window: int = WINDOW
    """Mode cascade: number of tokens over which confidence is averaged; missing ones count as 1. Default: 8."""
    back: float | None = None
    """Mode cascade: return to a shallower exit once its mean confidence reaches this. Default: never return."""
    start: Start | None = None
    """Mode cascade: the rule of a policy file that chooses the first exit from the prompt. Default: the shallowest."""
    fallback: bool = False
    """Let the last reachable exit decide when the next node is lost, full or answers garbage, instead of failing."""
    draft: int = 4
    """Draft at most this many tokens past an undecided position before asking the next stage; 0 asks at once."""
    scale: Scale | None = None
    """Meaning of confidence, from a policy file. Default: the uncalibrated probability of the most probable token."""
    family: str | None = None
    """Fingerprint of the family that a policy file was calibrated for; other families refuse the request."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", parse_mode(self.mode))
        for name, low, high, meaning in (
            ("draft", 0, 1024, "a whole number from 0 (ask at once) to 1024"),
            ("window", 1, 1024, "a whole number of tokens from 1 to 1024"),
            ("exit", 0, MAX_COUNT, "one of the family's exits, a whole number"),
        ):
            given = getattr(self, name)
            if given is None and name == "exit":
                continue
            number = check_number(name, given, to_int(given), low=low, high=high, meaning=meaning)
            object.__setattr__(self, name, number)
        if not isinstance(self.fallback, bool):
            raise RequestError(f"fallback is {shown(self.fallback)}; it must be True or False")
        if self.family is not None and not is_text(self.family):
            raise RequestError(
                f"family is {shown(self.family)}; it must be the fingerprint that a policy file contains"
            )
        if not isinstance(self.start, Start | None) or not isinstance(self.scale, Scale | None):
            raise RequestError("start and scale must be a Start and a Scale; a policy file contains both")
        for name, exits in (
            ("scale", () if self.scale is None else self.scale.curves),
            ("start", () if self.start is None else self.start.weights),
        ):
            if any(to_token_id(p) is None for p in exits):
                raise RequestError(f"{name} is for exits {shown(list(exits))}; exits are whole numbers")
        if self.thresholds is not None:
            given = dict(self.thresholds) if isinstance(self.thresholds, Mapping) else {}
            if not given or any(to_token_id(p) is None for p in given):
                raise RequestError(
                    f"thresholds is {shown(self.thresholds)}; it must map exits to numbers, as in {{5: 0.9}}"
                )
            chosen = {to_token_id(p): _threshold(value) for p, value in given.items()}
            object.__setattr__(self, "thresholds", chosen)
        for name in ("threshold", "back"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _threshold(getattr(self, name)))

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the names of the routing options."""
        return frozenset(f.name for f in fields(cls))

    @property
    def exits(self) -> tuple[int, ...]:
        """Every exit that an option names, ascending."""
        named = {*(self.thresholds or ()), *(() if self.exit is None else (self.exit,))}
        named.update(() if self.scale is None else self.scale.curves, () if self.start is None else self.start.weights)
        return tuple(sorted(named))

    def check_family(self, fingerprint: str) -> None:
        """Check that a policy file was calibrated for the family of this fingerprint.

        Raises:
            RequestError: it was calibrated for another one.
        """
        if self.family not in (None, fingerprint):
            raise RequestError(
                f"the policy was calibrated for family {str(self.family)[:12]}; this family is {fingerprint[:12]}: "
                "calibrate a policy for it with ruyi-flow trace and ruyi-flow calibrate"
            )

    def updated(self, options: Mapping[str, Any]) -> Routing:
        """Return this routing with the options of a request.

        An option of a mode replaces all options of the mode; other options, such as `draft`, keep their values. The
        name of the present mode alone changes nothing. Without a mode, `exit` means `fixed`, and a threshold `token`.

        Raises:
            RequestError: an option has a value that it cannot have.
        """
        of_a_mode = {name: value for name, value in options.items() if name in _OF_A_MODE}
        names_own_mode = of_a_mode.keys() == {"mode"} and parse_mode(options["mode"]) is self.mode
        if not of_a_mode or names_own_mode:
            return replace(self, **options)
        implied = Mode.FIXED if "exit" in options else Mode.TOKEN
        kept = {name: getattr(self, name) for name in self.names() if name not in _OF_A_MODE}
        return Routing(**({"mode": implied} | kept | dict(options)))


@dataclass(frozen=True, slots=True)
class Policy:
    """The thresholds that decide one session.

    A branch is confident when its confidence is at least its threshold: 0 is always reached, above 1 never.
    """

    routing: Routing
    """The options that the thresholds were resolved from, without exit, thresholds and family."""
    thresholds: Mapping[int, float]
    """The threshold of every exit shallower than the deepest."""
    deepest: int
    """The exit that decides whatever reaches it."""
    limited: bool = False
    """Whether a node's operator forbids the exits after `deepest`."""

    @classmethod
    def resolve(cls, routing: Routing, exits: Sequence[int]) -> Policy:
        """Resolve a request's routing for a family with these exits.

        Raises:
            RequestError: the family does not have an exit, or the mode does not take a parameter.
        """
        mode = routing.mode
        thresholded = mode in (Mode.TOKEN, Mode.CASCADE)
        for name, modes in (
            ("exit", "'fixed'"),
            ("threshold", "'token' or 'cascade'"),
            ("thresholds", "'token' or 'cascade'"),
            ("window", "'cascade'"),
            ("back", "'cascade'"),
            ("start", "'cascade'"),
        ):
            default = WINDOW if name == "window" else None
            if getattr(routing, name) != default and f"'{mode}'" not in modes:
                raise RequestError(f"{name} requires mode {modes}; the mode is '{mode}'")
        for p in routing.exits:
            if p not in exits:
                raise RequestError(f"exit {p} is not one of the exits {list(exits)}")
        deepest = exits[-1] if routing.exit is None else routing.exit
        shallower = [p for p in exits if p < deepest]
        if not thresholded:
            chosen = dict.fromkeys(shallower, NEVER)
        elif routing.thresholds is None and routing.threshold is None:
            raise RequestError(f"mode '{mode}' requires a threshold (0 … 1): one for all exits, or one per exit")
        elif routing.thresholds is not None and routing.threshold is not None:
            raise RequestError("threshold (for all exits) and thresholds (per exit) cannot be combined; give one")
        elif routing.thresholds is None:
            chosen = dict.fromkeys(shallower, float(routing.threshold or 0.0))
        else:
            for p in routing.thresholds:
                if p == deepest:
                    raise RequestError(f"thresholds: exit {p} is the last one, which always decides; leave it out")
            chosen = {p: float(routing.thresholds.get(p, NEVER)) for p in shallower}
        rest = replace(routing, exit=None, threshold=None, thresholds=None, family=None)
        return cls(rest, chosen, deepest)

    def starting_at(self, exit: int) -> Policy:
        """Return the policy in which no exit shallower than this one decides; the start rule has been applied."""
        chosen = {p: NEVER if p < exit else t for p, t in self.thresholds.items()}
        return replace(self, routing=replace(self.routing, start=None), thresholds=chosen)

    def limited_to(self, exit: int) -> Policy:
        """Return the policy whose deepest exit is this one, as a node's operator demands."""
        if exit >= self.deepest:
            return self
        chosen = {p: t for p, t in self.thresholds.items() if p < exit}
        return replace(self, thresholds=chosen, deepest=exit, limited=True)

    def can_decide(self, exit: int) -> bool:
        """Return whether the branch at an exit can ever be confident, so that it is worth running."""
        return exit == self.deepest or self.thresholds[exit] <= 1.0


class Judge:
    """Decides for one exit in one session whether its confidence suffices.

    In `cascade` it remembers the confidence of every position, so that a rewind can forget the last ones.

    Args:
        policy: the session's policy.
        exit: an exit that the policy may ask.
    """

    __slots__ = ("_always", "_back", "_moves", "_seen", "_threshold", "_window", "exit", "retired")

    def __init__(self, policy: Policy, exit: int) -> None:
        self.exit = exit
        self._always: Reason | None = None
        mode = policy.routing.mode
        if exit == policy.deepest:
            fixed = Reason.FIXED if mode is Mode.FIXED else Reason.DEEPEST
            self._always = Reason.LIMIT if policy.limited else fixed
        self._threshold = policy.thresholds.get(exit, NEVER)
        averages = mode is Mode.CASCADE and self._always is None and self._threshold <= 1.0
        self._window, self._back = policy.routing.window if averages else 0, policy.routing.back
        self._seen: list[tuple[int, float]] = []
        self._moves: list[int] = []
        """Positions at which it left the answer to deeper exits, took it back, left it again, and so on."""
        self.retired = False
        """Whether it will never be confident again, unless it is rewound."""

    def decide(self, position: int, confidence: float) -> Reason | None:
        """Return why the branch may decide the token after a position, or None when the next stage must be asked.

        Call it once for each position, in order; after a rewind, again.
        """
        if self._always is not None:
            return self._always
        if not self._window:
            return Reason.CONFIDENT if confidence >= self._threshold else None
        self._seen.append((position, confidence))
        recent = self._seen[-self._window :]
        missing = self._window - len(recent)
        mean = (sum([c for _, c in recent]) + missing) / self._window
        if len(self._moves) % 2 == 0:
            if mean < self._threshold:
                self._moves.append(position)
                self.retired = self._back is None
        elif self._back is not None and not missing and mean >= self._back:
            self._moves.append(position)
        return Reason.CONFIDENT if len(self._moves) % 2 == 0 else None

    @property
    def never_decides(self) -> bool:
        """Whether it cannot decide the next token, whatever its confidence."""
        return self._always is None and (self._threshold > 1.0 or self.retired)

    def rewind(self, position: int) -> None:
        """Forget every position from `position` on."""
        while self._seen and self._seen[-1][0] >= position:
            self._seen.pop()
        while self._moves and self._moves[-1] >= position:
            self._moves.pop()
            self.retired = False  # an exit that may return is never retired


def _threshold(value: object) -> float:
    number = to_float(value)
    if number is None or not (0 <= number <= 1e9 or number == NEVER):
        raise RequestError(
            f"a threshold is {shown(value)}; it must be a number from 0 (always decide) to 1 (above it: never)"
        )
    return number
