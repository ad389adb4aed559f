"""Products with a weight matrix, and how the matrix is held: as it is, laid out for the CPU, or in 8 or 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ruyi_flow.errors import CheckpointError
from ruyi_flow.types import Weights

__all__ = ["GROUP", "Linear", "Quantized", "pack"]

GROUP = 32
"""Values of a row that share a scale and a zero: the blocks of GGUF's Q4_1, which so keeps its values."""

_MANY_ROWS = 56
"""From here on widening a 4-bit weight beats torch's kernel for it, whose time grows with the rows (docs/log.md)."""

_BLOCK = 4096
"""Rows of a weight that are rounded, packed or widened at once, so that what lies in between stays small."""

_PACKED_ROWS = 64
"""A multiple of the rows of a block in every layout that torch's 4-bit kernel has."""

_onednn = torch.ops.mkldnn._linear_pointwise.default


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of (out, in) in few bits, as a shard's file holds it; rows stand for themselves.

    `values` uint8, (out, in) in 8 bits, (out, in / 2) in 4, the even column in the low half; `scales` and `zeros`
    (out, in / GROUP) bfloat16. The weight is `(value - middle) * scale + zero`, its middle being 128 or 8.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def of(cls, weight: Tensor, weights: Weights, name: str = "a weight") -> Quantized:
        """Round a weight to the nearest that the format has.

        Raises:
            CheckpointError: a shape that the format cannot hold; `name` says whose.
        """
        rows, columns = weight.shape
        if columns % GROUP:
            raise CheckpointError(
                f"{name} has shape {rows} x {columns}: {weights} needs a multiple of {GROUP} columns; "
                "take weights: bf16, or leave them out"
            )
        return cls.cat([cls._of(block, 8 if weights is Weights.INT8 else 4) for block in weight.split(_BLOCK)])

    @classmethod
    def _of(cls, weight: Tensor, bits: int) -> Quantized:
        w = weight.float().view(weight.shape[0], -1, GROUP)
        low, high = w.amin(-1), w.amax(-1)
        scales = ((high - low) / (2**bits - 1)).clamp(min=1e-12).bfloat16()
        zeros = (low + 2 ** (bits - 1) * scales.float()).bfloat16()
        steps = (w - zeros.float()[..., None]).div_(scales.float()[..., None]).round_().add_(2 ** (bits - 1))
        values = steps.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)
        return cls(values if bits == 8 else values[:, ::2] | (values[:, 1::2] << 4), scales, zeros)

    @classmethod
    def cat(cls, parts: Sequence[Quantized]) -> Quantized:
        """Weights of the same inputs, one below the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("values", "scales", "zeros")))

    @property
    def weights(self) -> Weights:
        """Its format."""
        return Weights.INT8 if self.values.shape[1] == self.shape[1] else Weights.INT4

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, groups = self.scales.shape
        return rows, groups * GROUP

    def is_whole(self) -> bool:
        """Whether the tensors have the formats and shapes that belong together: a file may hold anything."""
        if self.values.dim() != 2 or self.values.dtype is not torch.uint8:
            return False
        if any(t.dtype is not torch.bfloat16 or t.dim() != 2 for t in (self.scales, self.zeros)):
            return False
        rows, columns = self.shape
        return self.values.shape in ((rows, columns), (rows, columns // 2)) and self.zeros.shape == self.scales.shape

    def rows(self, start: int, stop: int) -> Quantized:
        """A part of its rows, without a copy."""
        return Quantized(self.values[start:stop], self.scales[start:stop], self.zeros[start:stop])

    def to(self, device: str | torch.device) -> Quantized:
        """On another device."""
        return Quantized(self.values.to(device), self.scales.to(device), self.zeros.to(device))

    def wide(self) -> Tensor:
        """(out, in) float32: what the format made of the weight."""
        values, middle = (self.values, 128) if self.weights is Weights.INT8 else (self._numbers(), 8)
        steps = (values.float() - middle).view(*self.scales.shape, GROUP)
        return torch.addcmul(self.zeros.float()[..., None], steps, self.scales.float()[..., None]).flatten(1)

    def halves(self) -> Quantized:
        """In 4 bits: as it is, or (out, 2 * in) whose product with an input twice in a row is that of these 8 bits."""
        if self.weights is Weights.INT4:
            return self
        high, low = self.values >> 4, self.values & 15
        values = torch.cat([half[:, ::2] | (half[:, 1::2] << 4) for half in (high, low)], 1)
        # (16 high + low - 128) s + z = (high - 8) 16 s + z + (low - 8) s + 8 s; 16 s and 8 s are as exact as s.
        scales, zeros = torch.cat((16 * self.scales, self.scales), 1), torch.cat((self.zeros, 8 * self.scales), 1)
        return Quantized(values, scales, zeros)

    def _numbers(self) -> Tensor:
        """(out, in) uint8: the 4-bit values, one a byte."""
        return torch.stack((self.values & 15, self.values >> 4), -1).flatten(1)

    def packed(self) -> Tensor:
        """The 4-bit values as torch's kernel for the CPU wants them: see `_layout`."""
        assert self.weights is Weights.INT4
        # Some rows at a time: it is made from 32 bits a value.
        starts = range(0, self.shape[0], _BLOCK)
        blocks = [self.rows(i, i + _BLOCK)._numbers().int() for i in starts]
        return torch.cat([torch._convert_weight_to_int4pack_for_cpu(block, 1) for block in blocks])


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


