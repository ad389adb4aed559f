"""Checkpoint files: read Ruyi and Hugging Face folders, and cut shards.

Only safetensors and JSON are read from a folder: no downloaded code runs and nothing is unpickled. Tensors have Ruyi's
published names (`model.eelayers.{i}`, `model.norms.{i}`, `lm_head.{i}`). The second and further layers of a branch,
which Ruyi does not have, are `model.eeblocks.{i}.{j}`. In an ordinary Hugging Face checkpoint that was given exits, the
same names refer to copies of its trunk layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.linear import Quantized
from ruyi_flow.types import Weights

__all__ = ["LAYER_NAMES", "PROBE_NAMES", "Checkpoint", "cut", "format_of", "parse_dtype", "whole_or_not"]

_WEIGHTS = "model.safetensors"
_COMPANIONS = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE"),
]
"""Files of a family other than config and weights, copied to the shard of the entry node."""

LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""Module of a `DecoderLayer` -> the published names of the tensors that it stacks."""

PROBE_NAMES = ("up.weight", "up.bias", "down.weight", "down.bias")
"""Names of the tensors of a branch's `Probe`."""

_SCALE, _ZERO = "_scale", "_zero"
"""Suffixes of the names of a quantized weight's scales and zeros."""

_TRAINED = ("branch_layers", "probe_size")
"""Metadata keys of a file of trained branches, which are `early_exit_…` in config.json."""


