"""What branches say in the simulator: along recorded answers, or drawn from a model of how often they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.calibration import trace as traces
from ruyi_flow.calibration.trace import Header, Record
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Scale, Score
from ruyi_flow.routing.start import Reading
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.sim.shapes import geometry

__all__ = ["Drawn", "Recorded", "Script", "Scripts", "scripts_of"]

_SAID = 1
"""The token that the last exit says at an even position of a drawn answer; what matters of tokens is who agrees."""


@dataclass(frozen=True, slots=True)
class Script:
    """What the branches say along one answer."""

    looks: Mapping[int, Sequence[tuple[int, float]]]
    """By exit: a token and a confidence for each position of the answer."""
    reading: Reading
    """What the first branch makes of the prompt."""
    vocab_size: int

    @property
    def last(self) -> Sequence[tuple[int, float]]:
        """The last exit's."""
        return self.looks[max(self.looks)]


class Scripts(Protocol):
    """Where scripts come from."""

    def prompt(self, number: int) -> int:
        """Tokens of a request's prompt, where recorded; else 0."""
        ...

    def script(self, number: int, length: int) -> Script:
        """For a request's answer of so many tokens; 0 for as many as recorded."""
        ...


class Recorded:
    """Scripts from a trace: every branch's tokens and confidences along the last exit's answers.

    Where a branch decides another token than the last exit's, what follows is still what was recorded after the last
    exit's own: a trace cannot know better.

    Args:
        header, records: of the trace.
        scale: what confidence means; None is the likeliest token's probability.

    Raises:
        ConfigError: the trace is empty, or lacks the score or a temperature that the scale needs.
    """

    def __init__(self, header: Header, records: Sequence[Record], scale: Scale | None) -> None:
        if not records:
            raise ConfigError("the trace is empty: it has no answer to follow")
        self._header, self._records, self._scale = header, records, scale
        self._last = header.exits[-1]
        score = scale.score if scale else Score.MAX_PROBABILITY
        if score not in header.scores:
            raise ConfigError(f"the trace has no score {score.value!r}; it has {', '.join(header.scores)}")
        self._score = header.scores.index(score)
        temperatures = {p: scale.curves[p].temperature if scale and p in scale.curves else 1.0 for p in header.exits}
        missing = [t for t in temperatures.values() if t not in header.temperatures]
        if missing:
            raise ConfigError(f"the trace has no temperature {missing[0]:g}; it has {list(header.temperatures)}")
        self._temperature = {p: header.temperatures.index(t) for p, t in temperatures.items()}
        self._known: dict[int, Script] = {}

    def prompt(self, number: int) -> int:
        """See `Scripts`."""
        return self._records[number % len(self._records)].prompt_tokens

    def answer(self, number: int) -> int:
        """Tokens of a request's answer."""
        return len(self._records[number % len(self._records)].answer)

    def least(self) -> tuple[int, int]:
        """The fewest tokens of a prompt, and of an answer."""
        return min(r.prompt_tokens for r in self._records), min(len(r.answer) for r in self._records)

    def script(self, number: int, length: int) -> Script:
        """See `Scripts`; an answer longer than recorded goes round."""
        i = number % len(self._records)
        if i not in self._known:
            self._known[i] = self._read(self._records[i])
        return self._known[i]

    def _read(self, record: Record) -> Script:
        looks = {}
        for p, e in record.exits.items():
            sure: NDArray[Any] = e.scores[:, self._score, self._temperature[p]]
            if self._scale is not None and p in self._scale.curves:
                curve = self._scale.curves[p]
                sure = np.interp(sure, curve.scores, curve.chances)
            looks[p] = list(zip(e.tokens.tolist(), sure.tolist(), strict=True))
        first = record.exits[min(record.exits)]
        reading = Reading(record.prompt_tokens, first.prompt_loss, first.prompt_entropy, looks[min(looks)][0][1])
        return Script(looks, reading, 2**31 - 1)


