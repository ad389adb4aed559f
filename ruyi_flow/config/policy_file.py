"""Policy files, which `ruyi-flow calibrate` writes and a topology or a request names.

A policy file is YAML: the family, the confidence score, the curve and the threshold of each early exit, and the bound
that was promised. Nothing else is needed to use one, since the curves travel with the session.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.examples import find
from ruyi_flow.config.yaml_files import explain, read_yaml
from ruyi_flow.errors import ConfigError, RequestError, shown
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import WINDOW, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.types import Mode, parse_mode

__all__ = ["CurvePoints", "PolicyFile", "StartRule", "curve_points", "with_policy_file"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoints(_Model):
    """The points of a calibration curve; see `routing.confidence.Curve`."""

    temperature: float = Field(gt=0)
    """Temperature of the branch's distribution."""
    scores: tuple[float, ...] = Field(min_length=1)
    """Scores of the curve's points, ascending."""
    chances: tuple[float, ...] = Field(min_length=1)
    """Probabilities of agreement at these points, ascending."""


def curve_points(curves: Mapping[int, Curve]) -> dict[int, CurvePoints]:
    """Convert curves to the form of a policy file."""
    return {p: CurvePoints(temperature=c.temperature, scores=c.scores, chances=c.chances) for p, c in curves.items()}


class StartRule(_Model):
    """The rule that chooses the first exit; see `routing.start.Start`."""

    weights: dict[int, tuple[float, ...]]
    """Weights of a logistic regression on the prompt's statistics, by early exit."""
    chance: float
    """The probability that suffices for an exit to begin."""


class PolicyFile(_Model):
    """A calibrated policy."""

    family: str
    """Fingerprint of the family that it was calibrated for."""
    mode: Mode = Mode.TOKEN
    """The mode that it was calibrated for."""
    score: Score
    """The score that confidence is computed from."""
    thresholds: dict[int, float]
    """The threshold of every early exit on calibrated confidence; above 1 the exit never decides."""
    curves: dict[int, CurvePoints]
    """The calibration curve of every early exit that may decide."""
    window: int = WINDOW
    """Mode cascade: number of tokens over which confidence is averaged."""
    back: float | None = None
    """Mode cascade: mean confidence at which a shallower exit decides again."""
    start: StartRule | None = None
    """Mode cascade: the rule that chooses the first exit from the prompt."""
    promise: dict[str, Any] = {}
    """The bound that was asked for and the statistics of the calibration, for people to read."""

    @classmethod
    def load(cls, path: str | Path) -> PolicyFile:
        """Read and check a policy file, or an example such as `smollm2-5-percent`.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        path = find(path, "policy")
        try:
            policy = cls.model_validate(read_yaml(path, "policy"))
        except ValidationError as error:
            raise ConfigError(explain(error, cls, str(path))) from None
        if policy.mode not in (Mode.TOKEN, Mode.CASCADE):
            raise ConfigError(f"{path}: mode: {policy.mode}: a policy file is for mode 'token' or 'cascade'")
        if policy.mode is Mode.TOKEN:
            for key, given in (
                ("window", policy.window != WINDOW),
                ("back", policy.back is not None),
                ("start", policy.start is not None),
            ):
                if given:
                    raise ConfigError(f"{path}: {key} requires mode 'cascade', not 'token'; remove the key")
        try:
            Routing().updated(policy.options({}))
        except (ValueError, RequestError) as error:
            raise ConfigError(f"{path}: {error}") from None
        for p, threshold in policy.thresholds.items():
            if threshold <= 1 and p not in policy.curves:
                raise ConfigError(
                    f"{path}: curves: exit {p} has none, but its threshold of {threshold:g} needs calibrated "
                    "confidence; add its curve, or a threshold above 1, which is never reached"
                )
        return policy

    def save(self, path: Path) -> None:
        """Write the file atomically; its folder is created."""
        text = yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=110
        )
        with atomic_file(path) as new:
            new.write_text(f"# Written by ruyi-flow calibrate.\n{text}", encoding="utf-8")

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return routing options: the given ones, and those that the file sets.

        The mode is the file's own, or `exact`, where the file only tells which drafts pay.

        Args:
            given: routing options of a request or a topology.

        Raises:
            RequestError: a given option is one that the file sets, or another mode.
        """
        for name in ("exit", "threshold", "thresholds", "window", "back", "start", "scale"):
            if given.get(name) is not None:
                raise RequestError(f"{name} cannot be combined with a policy file, which already sets it; remove one")
        mode = parse_mode(given.get("mode") or self.mode)
        if mode not in (self.mode, Mode.EXACT):
            raise RequestError(f"this policy was calibrated for mode '{self.mode}', not for '{mode}'")
        curves = {p: Curve(c.temperature, c.scores, c.chances) for p, c in self.curves.items()}
        options = {**given, "mode": mode, "scale": Scale(self.score, curves), "family": self.family}
        if mode is not Mode.EXACT:
            options["thresholds"] = dict(self.thresholds)
        if mode is Mode.CASCADE:
            start = None if self.start is None else Start(self.start.weights, self.start.chance)
            options |= {"window": self.window, "back": self.back, "start": start}
        return options


def with_policy_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a request, in which the file that `policy` names is replaced by what it sets.

    Raises:
        RequestError: `policy` is not a path, or an option is one that the file sets.
        ConfigError: the file cannot be read.
    """
    given = dict(options)
    policy = given.pop("policy", None)
    if policy is None:
        return given
    if not isinstance(policy, (str, Path)):
        raise RequestError(f"policy is {shown(policy)}; it must be the path of a policy file")
    return PolicyFile.load(policy).options(given)
