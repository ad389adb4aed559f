"""Logits of every exit for given tokens, in one pass of the trunk: for evaluation, traces and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruyi_flow.family.transformer import CausalAttention, FamilySlice, Rope

__all__ = ["Tree", "exit_logits"]


@dataclass(frozen=True, slots=True)
class Tree:
    """A context and its alternative continuations, evaluated in one pass: each attends to the context and to itself."""

    context: tuple[int, ...]
    """Token ids, at least one."""
    continuations: tuple[tuple[int, ...], ...]
    """Token ids of each continuation; the last id of each is predicted only, not run."""

    def __len__(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@torch.inference_mode()
def exit_logits(
    model: FamilySlice, exits: Sequence[int], trees: Sequence[Tree], chosen: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run trees of tokens through the family once and compute the logits of several exits.

    Args:
        model: the whole family.
        exits: the exits to compute, ascending.
        trees: run as one batch.
        chosen: for each tree, the indices of the positions to compute, in the order context, continuations.

    Yields:
        (exit, logits, states) for each exit: (sum of chosen, vocab) float32 logits, and the (sum of chosen, hidden)
        normed states that are the LM head's input.
    """
    length, device = max(map(len, trees)), model.device
    ids, places = torch.zeros(len(trees), length, dtype=torch.int64), torch.zeros(len(trees), length, dtype=torch.int64)
    parts = torch.full((len(trees), length), -1)
    for i, tree in enumerate(trees):
        stop = len(tree.context)
        ids[i, :stop], places[i, :stop], parts[i, :stop] = torch.tensor(tree.context), torch.arange(stop), 0
        for number, continuation in enumerate(tree.continuations, 1):
            start, stop = stop, stop + len(continuation) - 1
            ids[i, start:stop] = torch.tensor(continuation[:-1], dtype=torch.int64)
            places[i, start:stop] = len(tree.context) + torch.arange(stop - start)
            parts[i, start:stop] = number
    rope = Rope(model.config, model.dtype, device)
    cos, sin = rope.at(0, int(places.max()) + 1)
    where = places.flatten().to(device)
    turned = cos[where], sin[where]
    plain = all(len(tree) == length and len(tree.continuations) <= 1 for tree in trees)
    attention = CausalAttention(len(trees), None if plain else parts.to(device), root=0)
    rows = torch.cat([i * length + positions for i, positions in enumerate(chosen)]).to(device)
    x = model.embed(ids.flatten().to(device))
    for first, exit in model.stages:
        x = model.run(x, first, exit, rope=turned, attention=attention)
        if exit in exits:
            states = model.branch_states(exit, x, rope=turned, attention=attention)
            assert states is not None
            states = states[rows]
            yield exit, model.head_at[exit].forward(states).float(), states
        if exit == exits[-1]:
            return
