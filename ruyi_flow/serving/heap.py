"""Keep the memory of a node's process small while it loads. For programs only: it sets malloc for the whole process."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["tidy_heap"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
_SMALL, _LARGE = 64 << 10, 32 << 20


@contextmanager
def tidy_heap() -> Iterator[None]:
    """Return the memory of temporary objects made in this block to the system; does nothing without glibc.

    In the block, allocations of 64 kB and more get pages of their own, which go back to the system when they are
    freed; otherwise the objects that remain would keep holes between them in the heap. After the block and for the
    rest of the process, the limit is 32 MB, the largest that glibc would reach by itself: new pages for the tensors of
    every step would cost time.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
