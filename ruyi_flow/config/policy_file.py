"""Policy files: what `ruyi-flow calibrate` writes and a topology or a request names.

YAML: the family, the score that confidence is made of, each early exit's curve and threshold, and what was promised of
them. Whoever reads one needs nothing else: the curves travel with the session.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ruyi_flow.config.yaml_files import explain, read_yaml
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import WINDOW, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.types import Mode

__all__ = ["CurvePoints", "PolicyFile", "StartRule", "curve_points"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoints(_Model):
    """A `Curve`."""

    temperature: float = Field(gt=0)
    scores: tuple[float, ...] = Field(min_length=1)
    chances: tuple[float, ...] = Field(min_length=1)


def curve_points(curves: Mapping[int, Curve]) -> dict[int, CurvePoints]:
    """Curves as a policy file has them."""
    return {p: CurvePoints(temperature=c.temperature, scores=c.scores, chances=c.chances) for p, c in curves.items()}


class StartRule(_Model):
    """A `Start`."""

    weights: dict[int, tuple[float, ...]]
    chance: float


class PolicyFile(_Model):
    """A calibrated policy."""

    family: str
    """Fingerprint of the family that it was calibrated for."""
    mode: Mode = Mode.TOKEN
    """That it was calibrated for."""
    score: Score
    thresholds: dict[int, float]
    """Of every early exit, on calibrated confidence; above 1 is never."""
    curves: dict[int, CurvePoints]
    window: int = WINDOW
    """Mode `cascade`, as the next two: tokens of the running confidence."""
    back: float | None = None
    start: StartRule | None = None
    promise: dict[str, Any] = {}
    """What was asked for and found when it was made; for people."""

    @classmethod
    def load(cls, path: str | Path) -> PolicyFile:
        """Read and check a policy file.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        path = Path(path)
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
                    raise ConfigError(f"{path}: {key}: goes with mode 'cascade', this is for mode 'token'; remove it")
        try:
            policy.routing()
        except (ValueError, RequestError) as error:
            raise ConfigError(f"{path}: {error}") from None
        for p, threshold in policy.thresholds.items():
            if threshold <= 1 and p not in policy.curves:
                raise ConfigError(
                    f"{path}: curves: exit {p} has none, and its threshold of {threshold:g} is on calibrated "
                    "confidence; add its curve, or a threshold above 1, which is never"
                )
        return policy

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        text = yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, default_flow_style=None, width=110
        )
        new.write_text(f"# Written by ruyi-flow calibrate.\n{text}", encoding="utf-8")
        new.replace(path)

    def routing(self, mode: Mode | None = None) -> Routing:
        """As a request says it: in the file's own mode, or `exact`, whose drafts then stop where they should.

        Raises:
            RequestError: another mode.
        """
        curves = {p: Curve(c.temperature, c.scores, c.chances) for p, c in self.curves.items()}
        if mode not in (None, self.mode, Mode.EXACT):
            raise RequestError(f"this policy was calibrated for mode '{self.mode}', not for '{mode}'")
        common: dict[str, Any] = {"scale": Scale(self.score, curves), "family": self.family}
        if mode is Mode.EXACT:
            return Routing(mode, **common)
        common["thresholds"] = dict(self.thresholds)
        if self.mode is Mode.CASCADE:
            start = None if self.start is None else Start(self.start.weights, self.start.chance)
            common |= {"window": self.window, "back": self.back, "start": start}
        return Routing(self.mode, **common)
