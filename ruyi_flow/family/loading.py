"""Load slices of a family from a checkpoint, tensor by tensor, in the number format and layout that serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.checkpoint import LAYER_NAMES, PROBE_NAMES, Checkpoint, format_of
from ruyi_flow.family.devices import has_int4
from ruyi_flow.family.linear import Linear, Quantized, pack
from ruyi_flow.family.transformer import Branch, DecoderLayer, FamilySlice, RMSNorm
from ruyi_flow.types import Weights

__all__ = ["load_slice"]

logger = logging.getLogger(__name__)


class _Loader:
    """Fills the modules of a slice with a checkpoint's tensors.

    `quantized` is the format of the products' weights, INT8 or INT4; None keeps plain floats.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, weights: Weights | None):
        stored = checkpoint.weights
        if stored is not None and weights not in (None, stored):
            raise CheckpointError(
                f"{checkpoint.folder}: its weights are stored as {stored}, not as {weights}; "
                "cut the shard again from the family"
            )
        if weights is Weights.BF16 and dtype is not torch.bfloat16:
            raise CheckpointError(
                f"weights: bf16 requires dtype: bfloat16, but dtype is {str(dtype).removeprefix('torch.')}; "
                "remove weights, or set dtype: bfloat16"
            )
        self.quantized = stored or (weights if weights is not Weights.BF16 else None)
        self.dequantizes = self.quantized is not None and not has_int4(device)
        """Whether the quantized weights become plain ones, since the device has no product with them."""
        if self.dequantizes:
            logger.warning(
                "%s: torch has no product with %s weights on %s; they run as %s and need as much memory as that",
                checkpoint.folder,
                self.quantized,
                device,
                str(dtype).removeprefix("torch."),
            )
        self.checkpoint, self.config, self.dtype, self.device = checkpoint, checkpoint.config, dtype, device

    def embedding(self, model: FamilySlice) -> None:
        """Fill the token embedding of a slice that starts with one."""
        if model.embed_tokens is None:
            return
        name = "model.embed_tokens.weight"
        if not (self.config.tied_head and self.quantized):
            self.read(model.embed_tokens, "weight", [name])
        elif self.device.type == "cpu" and not self.dequantizes:
            model.embed_with_head()
        else:  # rows cannot be looked up in the layout of the CUDA kernel, so the table is stored a second time
            self.plain(model.embed_tokens, self.read_quantized([name]))

    def heads(self, model: FamilySlice) -> None:
        """Fill the LM heads: one for all exits, or one for each."""
        for head, exit in zip(model.heads, model.exits, strict=False):
            assert isinstance(head, Linear)
            is_plain = self.quantized is None or self.dequantizes
            if self.config.tied_head and model.embed_tokens is not None and is_plain:
                head.weight = model.embed_tokens.weight
            else:
                self.weight(head, [self.config.head_name(exit)])

    def branch(self, branch: Branch, exit: int) -> None:
        """Fill the layers, the norm and the probe of the branch at an exit."""
        index = self.config.exits.index(exit)
        for layer, prefix in zip(branch.stack, self.config.branch_prefixes(exit), strict=True):
            # The last layer computes keys and values alone for positions whose output is not needed.
            self.layer(layer, prefix, apart=layer is branch.stack[-1])
        self.read(branch.norm, "weight", [f"model.norms.{index}.weight"])
        if branch.probe is not None:
            for name in PROBE_NAMES:
                module, parameter = name.split(".")
                self.read(getattr(branch.probe, module), parameter, [f"model.probes.{index}.{name}"])

    def layer(self, layer: DecoderLayer, prefix: str, *, apart: bool = False) -> None:
        """Fill a decoder layer; `apart` gives queries and keys-and-values kernels of their own."""
        for name, parts in LAYER_NAMES.items():
            module = getattr(layer, name)
            if module is None:
                continue
            if getattr(module, "bias", None) is not None:
                self.read(module, "bias", [f"{prefix}.{part}.bias" for part in parts])
            names = [f"{prefix}.{part}.weight" for part in parts]
            if isinstance(module, Linear):
                self.weight(module, names, apart=apart and name == "qkv_proj")
            else:
                self.read(module, "weight", names)

    def weight(self, linear: Linear, names: Sequence[str], *, apart: bool = False) -> None:
        """Fill a product's weight, quantized if the slice is."""
        if self.quantized is None:
            self.read(linear, "weight", names)
            return
        joined = self.read_quantized(names)
        if joined.shape != tuple(linear.weight.shape):
            raise CheckpointError(
                f"{self.checkpoint.folder}: {' + '.join(names)} has shape {joined.shape}, but "
                f"config.json requires {tuple(linear.weight.shape)}; cut the shard again"
            )
        if self.dequantizes:
            self.plain(linear, joined)
        else:
            linear.set_kernels(joined.to(self.device), self.dtype, apart=apart)

    def read_quantized(self, names: Sequence[str]) -> Quantized:
        """Return these weights stacked, quantized here unless they are stored so."""
        assert self.quantized is not None
        parts = []
        for name in names:
            part = self.checkpoint.weight(name)
            if isinstance(part, Tensor):
                part = Quantized.of(part, format_of(name, self.quantized), f"{self.checkpoint.folder}: {name}")
            parts.append(part)
        return Quantized.cat(parts)

    def plain(self, module: nn.Module, weight: Quantized) -> None:
        """Fill a weight with the plain values that a quantized one stands for."""
        value = weight.dequantize(self.dtype).to(self.device)
        module.weight = nn.Parameter(value, requires_grad=False)

    def read(self, module: nn.Module, parameter: str, names: Sequence[str]) -> None:
        """Fill a parameter with these tensors, stacked along the first dimension."""
        tensors = [self.checkpoint.tensor(name) for name in names]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        value = joined.to(self.device, self.dtype, copy=True).contiguous()
        setattr(module, parameter, nn.Parameter(value, requires_grad=False))


def load_slice(
    checkpoint: Checkpoint,
    exits: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    packed: bool = True,
    weights: Weights | None = None,
    compiled: bool = False,
) -> FamilySlice:
    """Load the stages that end at these exits, and no other tensors, for inference.

    Args:
        checkpoint: the family, or a shard that has these stages.
        exits: consecutive exits.
        dtype: number format of the weights and of the computation.
        device: where the slice runs.
        packed: lay the weights out for the CPU's kernels where there are some for this format (`linear.pack`).
        weights: format of the products' weights. INT8 or INT4 quantizes them one by one unless the checkpoint's are
            stored so already. Default: the checkpoint's format.
        compiled: leave the trunk's layers unpacked, as `FamilySlice.compile_layers` needs them.

    Raises:
        CheckpointError: a tensor is missing, has a shape other than config.json requires, or does not fit the format.
    """
    loader = _Loader(checkpoint, dtype, torch.device(device), weights)
    checkpoint.check(exits)
    with torch.device("meta"):
        model = FamilySlice(checkpoint.config, exits)
    model.requires_grad_(False)
    loader.embedding(model)
    loader.heads(model)
    for i, layer in enumerate(model.trunk, model.first_layer):
        loader.layer(layer, f"model.layers.{i}")
        if packed and not compiled:
            pack(layer)
    for exit, branch in model.branch_at.items():
        loader.branch(branch, exit)
        if packed:
            pack(branch, apart=[branch.stack[-1].qkv_proj])
    if packed:
        pack(model.heads)
        if model.device.type == "cpu":
            frozen = model.branches if compiled else model
            for norm in (m for m in frozen.modules() if isinstance(m, RMSNorm)):
                norm.freeze()
    return model.eval()
