"""Attention of new positions to a session's KV cache, whose pages are read in place."""

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
"""Positions of a page for flash-attn's paged kernel, which accepts only multiples of 256."""

logger = logging.getLogger(__name__)


def flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """Return the flash-attn module if it can run here, else None (SDPA is used); the log gives the reason."""
    if device.type != "cuda" or dtype is torch.float32 or find_spec("flash_attn") is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        reason = f"it needs compute capability 8.0, {device} has {major}.{minor}"
    elif head_dim > 256:
        reason = f"it supports heads of up to 256 values, the family's have {head_dim}"
    else:
        try:
            import flash_attn
        except (ImportError, OSError) as error:  # built for another torch, or another CUDA
            reason = f"it cannot be loaded: {error}"
        else:
            return flash_attn
    logger.warning("flash-attn is not used, torch's attention runs instead: %s", reason)
    return None


def page_table(first: int, positions: int, num_pages: int) -> list[int]:
    """List the long pages of a run of pages: one begins at every page, so the run's are every fourth.

    Args:
        first: the run's first page.
        positions: positions that the table covers, a multiple of LONG_PAGE.
        num_pages: pages of the pool; an entry past its end is the padding page after it.
    """
    step = LONG_PAGE // PAGE_SIZE
    return [min(first + i * step, num_pages) for i in range(positions // LONG_PAGE)]


class CachedAttention:
    """Attention of one block of one session: appends its rows to the KV cache and attends to all positions so far.

    Args:
        memory: (slots, 2, kv_heads, positions, head_dim) KV cache of the session.
        start: position of the block's first row.
        count: rows of the block.
        flash: the flash-attn module. None: SDPA.
    """

    def __init__(self, memory: Tensor, start: int, count: int, flash: Any = None) -> None:
        self.start, self.count, self.flash = start, count, flash
        stop = start + count
        # Views for all slots are made once; making them in every layer would cost more calls.
        self._new = memory[:, :, :, start:stop].transpose(2, 3).flatten(0, 1).unbind(0)  # (count, kv_heads, d)
        self._seen = memory[:, :, None, :, :stop].flatten(0, 1).unbind(0)  # (1, kv_heads, stop, d)
        self.device = memory.device
        self._causal: Tensor | None = None

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        self._new[2 * slot].copy_(k)
        self._new[2 * slot + 1].copy_(v)
        return self.attend(slot, q, rows)

    def attend(self, slot: int, q: Tensor, rows: Tensor | None) -> Tensor:
        """Attend to the KV cache, which contains the block's rows already; see `Attention`."""
        keys, values = self._seen[2 * slot], self._seen[2 * slot + 1]
        m, heads, d = q.shape
        if m == 0:
            return q.view(0, heads * d)
        if self.flash is not None and rows is None:
            # flash-attn aligns its causal mask to the last position, as a block after cached positions needs.
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
            flash: Tensor = self.flash.flash_attn_func(q[None], k, v, causal=True)
            return flash.view(m, heads * d)
        # Query heads that share a key head become rows of one product, so that keys are neither copied nor reread.
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
        """Return the (group * m, stop) causal mask; the one for all rows is cached."""
        if rows is None and self._causal is not None:
            return self._causal
        device = self.device
        queries = torch.arange(self.count, device=device) if rows is None else rows
        mask = torch.arange(self.start + self.count, device=device) <= (queries + self.start)[:, None]
        mask = mask.repeat(group, 1)
        if rows is None:
            self._causal = mask
        return mask


class BatchedAttention:
    """Attention of several sessions' blocks in one step; each block attends to its own session only.

    Args:
        blocks: the blocks, whose rows are concatenated in this order.
        memory: (slots, 2, kv_heads, positions, head_dim) KV cache of the node.
        at: (n,) positions of the memory to which the n rows are written.
        query_rows: rows of each block that query in a layer that is called with `rows`. Default: all.
    """

    def __init__(
        self,
        blocks: Sequence[CachedAttention],
        memory: Tensor,
        at: Tensor,
        query_rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._blocks, self._memory, self._at = blocks, memory, at
        self._counts = [block.count for block in blocks]
        self._sizes = self._counts
        self._all: list[Tensor | None] = [None] * len(blocks)
        self._rows = self._all
        if query_rows is not None:
            self._sizes = [len(rows) for rows in query_rows]
            self._rows = [
                None if len(rows) == block.count else torch.tensor(rows, dtype=torch.int64, device=block.device)
                for rows, block in zip(query_rows, blocks, strict=True)
            ]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        sizes, queried = (self._counts, self._all) if rows is None else (self._sizes, self._rows)
        memory = self._memory[slot]
        memory[0].index_copy_(1, self._at, k.transpose(0, 1))
        memory[1].index_copy_(1, self._at, v.transpose(0, 1))
        parts = zip(self._blocks, q.split(sizes), queried, strict=True)
        return torch.cat([block.attend(slot, *part) for block, *part in parts])


class PagedAttention:
    """Attention of rows of any sessions; every row is a sequence that ends at its own position.

    Everything that differs between steps is in tensors, so a CUDA graph can capture it (docs/design/0003-cuda.md).

    Args:
        memory: (slots, 2, kv_heads, positions, head_dim) KV cache of the node, plus LONG_PAGE positions of padding.
        at: (n,) positions of the memory to which the n rows are written.
        lengths: (n,) int32 numbers of positions that the rows attend to, their own included.
        tables: (n, long pages) int32 `page_table` of each row.
        flash: the flash-attn module. None: SDPA over copies of the KV cache.
    """

    def __init__(self, memory: Tensor, at: Tensor, lengths: Tensor, tables: Tensor, *, flash: Any = None) -> None:
        self._memory, self._at, self._lengths, self._tables, self._flash = memory, at.long(), lengths, tables, flash
        if flash is None:
            within = torch.arange(LONG_PAGE, device=memory.device)
            positions = (tables[:, :, None] * PAGE_SIZE + within).flatten(1)
            visible = torch.arange(positions.shape[1], device=memory.device) < lengths[:, None]
            # Even a masked position must not be NaN; unwritten memory may be, the row's own position never is.
            self._gathered = torch.where(visible, positions, self._at[:, None]).flatten()
            self._mask = visible[:, None, None]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        assert rows is None, "every row queries"
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
        keys, values = (
            t.index_select(1, self._gathered).view(kv_heads, n, -1, d).transpose(0, 1) for t in (keys, values)
        )
        grouped = q.reshape(n, kv_heads, heads // kv_heads, d)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(n, heads * d)


def long_pages(cache: Tensor) -> Tensor:
    """Return a view of (kv_heads, positions, head_dim) as (long pages, LONG_PAGE, kv_heads, head_dim)."""
    # The long pages overlap, one begins at every page: flash-attn needs no more than a dense last dimension.
    return cache.unfold(1, LONG_PAGE, PAGE_SIZE).permute(1, 3, 0, 2)
