"""Takes parts of Linux, of x86-64 or of torch away from a Python process, before it runs anything.

Python imports this module by its name when its folder is on PYTHONPATH. `LACKS` in the environment names the parts.
Processes that this one starts inherit both.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import warnings
from typing import Any


class Missing:
    """A namespace of operators of which none is registered."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no operator {name!r}")


def no_onednn() -> None:
    """Take oneDNN away, which builds of torch for Apple Silicon and for some Jetsons lack."""
    import torch

    torch.ops.mkldnn = Missing()  # type: ignore[attr-defined]
    torch.backends.mkldnn.is_available = lambda: False


def no_int4() -> None:
    """Take the products with 4-bit weights away."""
    import torch

    del torch._weight_int4pack_mm_for_cpu, torch._convert_weight_to_int4pack_for_cpu


def no_signals() -> None:
    """Give event loops no more than those of Windows have: neither signal handlers nor watched file descriptors."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    for name in ("add_signal_handler", "remove_signal_handler", "add_reader", "remove_reader"):
        setattr(asyncio.SelectorEventLoop, name, refuse)


def no_affinity() -> None:
    """Take the pinning of processes to cores away, as on macOS."""
    import psutil

    del os.sched_getaffinity, os.sched_setaffinity, psutil.Process.cpu_affinity


def no_glibc() -> None:
    """Let the C library have no settings of malloc, as on macOS."""

    class Plain:
        def __init__(self, name: str | None) -> None:
            self.name = name

    ctypes.CDLL = Plain  # type: ignore[misc, assignment]


def no_process_library() -> None:
    """Refuse the library of the process itself, as Windows does."""
    real = ctypes.CDLL

    def load(name: str | None, *args: Any, **kwargs: Any) -> ctypes.CDLL:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return real(name, *args, **kwargs)

    ctypes.CDLL = load  # type: ignore[misc, assignment]


def no_posix() -> None:
    """Take the functions and modules of POSIX away that the package or its libraries could use."""
    for module, names in (
        (os, ("getppid", "killpg", "setsid", "getpgid", "fork")),
        (signal, ("pthread_sigmask", "SIGKILL", "SIGHUP")),
    ):
        for name in names:
            delattr(module, name)
    sys.modules["resource"] = sys.modules["fcntl"] = None  # type: ignore[assignment]


def no_default_encoding() -> None:
    """Make an error of every text file that the package opens without naming its encoding."""
    assert sys.flags.warn_default_encoding, "set PYTHONWARNDEFAULTENCODING"
    warnings.simplefilter("ignore", EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"ruyi_flow\.")


for part in os.environ.get("LACKS", "").split():
    globals()[f"no_{part}"]()
