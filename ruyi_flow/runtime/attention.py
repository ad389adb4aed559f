"""Attention of new positions to a session's cached ones, over pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BatchedAttention", "CachedAttention", "flash_attention"]


def flash_attention() -> Any:
    """flash-attn's kernel where the package is installed, else None."""
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


class CachedAttention:
    """One block of one session: writes its keys and values at `start …` and attends to everything up to there.

    Args:
        memory: (slots, 2, kv_heads, positions, head_dim), the session's own pages of the node's pool.
        start: position of the block's first row.
        count: rows of the block.
        flash: flash-attn's kernel, or None for SDPA.
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
        if self.flash is not None and rows is None and q.dtype is not torch.float32:
            # Its causal mask is aligned to the end, which is what a block after cached positions needs.
            flash: Tensor = self.flash(q[None], keys.transpose(1, 2), values.transpose(1, 2), causal=True)
            return flash.view(m, heads * d)
        # The query heads that share a key head become rows of one product, so that keys are read once, not copied.
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        if m == 1 and rows is None:
            out = F.scaled_dot_product_attention(q.reshape(1, kv_heads, group, d), keys, values)
            return out.view(1, heads * d)
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
