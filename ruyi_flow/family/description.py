"""The facts of a family's folder, read from config.json and the header of its weights. No torch."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.files import check_plain, companions, read_json

__all__ = ["Description", "describe", "size_on_disk", "untrained_exits"]

_MOST_HEADER_BYTES = 2**24
"""Largest header of a safetensors file that is read; a model of 100,000 tensors has one of about 12 MB."""

_COMPARED_BYTES = 2**14
"""Bytes of each tensor of a branch that are compared with the trunk's. Training changes nearly all values."""

_FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Number format in the header of a safetensors file -> its name in torch and in config.json."""


@dataclass(frozen=True, slots=True)
class Description:
    """The facts of one family. If its files cannot be read, `problem` says why, and the facts from them are empty."""

    name: str
    """Name of the family's folder."""
    folder: str
    """The family's folder."""
    source: str | None
    """Source that the family was pulled from, or None if it is not known."""
    size_bytes: int
    """Size of the folder's files."""
    exits: tuple[int, ...] = ()
    """Exits in ascending order."""
    untrained: tuple[int, ...] = ()
    """Exits whose branch is a copy of the trunk's layer there."""
    layers: int = 0
    """Number of decoder layers."""
    parameters: dict[int, int] | None = None
    """Number of parameters of the model that ends at each exit."""
    dtype: str | None = None
    """Number format of the weights: that of most tensors, int8, or int4."""
    has_tokenizer: bool = False
    """Whether prompts can be texts."""
    problem: str | None = None
    """Why the files cannot be read."""


class _Tensor(BaseModel):
    """A tensor in the header of a safetensors file."""

    dtype: str
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    """Where its bytes begin and end, counted from the end of the header."""


class _Header(BaseModel):
    """The header of a safetensors file."""

    metadata: dict[str, str] = Field(default={}, alias="__metadata__")
    __pydantic_extra__: dict[str, _Tensor] = Field(init=False)
    model_config = {"extra": "allow"}

    @property
    def tensors(self) -> dict[str, _Tensor]:
        """The tensors by name."""
        return self.__pydantic_extra__


def describe(folder: Path, source: str | None = None) -> Description:
    """Return the facts of a family's folder, whose weights are in one file, as `pull` and `shard` write them.

    Args:
        folder: the folder.
        source: what the family was pulled from.
    """
    size = size_on_disk(folder)
    try:
        config, header = _config(folder), _header(folder / "model.safetensors")
        formats = Counter(tensor.dtype for tensor in header.tensors.values()).most_common(1)
        stored = header.metadata.get("ruyi_flow.weights") or (formats[0][0] if formats else "")
        return Description(
            name=folder.name,
            folder=str(folder),
            source=source,
            size_bytes=size,
            exits=config.exits,
            untrained=untrained_exits(folder),
            layers=config.num_layers,
            parameters={p: config.num_parameters(p) for p in config.exits},
            dtype=_FORMATS.get(stored, stored),
            has_tokenizer=not {"tokenizer.json", "tokenizer.model", "vocab.json"}.isdisjoint(
                path.name for path in companions(folder)
            ),
        )
    except (CheckpointError, OSError) as error:
        return Description(folder.name, str(folder), source, size, problem=str(error))


def size_on_disk(folder: Path) -> int:
    """Return the size of a folder's files in bytes. A link counts itself, not what it leads to."""
    found = [os.lstat(folder)]
    if not folder.is_symlink():
        found += [
            os.lstat(os.path.join(at, name)) for at, folders, names in os.walk(folder) for name in folders + names
        ]
    return sum(one.st_size for one in found if not stat.S_ISDIR(one.st_mode))


def untrained_exits(folder: Path) -> tuple[int, ...]:
    """Return the exits of a family whose branch has the same values as the trunk's layer there.

    Args:
        folder: the family's folder, whose weights are in one file.

    Raises:
        CheckpointError: the folder's files cannot be read.
    """
    config, path = _config(folder), folder / "model.safetensors"
    tensors = _header(path).tensors
    found = []
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")

        def beginning(tensor: _Tensor) -> bytes:
            begin, end = tensor.data_offsets
            file.seek(start + begin)
            return file.read(max(0, min(end - begin, _COMPARED_BYTES)))

        def is_copy(name: str, original: str) -> bool:
            return original in tensors and beginning(tensors[name]) == beginning(tensors[original])

        for i, exit in enumerate(config.exits[:-1]):
            branch, layer = f"model.eelayers.{i}.", f"model.layers.{exit}."
            parts = [name.removeprefix(branch) for name in tensors if name.startswith(branch)]
            if config.branch_layers[i] == 1 and parts and all(is_copy(branch + part, layer + part) for part in parts):
                found.append(exit)
    return tuple(found)


def _config(folder: Path) -> FamilyConfig:
    path = folder / "config.json"
    return FamilyConfig.parse(read_json(path), where=str(path))


def _header(path: Path) -> _Header:
    """Read the header of a safetensors file.

    Raises:
        CheckpointError: there is no such file, or it is no safetensors file.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; pull the family again")
    check_plain(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= _MOST_HEADER_BYTES else b""
    try:
        return _Header.model_validate_json(text)
    except ValidationError:
        raise CheckpointError(f"{path}: truncated or not a safetensors file; pull the family again") from None
