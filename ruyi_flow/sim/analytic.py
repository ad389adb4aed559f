"""What the stages of a family cost on a machine, computed and not measured: a roofline.

What is computed takes the longer of two times, that of the operations and that of the bytes, and a fixed time a layer
for launching kernels (Williams, Waterman and Patterson 2009). docs/simulation-costs.md has the equations, the machines
with their sources, what the model leaves out, and how far it is from what was measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.sim.hardware import Hardware
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.types import Weights

__all__ = ["analytic", "check_fits"]

_ROWS = tuple(2**i for i in range(10))
"""1 … 512, the rows whose times a profile lists."""


def analytic(config: FamilyConfig, hardware: Hardware, *, weights: str, name: str) -> Profile:
    """What every stage of a family costs on a machine, by the roofline.

    Args:
        config: the family.
        hardware: where it runs. One machine runs all stages here; take from the profile those that it is to run.
        weights: bf16, int8 or int4; products are computed in 16 bits either way.
        name: the family's, for people.

    Raises:
        ConfigError: weights that are none of these.
    """
    if weights not in list(Weights):
        raise ConfigError(f"weights are {weights!r}; known: {', '.join(Weights)}")
    held = Weights(weights)
    hidden, keys = config.hidden_size, 2 * config.num_kv_heads * config.head_dim
    flops, layer, state, kv = config.layer_flops(0), config.layer_bytes(held), config.layer_state_bytes, config.kv_bytes

    def layers(count: int, rows: int) -> float:
        return count * (hardware.bound_s(rows * flops, layer + rows * (state + kv)) + hardware.layer_s)

    taking = layer * hidden * keys / config.layer_parameters  # of a layer's weights, those of keys and values

    def last(rows: int) -> float:
        """Keys and values of a branch's last layer."""
        return hardware.bound_s(rows * 2.0 * hidden * keys, taking + rows * (2 * (hidden + keys) + kv))

    def rest(rows: int) -> float:
        """The rest of a branch's last layer."""
        return hardware.bound_s(rows * (flops - 2.0 * hidden * keys), layer - taking + rows * state) + hardware.layer_s

    def head(rows: int) -> float:
        moved = config.head_bytes(held) + rows * 2 * (hidden + config.vocab_size)
        return hardware.bound_s(rows * config.head_flops, moved) + hardware.layer_s

    attended = hardware.bound_s(config.layer_flops(1) - flops, 0)
    context = hardware.bound_s(0.0, kv)
    embedding = 0 if config.tied_head else 2 * config.vocab_size * hidden
    stages = []
    for (first, exit), depth in zip(config.stages(config.exits), config.branch_layers, strict=True):
        count = exit - first
        own = (count + depth) * layer + 2 * hidden + config.head_bytes(held)
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
        weights=str(held),
        machine=asdict(hardware),
    )


def check_fits(stages: Sequence[StageCost], hardware: Hardware, positions: int) -> None:
    """Refuse stages whose weights, and so many positions' keys and values, are more than a machine's memory.

    A head that stages share counts at each of them, since a profile does not say which do.

    Raises:
        ConfigError: says what is needed, what there is, and what to do.
    """
    weights = sum(stage.weight_bytes for stage in stages)
    caches = positions * sum(stage.kv_bytes for stage in stages)
    if weights + caches > hardware.memory_bytes:
        exits = ", ".join(str(stage.exit) for stage in stages)
        raise ConfigError(
            f"{hardware.name}: exits {exits} need {weights / 1e9:.2f} GB for weights and {caches / 1e9:.2f} GB for the "
            f"keys and values of {positions} positions; it has {hardware.memory_bytes / 1e9:g} GB: give it fewer "
            "exits, weights in fewer bits or fewer positions"
        )
