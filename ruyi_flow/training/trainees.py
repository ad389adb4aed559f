"""What training trains: a family's trunk and branches jointly, its branches on a frozen trunk, or their probes.

Each trainee is a module whose forward pass gives the losses of some packed sequences, or, without a step, what
validation finds; `published` names its tensors as checkpoints do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ruyi_flow.family.checkpoint import LAYER_NAMES, PROBE_NAMES, Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.transformer import Branch, CausalAttention, DecoderLayer, FamilySlice, Probe, Rope
from ruyi_flow.training.corpus import Packed
from ruyi_flow.training.recipe import Recipe
from ruyi_flow.training.trunk_states import TrunkStates, rope_at

__all__ = ["Branches", "Joint", "Probes", "cross_entropy"]


class Joint(nn.Module):
    """Trunk and all branches; next-token cross-entropy at every exit."""

    def __init__(self, checkpoint: Checkpoint | None, config: FamilyConfig, recipe: Recipe, packed: Packed) -> None:
        super().__init__()
        self.recipe, self.packed = recipe, packed
        self.family = FamilySlice(config, config.exits)
        if checkpoint is None:
            _randomize(self.family)
        else:
            base = load_slice(checkpoint, checkpoint.config.exits, dtype=torch.float32, packed=False)
            self.family.load_state_dict(base.state_dict(), strict=False)
            for p in config.exits[:-1]:
                _start_branch(self.family.branch_at[p], base, p, recipe.start)
        self.family.requires_grad_(True)
        if recipe.gradient_checkpointing:
            self.family.call = _recomputed
        self.rope = Rope(config, torch.float32, torch.device("cpu"))

    def forward(self, indices: Tensor, step: int | None) -> dict[str, Any]:
        """The losses on some sequences; without a step, what validation wants to know of them."""
        if step is None:
            return self._validate(indices)
        losses = self._exits(indices)
        weights = _exit_weights(self.recipe, len(losses), step)
        total = sum((w * loss for w, loss in zip(weights, losses.values(), strict=True)), torch.zeros(()))
        return {"loss": total} | {f"cross_entropy/{p}": loss.detach() for p, loss in losses.items()}

    def _exits(self, indices: Tensor) -> dict[int, Tensor]:
        device = self.family.device
        rows = self.packed.rows(indices)
        ids = rows.token_ids.to(device, torch.int64)
        attention = CausalAttention(len(ids), rows.documents.to(device))
        rope = rope_at(self.rope, rows.positions, device)
        labels = _labels(rows).to(device).flatten()
        states, losses = self.family.embed(ids.flatten()), {}
        for first, exit in self.family.stages:
            states = self.family.run(states, first, exit, rope, attention)
            logits = self.family.branch(exit, states, rope, attention)
            assert logits is not None
            losses[exit] = F.cross_entropy(logits.float(), labels, ignore_index=-100)
        return losses

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Loss of every exit on sequences that are not trained on."""
        sums: dict[str, float] = {}
        parts = indices.split(self.recipe.batch)
        for part in parts:
            for exit, loss in self._exits(part).items():
                sums[f"loss/{exit}"] = sums.get(f"loss/{exit}", 0.0) + float(loss) * len(part) / len(indices)
        return sums

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors by their published names, of the module's state."""
        family = FamilySlice(self.family.config, self.family.exits)
        family.load_state_dict({name.removeprefix("family."): tensor for name, tensor in weights.items()})
        return published(family)


