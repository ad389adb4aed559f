"""Attention of new positions to a session's cached ones, over pages in place."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CachedAttention", "flash_attention"]


def flash_attention() -> Any:
    """flash-attn's kernel where the package is installed, else None."""
    if find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


class CachedAttention:
    """One block of one session: writes its keys and values at `start …` and attends to everything up to there.

    Args:
        memory: (slots, 2, positions, kv_heads, head_dim), the session's own pages of the node's pool.
        start: position of the block's first row.
        count: rows of the block.
        flash: flash-attn's kernel, or None for SDPA.
    """

    def __init__(self, memory: Tensor, start: int, count: int, flash: Any = None) -> None:
        self.start, self.count, self.flash = start, count, flash
        stop = start + count
        self._new = memory[:, :, start:stop].unbind(0)  # slot -> (2, count, kv_heads, d)
        self._seen = memory[:, :, :stop].unbind(0)  # slot -> (2, stop, kv_heads, d)
        self._masks: dict[int, Tensor] = {}

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        new_k, new_v = self._new[slot].unbind(0)
        new_k.copy_(k)
        new_v.copy_(v)
        keys, values = self._seen[slot].unbind(0)
        m, heads, d = q.shape
        if m == 0:
            return q.view(0, heads * d)
        if self.flash is not None and rows is None and q.dtype is not torch.float32:
            # Its causal mask is aligned to the end, which is what a block after cached positions needs.
            flash: Tensor = self.flash(q[None], keys[None], values[None], causal=True)
            return flash.view(m, heads * d)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # (1, kv_heads, stop, d)
        if rows is None and self.start == 0 and m > 1:
            out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(m, heads * d)
        # The query heads that share a key head become rows of one product, so that keys are read once, not copied.
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        grouped = q.view(m, kv_heads, group, d).permute(1, 2, 0, 3).reshape(1, kv_heads, group * m, d)
        mask = None if m == 1 and rows is None else self._mask(rows, group)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.view(kv_heads, group, m, d).permute(2, 0, 1, 3).reshape(m, heads * d)

    def _mask(self, rows: Tensor | None, group: int) -> Tensor:
        """(group * m, stop): row i sees position j when j is at or before it. Made once, the same for every layer."""
        key = -1 if rows is None else id(rows)
        if key not in self._masks:
            device = self._seen[0].device
            asked = torch.arange(self.count, device=device) if rows is None else rows
            seen = torch.arange(self.start + self.count, device=device) <= (asked + self.start)[:, None]
            self._masks[key] = seen.repeat(group, 1)
        return self._masks[key]
