"""Checkpoint files: read Ruyi and Hugging Face folders, and cut shards.

Only safetensors and JSON are read from a folder: no downloaded code runs and nothing is unpickled. Tensors have Ruyi's
published names (`model.eelayers.{i}`, `model.norms.{i}`, `lm_head.{i}`). The prefix `model.` may be missing, as in
checkpoints of a base model. The second and further layers of a branch,
which Ruyi does not have, are `model.eeblocks.{i}.{j}`. In an ordinary Hugging Face checkpoint that was given exits, the
same names refer to copies of its trunk layers.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ruyi_flow.errors import CheckpointError, shown
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.config_file import GenerationFile, check_values
from ruyi_flow.family.files import Progress, check_plain, copy_companions, read_json, whole_or_not
from ruyi_flow.family.linear import Quantized
from ruyi_flow.types import Weights

__all__ = ["LAYER_NAMES", "PROBE_NAMES", "Checkpoint", "cut", "format_of", "parse_dtype", "save_weights"]

_WEIGHTS = "model.safetensors"
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
        raw = read_json(self.folder / "config.json", "a family is a folder with config.json and *.safetensors files")
        self.config = FamilyConfig.parse(
            raw, exits=None if exits is None else tuple(exits), where=str(self.folder / "config.json")
        )
        self._ordinary = self.config.ordinary
        self._metadata: dict[str, str] = {}
        self._places = self._open()
        """Published name of each stored tensor -> its open file and its name there."""
        if self._ordinary and self.config.tied_head:
            self._untie()
        named = self._metadata.get("ruyi_flow.exits")
        stored = self.config.exits if named is None else _parse_exits(named)
        if not stored or any(p not in self.config.exits for p in stored):
            raise CheckpointError(
                f"{self.folder}: its metadata names exits {shown(named)}, but config.json has "
                f"{list(self.config.exits)}; cut the shard again"
            )
        self.exits: tuple[int, ...] = stored
        """The exits at which the stages in this folder end."""
        for file in branches:
            self._replace_branches(Path(file))
        path = self.folder / "generation_config.json"
        self.generation_config = read_json(path) if path.exists() else None
        """The content of generation_config.json, or None; read early, since a converted folder is temporary."""

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer, from config.json and generation_config.json."""
        given = self.generation_config or {}
        more = check_values(GenerationFile, given, str(self.folder / "generation_config.json")).eos_token_id
        ids = dict.fromkeys((*self.config.eos_token_ids, *more))
        return tuple(i for i in ids if i < self.config.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the family: of its geometry, and of all tensors' names, dtypes, shapes and first rows.

        A shard has the fingerprint of the family that it was cut from.
        """
        stored = self._metadata.get("ruyi_flow.fingerprint")
        if stored and not re.fullmatch(r"[0-9a-f]{16}", stored):
            raise CheckpointError(
                f"{self.folder}: its metadata names fingerprint {shown(stored)}, which is none; cut the shard again"
            )
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

    def check(self, exits: Sequence[int]) -> None:
        """Check that the tensors of these stages exist in the shapes that config.json requires. Reads only headers.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name in self.names(exits):
            file, stored = self._place(name)
            if f"{name}{_SCALE}" in self._places:
                continue  # packed; `Quantized.is_valid` checks it
            found, required = tuple(file.get_slice(stored).get_shape()), self.config.shape(name)
            if found != required:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {found}, but config.json requires {required}; "
                    "fetch or cut the checkpoint again"
                )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its published name, mapped from disk.

        Raises:
            CheckpointError: the tensor is missing, or is not of plain floats.
        """
        tensor = self._read(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(f"{self.folder}: tensor {name} is {tensor.dtype}; only float formats are supported")
        return tensor

    def weight(self, name: str) -> Tensor | Quantized:
        """Return a product's weight by its published name, quantized if it is stored so; see `tensor`."""
        parts = [name, f"{name}{_SCALE}", f"{name}{_ZERO}"]
        found = [part in self._places for part in parts]
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

    def stores(self, name: str) -> bool:
        """Whether the files contain a tensor of this published name, rather than one that is copied for it."""
        return name in self._places

    def close(self) -> None:
        """Close the mapped files. Tensors that were copied from them stay valid."""
        self._places.clear()

    def _place(self, name: str) -> tuple[Any, str]:
        """Return the open file of a tensor and its name there."""
        source = self._source(name)
        if source not in self._places:
            of = "" if source == name else f" (for {name})"
            is_shard = self.exits != self.config.exits
            raise CheckpointError(
                f"{self.folder}: tensor {source}{of} is missing; "
                + (
                    f"this shard has exits {list(self.exits)} only; cut another one"
                    if is_shard
                    else "fetch or convert the family again"
                )
            )
        return self._places[source]

    def _read(self, name: str) -> Tensor:
        file, stored = self._place(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

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

    def _source(self, name: str) -> str:
        """Return the published name of the tensor that is read for a name: another one's in an ordinary checkpoint."""
        if not self._ordinary or name in self._places:
            return name
        parts = name.split(".")
        if parts[1] == "eelayers":  # a branch starts as a copy of the trunk layer at its exit
            return ".".join(("model", "layers", str(self.config.exits[int(parts[2])]), *parts[3:]))
        return "model.norm.weight" if parts[1] == "norms" else name

    def _open(self) -> dict[str, tuple[Any, str]]:
        index = self.folder / "model.safetensors.index.json"
        weight_map: Any = {}
        if not (self.folder / _WEIGHTS).exists() and index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) and re.fullmatch(r"\w[\w. -]*", file) for file in weight_map.values()
            ):
                raise CheckpointError(
                    f"{index}: weight_map is missing or does not map tensors to files of this folder; "
                    "fetch the checkpoint again"
                )
        places: dict[str, tuple[Any, str]] = {}
        for name in sorted(set(weight_map.values())) or [_WEIGHTS]:
            path = self.folder / name
            if not path.exists():
                others = sorted(p.name for p in self.folder.glob("*.bin"))
                pickles = f"convert {others[0]} to safetensors: pickles are never read" if others else ""
                raise CheckpointError(f"{path}: no such file; {pickles or 'fetch the checkpoint again'}")
            file = _open_weights(path)
            self._metadata |= file.metadata() or {}
            for stored in map(str, file.keys()):
                published = stored if stored.startswith(("model.", "lm_head")) else f"model.{stored}"
                if published not in places or weight_map.get(stored) == name:  # another file may have a stale copy
                    places[published] = file, stored
        return places

    def _untie(self) -> None:
        """Read a tied head as transformers does: one that differs from the embedding is not tied, whatever is said."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if head not in self._places:
            return
        if embedding not in self._places:
            self._places[embedding] = self._places[head]
        elif not torch.equal(self.tensor(head), self.tensor(embedding)):
            raw = {**self.config.raw, "tie_word_embeddings": False}
            self.config = FamilyConfig.parse(raw, exits=self.config.exits, where=str(self.folder / "config.json"))

    def _replace_branches(self, file: Path) -> None:
        """Replace tensors of the family with those of a file of trained branches or probes."""
        handle = _open_weights(file)
        metadata = handle.metadata() or {}
        exits = _parse_exits(metadata.get("ruyi_flow.branch_exits", ""))
        try:
            trained = {k: json.loads(metadata[f"ruyi_flow.{k}"]) for k in _TRAINED if f"ruyi_flow.{k}" in metadata}
        except (ValueError, RecursionError):
            exits = ()
        if not exits:
            raise CheckpointError(f"{file}: not a file of trained branches; ruyi-flow train writes them")
        if exits != self.config.exits:
            raise CheckpointError(
                f"{file}: its branches are for exits {list(exits)}, but the family has exits {list(self.config.exits)}"
            )
        raw = {**self.config.to_dict(), **{f"early_exit_{key}": value for key, value in trained.items()}}
        self.config = FamilyConfig.parse(raw, where=str(file))
        self._places |= {str(name): (handle, str(name)) for name in handle.keys()}
        self._metadata.pop("ruyi_flow.fingerprint", None)

    def _first_values(self, name: str) -> Tensor:
        file, stored = self._place(name)
        part = file.get_slice(stored)
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
    report: Progress = lambda what, done, total: None,
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
        report: called with (part of the work, amount done, whole amount).

    Raises:
        CheckpointError: `out` exists, or the checkpoint does not have these stages.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or name another folder")
    checkpoint.check(exits)
    names = checkpoint.names(exits)
    if checkpoint.weights is not None and weights not in (None, checkpoint.weights):
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are already {checkpoint.weights}, so they cannot become {weights}; "
            "cut the shard from the family"
        )
    quantized = checkpoint.weights or (weights if weights is not Weights.BF16 else None)
    with whole_or_not(out) as folder:
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(names):
            report("converting tensors", i, len(names))
            weight = checkpoint.weight(name)
            if isinstance(weight, Tensor) and quantized and _is_product(name, checkpoint.config):
                weight = Quantized.of(weight, format_of(name, quantized), name)
            if isinstance(weight, Quantized):
                tensors[name] = weight.values
                tensors[f"{name}{_SCALE}"], tensors[f"{name}{_ZERO}"] = weight.scales, weight.zeros
                continue
            # Copies of a trunk layer must not share memory: safetensors stores no aliases.
            tensors[name] = weight.to(dtype or weight.dtype, copy=not checkpoint.stores(name)).contiguous()
        report("converting tensors", len(names), len(names))
        fingerprint = checkpoint.fingerprint
        if tuple(exits) == checkpoint.config.exits and not quantized:  # dtype may make another family of it
            fingerprint = _fingerprint(checkpoint.config, names, tensors.__getitem__)
        metadata = {"format": "pt", "ruyi_flow.exits": json.dumps(list(exits)), "ruyi_flow.fingerprint": fingerprint}
        if quantized:
            metadata["ruyi_flow.weights"] = quantized
        save_weights(tensors, folder / _WEIGHTS, metadata, report)
        config = checkpoint.config.to_dict()
        if dtype is not None:
            config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if companions:
            copy_companions(checkpoint.folder, folder)
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


def _open_weights(path: Path) -> Any:
    """Map a safetensors file into memory.

    Raises:
        CheckpointError: the file is no safetensors file, or is truncated.
    """
    check_plain(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from None


def save_weights(
    tensors: dict[str, Tensor],
    path: Path,
    metadata: dict[str, str],
    report: Progress = lambda what, done, total: None,
) -> None:
    """Write a safetensors file with the permissions of any new file; the library's own are for the owner alone.

    The file is written on a thread, since the library cannot be interrupted: Ctrl-C ends the wait for it at once.

    Args:
        tensors: the tensors by name.
        path: the new file, in a folder to which nothing else is written.
        metadata: texts for the file's header.
        report: called with ("writing, in MB", megabytes written, all megabytes).
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    errors: list[BaseException] = []

    def save() -> None:
        try:
            save_file(tensors, path, metadata)
        except BaseException as error:
            errors.append(error)

    total = sum(tensor.nbytes for tensor in tensors.values())
    before = _stored_bytes(path.parent)
    thread = threading.Thread(target=save, name="save weights", daemon=True)
    thread.start()
    is_writing = True
    while is_writing:
        thread.join(0.1)
        is_writing = thread.is_alive()
        report("writing, in MB", min(total, _stored_bytes(path.parent) - before) // 10**6, total // 10**6)
    if errors:
        raise errors[0]
    path.chmod(mode)


def _stored_bytes(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk: less than their size while one is being written."""
    stored = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # the library renames its file at the end
            stored += 512 * file.stat().st_blocks
    return stored


def _parse_exits(text: str) -> tuple[int, ...]:
    """Parse exits that a safetensors file's metadata names; () if they are malformed."""
    try:
        exits = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return tuple(exits) if isinstance(exits, list) and all(type(p) is int for p in exits) else ()


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