class _Widened:
    """A bfloat16 weight on a processor without products of that format.

    torch multiplies such numbers one by one there, so that time grows with the rows. From a few rows on, a block of the
    weight at a time is widened to float32 and stays in the cache for its product: seven times faster at 64 rows.
    """

    _MANY = 3
    _ROWS = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight.contiguous(), bias
        self._blocks = self._weight.split(self._ROWS)
        self.tensors: tuple[Tensor, ...] = (self._weight,) if bias is None else (self._weight, bias)
        self.biased = bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < self._MANY:
            return F.linear(x, self._weight, self._bias)
        x = x.float()
        if len(self._blocks) == 1:
            out = x @ self._weight.float().T
        else:
            out = x.new_empty(x.shape[0], len(self._weight))
            for part, block in zip(out.split(self._ROWS, 1), self._blocks, strict=True):
                torch.mm(x, block.float().T, out=part)
        return out.bfloat16() if self._bias is None else out.add_(self._bias).bfloat16()


class _FewBits:
    """A weight in 4 bits, or in 8 as two halves of 4, in the layout of torch's 4-bit kernel.

    Args:
        held: the weight.
        bias: (out,) or None.
        dtype: number format of what goes in and comes out.
    """

    def __init__(self, held: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._rows, self._columns = held.shape
        self._twice = held.weights is Weights.INT8
        self._many_in = torch.float32 if _multiplies_one_by_one(dtype, held.values.device) else dtype
        self._bias, self._on_cpu = bias, held.values.device.type == "cpu"
        # Rows of zeros fill up the layout's last block.
        pad = (0, 0, 0, -self._rows % _PACKED_ROWS)
        half = held.halves()
        half = Quantized(*(F.pad(t, pad) for t in (half.values, half.scales, half.zeros)))
        self._padded = half.shape[0] > self._rows
        scales_zeros = torch.stack((half.scales, half.zeros), -1).transpose(0, 1).contiguous()
        if self._on_cpu:
            self._mm = torch._weight_int4pack_mm_for_cpu
            self._packed, self._scales_zeros = half.packed(), scales_zeros.to(dtype)
            self._many = _MANY_ROWS // 2 if self._twice else _MANY_ROWS
        else:
            self._mm = torch._weight_int4pack_mm
            tiles = next(t for t in (8, 4, 2) if half.shape[1] % (16 * t) == 0)
            swapped = (half.values << 4) | (half.values >> 4)
            self._packed, self._scales_zeros = torch._convert_weight_to_int4pack(swapped, tiles), scales_zeros
            self._many = sys.maxsize
        self.tensors = (self._packed, self._scales_zeros) + (() if bias is None else (bias,))
        self.biased = bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < self._many:
            if self._twice:
                x = torch.cat((x, x), 1)
            if self._on_cpu or x.dtype is torch.bfloat16:
                out = self._mm(x, self._packed, GROUP, self._scales_zeros)
            else:
                out = self._mm(x.bfloat16(), self._packed, GROUP, self._scales_zeros).to(x.dtype)
        else:
            size = self._scales_zeros.shape[1]
            many = x.to(self._many_in)
            blocks = [(many @ self._wide(i, min(i + _BLOCK, size))).to(x.dtype) for i in range(0, size, _BLOCK)]
            out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        if self._padded:
            out = out[:, : self._rows]
        return out if self._bias is None else out.add_(self._bias)

    def _wide(self, start: int, stop: int) -> Tensor:
        """(in, stop - start): rows of the weight as columns, in the number format of the product."""
        block, apart = _layout()
        size, half = stop - start, block // 2
        packed = self._bytes()[start // block : stop // block].transpose(0, 1)  # (in or 2 in, blocks, half)
        values = packed.new_empty(self._columns, size // block, block)
        first, second = (values[..., :half], values[..., half:]) if apart else (values[..., ::2], values[..., 1::2])
        if self._twice:
            high, low = packed.split(self._columns)
            torch.bitwise_or(high << 4, low & 15, out=first)
            torch.bitwise_or(high & 240, low >> 4, out=second)
        else:
            torch.bitwise_and(packed, 15, out=first)
            torch.bitwise_right_shift(packed, 4, out=second)
        # Bytes wrap around: what is below the middle becomes negative.
        steps = values.sub_(self._middle()).view(torch.int8).to(self._many_in).view(-1, GROUP, size)
        # Broadcasting tensors whose columns lie together is several times faster than these views of every second.
        parts = (t[:, None, start:stop] for t in self._scales_and_zeros())
        scales, zeros = (t.to(self._many_in, memory_format=torch.contiguous_format) for t in parts)
        return torch.addcmul(zeros, steps, scales, out=steps).view(-1, size)

    def embedding(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, in): rows of the weight, on a CPU."""
        block, apart = _layout()
        row, half = ids % block, block // 2
        byte, in_high = (row % half, row // half) if apart else (row // 2, row % 2)
        values = self._bytes()[ids // block, :, byte] >> (4 * in_high)[:, None] & 15
        if self._twice:
            high, low = values.split(self._columns, 1)
            values = 16 * high + low
        scales, zeros = (t[:, ids].T[..., None] for t in self._scales_and_zeros())
        steps = (values - self._middle()).to(scales.dtype).view(len(ids), -1, GROUP)
        return torch.addcmul(zeros, steps, scales).flatten(1)

    def _bytes(self) -> Tensor:
        """(blocks, in or 2 in, half a block)"""
        block, _ = _layout()
        return self._packed.view(-1, self._columns * (2 if self._twice else 1), block // 2)

    def _scales_and_zeros(self) -> tuple[Tensor, Tensor]:
        """(groups, out) each, of the whole value."""
        scales, zeros = self._scales_zeros.unbind(-1)
        groups = self._columns // GROUP
        return (scales[groups:], zeros[:groups]) if self._twice else (scales, zeros)

    def _middle(self) -> int:
        return 128 if self._twice else 8


@cache
def _layout() -> tuple[int, bool]:
    """How the CPU's 4-bit kernel lays a weight out, which depends on its vectors: a block's rows; which share a byte.

    A block's bytes lie column by column. A byte holds, low half first, rows `i` and `i + block / 2` where the second
    value is True, else rows `2 i` and `2 i + 1`.
    """
    rows = torch.arange(_PACKED_ROWS, dtype=torch.int32)[:, None].repeat(1, 2)
    low, high = (
        torch._convert_weight_to_int4pack_for_cpu(digit, 1).flatten() & 15 for digit in (rows % 16, rows // 16)
    )
    first = low + 16 * high  # the row in the low half of each byte
    half = int((first == 0).nonzero()[1])  # where the second column begins
    return 2 * half, int(first[1]) == 1


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
        assert isinstance(kernel, _FewBits)
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
                wide = _Widened if _multiplies_one_by_one(weight.dtype, weight.device) else _OneDnn
                kernels.append(wide(weight[start : start + size], part_bias))
            else:
                kernels.append(_FewBits(weight.rows(start, start + size), part_bias, dtype))
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
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return (onednn and dtype in (torch.bfloat16, torch.float32)) or _multiplies_one_by_one(dtype, device)


def _multiplies_one_by_one(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has no kernels for products in bfloat16 on this processor, as on those without AVX-512."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
