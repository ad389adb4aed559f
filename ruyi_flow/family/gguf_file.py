"""The contents of one GGUF file: metadata and tensors. Reads versions 2 and 3 in little-endian byte order.

The reader of the `gguf` package takes ten seconds for the strings of a large vocabulary; this one takes less than one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from ruyi_flow.errors import CheckpointError

__all__ = ["GGUFFile", "Keys"]

_T = TypeVar("_T")

_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Code of a number's type in the file -> its code in the `struct` module."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFFile:
    """An opened GGUF file. Tensors are mapped from disk and converted on demand.

    Raises:
        CheckpointError: there is no such file, or it is truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file")
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        self.metadata: dict[str, Any] = {}
        self._stored: dict[str, _Stored] = {}
        try:
            self._read()
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:
            why = "the file ends inside its header" if isinstance(error, struct.error) else error
            raise CheckpointError(f"{path}: cannot be converted; truncated, or not a supported model: {why}") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors by their names in the file, outermost dimension first."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, and convert it to float32."""
        stored = self._stored[name]
        raw = self._data[stored.start : stored.start + stored.num_bytes].reshape(*stored.shape[:-1], -1)
        return torch.from_numpy(np.array(dequantize(raw, stored.kind), dtype=np.float32)).reshape(stored.shape)

    def _read(self) -> None:
        cursor = _Cursor(self._data.data)
        _, version, num_tensors, num_keys = cursor.take("4sIQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}; known: 2 and 3 in little-endian byte order")
        for _ in range(num_keys):
            key = cursor.text()
            self.metadata[key] = cursor.value(*cursor.take("I"))
        tensors: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            name, (rank,) = cursor.text(), cursor.take("I")
            dims = cursor.take(f"{rank}Q")[::-1]
            tensors.append((name, dims, *cursor.take("IQ")))
        align = self.metadata.get("general.alignment", 32)
        begin = -(-cursor.at // align) * align
        for name, shape, code, offset in tensors:
            if name in self._stored:
                raise ValueError(f"it has two tensors {name}")
            kind = _kind(name, code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise ValueError(f"tensor {name} has shape {shape}, but {kind.name} has blocks of {block} values")
            stored = _Stored(shape, kind, begin + offset, math.prod(shape) // block * block_bytes)
            if stored.start + stored.num_bytes > len(self._data):
                raise ValueError(f"the file ends before tensor {name} does")
            self._stored[name] = stored


class Keys:
    """Metadata keys of one namespace. Each key must be taken, or be refused by name: none is ignored in silence."""

    def __init__(self, file: GGUFFile, namespace: str) -> None:
        self.file = file
        self.namespace = namespace
        self._left = {
            key.removeprefix(namespace): value for key, value in file.metadata.items() if key.startswith(namespace)
        }

    def take(self, key: str, kind: Callable[[Any], _T], default: _T | None = None) -> _T:
        """Return the value of a key, converted by `kind`.

        Raises:
            CheckpointError: the key is missing and has no default, or its value has the wrong type.
        """
        value = self._left.pop(key, None)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.file.path}: metadata {self.namespace}{key} is missing")
            return default
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise self.refusal(key, value, "cannot be used") from None

    def drop(self, prefix: str) -> None:
        """Ignore the keys that begin so, which have no effect beside the others."""
        self._left = {key: value for key, value in self._left.items() if not key.startswith(prefix)}

    def refuse_rest(self, harmless: Mapping[str, Collection[Any] | None]) -> None:
        """Refuse the keys that were not taken.

        Args:
            harmless: key -> the values that change nothing; None if no value does.

        Raises:
            CheckpointError: there is such a key.
        """
        for key, value in self._left.items():
            values = harmless.get(key, ())
            if values is not None and value not in values:
                raise self.refusal(key, value, "is not supported")

    def refusal(self, key: str, value: Any, why: str) -> CheckpointError:
        """Return the error that names a key, its value, and why it cannot be used."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        return CheckpointError(f"{self.file.path}: metadata {self.namespace}{key} {why}: {shown}")


class _Cursor:
    """A position in the bytes of a file, which moves on with every value that is read."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        (raw,) = self.take(f"{length}s")
        return str(raw, "utf-8")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.text()
        if code != _ARRAY:
            return self.take(_FORMS[code])[0]
        code, length = self.take("IQ")
        return [self.text() for _ in range(length)] if code == _STRING else list(self.take(f"{length}{_FORMS[code]}"))


def _kind(name: str, code: int) -> GGMLQuantizationType:
    """Return the number format of a tensor, if the `gguf` package can convert it to floats."""
    known = {kind.value: kind for kind in GGMLQuantizationType}
    if code not in known or not _is_convertible(known[code]):
        kind = known[code].name if code in known else code
        raise ValueError(f"tensor {name} is stored as {kind}, which is not supported")
    return known[code]


@cache
def _is_convertible(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True
