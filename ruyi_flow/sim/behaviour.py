"""What branches predict in the simulator: taken from recorded answers, or drawn from a model of their agreement."""

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
from ruyi_flow.sim.shapes import family_shape

__all__ = ["DrawnScripts", "RecordedScripts", "Script", "Scripts", "scripts_for"]

_FIRST_TOKEN = 1
"""The last exit's first token in a drawn answer. Only agreement of tokens matters, not which ones they are."""


@dataclass(frozen=True, slots=True)
class Script:
    """What the branches predict along one answer."""

    looks: Mapping[int, Sequence[tuple[int, float]]]
    """The predicted token and its confidence at each position of the answer, by exit."""
    prompt_reading: Reading
    """The first branch's statistics of the prompt, which choose the exit to start at."""
    vocab_size: int

    @property
    def last(self) -> Sequence[tuple[int, float]]:
        """The last exit's predictions."""
        return self.looks[max(self.looks)]


class Scripts(Protocol):
    """A source of scripts."""

    def lengths(self, number: int) -> tuple[int, int]:
        """Return the recorded tokens of a request's prompt and answer; 0 if they are not recorded."""
        ...

    def least(self) -> tuple[int, int]:
        """Return the fewest recorded tokens of any prompt, and of any answer; 0 if they are not recorded."""
        ...

    def script(self, number: int, length: int) -> Script:
        """Return the script of a request's answer of `length` tokens; 0 for the recorded length."""
        ...


class RecordedScripts:
    """Scripts from a trace: every branch's tokens and confidences along the last exit's answers.

    After a branch has decided a token that differs from the last exit's, the script still continues as recorded: what
    the branches would predict then is not in the trace.

    Args:
        header, records: the content of the trace.
        scale: how confidence is computed. Default (None): the probability of the most probable token.

    Raises:
        ConfigError: the trace is empty, or does not contain the score or a temperature of the scale.
    """

    def __init__(self, header: Header, records: Sequence[Record], scale: Scale | None) -> None:
        if not records:
            raise ConfigError("the trace is empty; record answers (ruyi-flow trace)")
        self._header, self._records, self._scale = header, records, scale
        self._last = header.exits[-1]
        score = scale.score if scale else Score.MAX_PROBABILITY
        if score not in header.scores:
            raise ConfigError(
                f"the trace has no score {score.value!r}, only {', '.join(header.scores)}; record it again"
            )
        self._score = header.scores.index(score)
        temperatures = {p: scale.curves[p].temperature if scale and p in scale.curves else 1.0 for p in header.exits}
        missing = [t for t in temperatures.values() if t not in header.temperatures]
        if missing:
            raise ConfigError(
                f"the trace has no temperature {missing[0]:g}, only {list(header.temperatures)}; record it again"
            )
        self._temperature = {p: header.temperatures.index(t) for p, t in temperatures.items()}
        self._known: dict[int, Script] = {}

    def lengths(self, number: int) -> tuple[int, int]:
        """See `Scripts.lengths`."""
        record = self._records[number % len(self._records)]
        return record.prompt_tokens, len(record.answer)

    def least(self) -> tuple[int, int]:
        """See `Scripts.least`."""
        return min(r.prompt_tokens for r in self._records), min(len(r.answer) for r in self._records)

    def script(self, number: int, length: int) -> Script:
        """See `Scripts.script`. An answer that is longer than recorded repeats the record."""
        i = number % len(self._records)
        if i not in self._known:
            self._known[i] = self._convert(self._records[i])
        return self._known[i]

    def _convert(self, record: Record) -> Script:
        looks = {}
        for p, e in record.exits.items():
            confidence: NDArray[Any] = e.scores[:, self._score, self._temperature[p]]
            if self._scale is not None and p in self._scale.curves:
                curve = self._scale.curves[p]
                confidence = np.interp(confidence, curve.scores, curve.chances)
            looks[p] = list(zip(e.tokens.tolist(), confidence.tolist(), strict=True))
        first = record.exits[min(record.exits)]
        reading = Reading(record.prompt_tokens, first.prompt_loss, first.prompt_entropy, looks[min(looks)][0][1])
        return Script(looks, reading, 2**31 - 1)