class Branches(nn.Module):
    """The early branches on a frozen trunk, each learning from the last one."""

    def __init__(
        self, checkpoint: Checkpoint, config: FamilyConfig, recipe: Recipe, packed: Packed, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe, self.config, self.packed, self.device = recipe, config, packed, device
        base = load_slice(checkpoint, checkpoint.config.exits, dtype=torch.float32, packed=False)
        early = config.exits[:-1]
        self.branches = nn.ModuleDict()
        for p in early:
            branch = Branch(config, config.branch_layers[config.exits.index(p)])
            _start_branch(branch, base, p, recipe.start)
            self.branches[str(p)] = branch.requires_grad_(True)
        heads = {p: base.head_at[p].weight.detach().to(device, torch.bfloat16) for p in config.exits}
        self.heads = heads  # not parameters: they do not change, and other exits share them
        self.rope = Rope(config, torch.float32, torch.device("cpu"))
        del base
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        trunk = load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device)
        self.trunk = TrunkStates(trunk, packed, recipe, checkpoint.fingerprint)

    def forward(self, indices: Tensor, step: int | None) -> dict[str, Any]:
        """The losses on some sequences; without a step, what validation wants to know of them."""
        if step is None:
            return self._validate(indices)
        losses, recipe = self.recipe.losses, self.recipe
        states, target, top, chances = (t.to(self.device) for t in self.trunk.of(indices))
        rows = self.packed.rows(indices)
        labels = _labels(rows).to(self.device).flatten()
        weight = torch.where(rows.answers, 1.0, losses.prompt) * (rows.documents >= 0)
        weight = weight.to(self.device).flatten()
        attention = CausalAttention(len(indices), rows.documents.to(self.device))
        rope = rope_at(self.rope, rows.positions, self.device)
        chosen = _positions(weight, losses.positions, seed=hash((recipe.seed, step, int(indices[0]))))
        likely, goal = top[chosen], labels[chosen]
        wanted = goal.clamp(min=0)
        if losses.vocabulary == "candidates":
            columns, likely, wanted = _compact(likely, wanted)
        else:
            columns = None
        share = weight / weight.sum()
        picked = weight[chosen] / weight[chosen].sum()
        known = picked * (goal >= 0)
        size = target.float().square().mean(-1)
        total, parts = torch.zeros((), device=self.device), {}
        for i, (name, branch) in enumerate(self.branches.items()):
            h = _read_branch(branch, states[:, i].flatten(0, 1).float(), rope, attention, recipe.gradient_checkpointing)
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

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Teacher-forced: how often each branch's likeliest token is the last one's, on answers and elsewhere."""
        hits: dict[str, float] = {}
        counts = {"answers": 0, "rest": 0}
        for part in indices.split(self.recipe.batch):
            states, _, top, _ = (t.to(self.device) for t in self.trunk.of(part))
            rows = self.packed.rows(part)
            attention = CausalAttention(len(part), rows.documents.to(self.device))
            rope = rope_at(self.rope, rows.positions, self.device)
            following, real = _before_answers(rows).flatten(), (rows.documents >= 0).flatten()
            groups = {"answers": (following & real).to(self.device), "rest": (~following & real).to(self.device)}
            for name, group in groups.items():
                counts[name] += int(group.sum())
            for i, (exit, branch) in enumerate(self.branches.items()):
                h = _read_branch(branch, states[:, i].flatten(0, 1).float(), rope, attention, False)
                head = self.heads[int(exit)]
                said = torch.cat([F.linear(c.to(head.dtype), head).argmax(-1) for c in h.split(1024)])
                for name, group in groups.items():
                    key = f"agreement/{exit}" if name == "answers" else f"agreement_rest/{exit}"
                    hits[key] = hits.get(key, 0.0) + float((said == top[:, 0])[group].sum())
        return {k: v / max(1, counts["rest" if "rest" in k else "answers"]) for k, v in hits.items()}

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The branches' tensors by their published names, of the module's state."""
        out: dict[str, Tensor] = {}
        for p, depth in zip(self.config.exits[:-1], self.config.branch_layers, strict=False):
            branch, prefix = Branch(self.config, depth), f"branches.{p}."
            branch.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
            out |= published_branch(self.config, p, branch)
        return out


_PROBE_DROPOUT = 0.3
"""Of a probe's view of the state, while it learns: a probe would know its training answers by heart (docs/log.md)."""


