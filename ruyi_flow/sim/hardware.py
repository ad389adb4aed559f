"""Machines, families' shapes, and what the stages of one cost on the other, computed and not measured: a roofline.

What is computed takes the longer of two times, that of the operations and that of the bytes, and a fixed time a layer
for launching kernels (Williams, Waterman and Patterson 2009). docs/simulation-costs.md has the equations, the machines
with their sources, what the model leaves out, and how far it is from what was measured here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ruyi_flow.config_files import did_you_mean
from ruyi_flow.errors import ConfigError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.sim.profile import Profile, StageCost
from ruyi_flow.types import Weights

__all__ = ["FAMILIES", "HARDWARE", "RUYI2", "RUYI_7B", "SMOLLM2", "Hardware", "analytic", "check_fits", "geometry"]

_LAYER_S = {"phone": 2e-4, "board": 2e-4, "laptop": 8e-5, "cpu": 8e-5, "gpu": 1e-4}
"""Launching one layer's kernels, by kind. docs/simulation-costs.md says where these come from."""

_ROWS = tuple(2**i for i in range(10))
"""1 … 512, the rows whose times a profile lists."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine, or one accelerator of a machine, that runs a node."""

    name: str
    label: str
    """For people."""
    kind: Literal["phone", "board", "laptop", "cpu", "gpu"]
    flops: float
    """Dense operations a second at the best, in bfloat16 or float16; in float32 where a CPU has no faster format."""
    bandwidth: float
    """Bytes a second from memory at the best."""
    memory_bytes: int
    """Nominal, in gigabytes of 10^9; what the system and the programs take is not subtracted."""
    idle_w: float
    """Watts with a model in memory and nothing to do."""
    busy_w: float
    """Watts at full load."""
    price_per_hour: float | None
    """USD, on demand; None for what people own."""
    source: str
    """Of the speeds and the memory."""
    power_source: str
    """Of the watts and the price."""
    flops_share: float = 0.5
    """Of `flops`, what products reach."""
    bandwidth_share: float = 0.7
    """Of `bandwidth`, what they reach."""
    launch_s: float | None = None
    """Of one layer's kernels; None takes the kind's."""

    @property
    def layer_s(self) -> float:
        """Seconds that one layer's kernels take to be launched."""
        return _LAYER_S[self.kind] if self.launch_s is None else self.launch_s

    def bound_s(self, flops: float, moved: float) -> float:
        """Seconds to compute so many operations and to move so many bytes, at once."""
        return max(flops / (self.flops * self.flops_share), moved / (self.bandwidth * self.bandwidth_share))


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


# ---- families that need no checkpoint ----

