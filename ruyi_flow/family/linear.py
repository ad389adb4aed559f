"""Products with a weight matrix, and how the matrix is stored: plain, laid out for the CPU, or in 8 or 4 bits."""

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
from ruyi_flow.family.devices import has_onednn, lacks_bfloat16
from ruyi_flow.types import Weights

__all__ = ["GROUP", "Linear", "Quantized", "pack"]

GROUP = 32
"""Consecutive values of a row that share a scale and a zero: the blocks of GGUF's Q4_1, whose values stay exact."""

_MANY_ROWS = 56
"""Input rows from which dequantizing a 4-bit weight is faster than torch's 4-bit kernel for the CPU (docs/log.md)."""

_BLOCK = 4096
"""Rows of a weight that are quantized, packed or dequantized at once, which bounds the temporary memory."""

_PACKED_ROWS = 64
"""Rows of a weight are padded to a multiple of this, which suits every layout of torch's 4-bit kernel."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight of shape (out, in) in 8 or 4 bits, in row order as in a shard's file.

    A value stands for `(value - middle) * scale + zero`, where middle is 128 in 8 bits and 8 in 4 bits.
    """

    values: Tensor
    """uint8, (out, in) in 8 bits or (out, in / 2) in 4 bits, with even columns in the low half of each byte."""
    scales: Tensor
    """bfloat16, (out, in / GROUP)."""
    zeros: Tensor
    """bfloat16, (out, in / GROUP)."""

    @classmethod
    def of(cls, weight: Tensor, weights: Weights, name: str = "a weight") -> Quantized:
        """Quantize a weight to the nearest values of a format.

        Args:
            weight: (out, in), plain floats.
            weights: INT8 or INT4.
            name: the weight's name, for the error.

        Raises:
            CheckpointError: the number of columns is not a multiple of GROUP.
        """
        rows, columns = weight.shape
        if columns % GROUP:
            raise CheckpointError(
                f"{name} has shape {rows} x {columns}, but {weights} needs a multiple of {GROUP} columns; "
                "set weights: bf16, or remove weights"
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
        """Stack the rows of weights that have the same inputs and format."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("values", "scales", "zeros")))

    @property
    def weights(self) -> Weights:
        """The format, INT8 or INT4."""
        return Weights.INT8 if self.values.shape[1] == self.shape[1] else Weights.INT4

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this stands for, (out, in)."""
        rows, groups = self.scales.shape
        return rows, groups * GROUP

    def is_valid(self) -> bool:
        """Check that dtypes and shapes fit together, since they come from a file."""
        if self.values.dim() != 2 or self.values.dtype is not torch.uint8:
            return False
        if any(t.dtype is not torch.bfloat16 or t.dim() != 2 for t in (self.scales, self.zeros)):
            return False
        rows, columns = self.shape
        return self.values.shape in ((rows, columns), (rows, columns // 2)) and self.zeros.shape == self.scales.shape

    def rows(self, start: int, stop: int) -> Quantized:
        """Return rows `start … stop-1` as views."""
        return Quantized(self.values[start:stop], self.scales[start:stop], self.zeros[start:stop])

    def to(self, device: str | torch.device) -> Quantized:
        """Return this weight on another device."""
        return Quantized(self.values.to(device), self.scales.to(device), self.zeros.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that this stands for, (out, in)."""
        return torch.cat([self.rows(i, i + _BLOCK)._block(dtype) for i in range(0, self.shape[0], _BLOCK)])

    def _block(self, dtype: torch.dtype) -> Tensor:
        values, middle = (self.values, 128) if self.weights is Weights.INT8 else (self._nibbles(), 8)
        steps = (values.float() - middle).view(*self.scales.shape, GROUP)
        return torch.addcmul(self.zeros.float()[..., None], steps, self.scales.float()[..., None]).flatten(1).to(dtype)

    def as_int4(self) -> Quantized:
        """Return an INT4 weight unchanged, and an INT8 one as INT4 of shape (out, 2 * in).

        The product of the latter with `cat((x, x), 1)` equals the product of the INT8 weight with `x`.
        """
        if self.weights is Weights.INT4:
            return self
        high, low = self.values >> 4, self.values & 15
        values = torch.cat([half[:, ::2] | (half[:, 1::2] << 4) for half in (high, low)], 1)
        # (16 high + low - 128) s + z = (high - 8) 16 s + z + (low - 8) s + 8 s; 16 s and 8 s are as exact as s.
        scales, zeros = torch.cat((16 * self.scales, self.scales), 1), torch.cat((self.zeros, 8 * self.scales), 1)
        return Quantized(values, scales, zeros)

    def _nibbles(self) -> Tensor:
        """Return the 4-bit values one a byte, (out, in) uint8."""
        return torch.stack((self.values & 15, self.values >> 4), -1).flatten(1)

    def packed_for_cpu(self) -> Tensor:
        """Return the 4-bit values in the layout of torch's kernel for the CPU (`_cpu_layout`)."""
        assert self.weights is Weights.INT4
        # In blocks, since torch packs from 32 bits a value.
        starts = range(0, self.shape[0], _BLOCK)
        blocks = [self.rows(i, i + _BLOCK)._nibbles().int() for i in starts]
        return torch.cat([torch._convert_weight_to_int4pack_for_cpu(block, 1) for block in blocks])


class _Kernel(Protocol):
    """A product with a weight in the layout of one of torch's kernels."""

    tensors: tuple[Tensor, ...]
    """The weight, without the bias."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, out)"""
        ...


class _OneDnn:
    """A plain weight in oneDNN's layout for small batches, which `torch.compile` uses for frozen models too."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._linear = torch.ops.mkldnn._linear_pointwise.default  # not at import: some builds of torch lack it
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self.tensors: tuple[Tensor, ...] = (self._weight,)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._linear(x, self._weight, self.bias, "none", [], "")
        return out


class _Widened:
    """A bfloat16 weight on a processor without bfloat16 products.

    torch multiplies value by value there, so its time grows with the rows. From `_MANY` rows on, this converts a block
    of the weight at a time to float32, which stays in the cache for its product: seven times faster at 64 rows.
    """

    _MANY = 3
    _ROWS = 1024

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self.bias = weight.contiguous(), bias
        self._blocks = self._weight.split(self._ROWS)
        self.tensors: tuple[Tensor, ...] = (self._weight,)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < self._MANY:
            return F.linear(x, self._weight, self.bias)
        x = x.float()
        if len(self._blocks) == 1:
            out = x @ self._weight.float().T
        else:
            out = x.new_empty(x.shape[0], len(self._weight))
            for part, block in zip(out.split(self._ROWS, 1), self._blocks, strict=True):
                torch.mm(x, block.float().T, out=part)
        return out.bfloat16() if self.bias is None else out.add_(self.bias).bfloat16()


class _Int4:
    """A quantized weight in the layout of torch's 4-bit kernel; 8 bits run as two halves of 4 (`Quantized.as_int4`).

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: number format of inputs and outputs.
    """

    def __init__(self, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> None:
        device = weight.values.device
        self._rows, self._columns = weight.shape
        self._is_int8 = weight.weights is Weights.INT8
        self._middle = 128 if self._is_int8 else 8
        self._wide_dtype = torch.float32 if lacks_bfloat16(dtype, device) else dtype
        self._on_cpu = device.type == "cpu"
        pad = (0, 0, 0, -self._rows % _PACKED_ROWS)  # rows of zeros that fill the layout's last block
        int4 = weight.as_int4()
        int4 = Quantized(*(F.pad(t, pad) for t in (int4.values, int4.scales, int4.zeros)))
        self._padded = int4.shape[0] > self._rows
        scales_zeros = torch.stack((int4.scales, int4.zeros), -1).transpose(0, 1).contiguous()
        if self._on_cpu:
            self._mm = torch._weight_int4pack_mm_for_cpu
            self._packed, self._scales_zeros = int4.packed_for_cpu(), scales_zeros.to(dtype)
            self._many = _MANY_ROWS // 2 if self._is_int8 else _MANY_ROWS
            # The weight as bytes, (blocks, in or 2 in, block / 2), and the scales and zeros of it, (groups, out) each.
            self._block, self._halves_apart = _cpu_layout()
            self._bytes = self._packed.view(-1, int4.shape[1], self._block // 2)
            self._scales, self._zeros = self._scales_zeros.unbind(-1)
            if self._is_int8:
                groups = self._columns // GROUP
                self._scales, self._zeros = self._scales[groups:], self._zeros[:groups]
        else:
            self._mm = torch._weight_int4pack_mm
            tiles = next(t for t in (8, 4, 2) if int4.shape[1] % (16 * t) == 0)
            swapped = (int4.values << 4) | (int4.values >> 4)
            self._packed, self._scales_zeros = torch._convert_weight_to_int4pack(swapped, tiles), scales_zeros
            self._many = sys.maxsize
        self.tensors: tuple[Tensor, ...] = (self._packed, self._scales_zeros)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] < self._many:
            if self._is_int8:
                x = torch.cat((x, x), 1)
            if self._on_cpu or x.dtype is torch.bfloat16:
                out = self._mm(x, self._packed, GROUP, self._scales_zeros)
            else:
                out = self._mm(x.bfloat16(), self._packed, GROUP, self._scales_zeros).to(x.dtype)
        else:
            size = self._scales_zeros.shape[1]
            wide = x.to(self._wide_dtype)
            blocks = [(wide @ self._columns_of(i, min(i + _BLOCK, size))).to(x.dtype) for i in range(0, size, _BLOCK)]
            out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        if self._padded:
            out = out[:, : self._rows]
        return out if self.bias is None else out.add_(self.bias)

    def _columns_of(self, start: int, stop: int) -> Tensor:
        """Dequantize rows `start … stop-1` of the weight on a CPU, transposed: (in, stop - start)."""
        block, size, half = self._block, stop - start, self._block // 2
        packed = self._bytes[start // block : stop // block].transpose(0, 1)  # (in or 2 in, blocks, half)
        values = packed.new_empty(self._columns, size // block, block)
        in_low = values[..., :half] if self._halves_apart else values[..., ::2]
        in_high = values[..., half:] if self._halves_apart else values[..., 1::2]
        if self._is_int8:
            high, low = packed.split(self._columns)
            torch.bitwise_or(high << 4, low & 15, out=in_low)
            torch.bitwise_or(high & 240, low >> 4, out=in_high)
        else:
            torch.bitwise_and(packed, 15, out=in_low)
            torch.bitwise_right_shift(packed, 4, out=in_high)
        # Bytes wrap around, so values below the middle become negative as int8.
        steps = values.sub_(self._middle).view(torch.int8).to(self._wide_dtype).view(-1, GROUP, size)
        # Broadcasting contiguous tensors is several times faster than these strided views.
        parts = (t[:, None, start:stop] for t in (self._scales, self._zeros))
        scales, zeros = (t.to(self._wide_dtype, memory_format=torch.contiguous_format) for t in parts)
        return torch.addcmul(zeros, steps, scales, out=steps).view(-1, size)

    def embedding(self, ids: Tensor) -> Tensor:
        """Dequantize single rows of the weight on a CPU: (n,) -> (n, in)."""
        row, half = ids % self._block, self._block // 2
        byte, in_high = (row % half, row // half) if self._halves_apart else (row // 2, row % 2)
        values = self._bytes[ids // self._block, :, byte] >> (4 * in_high)[:, None] & 15
        if self._is_int8:
            high, low = values.split(self._columns, 1)
            values = 16 * high + low
        scales, zeros = (t[:, ids].T[..., None] for t in (self._scales, self._zeros))
        steps = (values - self._middle).to(scales.dtype).view(len(ids), -1, GROUP)
        return torch.addcmul(zeros, steps, scales).flatten(1)


@cache
def _cpu_layout() -> tuple[int, bool]:
    """Find out how torch's 4-bit kernel lays a weight out on this CPU, which depends on its vector instructions.

    The bytes of a block of rows are stored column by column.

    Returns:
        The rows of a block, and which two rows share a byte, low half first: `i` and `i + block / 2` if True, else
        `2 i` and `2 i + 1`.
    """
    rows = torch.arange(_PACKED_ROWS, dtype=torch.int32)[:, None].repeat(1, 2)
    low, high = (
        torch._convert_weight_to_int4pack_for_cpu(digit, 1).flatten() & 15 for digit in (rows % 16, rows // 16)
    )
    row_in_low_half = low + 16 * high
    half = int((row_in_low_half == 0).nonzero()[1])  # where the second column begins
    return 2 * half, int(row_in_low_half[1]) == 1


class Linear(nn.Module):
    """`x @ weight.T + bias`. Several products of the same input are one `Linear` with the sum of their output sizes.

    For serving, kernels replace the weight: one for all of it, or one for each product where `part` must run a product
    alone. With weights packed for one row in bf16, all the products of SmolLM2-135M took 12.2 ms instead of 18.0
    (docs/log.md).
    """

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.in_features, self.splits = in_features, tuple(out_features)
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features))
        self.bias = nn.Parameter(torch.empty(sum(self.splits))) if bias else None
        self.kernels: tuple[_Kernel, ...] = ()
        self.run: Callable[[Tensor], Tensor] = self.forward
        """Computes the same as `forward`; for the hot path, it calls the kernel directly if there is only one."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, in) -> (n, sum(splits))"""
        if not self.kernels:
            return F.linear(x, self.weight, self.bias)
        return torch.cat([kernel(x) for kernel in self.kernels], dim=-1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """Compute one of the products alone, which needs kernels of their own: (n, in) -> (n, splits[index])."""
        if self.kernels:
            return self.kernels[index](x)
        start = sum(self.splits[:index])
        rows = slice(start, start + self.splits[index])
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def num_parameters(self) -> int:
        """Count the parameters of weight and bias, in whatever layout they are stored."""
        has_bias = self.bias is not None or any(kernel.bias is not None for kernel in self.kernels)
        return sum(self.splits) * (self.in_features + has_bias)

    def embedding(self, ids: Tensor) -> Tensor:
        """Look up rows of a quantized head that is also the token embedding: (n,) -> (n, in)."""
        (kernel,) = self.kernels
        assert isinstance(kernel, _Int4)
        return kernel.embedding(ids)

    def set_kernels(self, weight: Tensor | Quantized, dtype: torch.dtype, *, apart: bool = False) -> None:
        """Replace the weight with kernels that compute the same; inference only.

        Args:
            weight: (sum(splits), in), on the device where it runs.
            dtype: number format of inputs and outputs.
            apart: make a kernel for each product, so that `part` can run it alone.
        """
        parts = self.splits if apart else (sum(self.splits),)
        bias = (None,) * len(parts) if self.bias is None else tuple(b.clone() for b in self.bias.detach().split(parts))
        kernels: list[_Kernel] = []
        for size, part_bias in zip(parts, bias, strict=True):
            start = sum(parts[: len(kernels)])
            if isinstance(weight, Tensor):
                plain = _Widened if lacks_bfloat16(weight.dtype, weight.device) else _OneDnn
                kernels.append(plain(weight[start : start + size], part_bias))
            else:
                kernels.append(_Int4(weight.rows(start, start + size), part_bias, dtype))
        self.kernels = tuple(kernels)
        if len(kernels) == 1:
            self.run = kernels[0].__call__
        del self.weight, self.bias
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)


def pack(module: nn.Module, *, apart: Collection[Linear] = ()) -> None:
    """Give the plain products of a module kernels for the CPU, where there are some for their format; inference only.

    Args:
        module: changed in place.
        apart: the products among them that need a kernel for each part.
    """
    for linear in module.modules():
        if isinstance(linear, Linear) and not linear.kernels and _can_pack(linear.weight.dtype, linear.weight.device):
            linear.set_kernels(linear.weight.detach(), linear.weight.dtype, apart=linear in apart)


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    onednn = device.type == "cpu" and has_onednn()
    return (onednn and dtype in (torch.bfloat16, torch.float32)) or lacks_bfloat16(dtype, device)