class Probes(nn.Module):
    """The early branches' probes: is this branch's token the last one's? Everything else is as it is."""

    def __init__(
        self, checkpoint: Checkpoint, config: FamilyConfig, recipe: Recipe, packed: Packed, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe, self.config, self.packed, self.device = recipe, config, packed, device
        self.probes = nn.ModuleDict({str(p): Probe(config) for p in config.exits[:-1]})
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.trunk = TrunkStates(
            load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device),
            packed,
            recipe,
            checkpoint.fingerprint,
        )
        self.rope = Rope(config, dtype, torch.device("cpu"))
        self._seen: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}

    def forward(self, indices: Tensor, step: int | None) -> dict[str, Any]:
        """The losses on some sequences; without a step, what validation wants to know of them."""
        if step is None:
            return self._validate(indices)
        parts, total, hidden = {}, torch.zeros((), device=self.device), self.config.hidden_size
        generator = torch.Generator(self.device)
        generator.manual_seed(hash((self.recipe.seed, step, int(indices[0]))) % 2**63)
        for name, (seen, agrees) in self._asked(indices).items():
            kept = torch.rand(len(seen), hidden, generator=generator, device=self.device) >= _PROBE_DROPOUT
            states = seen[:, :hidden] * (kept / (1 - _PROBE_DROPOUT))
            odds = self._probe(name).odds(torch.cat([states, seen[:, hidden:]], -1))
            parts[f"log_loss/{name}"] = F.binary_cross_entropy_with_logits(odds, agrees)
            total = total + parts[f"log_loss/{name}"]
        return {"loss": total} | {name: part.detach() for name, part in parts.items()}

    def _probe(self, name: str) -> Probe:
        probe = self.probes[name]
        assert isinstance(probe, Probe)
        return probe

    def _asked(self, indices: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By exit: what its probe sees, and whether the branch agrees, where the next token is an answer's.

        The branches are frozen, so it is computed once and kept in memory, in half precision.
        """
        missing = [i for i in indices.tolist() if i not in self._seen]
        if missing:
            self._look(torch.tensor(missing))
        rows = [self._seen[i] for i in indices.tolist()]
        return {
            name: (
                torch.cat([row[name][0].float() for row in rows]).to(self.device),
                torch.cat([row[name][1].float() for row in rows]).to(self.device),
            )
            for name in self.probes
        }

    @torch.no_grad()
    def _look(self, indices: Tensor) -> None:
        states, _, top, _ = (t.to(self.device) for t in self.trunk.of(indices))
        rows, model = self.packed.rows(indices), self.trunk.model
        attention = CausalAttention(len(indices), rows.documents.to(self.device))
        rope = rope_at(self.rope, rows.positions, self.device)
        wanted = _before_answers(rows)
        chosen, sizes = wanted.flatten().nonzero()[:, 0].to(self.device), wanted.sum(1).tolist()
        kept: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in sizes]
        for i, name in enumerate(self.probes):
            h = _read_branch(model.branch_at[int(name)], states[:, i].flatten(0, 1), rope, attention, False)[chosen]
            logits = model.head_at[int(name)].forward(h).float()
            seen = self._probe(name).seen(h, logits).half().cpu().split(sizes)
            agrees = (logits.argmax(-1) == top[chosen, 0]).cpu().split(sizes)
            for row, *found in zip(kept, seen, agrees, strict=True):
                row[name] = (found[0], found[1])
        self._seen |= dict(zip(indices.tolist(), kept, strict=True))

    def _validate(self, indices: Tensor) -> dict[str, float]:
        """Log-loss, and how well the probe tells agreement apart (area under the ROC curve), beside the lead alone."""
        out = {}
        for name, (seen, agrees) in self._asked(indices).items():
            odds, chances = self._probe(name).odds(seen), seen[:, self.config.hidden_size :].exp()
            out[f"log_loss/{name}"] = float(F.binary_cross_entropy_with_logits(odds, agrees))
            out[f"auc/{name}"] = _auc(odds, agrees)
            out[f"auc_of_margin/{name}"] = _auc(chances[:, 0] - chances[:, 1], agrees)
        return out

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The probes' tensors by their published names, of the module's state."""
        early = self.config.exits[:-1]
        return {
            f"model.probes.{i}.{part}": weights[f"probes.{p}.{part}"]
            for i, p in enumerate(early)
            for part in PROBE_NAMES
        }


class _SparseCrossEntropy(torch.autograd.Function):
    """Cross-entropy to a sparse distribution: (n,) from (n, m) logits and (n, k) columns, no row's twice, and chances.

    What autograd would make of log_softmax and gather writes several (n, m) arrays of float32; this keeps one in the
    logits' own format: a third off a step (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, chances: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        said = (logits - top).exp_()
        total = said.sum(-1, keepdim=True, dtype=torch.float32)
        ctx.save_for_backward(said.div_(total.to(said.dtype)), columns, chances)
        scores = logits.gather(1, columns).float() - top.float()
        loss: Tensor = total.log()[:, 0] - (chances * scores).sum(-1)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        said, columns, chances = ctx.saved_tensors
        out = said * gradient[:, None].to(said.dtype)
        # A row's columns differ, so this is an addition; scatter_add_ would go through float32 copies of it all.
        out.scatter_(1, columns, (out.gather(1, columns) - chances * gradient[:, None]).to(out.dtype))
        return out, None, None


def cross_entropy(logits: Tensor, columns: Tensor, chances: Tensor) -> Tensor:
    """See `_SparseCrossEntropy`."""
    return _SparseCrossEntropy.apply(logits, columns, chances)  # type: ignore[no-any-return,no-untyped-call]


def published_branch(config: FamilyConfig, exit: int, branch: Branch) -> dict[str, Tensor]:
    """A branch's tensors by their published names."""
    out = {f"model.norms.{config.exits.index(exit)}.weight": branch.norm.weight.detach()}
    for layer, prefix in zip(branch.stack, config.branch_prefixes(exit), strict=True):
        out |= _published_layer(layer, prefix)
    return out


def published(family: FamilySlice) -> dict[str, Tensor]:
    """A whole family's tensors by their published names."""
    config = family.config
    assert family.embed_tokens is not None
    out = {"model.embed_tokens.weight": family.embed_tokens.weight.detach()}
    for i, layer in enumerate(family.trunk):
        out |= _published_layer(layer, f"model.layers.{i}")
    for p, branch in family.branch_at.items():
        out |= published_branch(config, p, branch)
        out[config.head_name(p)] = family.head_at[p].weight.detach()
    return out


def _published_layer(layer: DecoderLayer, prefix: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, parts in LAYER_NAMES.items():
        module = getattr(layer, name)
        if module is None:
            continue
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)
            if tensor is not None:
                rows = _rows_of(layer, name, len(parts))
                pieces = tensor.detach().split(rows) if rows else [tensor.detach()]
                out |= {f"{prefix}.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return out


def _rows_of(layer: DecoderLayer, name: str, count: int) -> list[int] | None:
    if count == 1:
        return None
    if name == "qkv_proj":
        kv = layer.num_kv_heads * layer.head_dim
        return [layer.num_heads * layer.head_dim, kv, kv]
    return list(layer.gate_up_proj.splits)


def _start_branch(branch: Branch, base: FamilySlice, exit: int, start: str) -> None:
    """Where a branch starts: its first layer and norm as the family has them, the others as `start` says."""
    theirs = base.branch_at[exit]
    branch.norm.load_state_dict(theirs.norm.state_dict())
    for i, layer in enumerate(branch.stack):
        if i < len(theirs.stack):
            layer.load_state_dict(theirs.stack[i].state_dict())
        elif start == "copy" and exit + i < len(base.trunk):
            layer.load_state_dict(base.trunk[exit + i].state_dict())
        elif start == "copy":
            layer.load_state_dict(base.branch_at[base.exits[-1]].stack[0].state_dict())
        else:
            _randomize(layer)
            nn.init.zeros_(layer.o_proj.weight)
            nn.init.zeros_(layer.down_proj.weight)


def _randomize(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:  # a norm's
            nn.init.ones_(parameter)


def _read_branch(branch: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], attention: Any, recomputed: bool) -> Tensor:
    assert isinstance(branch, Branch)
    for slot, layer in enumerate(branch.stack):
        out = (_recomputed if recomputed else DecoderLayer.forward)(layer, x, rope, attention, slot)
        assert out is not None
        x = out
    return branch.norm.forward(x)


def _recomputed(layer: DecoderLayer, *args: Any) -> Tensor | None:
    out: Tensor | None = recompute(layer, *args, use_reentrant=False)
    return out


def _labels(rows: Packed) -> Tensor:
    """(rows, length) the token after each position in its document, -100 where there is none."""
    labels = torch.full(rows.token_ids.shape, -100, dtype=torch.int64)
    same = (rows.documents[:, 1:] == rows.documents[:, :-1]) & (rows.documents[:, 1:] >= 0)
    labels[:, :-1] = torch.where(same, rows.token_ids[:, 1:].long(), -100)
    return labels


def _before_answers(rows: Packed) -> Tensor:
    """(rows, length) whether the token after a position belongs to an answer."""
    return F.pad(rows.answers[:, 1:], (0, 1), value=False)


def _auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative."""
    ranks = torch.empty_like(scores, dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    yes = int(positive.sum())
    no = len(positive) - yes
    return float((ranks[positive.bool()].sum() - yes * (yes + 1) / 2) / max(1, yes * no))


def _positions(weight: Tensor, share: float, seed: int) -> Tensor:
    """A share of the positions that weigh something."""
    real = weight.nonzero()[:, 0]
    if share == 1.0:
        return real
    count = max(1, round(share * len(real)))
    generator = torch.Generator().manual_seed(seed % 2**63)
    return real[torch.randperm(len(real), generator=generator)[:count].to(real.device)]


def _compact(likely: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that occur, and the two tensors with their places among these instead."""
    columns, places = torch.unique(torch.cat([likely.flatten(), wanted]), return_inverse=True)
    return columns, places[: likely.numel()].view_as(likely), places[likely.numel() :]


def _exit_weights(recipe: Recipe, exits: int, step: int) -> list[float]:
    if recipe.exit_weights == "equal":
        return [1 / exits] * exits
    early = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return [early] * (exits - 1) + [1.0]
