"""Fill slices of a family from a checkpoint: tensor by tensor, in the number format and layout that serve."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError, ConfigError
from ruyi_flow.family.checkpoint import LAYER_NAMES, PROBE_NAMES, Checkpoint, format_of
from ruyi_flow.family.linear import Linear, Quantized, pack
from ruyi_flow.family.transformer import DecoderLayer, FamilySlice, RMSNorm
from ruyi_flow.types import Weights

__all__ = ["find_device", "load_slice", "tidy_heap"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SMALL, _LARGE = 64 << 10, 32 << 20


@contextmanager
def tidy_heap() -> Iterator[None]:
    """Let what is made inside leave nothing in memory but itself, where the C library is glibc.

    Blocks of 64 kB and more get pages of their own inside, which are given back when they are freed. In the heap, what
    is kept would lie between holes that only what comes after can use. Afterwards only blocks of 32 MB do, the most
    that glibc would come to by itself: new pages for each step's tensors would cost time.
    """
    libc = ctypes.CDLL(None)
    has = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if has:
        libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        if has:
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)
            libc.malloc_trim(0)


@tidy_heap()
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
    """Read the stages that end at these exits, and nothing else, ready to serve.

    Args:
        checkpoint: the family, or a shard that has these stages.
        exits: consecutive exits.
        dtype: number format to hold and compute in.
        packed: pack the weights for the CPU where possible (`linear.pack`).
        weights: how products hold their weights, converted one by one where the checkpoint's are wide; None keeps them
            as they are in the checkpoint.
        compiled: leave the trunk's layers as `FamilySlice.compile_layers` can take them.

    Raises:
        CheckpointError: a tensor is missing or has another shape than config.json says, or cannot be held like this.
        ConfigError: a GPU that has no kernel for weights in few bits.
    """
    config, held = checkpoint.config, checkpoint.weights
    if held is not None and weights not in (None, held):
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are {held} already, not {weights}; cut the shard again from the family"
        )
    if weights is Weights.BF16 and dtype is not torch.bfloat16:
        raise CheckpointError(f"weights: bf16 goes with dtype: bfloat16, not with {dtype}; leave weights out")
    few_bits = held or (weights if weights is not Weights.BF16 else None)
    if few_bits and torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:  # torch's 4-bit kernel
            raise ConfigError(
                f"weights: {few_bits} needs a GPU of compute capability 8.0, {device} has {major}.{minor}; "
                "take device: cpu, or weights as the family has them"
            )
    with torch.device("meta"):
        model = FamilySlice(config, exits)
    model.requires_grad_(False)

    def read(module: nn.Module, parameter: str, names: Sequence[str]) -> None:
        wanted = getattr(module, parameter)
        tensors = [checkpoint.tensor(name) for name in names]
        sizes = module.splits if isinstance(module, Linear) and len(module.splits) == len(names) else None
        found = [tuple(t.shape) for t in tensors]
        try:
            joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            value = joined.to(device, dtype, copy=True).contiguous()
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint.folder}: {' + '.join(names)}, shapes {found}: {error}") from None
        if value.shape != wanted.shape or (sizes and [s[0] for s in found] != list(sizes)):
            raise CheckpointError(
                f"{checkpoint.folder}: {' + '.join(names)} has shape {found}; config.json means {tuple(wanted.shape)}"
            )
        setattr(module, parameter, nn.Parameter(value, requires_grad=False))

    def read_weight(linear: Linear, names: Sequence[str], *, apart: bool = False) -> None:
        if few_bits is None:
            read(linear, "weight", names)
            return
        parts = []
        for name in names:
            part = checkpoint.weight(name)
            if isinstance(part, Tensor):
                part = Quantized.of(part, format_of(name, few_bits), f"{checkpoint.folder}: {name}")
            parts.append(part)
        joined = Quantized.cat(parts)
        if joined.shape != tuple(linear.weight.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {' + '.join(names)} has shape {joined.shape}; "
                f"config.json means {tuple(linear.weight.shape)}"
            )
        linear.hold(joined.to(device), dtype, apart=apart)

    def read_layer(layer: DecoderLayer, prefix: str, *, apart: bool = False) -> None:
        for name, parts in LAYER_NAMES.items():
            module = getattr(layer, name)
            if module is None:
                continue
            if getattr(module, "bias", None) is not None:
                read(module, "bias", [f"{prefix}.{part}.bias" for part in parts])
            names = [f"{prefix}.{part}.weight" for part in parts]
            if isinstance(module, Linear):
                read_weight(module, names, apart=apart and name == "qkv_proj")
            else:
                read(module, "weight", names)

    if model.embed_tokens is not None:
        if config.tied_head and few_bits and torch.device(device).type == "cpu":
            model.embed_with_head()
        elif config.tied_head and few_bits:  # no rows can be taken out of what the kernel on CUDA wants
            stored = checkpoint.weight("model.embed_tokens.weight")
            table = stored.wide() if isinstance(stored, Quantized) else stored
            model.embed_tokens.weight = nn.Parameter(table.to(device, dtype, copy=True), requires_grad=False)
        else:
            read(model.embed_tokens, "weight", ["model.embed_tokens.weight"])
    for head, p in zip(model.heads, model.exits, strict=False):
        if config.tied_head and model.embed_tokens is not None and not few_bits:
            head.weight = model.embed_tokens.weight
        else:
            name = (
                "model.embed_tokens"
                if config.tied_head
                else "lm_head"
                if config.shared_heads
                else f"lm_head.{config.exits.index(p)}"
            )
            read_weight(head, [f"{name}.weight"])  # type: ignore[arg-type]
    for i, layer in enumerate(model.trunk, model.first_layer):
        read_layer(layer, f"model.layers.{i}")
        if packed and not compiled:
            pack(layer)
    for p, branch in model.branch_at.items():
        index = config.exits.index(p)
        for layer, prefix in zip(branch.stack, config.branch_prefixes(p), strict=True):
            # The last layer computes keys and values alone where its answer is not wanted.
            read_layer(layer, prefix, apart=layer is branch.stack[-1])
        read(branch.norm, "weight", [f"model.norms.{index}.weight"])
        if branch.probe is not None:
            for part in PROBE_NAMES:
                module, parameter = part.split(".")
                read(getattr(branch.probe, module), parameter, [f"model.probes.{index}.{part}"])
        if packed:
            pack(branch, apart=[branch.stack[-1].qkv_proj])
    if packed:
        pack(model.heads)
        if model.device.type == "cpu":
            frozen = model.branches if compiled else model
            for norm in (m for m in frozen.modules() if isinstance(m, RMSNorm)):
                norm.freeze()
    return model.eval()


def find_device(name: str, where: str) -> torch.device:
    """Return a torch device that can be used.

    Args:
        name: the device: cpu, cuda, cuda:1.
        where: where it was named, for the error message.

    Raises:
        ConfigError: the device cannot be used here.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {name!r} cannot be used here: {reason}") from None
    return device
