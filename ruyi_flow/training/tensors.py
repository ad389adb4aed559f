"""A trainee's tensors: how new ones begin, and what all are called in checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from ruyi_flow.family.checkpoint import LAYER_NAMES
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.transformer import Branch, DecoderLayer, FamilySlice

__all__ = ["published", "published_branch", "randomize", "start_branch"]


def published_branch(config: FamilyConfig, exit: int, branch: Branch) -> dict[str, Tensor]:
    """Return the tensors of a branch by their published names."""
    out = {f"model.norms.{config.exits.index(exit)}.weight": branch.norm.weight.detach()}
    for layer, prefix in zip(branch.stack, config.branch_prefixes(exit), strict=True):
        out |= _published_layer(layer, prefix)
    return out


def published(family: FamilySlice) -> dict[str, Tensor]:
    """Return the tensors of a whole family by their published names."""
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
    kv = layer.num_kv_heads * layer.head_dim
    rows = {"qkv_proj": [layer.num_heads * layer.head_dim, kv, kv], "gate_up_proj": list(layer.gate_up_proj.splits)}
    for name, parts in LAYER_NAMES.items():
        for kind in ("weight", "bias"):
            tensor = getattr(getattr(layer, name), kind, None)  # norms of queries and keys may be None
            if tensor is not None:
                pieces = tensor.detach().split(rows.get(name, len(tensor)))
                out |= {f"{prefix}.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return out


def start_branch(branch: Branch, base: FamilySlice, exit: int, start: str) -> None:
    """Initialize a branch with the family's own, and new layers as `Recipe.start` requires."""
    old = base.branch_at[exit]
    branch.norm.load_state_dict(old.norm.state_dict())
    for i, layer in enumerate(branch.stack):
        if i < len(old.stack):
            layer.load_state_dict(old.stack[i].state_dict())
        elif start == "copy" and exit + i < len(base.trunk):
            layer.load_state_dict(base.trunk[exit + i].state_dict())
        elif start == "copy":
            layer.load_state_dict(base.branch_at[base.exits[-1]].stack[0].state_dict())
        else:
            randomize(layer)
            nn.init.zeros_(layer.o_proj.weight)
            nn.init.zeros_(layer.down_proj.weight)


def randomize(module: nn.Module) -> None:
    """Give a module random matrices, norms of 1 and biases of 0."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:  # the weight of a norm
            nn.init.ones_(parameter)
