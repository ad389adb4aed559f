"""The files of a family's folder: how they are read, copied and written.

A folder may come from a stranger. Only plain files of a limited size are opened, since a pipe would wait for ever. Only
files inside the folder are copied from it, since a link could name any file of this machine. No torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ruyi_flow.errors import CheckpointError

__all__ = [
    "Progress",
    "check_plain",
    "companions",
    "copy_companions",
    "exchange",
    "exclusive_folder",
    "read_json",
    "whole_or_not",
]

Progress = Callable[[str, int, int], None]
"""A function that shows how far a long task is: it takes a part of the work, the amount done, and the whole amount."""

_COMPANIONS = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    "LICENSE",
]
"""Files of a family other than config and weights, copied to the shard of the entry node."""

_MOST_BYTES = 2**27
"""Largest file beside the weights; the largest published tokenizer.json has about 35 MB."""

_MOST_JSON_BYTES = 2**24
"""Largest JSON file that is parsed here; the largest published index has about 9 MB."""


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        hint: what to do if there is no such file.

    Raises:
        CheckpointError: the file is missing, too large or no JSON object.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file" + (f"; {hint}" if hint else ""))
    check_plain(path, _MOST_JSON_BYTES)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def companions(folder: Path) -> list[Path]:
    """List a folder's tokenizer files, chat templates, generation_config.json and licence.

    Raises:
        CheckpointError: one of them is not a plain file, or is too large.
    """
    found = [folder / name for name in _COMPANIONS if (folder / name).exists()]
    found += sorted(folder.glob("additional_chat_templates/*.jinja"))
    for path in found:
        check_plain(path, _MOST_BYTES)
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy a folder's companions.

    Raises:
        CheckpointError: one of them is a link to a file outside of the folder.
    """
    inside = source.resolve()
    if inside.parent.name == "snapshots":  # the cache of Hugging Face links a snapshot's files to the blobs beside it
        inside = inside.parent.parent
    for path in companions(source):
        real = path.resolve()
        if not real.is_relative_to(inside):
            raise CheckpointError(f"{path}: is a link to {real}, outside of the folder; put the file itself there")
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


@contextmanager
def whole_or_not(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `out` at the end, or is removed after an error.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    folder = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, out)
    except _write_errors() as error:
        raise CheckpointError(f"{out}: cannot be written: {error}") from None
    finally:  # after Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)


def _write_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a full disk; safetensors, which a plain install does not have, raises its own."""
    safetensors = sys.modules.get("safetensors")
    return (OSError, safetensors.SafetensorError) if safetensors else (OSError,)


@contextmanager
def exclusive_folder(folder: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """Yield a new temporary folder, to one process at a time; nothing of it stays but an empty lock file beside it.

    Args:
        folder: the folder. What is beside it are such folders too; those of processes that were killed are removed.
        waiting: called when another process has the folder, before waiting for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        for other in [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]:
            with suppress(Timeout), _lock(other).acquire(timeout=0):
                shutil.rmtree(other, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def exchange(new: Path, out: Path) -> None:
    """Put a new folder in the place of another, which then has the place of the new one."""
    # Linux exchanges two names in one step. Python has no function for it, and some file systems cannot do it.
    libc, here, exchange = ctypes.CDLL(None), -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and not libc.renameat2(here, os.fsencode(new), here, os.fsencode(out), exchange):
        return
    old = new.with_name("old")
    os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        os.replace(old, out)
        raise


def check_plain(path: Path, most: int | None = None) -> None:
    """Check that a file can be opened without waiting.

    Args:
        path: the file.
        most: largest size in bytes. Default: any.

    Raises:
        CheckpointError: it is a pipe, a device or a folder, or is larger.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: not a plain file; fetch the checkpoint again")
    if most is not None and (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path}: has {size} bytes; at most {most} are read, since no such file needs more")
