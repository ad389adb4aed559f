"""Other systems, emulated: what Python, torch and the processor lack there is taken away from a process here."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["SYSTEMS", "environment"]

_ROOT = Path(__file__).parents[2]

SYSTEMS: dict[str, dict[str, str]] = {
    "apple": {"LACKS": "default_encoding onednn affinity glibc", "PYTHONWARNDEFAULTENCODING": "1"},
    "windows": {
        "LACKS": "default_encoding signals affinity process_library posix",
        "PYTHONWARNDEFAULTENCODING": "1",
        "PYTHONIOENCODING": "cp1252",
    },
    "bare": {"LACKS": "onednn int4"},
    "here": {},
    "old": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
"""The environment in which each system is emulated. `bare` is a torch that has only plain operations, and `old` is an
x86-64 without AVX."""


def environment(system: str) -> dict[str, str]:
    """Return the environment of a process that runs on an emulated system."""
    path = os.pathsep.join([str(Path(__file__).parent / "without"), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path} | SYSTEMS[system]