RUYI_7B: Mapping[str, Any] = {
    # config.json of huggingface.co/TeleAI-AI-Flow/AI-Flow-Ruyi-7B-0725. Exits and sizes, 3B to 7B:
    # github.com/TeleAI-AI-Flow/AI-Flow-Ruyi, README_en.md. The shape is Qwen2.5-7B's.
    "model_type": "ruyi_qwen2",
    "early_exit_points": [11, 15, 19, 23, 27],
    "shared_heads": False,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
    "vocab_size": 152064,
}
RUYI2: Mapping[str, Any] = {
    # Exits and sizes, 1.7B, 8B and 14B: github.com/TeleAI-AI-Flow/AI-Flow-Ruyi2, README_en.md. The shape is
    # Qwen3-14B-Base's.
    "model_type": "ruyi_qwen3",
    "early_exit_points": [2, 21, 39],
    "shared_heads": False,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
    "vocab_size": 151936,
}
SMOLLM2: Mapping[str, Any] = {
    # The demo family: SmolLM2-135M-Instruct with the branches of family/demo/recipe.yaml, its probes left out.
    "model_type": "ruyi_llama",
    "early_exit_points": [5, 11, 17, 23, 29],
    "early_exit_branch_layers": [1, 2, 2, 2, 1],
    "shared_heads": True,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "vocab_size": 49152,
}
"""Each in config.json's words, for `FamilyConfig.parse`."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {"ruyi-7b": RUYI_7B, "ruyi2": RUYI2, "smollm2": SMOLLM2}
"""By the name that a scenario gives."""


def geometry(family: str, exits: tuple[int, ...] | None, where: str) -> FamilyConfig:
    """A family's shape: one of `FAMILIES`, or a folder's config.json.

    Raises:
        ConfigError: it is neither.
    """
    if family.lower() in FAMILIES:
        return FamilyConfig.parse(FAMILIES[family.lower()])
    file = Path(family) / "config.json"
    try:
        return FamilyConfig.parse(json.loads(file.read_text(encoding="utf-8")), exits=exits, where=str(file))
    except (OSError, ValueError):
        raise ConfigError(
            f"{where}: family: hardware's costs need the family's shape, and {family!r} is neither a folder with a "
            f"config.json nor one of {', '.join(FAMILIES)}{did_you_mean(family, [*FAMILIES])}"
        ) from None


# ---- machines ----

_UNREAD = "well known; not read at an address"
_RULE = "idle: 0.15 of busy, a rule of thumb (https://nemulai.com/blog/gpu-electricity-cost-per-training-run)"
_RUNPOD = "price: active serverless workers (https://docs.runpod.io/serverless/pricing)"
_AWS = f"price: AWS's list, us-east-1, on demand ({_UNREAD})"
_CCF = (
    "0.74 and 3.5 W a vCPU, its average of AWS's servers "
    f"(https://www.cloudcarbonfootprint.org/docs/methodology/; {_UNREAD})"
)
_BATTERY = "https://www.macrumors.com/2023/10/30/m3-macbook-pro-models-battery-life/"
_NO_WATTS = "watts: assumed, no source found"

_MACHINES = (
    Hardware(
        name="snapdragon-8-gen-3",
        label="phone with a Snapdragon 8 Gen 3",
        kind="phone",
        flops=5.55e12,
        bandwidth=76.8e9,
        memory_bytes=12 * 10**9,
        idle_w=0.5,
        busy_w=5.0,
        price_per_hour=None,
        source="64 bits of LPDDR5X at 4,800 MHz (https://droidholic.com/snapdragon-8-gen-3-launched/); GPU: Adreno "
        f"750, 1,536 lanes at 903 MHz, twice the rate in float16 ({_UNREAD})",
        power_source=_NO_WATTS,
    ),
    Hardware(
        name="apple-a17-pro",
        label="phone with an Apple A17 Pro",
        kind="phone",
        flops=2.15e12,
        bandwidth=51.2e9,
        memory_bytes=8 * 10**9,
        idle_w=0.5,
        busy_w=5.0,
        price_per_hour=None,
        source="GPU: https://hmc-tech.com/gpu/apple-6-core-a17-pro-vs-imagination-img-axe-2-16; 8 GB of LPDDR5 "
        "(https://grokipedia.com/page/Apple_A17), 64 bits at 3,200 MHz",
        power_source=_NO_WATTS,
    ),
    Hardware(
        name="snapdragon-7s-gen-3",
        label="phone with a Snapdragon 7s Gen 3",
        kind="phone",
        flops=0.31e12,
        bandwidth=25.6e9,
        memory_bytes=8 * 10**9,
        idle_w=0.5,
        busy_w=5.0,
        price_per_hour=None,
        source="bandwidth and cores: https://forumsr.anandtech.com/show/21534/qualcomm-adds-snapdragon-7s-gen-3-"
        "midtier-snapdragon-gets-cortexa720-treatment; its GPU's rate is not published, so the four large cores "
        "(2.5 and 3 x 2.4 GHz, 32 float16 operations a cycle: Cortex-A720's two 128-bit units)",
        power_source=_NO_WATTS,
    ),
    Hardware(
        name="raspberry-pi-5",
        label="Raspberry Pi 5, 8 GB",
        kind="board",
        flops=0.1536e12,
        bandwidth=17.1e9,
        memory_bytes=8 * 10**9,
        idle_w=3.3,
        busy_w=9.8,
        price_per_hour=None,
        source="32 bits of LPDDR4X at 4,267 MT/s, four Cortex-A76 at 2.4 GHz "
        "(https://circuitdigest.com/news/the-new-raspberry-pi-5-is-here-faster-than-ever), "
        "16 float32 operations a cycle each",
        power_source="a board of 4 GB, idle and in a stress test "
        "(https://avalanchenoticias.com.br on a Raspberry Pi 5 of 2 GB, after "
        "https://github.com/geerlingguy/pi-overvolt/issues/4)",
    ),
    Hardware(
        name="jetson-orin-nano-8gb",
        label="Jetson Orin Nano 8 GB, Super mode",
        kind="board",
        flops=16.75e12,
        bandwidth=102e9,
        memory_bytes=8 * 10**9,
        idle_w=3.75,
        busy_w=25.0,
        price_per_hour=None,
        source="67 sparse int8 TOPS, a quarter of that in dense float16; 102 GB/s (NVIDIA's data sheet as in "
        "https://www.brojogopalsapui.com/ai-foundations/sub_contents/AI_hardware/jetson_orin_nano_light.html)",
        power_source=f"25 W: as the speeds; {_RULE}",
    ),
    Hardware(
        name="jetson-orin-nx-16gb",
        label="Jetson Orin NX 16 GB",
        kind="board",
        flops=15e12,
        bandwidth=102.4e9,
        memory_bytes=16 * 10**9,
        idle_w=3.75,
        busy_w=25.0,
        price_per_hour=None,
        source="NVIDIA Jetson Orin NX Series data sheet: 128 bits of LPDDR5; GPU as the Orin Nano's, at 918 MHz "
        "(https://gist.github.com/atinfinity/8cede915acda05d0ff427c09604735dd) against its 1,020",
        power_source="10 to 25 W "
        "(https://github.com/icub-tech-iit/cad-libraries/files/13056089/JETSON-ORIN-NX-DATASHEET.pdf); "
        f"{_RULE}",
    ),
    Hardware(
        name="jetson-agx-orin-64gb",
        label="Jetson AGX Orin 64 GB",
        kind="board",
        flops=42.5e12,
        bandwidth=204.8e9,
        memory_bytes=64 * 10**9,
        idle_w=9.0,
        busy_w=60.0,
        price_per_hour=None,
        source="NVIDIA Jetson AGX Orin Series technical brief: 170 sparse int8 TOPS of the GPU, a quarter of that "
        f"in dense float16; 256 bits of LPDDR5 ({_UNREAD})",
        power_source="https://forums.developer.nvidia.com/t/maximum-power-consumption-bounds-for-orin-agx/323456; "
        f"{_RULE}",
    ),
    Hardware(
        name="apple-m3",
        label="MacBook Pro 14 with an Apple M3, 16 GB",
        kind="laptop",
        flops=3.58e12,
        bandwidth=100e9,
        memory_bytes=16 * 10**9,
        idle_w=4.7,
        busy_w=17.0,
        price_per_hour=None,
        source="https://abachy.com/news/apples-m3-series-chips-enhanced-performance-and-advanced-gpus; ten of the "
        "GPU cores of https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max",
        power_source=f"idle: its battery over 15 hours of browsing ({_BATTERY}); "
        "busy: that and a quarter of the M3 Max's GPU",
    ),
    Hardware(
        name="apple-m3-max",
        label="MacBook Pro 14 with an Apple M3 Max of 40 GPU cores, 64 GB",
        kind="laptop",
        flops=14.32e12,
        bandwidth=400e9,
        memory_bytes=64 * 10**9,
        idle_w=6.0,
        busy_w=56.0,
        price_per_hour=None,
        source="https://hmc-tech.com/gpu/apple-32-core-m4-max-vs-apple-40-core-m3-max; 400 GB/s: Apple's "
        f"specifications ({_UNREAD})",
        power_source=f"idle: its battery over 12 hours of browsing ({_BATTERY}); "
        "busy: that and 50 W of the GPU (https://spy.macrumors.com/threads/m3-max-power-consumption-its-remarkably-efficient.2411481)",
    ),
    Hardware(
        name="ryzen-7-7840u",
        label="laptop with a Ryzen 7 7840U, 32 GB",
        kind="laptop",
        flops=16.59e12,
        bandwidth=120e9,
        memory_bytes=32 * 10**9,
        idle_w=4.2,
        busy_w=28.0,
        price_per_hour=None,
        source="GPU: https://fpsbench.com/compare/gpu/amd-radeon-760m-vs-amd-radeon-780m; 128 bits of LPDDR5X-7500 "
        "(https://cputronic.com/cpu/amd-ryzen-7-7840u)",
        power_source=f"28 W: https://cputronic.com/cpu/amd-ryzen-7-7840u; {_RULE}",
    ),
    Hardware(
        name="cloud-2-vcpu",
        label="virtual machine with 2 vCPUs of an EPYC 9004, 8 GB",
        kind="cpu",
        flops=0.474e12,
        bandwidth=33e9,
        memory_bytes=8 * 10**9,
        idle_w=1.5,
        busy_w=7.0,
        price_per_hour=0.1159,
        source="bandwidth: read by two threads, and share of the operations: docs/log.md, machines that are computed; "
        f"vCPUs are cores of 64 bfloat16 operations a cycle (AVX-512) at 3.7 GHz (AWS, M7a; {_UNREAD})",
        power_source=f"{_CCF}; {_AWS}, m7a.large",
        flops_share=0.8,
    ),
    Hardware(
        name="cloud-16-vcpu",
        label="virtual machine with 16 vCPUs of an EPYC 9004, 64 GB",
        kind="cpu",
        flops=3.79e12,
        bandwidth=76.8e9,
        memory_bytes=64 * 10**9,
        idle_w=11.8,
        busy_w=56.0,
        price_per_hour=0.9274,
        source="a sixth of a socket of 96 cores and 460.8 GB/s (https://tomshardware.com/uk/news/amd-confirms-12-ddr5-memory-channels-"
        "on-genoa); cores as in cloud-2-vcpu",
        power_source=f"{_CCF}; {_AWS}, m7a.4xlarge",
        flops_share=0.8,
    ),
    Hardware(
        name="rtx-4090",
        label="GeForce RTX 4090",
        kind="gpu",
        flops=165.2e12,
        bandwidth=1008e9,
        memory_bytes=24 * 10**9,
        idle_w=21.0,
        busy_w=450.0,
        price_per_hour=0.756,
        source="https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-4500-blackwell",
        power_source="https://nationalpcbuilder.com/rtx-4090-power-consumption-how-much-power-does-the-rtx-4090-use-"
        f"and-what-power-supply-do-you-need/; {_RUNPOD}",
    ),
    Hardware(
        name="l4",
        label="NVIDIA L4",
        kind="gpu",
        flops=121e12,
        bandwidth=300e9,
        memory_bytes=24 * 10**9,
        idle_w=10.8,
        busy_w=72.0,
        price_per_hour=0.468,
        source="half of the sparse rate, and the rest: https://grokipedia.com/page/NVIDIA_L4_vs_L40S",
        power_source=f"72 W: as the speeds; {_RULE}; {_RUNPOD}",
    ),
    Hardware(
        name="a10",
        label="NVIDIA A10",
        kind="gpu",
        flops=125e12,
        bandwidth=600e9,
        memory_bytes=24 * 10**9,
        idle_w=64.8,
        busy_w=150.0,
        price_per_hour=1.006,
        source="https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/; 125 TFLOPS: "
        "https://gist.github.com/kimbochen",
        power_source="https://github.com/mayooot/detect-gpu/issues/3, with a process on it (15.7 W without); price: "
        "AWS g5.xlarge, whose A10G is its near twin (https://main.d1m6t5n8e4tvia.amplifyapp.com/blog/amazon-ec2-on-demand-pricing-instance-"
        "families-2026)",
    ),
    Hardware(
        name="a100-sxm-80gb",
        label="NVIDIA A100 SXM 80 GB",
        kind="gpu",
        flops=312e12,
        bandwidth=2039e9,
        memory_bytes=80 * 10**9,
        idle_w=60.0,
        busy_w=400.0,
        price_per_hour=2.16,
        source="https://glennklockwood.com/garden/processors/A100",
        power_source=f"400 W: as the speeds; {_RULE}; {_RUNPOD}",
    ),
    Hardware(
        name="h100-sxm",
        label="NVIDIA H100 SXM",
        kind="gpu",
        flops=989.5e12,
        bandwidth=3350e9,
        memory_bytes=80 * 10**9,
        idle_w=140.0,
        busy_w=700.0,
        price_per_hour=3.348,
        source="https://github.com/meta-pytorch/tritonbench/issues/78",
        power_source=f"idle with 73 GB in use: https://github.com/wilicc/gpu-burn/issues/114; {_RUNPOD}",
    ),
    Hardware(
        name="h200",
        label="NVIDIA H200",
        kind="gpu",
        flops=989.5e12,
        bandwidth=4800e9,
        memory_bytes=141 * 10**9,
        idle_w=140.0,
        busy_w=700.0,
        price_per_hour=4.464,
        source="https://github.com/allenai/open-instruct/pull/1441",
        power_source=f"700 W: https://aiminingco.com/gpu/h200/specs; idle: the H100's, whose chip it has; {_RUNPOD}",
    ),
)

HARDWARE: Mapping[str, Hardware] = {hardware.name: hardware for hardware in _MACHINES}
"""By name, the slower kinds first."""
