"""Attention of new positions to a session's cached ones, over pages in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ruyi_flow.loop.pages import PAGE_SIZE

__all__ = [
    "LONG_PAGE",
    "BatchedAttention",
    "CachedAttention",
    "PagedAttention",
    "flash_attention",
    "long_pages",
    "page_table",
]

LONG_PAGE = 256
"""Positions of a page as flash-attn's kernel sees the memory: it takes multiples of 256 only."""

logger = logging.getLogger(__name__)


def flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """flash-attn, where it is installed and has kernels for this, else None for SDPA; the log says why not."""
    if device.type != "cuda" or dtype is torch.float32 or find_spec("flash_attn") is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        why = f"it needs compute capability 8.0, {device} has {major}.{minor}"
    elif head_dim > 256:
        why = f"it has heads of up to 256 values, the family's have {head_dim}"
    else:
        try:
            import flash_attn
        except (ImportError, OSError) as error:  # built for another torch, or another CUDA
            why = f"it cannot be loaded: {error}"
        else:
            return flash_attn
    logger.warning("flash-attn is left out, torch's own attention runs instead: %s", why)
    return None


def page_table(first: int, positions: int, num_pages: int) -> list[int]:
    """The long pages of a run that begins at a page: one begins at each page, so the run's are every fourth.

    Args:
        first: the run's first page.
        positions: how far the table reaches, a multiple of LONG_PAGE; past the pool it names the long page after it.
        num_pages: in the pool.
    """
    step = LONG_PAGE // PAGE_SIZE
    return [min(first + i * step, num_pages) for i in range(positions // LONG_PAGE)]


class CachedAttention:
    """One block of one session: writes its keys and values at `start …` and attends to everything up to there.

    Args:
        memory: (slots, 2, kv_heads, positions, head_dim), the session's own pages of the node's pool.
        start: position of the block's first row.
        count: rows of the block.
        flash: flash-attn, or None for SDPA.
    """

    def __init__(self, memory: Tensor, start: int, count: int, flash: Any = None) -> None:
        self.start, self.count, self.flash = start, count, flash
        stop = start + count
        # All views of the step at once, by slot: inside the layers each would cost its own calls.
        self._new = memory[:, :, :, start:stop].transpose(2, 3).flatten(0, 1).unbind(0)  # (count, kv_heads, d)
        self._seen = memory[:, :, None, :, :stop].flatten(0, 1).unbind(0)  # (1, kv_heads, stop, d)
        self.device = memory.device
        self._causal: Tensor | None = None

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        self._new[2 * slot].copy_(k)
        self._new[2 * slot + 1].copy_(v)
        return self.attend(slot, q, rows)

    def attend(self, slot: int, q: Tensor, rows: Tensor | None) -> Tensor:
        """Attend to keys and values that are written already; see `Attention`."""
        keys, values = self._seen[2 * slot], self._seen[2 * slot + 1]
        m, heads, d = q.shape
        if m == 0:
            return q.view(0, heads * d)
        if self.flash is not None and rows is None:
            # Its causal mask is aligned to the end, which is what a block after cached positions needs.
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
            flash: Tensor = self.flash.flash_attn_func(q[None], k, v, causal=True)
            return flash.view(m, heads * d)
        # The query heads that share a key head become rows of one product, so that keys are read once, not copied.
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        if m == 1 and rows is None:
            out = F.scaled_dot_product_attention(q.reshape(1, kv_heads, group, d), keys, values)
            return out.reshape(1, heads * d)
        if rows is None and self.start == 0:
            out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(m, heads * d)
        grouped = q.view(m, kv_heads, group, d).permute(1, 2, 0, 3).reshape(1, kv_heads, group * m, d)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask(rows, group))
        return out.view(kv_heads, group, m, d).permute(2, 0, 1, 3).reshape(m, heads * d)

    def _mask(self, rows: Tensor | None, group: int) -> Tensor:
        """(group * m, stop): row i sees position j when j is at or before it. That of all rows is made once."""
        if rows is None and self._causal is not None:
            return self._causal
        device = self.device
        asked = torch.arange(self.count, device=device) if rows is None else rows
        seen = torch.arange(self.start + self.count, device=device) <= (asked + self.start)[:, None]
        mask = seen.repeat(group, 1)
        if rows is None:
            self._causal = mask
        return mask


class BatchedAttention:
    """Blocks of several sessions whose rows lie one after the other: each attends to its own session only.

    Args:
        blocks: the sessions'.
        memory: (slots, 2, kv_heads, positions, head_dim), all of the node's pool.
        at: (n,) positions of the pool that the rows' keys and values go to.
        asked: for each block, which of its rows q is of; None where it is all of all.
    """

    def __init__(
        self,
        blocks: Sequence[CachedAttention],
        memory: Tensor,
        at: Tensor,
        asked: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._blocks, self._memory, self._at = blocks, memory, at
        self._counts = [block.count for block in blocks]
        self._sizes = self._counts
        self._all: list[Tensor | None] = [None] * len(blocks)
        self._rows = self._all
        if asked is not None:
            self._sizes = [len(rows) for rows in asked]
            self._rows = [
                None if len(rows) == block.count else torch.tensor(rows, dtype=torch.int64, device=block.device)
                for rows, block in zip(asked, blocks, strict=True)
            ]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        sizes, asked = (self._counts, self._all) if rows is None else (self._sizes, self._rows)
        memory = self._memory[slot]
        memory[0].index_copy_(1, self._at, k.transpose(0, 1))
        memory[1].index_copy_(1, self._at, v.transpose(0, 1))
        parts = zip(self._blocks, q.split(sizes), asked, strict=True)
        return torch.cat([block.attend(slot, *part) for block, *part in parts])


class PagedAttention:
    """Any rows of any sessions, each a sequence of its own that sees its session's positions up to its own.

    All that differs from step to step is in the tensors, so a CUDA graph can hold it (docs/design/0003-cuda.md).

    Args:
        memory: (slots, 2, kv_heads, positions, head_dim), all of the node's pool and LONG_PAGE positions more.
        at: (n,) positions of the memory that the rows' keys and values go to.
        lengths: (n,) int32, how many positions each row sees, its own the last.
        tables: (n, long pages) int32, each row's `page_table`.
        flash: flash-attn, or None for SDPA over copies.
    """

    def __init__(self, memory: Tensor, at: Tensor, lengths: Tensor, tables: Tensor, flash: Any = None) -> None:
        self._memory, self._at, self._lengths, self._tables, self._flash = memory, at.long(), lengths, tables, flash
        if flash is None:
            within = torch.arange(LONG_PAGE, device=memory.device)
            where = (tables[:, :, None] * PAGE_SIZE + within).flatten(1)
            seen = torch.arange(where.shape[1], device=memory.device) < lengths[:, None]
            # A hidden position must hold a number all the same, and only the row's own surely does.
            self._where = torch.where(seen, where, self._at[:, None]).flatten()
            self._mask = seen[:, None, None]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is None, "every row asks"
        keys, values = self._memory[slot].unbind(0)
        keys.index_copy_(1, self._at, k.transpose(0, 1))
        values.index_copy_(1, self._at, v.transpose(0, 1))
        n, heads, d = q.shape
        if self._flash is not None:
            pages = long_pages(keys), long_pages(values)
            flash: Tensor = self._flash.flash_attn_with_kvcache(
                q[:, None], *pages, cache_seqlens=self._lengths, block_table=self._tables
            )
            return flash.view(n, heads * d)
        kv_heads = keys.shape[0]
        keys, values = (t.index_select(1, self._where).view(kv_heads, n, -1, d).transpose(0, 1) for t in (keys, values))
        grouped = q.reshape(n, kv_heads, heads // kv_heads, d)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(n, heads * d)


def long_pages(held: Tensor) -> Tensor:
    """(kv_heads, positions, head_dim) as flash-attn's paged kernel wants it, a view: (long pages, LONG_PAGE, kv_heads,
    head_dim), of which one begins at each of our pages. The kernel asks for nothing but a dense last dimension."""
    return held.unfold(1, LONG_PAGE, PAGE_SIZE).permute(1, 3, 0, 2)