class Drawn:
    """Scripts from a model, where there is no trace.

    Each position is easy or hard: a normal value that all branches share by `correlation`. A branch's chance to agree
    with the last exit there is the normal distribution's of (threshold + spread * value), with the threshold such that
    the mean chance is the branch's agreement; its confidence is that chance, so it is calibrated. Whether it agrees is
    drawn with that chance. `spread` is how well branches know: 0 makes every position as likely as the mean.

    Args:
        agreement: by exit, the last one's being 1.
        spread, correlation: see above.
        seed: of the draws; a request's own depend on its number too.
    """

    def __init__(
        self, agreement: Mapping[int, float], *, spread: float = 0.9, correlation: float = 0.55, seed: int = 0
    ) -> None:
        self._exits, self._spread, self._seed = sorted(agreement), spread, seed
        self._shared = math.sqrt(correlation), math.sqrt(1 - correlation)
        early = [_quantile(agreement[p]) * math.sqrt(1 + spread**2) for p in self._exits[:-1]]
        self._middles = np.array(early)[:, None]

    def prompt(self, number: int) -> int:
        """See `Scripts`."""
        return 0

    def script(self, number: int, length: int) -> Script:
        """See `Scripts`."""
        length = max(1, length)
        random = np.random.default_rng((self._seed, number))
        shared = random.standard_normal(length)
        said = (np.arange(length) % 1000 + _SAID).tolist()
        size = len(self._exits) - 1, length
        values = self._shared[0] * shared + self._shared[1] * random.standard_normal(size)
        sure = _cdf(self._middles + self._spread * values)
        tokens = np.where(random.random(size) < sure, said, 0).tolist()
        looks = {p: list(zip(t, c, strict=True)) for p, t, c in zip(self._exits, tokens, sure.tolist(), strict=False)}
        looks[self._exits[-1]] = [(token, 1.0) for token in said]
        first = looks[self._exits[0]]
        mean = sum(c for _, c in first) / length
        loss = -math.log(max(1e-3, mean))
        return Script(looks, Reading(1, loss, loss, first[0][1]), 2**31 - 1)


def scripts_of(scenario: Scenario, profiles: Sequence[Profile], scale: Scale | None, where: str) -> Scripts:
    """What the branches say in a scenario: along its trace, or drawn by its behaviour.

    Args:
        scenario: checked.
        profiles: of its nodes.
        scale: of its policy; what confidence means.
        where: its file's name, for messages.

    Raises:
        ConfigError: the trace cannot be read, is of another family than the scenario's or the profiles', or lacks what
            the scale needs; or there is neither a trace nor a behaviour.
    """
    if scenario.trace is not None:
        try:
            header, records = traces.read_trace(scenario.trace)
        except ConfigError as error:
            raise ConfigError(f"{where}: trace: {error}") from None
        _check_family(header, scenario, profiles, where)
        try:
            return Recorded(header, records, scale)
        except ConfigError as error:
            raise ConfigError(f"{where}: trace: {scenario.trace}: {error}") from None
    exits = scenario.all_exits
    agreement = {} if scenario.behaviour is None else dict(scenario.behaviour.agreement)
    if scenario.behaviour is None and len(exits) > 1:
        raise ConfigError(
            f"{where}: trace: nobody knows what the branches say; name a trace (ruyi-flow trace), or a behaviour, "
            f"as in behaviour: {{agreement: {{{exits[0]}: 0.7}}}}"
        )
    options = {} if scenario.behaviour is None else scenario.behaviour.model_dump(exclude={"agreement"})
    return Drawn({**agreement, exits[-1]: 1.0}, seed=scenario.seed, **options)


def _check_family(header: Header, scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """Refuse a trace of another family."""
    trace = f"{where}: trace: {scenario.trace} is of"
    if header.exits != scenario.all_exits:
        raise ConfigError(
            f"{trace} a family with exits {list(header.exits)}, this one has {list(scenario.all_exits)}; trace this "
            f"family (ruyi-flow trace)"
        )
    for node, profile in zip(scenario.nodes, profiles, strict=True):
        if header.hidden_size != profile.hidden_size:
            raise ConfigError(
                f"{trace} a family whose states have {header.hidden_size} values, the costs of {node.name!r} of one "
                f"with {profile.hidden_size}; trace this family"
            )
        if node.hardware is not None and header.branch_layers:
            shape = geometry(scenario.family, scenario.exits, where)
            if header.branch_layers != shape.branch_layers:
                raise ConfigError(
                    f"{trace} a family with {list(header.branch_layers)} layers in its branches, {scenario.family} has "
                    f"{list(shape.branch_layers)}; trace this family"
                )
        if profile.kind == "measured" and profile.family != header.family:
            raise ConfigError(
                f"{trace} family {header.family[:12]}, the profile of {profile.family[:12]}; trace and profile the "
                f"same one"
            )


def _cdf(x: Any) -> Any:
    """Of the normal distribution, by Abramowitz and Stegun 7.1.26: an error of at most 1.5e-7, without scipy."""
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    upper = 0.5 * series * np.exp(-z * z)
    return np.where(np.asarray(x) >= 0, 1 - upper, upper)


def _quantile(share: float) -> float:
    """Of the normal distribution."""
    return NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
