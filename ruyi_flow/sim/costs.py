"""What the nodes of a scenario cost: their stages' times, watts and dollars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.sim.analytic import analytic, check_fits
from ruyi_flow.sim.hardware import HARDWARE
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.scenario import Scenario, SimNode
from ruyi_flow.sim.shapes import geometry
from ruyi_flow.types import Weights

__all__ = ["check_stages", "profiles_of", "rates"]


def rates(node: SimNode) -> tuple[float, float, float]:
    """Watts of a node while no step runs and while one does, and dollars an hour."""
    machine = HARDWARE.get(node.hardware or "")
    idle_w, busy_w, price = (
        float((getattr(machine, key, None) if (own := getattr(node, key)) is None else own) or 0.0)
        for key in ("idle_w", "busy_w", "price_per_hour")
    )
    return idle_w, busy_w, price


def profiles_of(scenario: Scenario, where: str) -> list[Profile]:
    """What each node's stages cost.

    Raises:
        ConfigError: a profile that cannot be read, a hardware that is not known, weights that do not fit in it.
    """
    known: dict[Path, Profile] = {}
    return [_profile_of(scenario, i, known, where) for i in range(len(scenario.nodes))]


def _profile_of(scenario: Scenario, i: int, known: dict[Path, Profile], where: str) -> Profile:
    node = scenario.nodes[i]
    if node.hardware is None:
        path = node.profile or scenario.profile
        assert path is not None
        if path not in known:
            try:
                known[path] = Profile.load(path)
            except ConfigError as error:
                raise ConfigError(f"{where}: {f'nodes.{i}.profile' if node.profile else 'profile'}: {error}") from None
        return known[path]
    key = f"{where}: nodes.{i}.hardware"
    if node.hardware not in HARDWARE:
        raise ConfigError(
            f"{key}: {node.hardware!r} is not known; known: {', '.join(HARDWARE)}"
            f"{did_you_mean(node.hardware, [*HARDWARE])}"
        )
    hardware, shape = HARDWARE[node.hardware], geometry(scenario.family, scenario.exits, where)
    scenario.check_family(shape.exits, where=where)
    found = analytic(shape, hardware, weights=node.weights or Weights.BF16, name=scenario.family)
    try:
        check_fits([found.stage(p) for p in node.exits], hardware, node.limits.max_positions)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return found


def check_stages(scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """Refuse profiles that lack a node's stages, or were made with other cuts.

    Raises:
        ConfigError: see above.
    """
    for i, (node, profile) in enumerate(zip(scenario.nodes, profiles, strict=True)):
        missing = [p for p in node.exits if p not in profile.exits]
        if missing:
            raise ConfigError(
                f"{where}: nodes.{i}.exits: the profile of {node.name!r} has no stage at exit {missing[0]}; "
                f"it has {list(profile.exits)}"
            )
        first = profile.stage(node.exits[0]).first_layer
        before = scenario.nodes[i - 1].exits[-1] if i else 0
        if first != before:
            raise ConfigError(
                f"{where}: nodes.{i}.exits: {node.name!r} starts after exit {before}, but its profile's stage at exit "
                f"{node.exits[0]} after {first}; profile this family"
            )
