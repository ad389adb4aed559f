"""Computed costs: the roofline, the machines, and the families that need no checkpoint."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.loading import load_slice
from ruyi_flow.sim.analytic import check_fits, roofline_profile
from ruyi_flow.sim.hardware import HARDWARE, Hardware
from ruyi_flow.sim.profile import Profile, StageCost, StepCost
from ruyi_flow.sim.shapes import RUYI2, RUYI_7B, SMOLLM2
from ruyi_flow.testing import tiny_family
from ruyi_flow.types import Weights

RUYI = FamilyConfig.parse(RUYI_7B)
H100 = HARDWARE["h100-sxm"]


def bytes_a_second(hardware: Hardware) -> float:
    return hardware.bandwidth * hardware.bandwidth_share


@pytest.mark.parametrize("weights", list(Weights))
def test_one_row_takes_as_long_as_reading_the_weights(weights: Weights) -> None:
    profile = roofline_profile(RUYI, H100, weights=weights, name="Ruyi-7B")
    for stage in profile.stages:
        layers = stage.exit - stage.first_layer
        reading = layers * RUYI.layer_bytes(weights) / bytes_a_second(H100)
        assert 0 < stage.trunk_s[0] - reading - layers * H100.layer_s < 0.002 * reading  # the row's own bytes
        head = RUYI.head_bytes(weights) / bytes_a_second(H100)
        branch = RUYI.layer_bytes(weights) / bytes_a_second(H100)
        assert stage.branch_s[0] + stage.head_s[0] == pytest.approx(branch + head + 2 * H100.layer_s, rel=0.001)


def test_bf16_weights_are_two_bytes_a_parameter() -> None:
    assert RUYI.layer_bytes(Weights.BF16) == 2 * RUYI.layer_parameters
    assert RUYI.head_bytes(Weights.BF16) == RUYI.head_flops


def test_many_rows_take_as_long_as_their_operations() -> None:
    pi = HARDWARE["raspberry-pi-5"]
    stage = roofline_profile(RUYI, pi, weights="bf16", name="Ruyi-7B").stage(11)
    rate = pi.flops * pi.flops_share
    by_rows = dict(zip(stage.rows, stage.trunk_s, strict=True))
    assert by_rows[512] == pytest.approx(11 * (512 * RUYI.layer_flops(0) / rate + pi.layer_s))
    more = [by_rows[2 * rows] - by_rows[rows] for rows in (64, 128, 256)]
    assert more == pytest.approx([11 * rows * RUYI.layer_flops(0) / rate for rows in (64, 128, 256)])


def test_a_step_never_gets_cheaper_by_rows_or_context() -> None:
    for hardware in HARDWARE.values():
        for stage in roofline_profile(RUYI, hardware, weights="int4", name="Ruyi-7B").stages:
            for times in (stage.trunk_s, stage.branch_s, stage.head_s):
                assert all(a <= b for a, b in pairwise(times))
            step = StepCost(stage)
            far = step.seconds(1, 4096, 4096, taken=1, read=1, read_attended=4096, read_context=4096)
            assert (
                far
                > step.seconds(1, 0, 0, taken=1, read=1)
                > step.seconds(1, 0, 0, taken=1)
                > step.seconds(1, 0, 0)
                > 0
            )


def test_attending_is_computing_for_each_row_and_reading_for_each_session() -> None:
    stage = roofline_profile(RUYI, H100, weights="bf16", name="Ruyi-7B").stage(15)
    assert stage.context_s == pytest.approx(4 * 2048 / bytes_a_second(H100))  # a layer's, as published
    assert stage.attended_s == pytest.approx(4 * 4 * 28 * 128 / (H100.flops * H100.flops_share))
    assert stage.branch_attended_s == pytest.approx(stage.attended_s / 4)
    assert stage.branch_context_s == pytest.approx(stage.context_s / 4)


def test_a_branch_takes_rows_in_for_less_than_it_reads_them() -> None:
    config = FamilyConfig.parse(SMOLLM2)
    profile = roofline_profile(config, HARDWARE["cloud-2-vcpu"], weights="bf16", name="SmolLM2")
    one, two = profile.stage(5), profile.stage(17)  # layers in their branches
    layer = one.trunk_s[-1] / 5
    assert layer / 40 < one.branch_s[-1] < layer / 5
    assert two.branch_s[-1] - one.branch_s[-1] == pytest.approx(layer)
    assert one.head_s[-1] > 0.8 * layer


def test_fewer_bits_decode_faster_and_compute_no_faster() -> None:
    wide, eight, four = (roofline_profile(RUYI, H100, weights=w, name="x").stage(27) for w in ("bf16", "int8", "int4"))
    assert wide.trunk_s[0] > eight.trunk_s[0] > four.trunk_s[0]
    assert wide.branch_s[0] > eight.branch_s[0] > four.branch_s[0]
    assert wide.head_s[0] > eight.head_s[0] > four.head_s[0]
    assert wide.trunk_s[-1] == four.trunk_s[-1]
    assert wide.weight_bytes > eight.weight_bytes > four.weight_bytes and wide.kv_bytes == four.kv_bytes


def test_the_trunk_costs_the_same_wherever_it_is_cut() -> None:
    def cut(*exits: int) -> Profile:
        config = FamilyConfig.parse({**RUYI_7B, "early_exit_points": list(exits)})
        return roofline_profile(config, H100, weights="int8", name="x")

    whole, parts = cut(27), cut(3, 11, 15, 26, 27)
    for i in range(len(whole.stages[0].rows)):
        assert sum(stage.trunk_s[i] for stage in parts.stages) == pytest.approx(whole.stages[0].trunk_s[i])
    assert sum(stage.attended_s for stage in parts.stages) == pytest.approx(whole.stages[0].attended_s)
    branch = RUYI.layer_bytes(Weights.INT8) + 2 * RUYI.hidden_size + RUYI.head_bytes(Weights.INT8)
    assert sum(stage.weight_bytes for stage in parts.stages) == whole.stages[0].weight_bytes + 4 * branch
    assert sum(stage.kv_bytes for stage in parts.stages) == whole.stages[0].kv_bytes + 4 * RUYI.kv_bytes


@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("weights", list(Weights))
def test_bytes_are_those_of_the_tensors_that_a_node_holds(tmp_path: Path, base: str, weights: Weights) -> None:
    folder = tiny_family(tmp_path / "f", base=base, vocab_size=64, intermediate_size=64, head_dim=16)
    checkpoint = Checkpoint(folder)
    profile = roofline_profile(checkpoint.config, H100, weights=weights, name="tiny")
    for exits in ((2,), (4, 6)):
        held = load_slice(checkpoint, exits, dtype=torch.bfloat16, weights=weights).tensor_bytes()
        assert held == sum(profile.stage(exit).weight_bytes for exit in exits)


def test_a_profile_comes_back_from_its_file_with_the_machine(tmp_path: Path) -> None:
    profile = roofline_profile(RUYI, HARDWARE["l4"], weights="int8", name="Ruyi-7B")
    profile.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p") == profile
    assert profile.machine["busy_w"] == 72 and profile.kind == "analytic" and profile.context == 131072


def test_what_does_not_fit_is_refused_with_its_size() -> None:
    l4 = HARDWARE["l4"]
    stages = roofline_profile(RUYI, l4, weights="bf16", name="Ruyi-7B").stages

    def check(memory_bytes: int, positions: int, stages: Sequence[StageCost] = stages) -> None:
        check_fits("l4", stages, memory_bytes=memory_bytes, positions=positions)

    check(l4.memory_bytes, 100_000, stages[-2:])
    with pytest.raises(
        ConfigError, match=r"l4: exits 11, 15, 19, 23, 27 need 21\.46 GB for weights and 0\.00 GB .*21 GB"
    ):
        check(21 * 10**9, 0)
    positions = (l4.memory_bytes - sum(s.weight_bytes for s in stages)) // sum(s.kv_bytes for s in stages)
    check(l4.memory_bytes, positions)
    with pytest.raises(ConfigError, match="use fewer exits"):
        check(l4.memory_bytes, positions + 1)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown weights 'fp8'; known: bf16, int8, int4"):
        roofline_profile(RUYI, H100, weights="fp8", name="x")


def test_the_families_have_the_published_sizes() -> None:
    def sizes(config: FamilyConfig) -> list[float]:
        return [round(config.num_parameters(p) / 1e9, 2) for p in config.exits]

    assert sizes(RUYI) == [3.34, 4.27, 5.21, 6.14, 7.07]
    assert sizes(FamilyConfig.parse(RUYI2)) == [1.77, 8.04, 13.99]
    assert FamilyConfig.parse(SMOLLM2).num_parameters(29) == 134_515_008


@pytest.mark.model
def test_the_demo_familys_shape_is_that_of_its_weights(smollm2: Path) -> None:
    ours, stored = FamilyConfig.parse(SMOLLM2), Checkpoint(smollm2).config
    assert (ours.exits, ours.branch_layers) == (stored.exits, stored.branch_layers)
    assert [ours.num_parameters(p) for p in ours.exits] == [stored.num_parameters(p) for p in ours.exits]
    assert (ours.layer_flops(100), ours.head_flops, ours.kv_bytes) == (
        stored.layer_flops(100),
        stored.head_flops,
        stored.kv_bytes,
    )


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_machines_have_sources_and_are_of_this_world(hardware: Hardware) -> None:
    assert len(hardware.source) > 20 and len(hardware.power_source) > 20
    assert 10e9 <= hardware.bandwidth <= 6e12
    assert 0.1e12 <= hardware.flops <= 1e15
    assert 8e9 <= hardware.memory_bytes <= 200e9
    assert 0 < hardware.idle_w < hardware.busy_w <= 1000
    assert 0 < hardware.flops_share <= 1 and 0 < hardware.bandwidth_share <= 1 and 1e-5 < hardware.layer_s < 1e-3
    assert (hardware.price_per_hour is None) == (hardware.kind in ("phone", "board", "laptop"))
    assert hardware.price_per_hour is None or 0.01 < hardware.price_per_hour < 10
    assert 5 <= hardware.flops / hardware.bandwidth <= 600  # operations a byte


def test_no_torch_and_no_grpc() -> None:
    code = "import sys, ruyi_flow.sim.hardware; sys.exit(bool({'torch', 'grpc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_the_docs_list_the_machine(hardware: Hardware) -> None:
    text = (Path(__file__).parents[2] / "docs/reference/simulation-costs.md").read_text()
    assert in_table(hardware) in text and in_sources(hardware) in text


def in_table(h: Hardware) -> str:
    price = "" if h.price_per_hour is None else f"{h.price_per_hour:g}"
    figures = [
        f"{h.flops / 1e12:g}",
        f"{h.bandwidth / 1e9:g}",
        f"{h.memory_bytes / 1e9:g}",
        f"{h.idle_w:g}",
        f"{h.busy_w:g}",
    ]
    return f"| `{h.name}` | {h.label} | {' | '.join(figures)} | {price} |"


def in_sources(h: Hardware) -> str:
    return f"- `{h.name}`: {h.source}. Power and price: {h.power_source}."