class DrawnScripts:
    """Scripts from a model, for when there is no trace.

    At each position every early branch has a normal value z, easy or hard; `correlation` is the correlation of the
    branches' values. The branch agrees with the last exit with probability Φ(m + spread * z), where m is such that
    the mean probability is the branch's agreement. That probability is also its confidence, which is so calibrated.
    With a `spread` of 0 every position has the mean probability.

    Args:
        agreement: each exit's rate of agreement with the last exit; 1 for the last exit itself.
        spread, correlation: see above.
        seed: seed of the draws, which also depend on the request's number.
    """

    def __init__(
        self, agreement: Mapping[int, float], *, spread: float = 0.9, correlation: float = 0.55, seed: int = 0
    ) -> None:
        self._exits, self._spread, self._seed = sorted(agreement), spread, seed
        self._shared = math.sqrt(correlation), math.sqrt(1 - correlation)
        early = [_quantile(agreement[p]) * math.sqrt(1 + spread**2) for p in self._exits[:-1]]
        self._middles = np.array(early)[:, None]

    def lengths(self, number: int) -> tuple[int, int]:
        """See `Scripts.lengths`."""
        return 0, 0

    def least(self) -> tuple[int, int]:
        """See `Scripts.least`."""
        return 0, 0

    def script(self, number: int, length: int) -> Script:
        """See `Scripts.script`."""
        length = max(1, length)
        random = np.random.default_rng((self._seed, number))
        shared = random.standard_normal(length)
        tokens_of_last = (np.arange(length) % 1000 + _FIRST_TOKEN).tolist()
        size = len(self._exits) - 1, length
        values = self._shared[0] * shared + self._shared[1] * random.standard_normal(size)
        confidence = _cdf(self._middles + self._spread * values)
        tokens = np.where(random.random(size) < confidence, tokens_of_last, 0).tolist()
        looks = {
            p: list(zip(t, c, strict=True)) for p, t, c in zip(self._exits, tokens, confidence.tolist(), strict=False)
        }
        looks[self._exits[-1]] = [(token, 1.0) for token in tokens_of_last]
        first = looks[self._exits[0]]
        mean = sum(c for _, c in first) / length
        loss = -math.log(max(1e-3, mean))
        return Script(looks, Reading(1, loss, loss, first[0][1]), 2**31 - 1)


def scripts_for(scenario: Scenario, profiles: Sequence[Profile], scale: Scale | None, where: str) -> Scripts:
    """Return a scenario's scripts: from its trace, or drawn from its behaviour.

    Args:
        scenario: the deployment.
        profiles: its nodes' profiles.
        scale: how its policy computes confidence.
        where: name of the scenario's file, for error messages.

    Raises:
        ConfigError: the trace cannot be read, is of another family than the scenario's or the profiles', or does not
            contain what the scale needs; or there is neither a trace nor a behaviour.
    """
    if scenario.trace is not None:
        try:
            header, records = traces.read_trace(scenario.trace)
        except ConfigError as error:
            raise ConfigError(f"{where}: trace: {error}") from None
        _check_family(header, scenario, profiles, where)
        try:
            return RecordedScripts(header, records, scale)
        except ConfigError as error:
            raise ConfigError(f"{where}: trace: {scenario.trace}: {error}") from None
    exits = scenario.all_exits
    agreement = {} if scenario.behaviour is None else dict(scenario.behaviour.agreement)
    if scenario.behaviour is None and len(exits) > 1:
        raise ConfigError(
            f"{where}: trace: it is not known what the branches predict; give a trace (ruyi-flow trace), or a "
            f"behaviour, as in behaviour: {{agreement: {{{exits[0]}: 0.7}}}}"
        )
    options = {} if scenario.behaviour is None else scenario.behaviour.model_dump(exclude={"agreement"})
    return DrawnScripts({**agreement, exits[-1]: 1.0}, seed=scenario.seed, **options)


def _check_family(header: Header, scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """Refuse a trace of another family."""
    pairs: list[tuple[str, Any, str, Any]] = [("exits", [*header.exits], "the nodes have", [*scenario.all_exits])]
    for node, profile in zip(scenario.nodes, profiles, strict=True):
        costs = f"the costs of {node.name!r} are of a family with"
        pairs.append(("hidden size", header.hidden_size, costs, profile.hidden_size))
        if node.hardware is not None and header.branch_layers:
            layers = family_shape(scenario.family, scenario.exits, where).branch_layers
            pairs.append(("layers per branch", [*header.branch_layers], f"{scenario.family} has", [*layers]))
        if profile.kind == "measured":
            pairs.append(("fingerprint", header.family, costs, profile.family))
    for what, traced, owner, wanted in pairs:
        if traced != wanted:
            raise ConfigError(
                f"{where}: trace: {scenario.trace} is of a family with {what} {traced}, but {owner} {wanted}; trace "
                "this family (ruyi-flow trace)"
            )


def _cdf(x: Any) -> Any:
    """Return Φ(x) of the normal distribution, by Abramowitz and Stegun 7.1.26: the error is at most 1.5e-7."""
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    upper = 0.5 * series * np.exp(-z * z)
    return np.where(np.asarray(x) >= 0, 1 - upper, upper)


def _quantile(share: float) -> float:
    """Return the normal distribution's quantile."""
    return NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
