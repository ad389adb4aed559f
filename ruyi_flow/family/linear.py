"""Products with a weight matrix, and how the matrix is held: as it is, laid out for the CPU, or in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError
from ruyi_flow.types import Weights

__all__ = ["GROUP", "Linear", "Quantized", "pack"]

GROUP = 32
"""Values of a row that share a scale and a zero in 4 bits: the blocks of GGUF's Q4_1, which so keeps its values."""

_INT8_ROWS = 12
"""Up to here torch's 8-bit kernel, whose time grows with the rows, beats widening the weight first (docs/log.md)."""

_INT8_BLOCK = 4096
"""Rows of an 8-bit weight that are widened at once, so that they stay in the processor's caches."""

_onednn = torch.ops.mkldnn._linear_pointwise.default


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of (out, in) in few bits, as a shard's file holds it; rows stand for themselves.

    8 bits: `values` (out, in) int8, `scales` (out,) bfloat16. 4 bits: `values` (out, in / 2) uint8, the even column in
    the low half; `scales` and `zeros` (out, in / GROUP) bfloat16, and the weight is `(value - 8) * scale + zero`.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, weights: Weights, name: str = "a weight") -> Quantized:
        """Round a weight to the nearest that the format has.

        Raises:
            CheckpointError: a shape that the format, or torch's kernel for it, cannot hold; `name` says whose.
        """
        w = weight.float()
        if weights is Weights.INT8:
            scales = (w.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
            values = (w / scales.float()[:, None]).round_().clamp_(-127, 127)
            return cls(values.to(torch.int8), scales)
        rows, columns = w.shape
        if columns % GROUP or rows % 16:
            raise CheckpointError(
                f"{name} has shape {rows} x {columns}: int4 needs a multiple of 16 rows and of {GROUP} columns; "
                "take weights: int8"
            )
        w = w.view(rows, -1, GROUP)
        low, high = w.amin(-1), w.amax(-1)
        scales = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        zeros = (low + 8 * scales.float()).bfloat16()
        values = (w - zeros.float()[..., None]).div_(scales.float()[..., None]).round_().add_(8).clamp_(0, 15)
        nibbles = values.to(torch.uint8).view(rows, columns)
        return cls(nibbles[:, ::2] | (nibbles[:, 1::2] << 4), scales, zeros)

    @classmethod
    def cat(cls, parts: Sequence[Quantized]) -> Quantized:
        """Weights of the same inputs, one below the other."""
        zeros = [p.zeros for p in parts if p.zeros is not None]
        return cls(
            torch.cat([p.values for p in parts]),
            torch.cat([p.scales for p in parts]),
            torch.cat(zeros) if zeros else None,
        )

    @property
    def weights(self) -> Weights:
        """Its format."""
        return Weights.INT8 if self.zeros is None else Weights.INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.values.shape
        return rows, columns if self.zeros is None else 2 * columns

    def is_whole(self) -> bool:
        """Whether the tensors have the formats and shapes that belong together: a file may hold anything."""
        tensors = [t for t in (self.scales, self.zeros) if t is not None]
        if self.values.dim() != 2 or any(t.dtype is not torch.bfloat16 for t in tensors):
            return False
        rows, columns = self.shape
        if self.zeros is None:
            return self.values.dtype is torch.int8 and self.scales.shape == (rows,)
        return self.values.dtype is torch.uint8 and all(t.shape == (rows, columns // GROUP) for t in tensors)

    def rows(self, start: int, stop: int) -> Quantized:
        """A part of its rows, without a copy."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Quantized(self.values[start:stop], self.scales[start:stop], zeros)

    def to(self, device: str | torch.device) -> Quantized:
        """On another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Quantized(self.values.to(device), self.scales.to(device), zeros)

    def wide(self) -> Tensor:
        """(out, in) float32: what the format made of the weight."""
        if self.zeros is None:
            return self.values.float() * self.scales.float()[:, None]
        return (
            (self.numbers().float() - 8).view(*self.scales.shape, GROUP) * self.scales.float()[..., None]
            + self.zeros.float()[..., None]
        ).flatten(1)

    def numbers(self) -> Tensor:
        """(out, in) uint8: the 4-bit values, one a byte."""
        return torch.stack((self.values & 15, self.values >> 4), -1).flatten(1)


class _Kernel(Protocol):
    """A weight as one of torch's kernels wants it."""

    tensors: tuple[Tensor, ...]
    biased: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)"""
        ...


class _OneDnn:
    """A wide weight in oneDNN's layout for small batches, the one that `torch.compile` gives to frozen models."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._bias = bias
        self.tensors: tuple[Tensor, ...] = (self._weight,) if bias is None else (self._weight, bias)
        self.biased = bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _onednn(x, self._weight, self._bias, "none", [], "")
        return out


class _Int8:
    """A weight in 8 bits, with one scale a row; activations stay wide."""

    def __init__(self, held: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.values, self.scales, self._bias = held.values.contiguous(), held.scales.to(dtype), bias
        self.tensors: tuple[Tensor, ...] = (
            (self.values, self.scales) if bias is None else (self.values, self.scales, bias)
        )
        self.biased = bias is not None
        # CUDA has a kernel of this name too: a thread a value, in float32 whatever comes in (docs/design/0003-cuda.md).
        self._most_rows = _INT8_ROWS if held.values.device.type == "cpu" else 0

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self._most_rows:
            out: Tensor = torch._weight_int8pack_mm(x, self.values, self.scales)
        else:
            blocks = [F.linear(x, block.to(x.dtype)) for block in self.values.split(_INT8_BLOCK)]
            out = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)).mul_(self.scales)
        return out if self._bias is None else out.add_(self._bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, in): rows of the weight."""
        return self.values[ids].to(self.scales.dtype) * self.scales[ids, None]


class _Int4:
    """A weight in 4 bits, laid out for torch's kernel, which computes in bfloat16."""

    def __init__(self, held: Quantized, bias: Tensor | None) -> None:
        assert held.zeros is not None
        self._bias = bias
        self._scales_zeros = torch.stack((held.scales, held.zeros), -1).transpose(0, 1).contiguous()
        if held.values.device.type == "cpu":
            self._mm = torch._weight_int4pack_mm_for_cpu
            # Some rows at a time: the kernel's layout is made from 32 bits a value.
            starts = range(0, held.shape[0], _INT8_BLOCK)
            blocks = [held.rows(i, i + _INT8_BLOCK).numbers().int() for i in starts]
            self._packed = torch.cat([torch._convert_weight_to_int4pack_for_cpu(block, 1) for block in blocks])
        else:
            self._mm = torch._weight_int4pack_mm
            tiles = next(t for t in (8, 4, 2) if held.shape[1] % (16 * t) == 0)
            swapped = (held.values << 4) | (held.values >> 4)
            self._packed = torch._convert_weight_to_int4pack(swapped, tiles)
        self.tensors = (self._packed, self._scales_zeros) + (() if bias is None else (bias,))
        self.biased = bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16:
            out = self._mm(x, self._packed, GROUP, self._scales_zeros)
        else:
            out = self._mm(x.bfloat16(), self._packed, GROUP, self._scales_zeros).to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)


