"""Setup and results of a benchmark, the order of its runs, and the description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ruyi_flow import __version__
from ruyi_flow.types import Weights

__all__ = [
    "Measurement",
    "Report",
    "Setup",
    "available_cores",
    "describe_machine",
    "interleaved",
    "no_report",
    "ratios",
]

Report = Callable[[str, int, int], None]
"""A function that is called with the part of the work that runs, how much of it is done, and its total.

A total of 0 means that it is not known.
"""


def no_report(what: str, done: int, total: int) -> None:
    """Do nothing; the `Report` of callers that show no progress."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings that all benchmarks share."""

    family: str
    """Folder of the family, or its name in the store."""
    _: KW_ONLY
    weights: Weights | None = None
    """Number format of the weight matrices. Default: as in the checkpoint."""
    dtype: str = "bfloat16"
    """Number format of hidden states: bfloat16, float32 or float16."""
    threads: int = 2
    """CPU threads of each process that computes."""
    tokens: int = 128
    """New tokens per answer, at least 2."""
    rounds: int = 5
    """Measured rounds; one more round warms up."""
    device: str = "cpu"
    """Torch device of the benchmarks that run the whole family in one place."""

    @property
    def node_options(self) -> dict[str, Any]:
        """The settings that `running_nodes` takes."""
        return {name: getattr(self, name) for name in ("family", "weights", "dtype", "threads", "device")}


@dataclass(frozen=True, slots=True)
class Measurement:
    """The results of one benchmark."""

    bench: str
    """Name of the benchmark."""
    settings: dict[str, Any]
    """Settings of the run, for the JSON line."""
    results: dict[str, dict[str, float]]
    """Statistics by what was run; each name ends in its unit."""
    samples: dict[str, dict[str, list[float]]]
    """All measured samples for the plot, by the label of the axis and then by what was run."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples as one JSON object."""
        rows = {name: {k: round(v, 4) for k, v in row.items()} for name, row in self.results.items()}
        return {"bench": self.bench, "settings": self.settings, "results": rows}


def interleaved(names: Sequence[str], rounds: int, report: Report) -> Iterator[tuple[str, bool]]:
    """Yield every name once per round, and whether the round is measured; the first round only warms up.

    The names take turns so that whatever disturbs the machine in one round disturbs all that are compared.
    """
    total = (rounds + 1) * len(names)
    for i in range(total):
        report("measuring", i, total)
        yield names[i % len(names)], i >= len(names)
    report("measuring", total, total)


def ratios(name: str, numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Return the median and the lowest ratio over the rounds, as `name` and `name_lowest`."""
    by_round = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return {name: statistics.median(by_round), f"{name}_lowest": min(by_round)}


def available_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on; empty where the system does not tell."""
    process = psutil.Process()
    return sorted(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else []


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return what results depend on besides the program: processor, memory, versions and date."""
    gpu = {}
    if device.startswith("cuda"):
        import torch

        gpu = {"gpu": torch.cuda.get_device_name(device)}
    return {
        "processor": _processor(),
        "cores": len(available_cores()) or os.cpu_count(),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        **gpu,
        "ruyi_flow": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
