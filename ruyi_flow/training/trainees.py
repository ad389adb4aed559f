"""The modules that training optimizes: trunk and branches jointly, branches on a frozen trunk, or their probes.

The forward pass of each takes numbers of packed sequences, the number of the step, and the numbers of all sequences of
that step. It returns the share of these sequences in the step's losses: their sum over positions, divided by the weight
of the whole step's positions. So the shares of batches and processes add up to the losses of one large batch, however
its positions are divided among them. If the step is None, it returns validation results. `published` names the module's
tensors as checkpoints do.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ruyi_flow.family.checkpoint import PROBE_NAMES, Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.transformer import Attention, Branch, DecoderLayer, FamilySlice, Probe, Rope
from ruyi_flow.training.corpus import Packed
from ruyi_flow.training.recipe import Recipe
from ruyi_flow.training.tensors import published, published_branch, randomize, start_branch
from ruyi_flow.training.trunk_states import TrunkStates, rope_and_attention

__all__ = ["Branches", "Joint", "Probes", "cross_entropy"]

_recomputed = partial(recompute, DecoderLayer.forward, use_reentrant=False)


class Joint(nn.Module):
    """The whole family, trained with next-token cross-entropy at every exit; random weights without a checkpoint."""

    def __init__(self, checkpoint: Checkpoint | None, config: FamilyConfig, recipe: Recipe, packed: Packed) -> None:
        super().__init__()
        self.recipe, self.packed = recipe, packed
        self.family = FamilySlice(config, config.exits)
        if checkpoint is None:
            randomize(self.family)
        else:
            base = load_slice(checkpoint, checkpoint.config.exits, dtype=torch.float32, packed=False)
            self.family.load_state_dict(base.state_dict(), strict=False)
            for p in config.exits[:-1]:
                start_branch(self.family.branch_at[p], base, p, recipe.start)
        self.family.requires_grad_(True)
        if recipe.gradient_checkpointing:
            self.family.call = _recomputed
        self.rope = Rope(config, torch.float32, torch.device("cpu"))

    def forward(self, indices: Tensor, step: int | None, whole: Tensor) -> dict[str, Any]:
        """Return the losses' shares of some sequences of a step; without a step, their validation results."""
        if step is None:
            return self._validate(indices)
        losses = self._losses(indices, self._count(whole))
        weights = _exit_weights(self.recipe, len(losses), step)
        total = sum((w * loss for w, loss in zip(weights, losses.values(), strict=True)), torch.zeros(()))
        return {"loss": total} | {f"cross_entropy/{p}": loss.detach() for p, loss in losses.items()}

    def _count(self, indices: Tensor) -> int:
        """Count the positions of some sequences that have a next token."""
        return int((_labels(self.packed.rows(indices)) >= 0).sum())

    def _losses(self, indices: Tensor, count: int) -> dict[int, Tensor]:
        """Return the cross-entropy of each exit over some sequences, as its share of a mean over `count` positions."""
        device, rows = self.family.device, self.packed.rows(indices)
        rope, attention = rope_and_attention(self.rope, rows, device)
        labels = _labels(rows).to(device).flatten()
        states, losses = self.family.embed(rows.token_ids.to(device, torch.int64).flatten()), {}
        for first, exit in self.family.stages:
            states = self.family.run(states, first, exit, rope=rope, attention=attention)
            logits = self.family.branch_logits(exit, states, rope=rope, attention=attention)
            assert logits is not None
            losses[exit] = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / max(1, count)
        return losses

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Return the loss of every exit."""
        sums: dict[str, float] = {}
        count = self._count(indices)
        for part in indices.split(self.recipe.batch):
            for exit, loss in self._losses(part, count).items():
                sums[f"loss/{exit}"] = sums.get(f"loss/{exit}", 0.0) + float(loss)
        return sums

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all tensors of a state of this module by their published names."""
        family = FamilySlice(self.family.config, self.family.exits)
        family.load_state_dict({name.removeprefix("family."): tensor for name, tensor in weights.items()})
        return published(family)


