"""What a frozen trunk says about packed sequences, computed once and kept on disk: most of training's cost on a CPU."""

from __future__ import annotations

import hashlib
import math
import shutil

import torch
from torch import Tensor

from ruyi_flow.family.transformer import CausalAttention, FamilySlice, Rope
from ruyi_flow.training.corpus import Packed
from ruyi_flow.training.recipe import Recipe

__all__ = ["TrunkStates", "rope_at"]

_LIKELY = 16
"""Tokens of the last branch's distribution that are kept for each position."""


class TrunkStates:
    """What the frozen trunk gives for each packed sequence, kept on disk up to a bound; the rest is computed again.

    One sparse file, mapped: a row's place holds its states, a byte at the end says whether it is there.
    """

    def __init__(self, model: FamilySlice, packed: Packed, recipe: Recipe, fingerprint: str) -> None:
        self.model, self.packed, self.batch = model, packed, recipe.batch
        hidden, length = model.config.hidden_size, recipe.length
        dtype = model.dtype
        self._shape = (len(model.exits), length, hidden)
        self._likely = min(_LIKELY, model.config.vocab_size)
        row_bytes = math.prod(self._shape) * dtype.itemsize + length * self._likely * 8
        digest = hashlib.sha256(f"{fingerprint} {recipe.length} {recipe.precision}".encode())
        digest.update(packed.token_ids.numpy().tobytes() + packed.documents.numpy().tobytes())
        folder = recipe.out / f"trunk-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        # A mapped file that outgrows its disk ends the process: what is there and most of what is free is the bound.
        used = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        room = min(recipe.cache_gb * 1e9, used + 0.9 * shutil.disk_usage(folder).free)
        kept = min(len(packed), int(room / row_bytes))

        def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size = math.prod(shape)
            file = str(folder / name)
            return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape) if size else torch.empty(0)

        self._states = mapped("states", (kept, *self._shape), dtype)
        self._top = mapped("top", (kept, length, self._likely), torch.int32)
        self._chances = mapped("chances", (kept, length, self._likely), torch.float32)
        self._there = mapped("there", (kept,), torch.uint8)
        self._kept = kept
        self._rope = Rope(model.config, dtype, model.device)

    def of(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For some sequences.

        Returns:
            (n, early exits, length, hidden) boundary states; (n * length, hidden) what the last head reads;
            (n * length, top) its likeliest tokens; (n * length, top) their probabilities, which sum to 1.
        """
        keepable = indices < self._kept
        missing = indices[keepable][self._there[indices[keepable]] == 0] if self._kept else indices[:0]
        for part in missing.split(self.batch) if len(missing) else ():
            self._states[part], self._top[part], self._chances[part] = (t.cpu() for t in self._compute(part))
            self._there[part] = 1
        if not keepable.any():
            found = self._compute(indices)  # stays where it was computed
        elif keepable.all():
            found = self._states[indices], self._top[indices], self._chances[indices]
        else:
            states, top, chances = self._compute(indices[~keepable])
            found = tuple(
                _merge(keepable, kept[indices[keepable]] if self._kept else new[:0], new)
                for kept, new in ((self._states, states), (self._top, top), (self._chances, chances))
            )  # type: ignore[assignment]
        states, top, chances = found
        last = states[:, -1].flatten(0, 1)
        return states[:, :-1], last, top.flatten(0, 1).long(), chances.flatten(0, 1)

    @torch.no_grad()
    def _compute(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States at each early exit and, in place of the last exit's, what its head reads; likeliest tokens."""
        model, rows = self.model, self.packed.rows(indices)
        device = self._rope.device
        attention = CausalAttention(len(indices), rows.documents.to(device))
        rope = rope_at(self._rope, rows.positions, device)
        x = model.embed(rows.token_ids.to(device, torch.int64).flatten())
        kept = []
        for first, exit in model.stages:
            x = model.run(x, first, exit, rope, attention)
            kept.append(x)
        read = model.reading(model.exits[-1], x, rope, attention)
        assert read is not None
        kept[-1] = read
        tops, chances = [], []
        for part in read.split(1024):
            found = model.head_at[model.exits[-1]].forward(part).float().topk(self._likely, -1)
            tops.append(found.indices.int())
            chances.append(found.values.softmax(-1))
        n, length = len(indices), self._shape[1]
        states = torch.stack([k.view(n, length, -1) for k in kept], 1)
        return states, torch.cat(tops).view(n, length, -1), torch.cat(chances).view(n, length, -1)


def rope_at(rope: Rope, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of these positions, in any order."""
    cos, sin = rope.at(0, int(positions.max()) + 1)
    where = positions.flatten().long()
    return cos[where.to(cos.device)].to(device), sin[where.to(sin.device)].to(device)


def _merge(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    out = torch.empty((len(mask), *no.shape[1:]), dtype=no.dtype)
    out[mask], out[~mask] = yes.cpu(), no.cpu()
    return out
