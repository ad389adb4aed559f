"""What torch and the store say of this machine and of some folders, asked in a process of its own.

Torch may be missing, may not start on this processor, or may take long to load, and none of that may end the caller.
`python -m ruyi_flow.doctor.torch_report FOLDERS` prints the report as JSON.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Accelerator", "Folder", "FolderReport", "TorchReport", "ask_torch"]

_LIMIT_S = 90.0
"""Seconds that the process may take: torch is loaded from a cold disk, and each folder's tensors are looked at."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder to look at."""

    node: str
    """The node that reads it; empty for the whole family."""
    family: str
    """A folder, or a family's name in the store."""
    exits: tuple[int, ...] | None = None
    """Exits that the topology gives to an ordinary checkpoint."""


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What is in a folder."""

    node: str
    """The node that reads it; empty for the whole family."""
    folder: str
    """The folder."""
    exits: tuple[int, ...] = ()
    """Exits at which the stages in the folder end."""
    family_exits: tuple[int, ...] = ()
    """All exits of the family."""
    fingerprint: str = ""
    """Fingerprint of the family."""
    bytes: int = 0
    """Size of the files with weights."""
    error: str = ""
    """Why the folder cannot be read; empty if it can."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device beside the processor."""

    device: str
    """Its name in a topology: cuda:0, mps, xpu:0."""
    name: str
    """The product's name."""
    total_bytes: int = 0
    """Its memory; 0 if it is not known."""


@dataclass(frozen=True, slots=True)
class TorchReport:
    """What torch and the store say."""

    version: str = ""
    """Version of torch; empty without torch."""
    build: str = ""
    """What torch was built for: CPU, CUDA 12.8, ROCm 6.4, MPS or XPU."""
    onednn: bool = False
    """Whether the build has oneDNN."""
    bfloat16: bool = False
    """Whether oneDNN has products in bfloat16 for this processor."""
    accelerators: tuple[Accelerator, ...] = ()
    """Devices beside the processor."""
    store: str = ""
    """Folder of the store."""
    families: tuple[str, ...] = ()
    """Names of the families in the store."""
    free_bytes: int = 0
    """Free disk space where the store is."""
    folders: tuple[FolderReport, ...] = ()
    """What is in the folders that were asked about."""
    error: str = ""
    """Why there is no report; empty if there is one, and without torch."""
    is_installed: bool = field(default=True)
    """Whether torch is installed."""


async def ask_torch(folders: tuple[Folder, ...] = ()) -> TorchReport:
    """Start a process that loads torch, and return its report.

    Args:
        folders: shards and families to look at.
    """
    if importlib.util.find_spec("torch") is None:
        return TorchReport(is_installed=False)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ruyi_flow.doctor.torch_report", json.dumps([asdict(folder) for folder in folders])),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_LIMIT_S):
            out, err = await process.communicate()
    except TimeoutError:
        return TorchReport(error=f"it was not loaded within {_LIMIT_S:g} s")
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        found = json.loads(out)
    except ValueError:
        lines = err.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        return TorchReport(error=f"a process that loads it ended with {process.returncode}: {lines[-1].strip()[:300]}")
    return TorchReport(
        **found
        | {
            "accelerators": tuple(Accelerator(**one) for one in found["accelerators"]),
            "families": tuple(found["families"]),
            "folders": tuple(_folder_report(one) for one in found["folders"]),
        }
    )


def _folder_report(found: dict[str, Any]) -> FolderReport:
    lists = {key: tuple(found[key]) for key in ("exits", "family_exits")}
    return FolderReport(**found | lists)


def _report(folders: list[dict[str, Any]]) -> TorchReport:
    """Load torch and make the report."""
    import shutil

    import torch

    from ruyi_flow.family import store

    build, accelerators = "CPU", []
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            accelerators.append(Accelerator(f"cuda:{i}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        accelerators.append(Accelerator("mps", "Apple GPU"))
    if torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            accelerators.append(Accelerator(f"xpu:{i}", torch.xpu.get_device_name(i)))
    onednn = torch.backends.mkldnn.is_available()
    there = next(path for path in (store.home(), *store.home().absolute().parents) if path.exists())
    return TorchReport(
        version=torch.__version__,
        build=build,
        onednn=onednn,
        bfloat16=onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        accelerators=tuple(accelerators),
        store=str(store.home()),
        families=tuple(store.names()),
        free_bytes=shutil.disk_usage(there).free,
        folders=tuple(_look(**folder) for folder in folders),
    )


def _look(node: str, family: str, exits: list[int] | None) -> FolderReport:
    """Look into a folder with a family or a shard."""
    from ruyi_flow.errors import RuyiFlowError
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint(store.locate(family), exits)
        checkpoint.check(checkpoint.exits)
        size = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
        folder, fingerprint = str(checkpoint.folder), checkpoint.fingerprint
        return FolderReport(node, folder, checkpoint.exits, checkpoint.config.exits, fingerprint, size)
    except (RuyiFlowError, OSError) as error:
        return FolderReport(node, family, error=str(error))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_report(json.loads(sys.argv[1])))))