class Branches(nn.Module):
    """The early branches on a frozen trunk, trained to predict what the last branch predicts."""

    def __init__(
        self, checkpoint: Checkpoint, *, config: FamilyConfig, recipe: Recipe, packed: Packed, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe, self.config, self.packed, self.device = recipe, config, packed, device
        base = load_slice(checkpoint, checkpoint.config.exits, dtype=torch.float32, packed=False)
        early = config.exits[:-1]
        self.branches = nn.ModuleDict()
        for p in early:
            branch = Branch(config, config.branch_layers[config.exits.index(p)])
            start_branch(branch, base, p, recipe.start)
            self.branches[str(p)] = branch.requires_grad_(True)
        heads = {p: base.head_at[p].weight.detach().to(device, torch.bfloat16) for p in config.exits}
        self.heads = heads  # not parameters, since they stay as they are
        self.rope = Rope(config, torch.float32, torch.device("cpu"))
        del base  # before the trunk is loaded
        self.trunk = _trunk_states(checkpoint, recipe, packed, device)

    def forward(self, indices: Tensor, step: int | None, whole: Tensor) -> dict[str, Any]:
        """Return the losses' shares of some sequences of a step; without a step, their validation results."""
        if step is None:
            return self._validate(indices)
        losses, recipe = self.recipe.losses, self.recipe
        states, target, top, chances = (t.to(self.device) for t in self.trunk.of(indices))
        rows = self.packed.rows(indices)
        labels = _labels(rows).to(self.device).flatten()
        rope, attention = rope_and_attention(self.rope, rows, self.device)
        weight, kept = (t.flatten().to(self.device) for t in self._weights(indices, step))
        of_all, of_kept = (max(float(t.sum()), 1e-9) for t in self._weights(whole, step))
        chosen = kept.nonzero()[:, 0] if kept.any() else torch.zeros(1, dtype=torch.int64, device=self.device)
        likely, goal = top[chosen], labels[chosen]
        wanted, columns = goal.clamp(min=0), None
        if losses.vocabulary == "candidates":
            columns, likely, wanted = _compact(likely, wanted)
        share, picked = weight / of_all, kept[chosen] / of_kept
        known = picked * (goal >= 0)
        size = target.float().square().mean(-1)
        total, parts = torch.zeros((), device=self.device), {}
        for i, (name, branch) in enumerate(self.branches.items()):
            x = states[:, i].flatten(0, 1).float()
            h = _branch_states(branch, x, rope, attention, recomputed=recipe.gradient_checkpointing)
            if losses.hidden:
                distance = (h.float() - target.float()).square().mean(-1) / size
                parts[f"hidden/{name}"] = (share * distance).sum()
                total = total + losses.hidden * parts[f"hidden/{name}"]
            if losses.kl or losses.cross_entropy:
                head = self.heads[int(name)]
                logits = F.linear(h[chosen].to(head.dtype), head if columns is None else head[columns])
                if losses.kl:
                    goals = chances[chosen]
                    entropy = -(goals * goals.clamp(min=1e-9).log()).sum(-1)
                    parts[f"kl/{name}"] = (picked * (cross_entropy(logits, likely, goals) - entropy)).sum()
                    total = total + losses.kl * parts[f"kl/{name}"]
                if losses.cross_entropy:
                    right = torch.ones_like(wanted, dtype=torch.float32)[:, None]
                    ce = cross_entropy(logits, wanted[:, None], right)
                    parts[f"cross_entropy/{name}"] = (known * ce).sum()
                    total = total + losses.cross_entropy * parts[f"cross_entropy/{name}"]
        return {"loss": total} | {name: part.detach() for name, part in parts.items()}

    def _weights(self, indices: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return (sequences, length) the weights of positions, and the same with 0 where `positions` leaves one out."""
        rows, losses = self.packed.rows(indices), self.recipe.losses
        weight = torch.where(_before_answers(rows), 1.0, losses.prompt) * (rows.documents >= 0)
        if losses.positions == 1.0:
            return weight, weight
        kept = torch.zeros_like(weight)
        for row, index in enumerate(indices.tolist()):  # each by itself, whatever other sequences are in the batch
            chosen = _positions(weight[row], losses.positions, seed=hash((self.recipe.seed, step, index)))
            kept[row, chosen] = weight[row, chosen]
        return weight, kept

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Return how often each branch's most probable token is the last branch's, in answers and elsewhere."""
        hits: dict[str, float] = {}
        counts = {"answers": 0, "rest": 0}
        for part in indices.split(self.recipe.batch):
            states, _, top, _ = (t.to(self.device) for t in self.trunk.of(part))
            rows = self.packed.rows(part)
            rope, attention = rope_and_attention(self.rope, rows, self.device)
            following, real = _before_answers(rows).flatten(), (rows.documents >= 0).flatten()
            groups = {"answers": (following & real).to(self.device), "rest": (~following & real).to(self.device)}
            for name, group in groups.items():
                counts[name] += int(group.sum())
            for i, (exit, branch) in enumerate(self.branches.items()):
                h = _branch_states(branch, states[:, i].flatten(0, 1).float(), rope, attention)
                head = self.heads[int(exit)]
                tokens = torch.cat([F.linear(c.to(head.dtype), head).argmax(-1) for c in h.split(1024)])
                for name, group in groups.items():
                    key = f"agreement/{exit}" if name == "answers" else f"agreement_rest/{exit}"
                    hits[key] = hits.get(key, 0.0) + float((tokens == top[:, 0])[group].sum())
        return {k: v / max(1, counts["rest" if "rest" in k else "answers"]) for k, v in hits.items()}

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the branches' tensors of a state of this module by their published names."""
        out: dict[str, Tensor] = {}
        for p, depth in zip(self.config.exits[:-1], self.config.branch_layers, strict=False):
            branch, prefix = Branch(self.config, depth), f"branches.{p}."
            branch.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
            out |= published_branch(self.config, p, branch)
        return out


_PROBE_DROPOUT = 0.3
"""Dropout on the state in a probe's input; without it, probes memorize their training answers (docs/log.md)."""


class Probes(nn.Module):
    """The early branches' probes, trained to predict agreement with the last branch; all else is frozen."""

    def __init__(
        self, checkpoint: Checkpoint, *, config: FamilyConfig, recipe: Recipe, packed: Packed, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe, self.config, self.packed, self.device = recipe, config, packed, device
        self.probes = nn.ModuleDict({str(p): Probe(config) for p in config.exits[:-1]})
        self.trunk = _trunk_states(checkpoint, recipe, packed, device)
        self.rope = Rope(config, self.trunk.model.dtype, torch.device("cpu"))
        self._examples: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}  # by sequence and exit

    def forward(self, indices: Tensor, step: int | None, whole: Tensor) -> dict[str, Any]:
        """Return the losses' shares of some sequences of a step; without a step, their validation results."""
        if step is None:
            return self._validate(indices)
        count = max(1, int(_before_answers(self.packed.rows(whole)).sum()))
        parts, total, hidden = {}, torch.zeros((), device=self.device), self.config.hidden_size
        dropout = self._dropout(indices, step)
        for name, (features, agrees) in self._of(indices).items():
            states = features[:, :hidden] * dropout
            log_odds = self._probe(name).log_odds(torch.cat([states, features[:, hidden:]], -1))
            parts[f"log_loss/{name}"] = F.binary_cross_entropy_with_logits(log_odds, agrees, reduction="sum") / count
            total = total + parts[f"log_loss/{name}"]
        return {"loss": total} | {name: part.detach() for name, part in parts.items()}

    def _dropout(self, indices: Tensor, step: int) -> Tensor:
        """Return dropout's factors for the states at positions before answers' tokens, drawn sequence by sequence."""
        masks, counts = [], _before_answers(self.packed.rows(indices)).sum(1).tolist()
        for index, count in zip(indices.tolist(), counts, strict=True):
            generator = torch.Generator().manual_seed(hash((self.recipe.seed, step, index)) % 2**63)
            masks.append(torch.rand(count, self.config.hidden_size, generator=generator) >= _PROBE_DROPOUT)
        return torch.cat(masks).to(self.device) / (1 - _PROBE_DROPOUT)

    def _probe(self, name: str) -> Probe:
        probe = self.probes[name]
        assert isinstance(probe, Probe)
        return probe

    def _of(self, indices: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by exit the probe's features, and whether the branch agrees, at positions before answers' tokens.

        The branches are frozen, so these are computed once and kept in memory in half precision.
        """
        missing = [i for i in indices.tolist() if i not in self._examples]
        if missing:
            self._compute(torch.tensor(missing))
        rows = [self._examples[i] for i in indices.tolist()]

        def joined(name: str, part: int) -> Tensor:
            return torch.cat([row[name][part].float() for row in rows]).to(self.device)

        return {name: (joined(name, 0), joined(name, 1)) for name in self.probes}

    @torch.no_grad()
    def _compute(self, indices: Tensor) -> None:
        states, _, top, _ = (t.to(self.device) for t in self.trunk.of(indices))
        rows, model = self.packed.rows(indices), self.trunk.model
        rope, attention = rope_and_attention(self.rope, rows, self.device)
        wanted = _before_answers(rows)
        chosen, sizes = wanted.flatten().nonzero()[:, 0].to(self.device), wanted.sum(1).tolist()
        examples: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in sizes]
        for i, name in enumerate(self.probes):
            h = _branch_states(model.branch_at[int(name)], states[:, i].flatten(0, 1), rope, attention)[chosen]
            logits = model.head_at[int(name)].forward(h).float()
            features = self._probe(name).features(h, logits).half().cpu().split(sizes)
            agrees = (logits.argmax(-1) == top[chosen, 0]).cpu().split(sizes)
            for row, *found in zip(examples, features, agrees, strict=True):
                row[name] = (found[0], found[1])
        self._examples |= dict(zip(indices.tolist(), examples, strict=True))

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Return log-loss and area under the ROC curve of each probe, and that area for the margin alone."""
        out = {}
        for name, (features, agrees) in self._of(indices).items():
            log_odds, chances = self._probe(name).log_odds(features), features[:, self.config.hidden_size :].exp()
            out[f"log_loss/{name}"] = float(F.binary_cross_entropy_with_logits(log_odds, agrees))
            out[f"auc/{name}"] = _auc(log_odds, agrees)
            out[f"auc_of_margin/{name}"] = _auc(chances[:, 0] - chances[:, 1], agrees)
        return out

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the probes' tensors of a state of this module by their published names."""
        names = [(i, p, part) for i, p in enumerate(self.config.exits[:-1]) for part in PROBE_NAMES]
        return {f"model.probes.{i}.{part}": weights[f"probes.{p}.{part}"] for i, p, part in names}


class _SparseCrossEntropy(torch.autograd.Function):
    """The function behind `cross_entropy`.

    Autograd of log_softmax and gather writes several (n, m) arrays of float32. This keeps one in the logits' own
    format, which makes a step a third shorter (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, chances: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        exps = (logits - top).exp_()
        total = exps.sum(-1, keepdim=True, dtype=torch.float32)
        ctx.save_for_backward(exps.div_(total.to(exps.dtype)), columns, chances)
        scores = logits.gather(1, columns).float() - top.float()
        loss: Tensor = total.log()[:, 0] - (chances * scores).sum(-1)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        softmax, columns, chances = ctx.saved_tensors
        # Rounded for both terms alike: where they nearly cancel, a difference would weigh more than they do.
        factor = gradient[:, None].to(softmax.dtype)
        out = softmax * factor
        # An addition, since the columns of a row differ; scatter_add_ would make float32 copies of everything.
        out.scatter_(1, columns, (out.gather(1, columns) - chances * factor).to(out.dtype))
        return out, None, None


def cross_entropy(logits: Tensor, columns: Tensor, chances: Tensor) -> Tensor:
    """Compute the cross-entropy to a sparse distribution.

    Args:
        logits: (n, m).
        columns: (n, k) indices of the distribution's columns, different ones in each row.
        chances: (n, k) float32 probabilities of these columns.

    Returns:
        (n,) float32
    """
    return _SparseCrossEntropy.apply(logits, columns, chances)  # type: ignore[no-any-return,no-untyped-call]


def _trunk_states(checkpoint: Checkpoint, recipe: Recipe, packed: Packed, device: torch.device) -> TrunkStates:
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    trunk = load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device)
    return TrunkStates(trunk, packed, recipe, checkpoint.fingerprint)


def _branch_states(
    branch: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], attention: Attention, *, recomputed: bool = False
) -> Tensor:
    """Return the branch's normed states for every row; `recomputed` enables gradient checkpointing."""
    assert isinstance(branch, Branch)
    for slot, layer in enumerate(branch.stack):
        out = (_recomputed if recomputed else DecoderLayer.forward)(layer, x, rope, attention, slot)
        assert out is not None
        x = out
    return branch.norm.forward(x)


def _has_next(rows: Packed) -> Tensor:
    """Return (rows, length) bool: whether a position is followed by another one of its document."""
    same = (rows.documents[:, 1:] == rows.documents[:, :-1]) & (rows.documents[:, 1:] >= 0)
    return F.pad(same, (0, 1), value=False)


def _labels(rows: Packed) -> Tensor:
    """Return (rows, length) int64: the next token of each position's document, or -100 if it is the last."""
    return torch.where(_has_next(rows), rows.token_ids.roll(-1, 1).long(), -100)


def _before_answers(rows: Packed) -> Tensor:
    """Return (rows, length) bool: whether the next token of a position's document belongs to an answer."""
    return rows.answers.roll(-1, 1) & _has_next(rows)


def _auc(scores: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve, the probability that a positive scores above a negative."""
    ranks = torch.empty_like(scores, dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    yes = int(positive.sum())
    no = len(positive) - yes
    return float((ranks[positive.bool()].sum() - yes * (yes + 1) / 2) / max(1, yes * no))


def _positions(weight: Tensor, share: float, seed: int) -> Tensor:
    """Choose a random share of the positions whose weight is not zero."""
    weighted = weight.nonzero()[:, 0]
    if share == 1.0:
        return weighted
    count = max(1, round(share * len(weighted)))
    generator = torch.Generator().manual_seed(seed % 2**63)
    return weighted[torch.randperm(len(weighted), generator=generator)[:count].to(weighted.device)]


def _compact(likely: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct tokens of both tensors, and the tensors as indices into them."""
    columns, places = torch.unique(torch.cat([likely.flatten(), wanted]), return_inverse=True)
    return columns, places[: likely.numel()].view_as(likely), places[likely.numel() :]


def _exit_weights(recipe: Recipe, exits: int, step: int) -> list[float]:
    if recipe.exit_weights == "equal":
        return [1 / exits] * exits
    early = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return [early] * (exits - 1) + [1.0]
