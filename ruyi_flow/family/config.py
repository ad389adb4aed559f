"""Geometry of a familial model, and what its parts cost. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruyi_flow.errors import CheckpointError
from ruyi_flow.types import Weights

__all__ = ["FamilyConfig"]

_BASES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "ruyi_llama": "llama",
    "ruyi_qwen2": "qwen2",
    "ruyi_qwen3": "qwen3",
    "ee_qwen3": "qwen3",
}
"""model_type in config.json -> the kind of decoder layer. The first three are ordinary Hugging Face checkpoints."""


@dataclass(frozen=True, slots=True)
class FamilyConfig:
    """The shape of a family: a trunk of decoder layers and a branch at each exit.

    Exit `p` runs trunk layers `0 … p-1`, then its branch: one decoder layer or more, a norm and a head.
    """

    base: str
    """llama, qwen2 or qwen3: the kind of decoder layer."""
    exits: tuple[int, ...]
    """Ascending; the last one is `num_layers - 1` (its branch layer is the last layer of the checkpoint)."""
    branch_layers: tuple[int, ...]
    """Decoder layers of each exit's branch: 1 in Ruyi; the last exit's is always 1."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    """The context: prompt and answer together."""
    rope: Mapping[str, Any]
    """`rope_type`, `rope_theta` and what the type needs, in transformers' words."""
    attention_bias: bool
    """Whether q, k and v have biases (Qwen2 does)."""
    output_bias: bool
    """Whether the output projection of the attention has one (Llama with attention_bias)."""
    mlp_bias: bool
    shared_heads: bool
    """One head for all exits."""
    tied_head: bool
    """The head is the embedding."""
    ordinary: bool
    """An ordinary checkpoint with exits given to it: branches start as copies of the trunk layer at their exit."""
    eos_token_ids: tuple[int, ...] = ()
    probe_size: int = 0
    """Width of the early branches' probes; 0 where there are none. Ours: Ruyi has none."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """config.json as it was read."""

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], *, exits: tuple[int, ...] | None = None, where: str = "config.json"
    ) -> FamilyConfig:
        """Read a config.json.

        Args:
            raw: the parsed file.
            exits: exits to give to an ordinary checkpoint; its last layer's exit is added when left out.
            where: the file's name for messages.

        Raises:
            CheckpointError: an architecture or a setting that the layers here do not implement.
        """
        try:
            config = cls._parse(raw, exits, where)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{where}: a value of the wrong kind: {error}") from None
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(config, name) < 1:
                raise CheckpointError(f"{where}: {name} is {getattr(config, name)}; it must be 1 or more")
        if not 0 <= config.rms_norm_eps < 1:
            raise CheckpointError(f"{where}: rms_norm_eps is {config.rms_norm_eps}; it must be 0 or a little more")
        return config

    @classmethod
    def _parse(cls, raw: Mapping[str, Any], exits: tuple[int, ...] | None, where: str) -> FamilyConfig:
        model_type = raw.get("model_type")
        if model_type not in _BASES:
            raise CheckpointError(f"{where}: model_type is {model_type!r}; known: {', '.join(_BASES)}")
        base = _BASES[str(model_type)]
        ordinary = model_type == base

        def need(key: str) -> Any:
            if raw.get(key) is None:
                raise CheckpointError(f"{where}: {key} is missing")
            return raw[key]

        num_layers = int(need("num_hidden_layers"))
        hidden_size, num_heads = int(need("hidden_size")), int(need("num_attention_heads"))
        if raw.get("quantization_config"):
            raise CheckpointError(f"{where}: quantized weights (quantization_config) are not supported; use plain ones")
        if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise CheckpointError(f"{where}: sliding-window attention is not supported, only full attention")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{where}: hidden_act is {raw['hidden_act']!r}; only silu is supported")
        if ordinary:
            points = sorted({*(exits or ()), num_layers - 1})
        else:
            points = [int(p) for p in need("early_exit_points")]
            if exits is not None and list(exits) != points:
                raise CheckpointError(
                    f"{where}: the checkpoint has its own exits {points}; {list(exits)} cannot be given to it"
                )
        if points != sorted(set(points)) or points[0] < 1 or points[-1] != num_layers - 1:
            raise CheckpointError(
                f"{where}: exits {points} must ascend from 1 or more to {num_layers - 1}, "
                f"the last of {num_layers} layers"
            )
        depths = [int(n) for n in raw.get("early_exit_branch_layers") or [1] * len(points)]
        if len(depths) != len(points) or min(depths) < 1 or depths[-1] != 1:
            raise CheckpointError(
                f"{where}: early_exit_branch_layers is {depths}; it must have a number of 1 or more for each of "
                f"the exits {points}, and 1 for the last"
            )
        if raw.get("tie_word_embeddings") and not ordinary and not raw.get("shared_heads", False):
            raise CheckpointError(
                f"{where}: tie_word_embeddings needs shared_heads: a head per branch cannot be the embedding"
            )
        probe_size = int(raw.get("early_exit_probe_size") or 0)
        if not 0 <= probe_size <= 4096:
            raise CheckpointError(f"{where}: early_exit_probe_size is {probe_size}; it must be 0 to 4096")
        bias = bool(raw.get("attention_bias", False))
        eos = raw.get("eos_token_id")
        return cls(
            base=base,
            exits=tuple(points),
            branch_layers=tuple(depths),
            vocab_size=int(need("vocab_size")),
            hidden_size=hidden_size,
            intermediate_size=int(need("intermediate_size")),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(need("rms_norm_eps")),
            max_positions=int(need("max_position_embeddings")),
            rope=_rope(raw),
            attention_bias=bias or base == "qwen2",
            output_bias=bias and base != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            shared_heads=True if ordinary else bool(raw.get("shared_heads", False)),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            ordinary=ordinary,
            probe_size=probe_size,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
            raw=raw,
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this family in the Ruyi layout (an ordinary checkpoint's exits become its own)."""
        out = dict(self.raw)
        out.update(
            model_type=f"ruyi_{self.base}",
            architectures=[f"Ruyi{self.base.capitalize()}ForCausalLM"],
            early_exit_points=list(self.exits),
            default_early_exit_point=self.exits[-1],
            shared_heads=self.shared_heads,
        )
        if max(self.branch_layers) > 1:
            out["early_exit_branch_layers"] = list(self.branch_layers)
        out.pop("auto_map", None)  # names Python files of the original release, which we neither ship nor run
        return out

    def stages(self, exits: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(first trunk layer, exit) of each stage that ends at one of these exits."""
        return tuple((0 if p == self.exits[0] else self.exits[self.exits.index(p) - 1], p) for p in exits)

    def branch_prefixes(self, exit: int) -> list[str]:
        """The published names of a branch's layers. Those after the first are ours: Ruyi's branches have one."""
        i = self.exits.index(exit)
        if exit == self.exits[-1]:
            return [f"model.layers.{exit}"]
        return [f"model.eelayers.{i}", *(f"model.eeblocks.{i}.{j}" for j in range(self.branch_layers[i] - 1))]

    def head_name(self, exit: int) -> str:
        """Return the published name of the tensor that is the LM head of an exit."""
        if self.tied_head:
            return "model.embed_tokens.weight"
        return "lm_head.weight" if self.shared_heads else f"lm_head.{self.exits.index(exit)}.weight"

    # ---- what it costs ----

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        biases = (q + 2 * kv) * self.attention_bias + h * self.output_bias + (2 * m + h) * self.mlp_bias
        norms = 2 * h + 2 * self.head_dim * (self.base == "qwen3")
        return h * (q + 2 * kv) + q * h + 3 * h * m + biases + norms

    def layer_flops(self, context: float) -> float:
        """Floating-point operations of one position in one layer that attends to so many positions."""
        return 2.0 * self.layer_parameters + 4.0 * self.num_heads * self.head_dim * context

    @property
    def head_flops(self) -> float:
        """Floating-point operations of one position's product with the vocabulary."""
        return 2.0 * self.vocab_size * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of one position's keys and values in one layer, in a 16-bit format."""
        return 4 * self.num_kv_heads * self.head_dim

    @property
    def layer_state_bytes(self) -> int:
        """Bytes that one layer's products take in and put out for one position, in a 16-bit format."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        return 2 * (h + (q + 2 * kv) + q + h + h + 2 * m + m + h)

    def layer_bytes(self, weights: Weights) -> int:
        """Bytes of one decoder layer's weights; what is not a product's matrix is in a 16-bit format."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        shapes = ((q + 2 * kv, h), (h, q), (2 * m, h), (h, m))
        others = self.layer_parameters - sum(rows * columns for rows, columns in shapes)
        return sum(_matrix_bytes(rows, columns, weights) for rows, columns in shapes) + 2 * others

    def head_bytes(self, weights: Weights) -> int:
        """Bytes of one head, which is held in 8 bits where the layers are in 4."""
        held = Weights.INT8 if weights is Weights.INT4 else weights
        return _matrix_bytes(self.vocab_size, self.hidden_size, held)

    def num_parameters(self, exit: int) -> int:
        """Parameters of the model that ends at this exit: decoder and one head, as the published sizes count."""
        layers = exit + self.branch_layers[self.exits.index(exit)]
        return layers * self.layer_parameters + self.hidden_size + self.vocab_size * self.hidden_size


def _matrix_bytes(rows: int, columns: int, weights: Weights) -> int:
    """Of a product's matrix as `family/linear.py` holds it."""
    if weights is Weights.BF16:
        return 2 * rows * columns
    halves = 2 if weights is Weights.INT8 else 1
    filled = -(-rows // 64) * 64
    return halves * filled * (columns // 2 + columns // 32 * 4)  # linear.GROUP cannot be had without torch


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one form: transformers 5 nests them in `rope_parameters`, older files have two keys."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))  # transformers 5 may give them for each kind of layer
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    for key in ("rope_theta", "factor"):
        if key in rope and not 0 < float(rope[key]) < math.inf:
            raise ValueError(f"rope settings: {key} is {rope[key]!r}; it must be above 0")
    return rope
