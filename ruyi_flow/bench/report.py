"""What a bench is asked, what it found, and on what machine."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ruyi_flow.types import Weights

__all__ = ["Measured", "Report", "Setup", "machine", "ratio", "settings", "turns", "unseen"]

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


def unseen(what: str, done: int, total: int) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every bench is asked."""

    family: str
    """A folder, or a name in the store."""
    weights: Weights | None = None
    """How products hold their weights; None keeps them as they are."""
    dtype: str = "bfloat16"
    threads: int = 2
    """Of every process that computes."""
    tokens: int = 128
    """New tokens an answer, 2 or more."""
    rounds: int = 5
    """That count; one more warms up."""
    device: str = "cpu"
    """A torch device, of benches that have all of the family in one place."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a bench found."""

    bench: str
    settings: dict[str, Any]
    results: dict[str, dict[str, float]]
    """By what was run: its figures, each with its unit in the name."""
    samples: dict[str, dict[str, list[float]]]
    """For a plot: by what an axis shows and by what was run, every sample that counts."""

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object, without the samples."""
        rows = {name: {k: round(v, 4) for k, v in row.items()} for name, row in self.results.items()}
        return {"bench": self.bench, "settings": self.settings, "results": rows}


def turns(names: Sequence[str], rounds: int, report: Report) -> Iterator[tuple[str, bool]]:
    """Whose turn it is, and whether it counts: each once a round, the first round not.

    In turn, since machines are noisy: what disturbs a round disturbs all that are compared in it.
    """
    total = (rounds + 1) * len(names)
    for i in range(total):
        report("measuring", i, total)
        yield names[i % len(names)], i >= len(names)
    report("measuring", total, total)


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median and the lowest of two sides' ratios, round by round, as figures of that name."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {name: statistics.median(ratios), f"{name}_lowest": min(ratios)}


def settings(setup: Setup, **more: Any) -> dict[str, Any]:
    """What was run, as the JSON line says it."""
    return asdict(setup) | more


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on beside the program."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        **({"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
        "ruyi_flow": version("ruyi-flow"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
