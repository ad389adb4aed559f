"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_file"]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new path beside `path` to write to; what is written there replaces `path` at the end of the block.

    After an error or Ctrl-C in the block, `path` is as before and the new file is removed. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new-{os.getpid()}-{path.name}")  # keeps the suffix, which some libraries go by
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
