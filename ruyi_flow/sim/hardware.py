"""The machines that nodes can be simulated on, from data sheets; docs/reference/simulation-costs.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["HARDWARE", "Hardware"]

_LAYER_S = {"phone": 2e-4, "board": 2e-4, "laptop": 8e-5, "cpu": 8e-5, "gpu": 1e-4}
"""Seconds of launching one layer's kernels, by kind of machine; docs/reference/simulation-costs.md has the sources."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine, or one accelerator of a machine, that runs a node."""

    name: str
    label: str
    """Name for display."""
    kind: Literal["phone", "board", "laptop", "cpu", "gpu"]
    flops: float
    """Peak dense operations per second in 16 bits, or in float32 for a CPU without a faster format."""
    bandwidth: float
    """Peak memory bandwidth in bytes per second."""
    memory_bytes: int
    """Nominal memory in bytes, a gigabyte being 10^9. It includes what the system and programs take."""
    idle_w: float
    """Power in watts with a model loaded but no step running."""
    busy_w: float
    """Power in watts at full load."""
    source: str
    """Source of the operations, the bandwidth and the memory."""
    power_source: str
    """Source of the power and the price."""
    price_per_hour: float | None = None
    """On-demand price in US dollars; None for machines that users own."""
    flops_share: float = 0.5
    """Share of the peak operations that matrix products reach."""
    bandwidth_share: float = 0.7
    """Share of the peak bandwidth that matrix products reach."""

    @property
    def layer_s(self) -> float:
        """Seconds of launching one layer's kernels."""
        return _LAYER_S[self.kind]

    def bound_s(self, flops: float, moved: float) -> float:
        """Return the seconds of computing so many operations while moving so many bytes."""
        return max(flops / (self.flops * self.flops_share), moved / (self.bandwidth * self.bandwidth_share))


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
"""The machines by name, the slower kinds first."""
