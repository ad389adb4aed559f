"""The costs of a scenario's nodes: their stages' times, their power and their price."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.sim.analytic import check_fits, roofline_profile
from ruyi_flow.sim.hardware import HARDWARE
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.scenario import Scenario, SimNode
from ruyi_flow.sim.shapes import family_shape
from ruyi_flow.types import Weights

__all__ = ["check_stages", "power_and_price", "profiles_of"]


def power_and_price(node: SimNode) -> tuple[float, float, float]:
    """Return a node's watts when idle, its watts when busy, and its price in dollars per hour."""
    machine = HARDWARE.get(node.hardware or "")
    idle_w, busy_w, price = (
        float((getattr(machine, key, None) if (own := getattr(node, key)) is None else own) or 0.0)
        for key in ("idle_w", "busy_w", "price_per_hour")
    )
    return idle_w, busy_w, price


def profiles_of(scenario: Scenario, where: str) -> list[Profile]:
    """Return the profile of each of a scenario's nodes, read from a file or computed for its hardware.

    Raises:
        ConfigError: a profile cannot be read, a hardware is unknown, or weights and caches do not fit its memory.
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
            f"{key}: unknown hardware {node.hardware!r}; known: {', '.join(HARDWARE)}"
            f"{did_you_mean(node.hardware, [*HARDWARE])}"
        )
    hardware, shape = HARDWARE[node.hardware], family_shape(scenario.family, scenario.exits, where)
    scenario.check_family(shape.exits, where=where)
    found = roofline_profile(shape, hardware, weights=node.weights or Weights.BF16, name=scenario.family)
    try:
        stages = [found.stage(p) for p in node.exits]
        check_fits(hardware.name, stages, memory_bytes=hardware.memory_bytes, positions=node.limits.max_positions)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return found


def check_stages(scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """Check that each node's profile has the node's stages, cut at the same layers.

    Raises:
        ConfigError: a stage is missing, or begins at another layer.
    """
    for i, (node, profile) in enumerate(zip(scenario.nodes, profiles, strict=True)):
        missing = [p for p in node.exits if p not in profile.exits]
        if missing:
            raise ConfigError(
                f"{where}: nodes.{i}.exits: the profile of {node.name!r} has no stage at exit {missing[0]}, only at "
                f"{list(profile.exits)}; use these exits, or profile this family"
            )
        first = profile.stage(node.exits[0]).first_layer
        before = scenario.nodes[i - 1].exits[-1] if i else 0
        if first != before:
            raise ConfigError(
                f"{where}: nodes.{i}.exits: {node.name!r} starts after exit {before}, but the stage at exit "
                f"{node.exits[0]} of its profile starts after exit {first}; profile this family"
            )
