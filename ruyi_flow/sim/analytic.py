"""Profiles that are computed by a roofline model (Williams, Waterman and Patterson 2009) instead of measured.

A computation takes the longer of two times, that of its operations and that of the bytes it moves, plus a fixed time
per layer for launching kernels. docs/reference/simulation-costs.md has the equations, the machines with their sources,
the limits of the model, and its error against measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.sim.hardware import Hardware
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.types import Weights

__all__ = ["check_fits", "roofline_profile"]

_ROWS = tuple(2**i for i in range(10))
"""The numbers of rows that a profile lists times for: 1, 2, 4 … 512."""


def roofline_profile(config: FamilyConfig, hardware: Hardware, *, weights: str, name: str) -> Profile:
    """Compute the profile of all stages of a family on a machine.

    Args:
        config: the family's shape.
        hardware: the machine.
        weights: format of the weights: bf16, int8 or int4. Products are computed in 16 bits in any case.
        name: the family's name, for display.

    Raises:
        ConfigError: unknown weights.
    """
    if weights not in list(Weights):
        raise ConfigError(f"unknown weights {weights!r}; known: {', '.join(Weights)}")
    stored = Weights(weights)
    hidden, keys = config.hidden_size, 2 * config.num_kv_heads * config.head_dim
    flops, layer, state, kv = (
        config.layer_flops(0),
        config.layer_bytes(stored),
        config.layer_state_bytes,
        config.kv_bytes,
    )

    def layers(count: int, rows: int) -> float:
        return count * (hardware.bound_s(rows * flops, layer + rows * (state + kv)) + hardware.layer_s)

    kv_weights = layer * hidden * keys / config.layer_parameters  # bytes of a layer's key and value weights

    def last(rows: int) -> float:
        """Seconds of computing the keys and values of a branch's last layer."""
        return hardware.bound_s(rows * 2.0 * hidden * keys, kv_weights + rows * (2 * (hidden + keys) + kv))

    def rest(rows: int) -> float:
        """Seconds of the rest of a branch's last layer."""
        return (
            hardware.bound_s(rows * (flops - 2.0 * hidden * keys), layer - kv_weights + rows * state) + hardware.layer_s
        )

    def head(rows: int) -> float:
        moved = config.head_bytes(stored) + rows * 2 * (hidden + config.vocab_size)
        return hardware.bound_s(rows * config.head_flops, moved) + hardware.layer_s

    attended = hardware.bound_s(config.layer_flops(1) - flops, 0)
    context = hardware.bound_s(0.0, kv)
    embedding = 0 if config.tied_head else 2 * config.vocab_size * hidden
    stages = []
    for (first, exit), depth in zip(config.stages(config.exits), config.branch_layers, strict=True):
        count = exit - first
        own = (count + depth) * layer + 2 * hidden + config.head_bytes(stored)
        stages.append(
            StageCost(
                exit=exit,
                first_layer=first,
                rows=_ROWS,
                trunk_s=tuple(layers(count, rows) for rows in _ROWS),
                branch_s=tuple(layers(depth - 1, rows) + last(rows) for rows in _ROWS),
                head_s=tuple(rest(rows) + head(rows) for rows in _ROWS),
                attended_s=count * attended,
                context_s=count * context,
                branch_attended_s=depth * attended,
                branch_context_s=depth * context,
                weight_bytes=own + (embedding if first == 0 else 0),
                kv_bytes=(count + depth) * kv,
            )
        )
    return Profile(
        kind="analytic",
        source=f"roofline of {hardware.label}, {hardware.flops_share:g} of its operations and "
        f"{hardware.bandwidth_share:g} of its bandwidth, {hardware.layer_s * 1e6:g} µs a layer",
        family=name,
        hidden_size=hidden,
        context=config.max_positions,
        stages=tuple(stages),
        weights=str(stored),
        machine=asdict(hardware),
    )


def check_fits(name: str, stages: Sequence[StageCost], *, memory_bytes: float, positions: int) -> None:
    """Check that the weights of stages and a KV cache of so many positions fit a machine's memory.

    A head that stages share is counted at each of them, because a profile does not say which stages share one.

    Raises:
        ConfigError: they do not fit.
    """
    weights = sum(stage.weight_bytes for stage in stages)
    caches = positions * sum(stage.kv_bytes for stage in stages)
    if weights + caches > memory_bytes:
        exits = ", ".join(str(stage.exit) for stage in stages)
        raise ConfigError(
            f"{name}: exits {exits} need {weights / 1e9:.2f} GB for weights and {caches / 1e9:.2f} GB for a KV cache "
            f"of {positions} positions, but it has {memory_bytes / 1e9:g} GB: use fewer exits, weights in fewer bits "
            "or a smaller limits.max_positions"
        )
