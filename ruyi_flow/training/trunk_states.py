"""A disk cache of a frozen trunk's states for packed sequences, which are most of the cost of training on a CPU."""

from __future__ import annotations

import hashlib
import math
import shutil

import torch
from torch import Tensor

from ruyi_flow.family.transformer import CausalAttention, FamilySlice, Rope
from ruyi_flow.training.corpus import Packed
from ruyi_flow.training.recipe import Recipe

__all__ = ["TrunkStates", "rope_and_attention"]

_TOP = 16
"""Number of most probable tokens of the last branch that are cached for each position."""


class TrunkStates:
    """The frozen trunk's states for each packed sequence: cached on disk up to a bound, and beyond it recomputed.

    The cache is sparse files that are mapped into memory, with a row for each sequence; `there` has one byte a row,
    which is 1 once the row is computed.

    Args:
        model: the whole family.
        packed: the sequences.
        recipe: sets the folder, the bound and the precision.
        fingerprint: the family's fingerprint.
    """

    def __init__(self, model: FamilySlice, packed: Packed, recipe: Recipe, fingerprint: str) -> None:
        self.model, self.packed, self.batch = model, packed, recipe.batch
        hidden, length = model.config.hidden_size, recipe.length
        dtype = model.dtype
        self._shape = (len(model.exits), length, hidden)
        self._top_size = min(_TOP, model.config.vocab_size)
        row_bytes = math.prod(self._shape) * dtype.itemsize + length * self._top_size * 8
        digest = hashlib.sha256(f"{fingerprint} {recipe.length} {recipe.precision}".encode())
        digest.update(packed.token_ids.numpy().tobytes() + packed.documents.numpy().tobytes())
        folder = recipe.out / f"trunk-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        # A mapped file that fills its disk kills the process, so 0.1 of what is free stays free.
        used = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        limit = min(recipe.cache_gb * 1e9, used + 0.9 * shutil.disk_usage(folder).free)
        cached = min(len(packed), int(limit / row_bytes))

        def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            size, file = math.prod(shape), folder / name
            if not size:
                return torch.empty(0)
            file.touch()  # with the permissions of any new file; torch's own are for the owner alone
            return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)

        self._cache = (
            mapped("states", (cached, *self._shape), dtype),
            mapped("top", (cached, length, self._top_size), torch.int32),
            mapped("chances", (cached, length, self._top_size), torch.float32),
        )
        self._there = mapped("there", (cached,), torch.uint8)
        self._rope = Rope(model.config, dtype, model.device)

    def of(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the states of some sequences, from the cache or computed.

        Args:
            indices: (n,) numbers of the sequences.

        Returns:
            (n, early exits, length, hidden) boundary states; (n * length, hidden) normed states of the last branch;
            (n * length, top) its most probable tokens; (n * length, top) their probabilities, scaled to a sum of 1.
        """
        cacheable = indices < len(self._there)
        missing = indices[cacheable][self._there[indices[cacheable]] == 0]
        for part in missing.split(self.batch) if len(missing) else ():
            for cache, values in zip(self._cache, self._compute(part), strict=True):
                cache[part] = values.cpu()
            self._there[part] = 1
        if not cacheable.any():
            states, top, chances = self._compute(indices)  # stays on its device
        else:
            states, top, chances = old = tuple(cache[indices[cacheable]] for cache in self._cache)
            if not cacheable.all():
                new = self._compute(indices[~cacheable])
                states, top, chances = (_merge(cacheable, a, b) for a, b in zip(old, new, strict=True))
        last = states[:, -1].flatten(0, 1)
        return states[:, :-1], last, top.flatten(0, 1).long(), chances.flatten(0, 1)

    @torch.no_grad()
    def _compute(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the boundary states of early exits, the normed states of the last one, and its top tokens."""
        model, rows = self.model, self.packed.rows(indices)
        device = self._rope.device
        rope, attention = rope_and_attention(self._rope, rows, device)
        x = model.embed(rows.token_ids.to(device, torch.int64).flatten())
        exit_states = []
        for first, exit in model.stages:
            x = model.run(x, first, exit, rope=rope, attention=attention)
            exit_states.append(x)
        normed = model.branch_states(model.exits[-1], x, rope=rope, attention=attention)
        assert normed is not None
        exit_states[-1] = normed
        tops, chances = [], []
        for part in normed.split(1024):
            found = model.head_at[model.exits[-1]].forward(part).float().topk(self._top_size, -1)
            tops.append(found.indices.int())
            chances.append(found.values.softmax(-1))
        n, length = len(indices), self._shape[1]
        states = torch.stack([s.view(n, length, -1) for s in exit_states], 1)
        return states, torch.cat(tops).view(n, length, -1), torch.cat(chances).view(n, length, -1)


def rope_and_attention(rope: Rope, rows: Packed, device: torch.device) -> tuple[tuple[Tensor, Tensor], CausalAttention]:
    """Return cosines and sines of packed sequences, and an attention that keeps their documents apart."""
    cos, sin = rope.at(0, int(rows.positions.max()) + 1)
    where = rows.positions.flatten().long()
    tables = cos[where.to(cos.device)].to(device), sin[where.to(sin.device)].to(device)
    return tables, CausalAttention(len(rows), rows.documents.to(device))


def _merge(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    out = torch.empty((len(mask), *no.shape[1:]), dtype=no.dtype)
    out[mask], out[~mask] = yes.cpu(), no.cpu()
    return out