class Linear(nn.Module):
    """`x @ weight.T + bias`. Several products of the same input are one `Linear` with the sum of their output sizes.

    For serving, the weight gives way to kernels: one for all of it, or, where `part` must run a product alone, one for
    each. Packed for one row in bf16, all the products of SmolLM2-135M took 12.2 ms instead of 18.0 (docs/log.md).
    """

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.in_features, self.splits = in_features, tuple(out_features)
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.splits))) if bias else None
        self.kernels: tuple[_Kernel, ...] = ()
        self.run: Callable[[Tensor], Tensor] = self.forward
        """The same as `forward`, without a call in between where one kernel does it all: for the hot path."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, sum(splits))"""
        if not self.kernels:
            return F.linear(x, self.weight, self.bias)
        return torch.cat([kernel(x) for kernel in self.kernels], dim=-1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """(n, in) -> (n, splits[index]): one of the products alone; kernels must have been made apart."""
        if self.kernels:
            return self.kernels[index](x)
        start = sum(self.splits[:index])
        rows = slice(start, start + self.splits[index])
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def num_parameters(self) -> int:
        """Parameters that it stands for, however they are held."""
        biased = self.bias is not None or any(kernel.biased for kernel in self.kernels)
        return sum(self.splits) * (self.in_features + biased)

    def embedding(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, in): rows of a head that is the embedding, too, and held in 8 bits."""
        (kernel,) = self.kernels
        assert isinstance(kernel, _Int8)
        return kernel.embedding(ids)

    def hold(self, weight: Tensor | Quantized, dtype: torch.dtype, *, apart: bool = False) -> None:
        """Give up the weight for kernels that run this one; inference only.

        Args:
            weight: (sum(splits), in), on the device where it runs.
            dtype: number format of what goes in and comes out.
            apart: a kernel for each product, so that `part` can run it alone.
        """
        parts = self.splits if apart else (sum(self.splits),)
        bias = (None,) * len(parts) if self.bias is None else tuple(b.clone() for b in self.bias.detach().split(parts))
        kernels: list[_Kernel] = []
        for size, part_bias in zip(parts, bias, strict=True):
            start = sum(parts[: len(kernels)])
            if isinstance(weight, Tensor):
                kernels.append(_OneDnn(weight[start : start + size], part_bias))
            elif weight.weights is Weights.INT8:
                kernels.append(_Int8(weight.rows(start, start + size), part_bias, dtype))
            else:
                kernels.append(_Int4(weight.rows(start, start + size), part_bias))
        self.kernels = tuple(kernels)
        if len(kernels) == 1:
            self.run = kernels[0].__call__
        del self.weight, self.bias
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def pack(module: nn.Module, *, apart: Collection[Linear] = ()) -> None:
    """Pack the wide products below a module for serving on a CPU, where their number format can be; inference only.

    Args:
        apart: those of them whose parts must be able to run alone.
    """
    for linear in module.modules():
        if isinstance(linear, Linear) and not linear.kernels and _can_pack(linear.weight.dtype, linear.weight.device):
            linear.hold(linear.weight.detach(), linear.weight.dtype, apart=linear in apart)


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