class Checkpoint:
    """An opened checkpoint folder: a whole family or a shard. Tensors are mapped from disk and read on demand.

    Args:
        folder: contains config.json and model.safetensors, or model.safetensors.index.json and the files that it names.
        exits: exits to give to an ordinary checkpoint. Default: none but the last.
        branches: files of trained branches or probes (`ruyi-flow train`), which replace the family's early ones in
            this order.

    Raises:
        CheckpointError: a file is missing, truncated, or contradicts config.json.
    """

    def __init__(
        self, folder: str | Path, exits: Sequence[int] | None = None, branches: Sequence[str | Path] = ()
    ) -> None:
        self.folder = Path(folder)
        raw = _read_json(self.folder / "config.json", "a family is a folder with config.json and *.safetensors files")
        self.config = FamilyConfig.parse(
            raw, exits=None if exits is None else tuple(exits), where=str(self.folder / "config.json")
        )
        self._ordinary = self.config.ordinary
        self._files: dict[str, Any] = {}
        self._file_of = self._open()
        metadata = self._metadata
        try:
            stored = tuple(json.loads(metadata.get("ruyi_flow.exits", "null")) or self.config.exits)
        except (ValueError, TypeError):
            stored = ()
        if not stored or any(p not in self.config.exits for p in stored):
            raise CheckpointError(
                f"{self.folder}: its metadata names exits {metadata['ruyi_flow.exits']}, but config.json has "
                f"{list(self.config.exits)}; cut the shard again"
            )
        self.exits: tuple[int, ...] = stored
        """The exits at which the stages in this folder end."""
        for file in branches:
            self._replace_branches(Path(file))
        path = self.folder / "generation_config.json"
        self.generation_config = _read_json(path) if path.exists() else None
        """The content of generation_config.json, or None; read early, since a converted folder is temporary."""

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer, from config.json and generation_config.json."""
        eos = (self.generation_config or {}).get("eos_token_id")
        more = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(isinstance(token, int) and token >= 0 for token in more):
            path = self.folder / "generation_config.json"
            raise CheckpointError(f"{path}: eos_token_id is {eos!r}; it must be a token id or a list of them")
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *more)))

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the family: of its geometry, and of all tensors' names, dtypes, shapes and first rows.

        A shard has the fingerprint of the family that it was cut from.
        """
        stored = self._metadata.get("ruyi_flow.fingerprint")
        return stored or _fingerprint(self.config, self.names(self.config.exits), self._first_values)

    def names(self, exits: Sequence[int]) -> list[str]:
        """List the published names of the tensors of the stages that end at these exits."""
        config, names = self.config, []
        if config.exits[0] in exits:
            names.append("model.embed_tokens.weight")
        for first, p in config.stages(tuple(exits)):
            i = config.exits.index(p)
            for prefix in (*(f"model.layers.{j}" for j in range(first, p)), *config.branch_prefixes(p)):
                names += [f"{prefix}.{name}" for name in self._layer_tensors]
            names.append(f"model.norms.{i}.weight")
            if config.probe_size and p != config.exits[-1]:
                names += [f"model.probes.{i}.{part}" for part in PROBE_NAMES]
            names.append(config.head_name(p))
        return list(dict.fromkeys(names))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its published name, mapped from disk.

        Raises:
            CheckpointError: the tensor is missing, or is not of plain floats.
        """
        stored = self._stored_name(name)
        if stored not in self._file_of:
            of = "" if stored == name else f" (for {name})"
            is_shard = self.exits != self.config.exits
            raise CheckpointError(
                f"{self.folder}: tensor {stored}{of} is missing; "
                + (
                    f"this shard has exits {list(self.exits)} only; cut another one"
                    if is_shard
                    else "fetch or convert the family again"
                )
            )
        tensor = self._read(stored)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(f"{self.folder}: tensor {stored} is {tensor.dtype}; only float formats are supported")
        return tensor

    def weight(self, name: str) -> Tensor | Quantized:
        """Return a product's weight by its published name, quantized if it is stored so; see `tensor`."""
        parts = [name, f"{name}{_SCALE}", f"{name}{_ZERO}"]
        found = [part in self._file_of for part in parts]
        if not any(found[1:]):
            return self.tensor(name)
        weight = Quantized(*map(self._read, parts)) if all(found) else None
        if weight is None or not weight.is_valid():
            raise CheckpointError(f"{self.folder}: {name} and its scales do not fit together; cut the shard again")
        return weight

    @cached_property
    def weights(self) -> Weights | None:
        """The format of quantized weights, INT8 or INT4; None if the weights are plain floats."""
        named = self._metadata.get("ruyi_flow.weights")
        if named not in (None, Weights.INT8, Weights.INT4):
            raise CheckpointError(
                f"{self.folder}: its metadata names weights {named!r}; known: int8, int4; cut the shard again"
            )
        return None if named is None else Weights(named)

    def _read(self, stored: str) -> Tensor:
        tensor: Tensor = self._files[self._file_of[stored]].get_tensor(stored)
        return tensor

    def stores(self, name: str) -> bool:
        """Whether the files contain a tensor of this published name, rather than one that is copied for it."""
        return name in self._file_of

    def close(self) -> None:
        """Close the mapped files. Tensors that were copied from them stay valid."""
        self._files.clear()

    @property
    def _layer_tensors(self) -> list[str]:
        config, out = self.config, []
        biases = {"qkv_proj": config.attention_bias, "o_proj": config.output_bias}
        biases |= dict.fromkeys(("gate_up_proj", "down_proj"), config.mlp_bias)
        for module, parts in LAYER_NAMES.items():
            if module not in ("q_norm", "k_norm") or config.base == "qwen3":
                kinds = ("weight", "bias") if biases.get(module) else ("weight",)
                out += [f"{part}.{kind}" for part in parts for kind in kinds]
        return out

    def _stored_name(self, name: str) -> str:
        if not self._ordinary or name in self._file_of:
            return name
        parts = name.split(".")
        if parts[1] == "eelayers":  # a branch starts as a copy of the trunk layer at its exit
            return ".".join(("model", "layers", str(self.config.exits[int(parts[2])]), *parts[3:]))
        return "model.norm.weight" if parts[1] == "norms" else name

    def _open(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(
                    f"{index}: weight_map is missing or does not map tensors to files; fetch the checkpoint again"
                )
            files = sorted(set(weight_map.values()))
        else:
            files = [_WEIGHTS]
        self._metadata: dict[str, str] = {}
        file_of: dict[str, str] = {}
        for file in files:
            path = self.folder / file
            if not path.exists():
                others = sorted(p.name for p in self.folder.glob("*.bin"))
                pickles = f"convert {others[0]} to safetensors: pickles are never read" if others else ""
                raise CheckpointError(f"{path}: no such file; {pickles or 'fetch the checkpoint again'}")
            self._files[file] = handle = _open(path)
            self._metadata |= handle.metadata() or {}
            file_of |= {str(name): file for name in handle.keys()}
        return file_of

    def _replace_branches(self, file: Path) -> None:
        """Replace tensors of the family with those of a file of trained branches or probes."""
        handle = _open(file)
        metadata = handle.metadata() or {}
        try:
            exits = json.loads(metadata["ruyi_flow.branch_exits"])
            trained = {k: json.loads(metadata[f"ruyi_flow.{k}"]) for k in _TRAINED if f"ruyi_flow.{k}" in metadata}
        except (KeyError, ValueError):
            raise CheckpointError(f"{file}: not a file of trained branches; ruyi-flow train writes them") from None
        if tuple(exits) != self.config.exits:
            raise CheckpointError(
                f"{file}: its branches are for exits {exits}, but the family has exits {list(self.config.exits)}"
            )
        raw = {**self.config.to_dict(), **{f"early_exit_{key}": value for key, value in trained.items()}}
        self.config = FamilyConfig.parse(raw, where=str(file))
        self._files[str(file)] = handle
        self._file_of |= {str(name): str(file) for name in handle.keys()}
        self._metadata.pop("ruyi_flow.fingerprint", None)

    def _first_values(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        if stored not in self._file_of:
            self.tensor(name)  # raises
        part = self._files[self._file_of[stored]].get_slice(stored)
        shape: list[int] = part.get_shape()
        first: Tensor = part[:1].expand(shape) if len(shape) > 1 else part[:]
        return first


def format_of(name: str, weights: Weights) -> Weights:
    """Return the format to quantize a weight to: LM heads need 8 bits to keep their quality (docs/log.md)."""
    return weights if name.startswith("model.") and "embed_tokens" not in name else Weights.INT8


def cut(
    checkpoint: Checkpoint,
    exits: Sequence[int],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    companions: bool = True,
) -> Path:
    """Write the stages that end at these exits to a new folder: config.json, one safetensors file, tokenizer files.

    After an error, no folder is left behind.

    Args:
        checkpoint: the whole family.
        exits: consecutive exits; with all exits, the folder is the whole family.
        out: the new folder; must not exist yet.
        dtype: number format to convert to. Default: as in the checkpoint.
        weights: INT8 or INT4 quantizes the weights of products. Default, and BF16: as in the checkpoint.
        companions: also copy the tokenizer files, which an entry node needs.

    Raises:
        CheckpointError: `out` exists, or the checkpoint does not have these stages.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or name another folder")
    names = checkpoint.names(exits)
    if checkpoint.weights is not None and weights not in (None, checkpoint.weights):
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are already {checkpoint.weights}, so they cannot become {weights}; "
            "cut the shard from the family"
        )
    quantized = checkpoint.weights or (weights if weights is not Weights.BF16 else None)
    with whole_or_not(out) as folder:
        tensors: dict[str, Tensor] = {}
        for name in names:
            weight = checkpoint.weight(name)
            if isinstance(weight, Tensor) and quantized and _is_product(name, checkpoint.config):
                weight = Quantized.of(weight, format_of(name, quantized), name)
            if isinstance(weight, Quantized):
                tensors[name] = weight.values
                tensors[f"{name}{_SCALE}"], tensors[f"{name}{_ZERO}"] = weight.scales, weight.zeros
                continue
            # Copies of a trunk layer must not share memory: safetensors stores no aliases.
            tensors[name] = weight.to(dtype or weight.dtype, copy=not checkpoint.stores(name)).contiguous()
        fingerprint = checkpoint.fingerprint
        if tuple(exits) == checkpoint.config.exits and not quantized:  # dtype may make another family of it
            fingerprint = _fingerprint(checkpoint.config, names, tensors.__getitem__)
        metadata = {"format": "pt", "ruyi_flow.exits": json.dumps(list(exits)), "ruyi_flow.fingerprint": fingerprint}
        if quantized:
            metadata["ruyi_flow.weights"] = quantized
        save_file(tensors, folder / _WEIGHTS, metadata)
        config = checkpoint.config.to_dict()
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if companions:
            for name in _COMPANIONS:
                if (checkpoint.folder / name).exists():
                    shutil.copyfile(checkpoint.folder / name, folder / name)
    return out


def _is_product(name: str, config: FamilyConfig) -> bool:
    """Whether a tensor is the weight of a `Linear`."""
    if "embed_tokens" in name:
        return config.tied_head
    return name.startswith("lm_head") or name.endswith("_proj.weight")


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype named 'float32', 'bfloat16' or 'float16'.

    Raises:
        CheckpointError: another name or dtype.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(name, torch.dtype) and name in known.values():
        return name
    if name not in known:
        raise CheckpointError(f"dtype is {name!r}; known: {', '.join(known)}")
    return known[str(name)]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from None


@contextmanager
def whole_or_not(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `out` at the end, or is removed after an error."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error}") from None
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fingerprint(config: FamilyConfig, names: Sequence[str], first_values: Callable[[str], Tensor]) -> str:
    rope = sorted(config.rope.items())
    geometry = (config.base, config.exits, config.num_heads, config.head_dim, config.rms_norm_eps, rope)
    digest = hashlib.sha256(repr(geometry).encode())
    for name in sorted(names):
        tensor = first_values(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        first = tensor[0] if tensor.dim() > 1 else tensor
        digest.update(first.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_json(path: Path, hint: str = "") -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file" + (f"; {hint}" if hint else "")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data
