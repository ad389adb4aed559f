"""Geometry of a familial model, and the FLOPs and bytes of its parts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruyi_flow.errors import CheckpointError, shown
from ruyi_flow.family.config_file import BASES, ConfigFile, check_values
from ruyi_flow.types import Weights

__all__ = ["PROBE_TOP", "FamilyConfig"]

PROBE_TOP = 16
"""Number of log-probabilities in the input of a branch's probe."""


@dataclass(frozen=True, slots=True)
class FamilyConfig:
    """The geometry of a family: a trunk of decoder layers, and a branch at each exit.

    Exit `p` runs trunk layers `0 … p-1`, then its branch: one or more decoder layers, a norm and an LM head.
    """

    base: str
    """Kind of decoder layer: llama, qwen2 or qwen3."""
    exits: tuple[int, ...]
    """Exits in ascending order. The last one is `num_layers - 1`: its branch is the checkpoint's last layer."""
    branch_layers: tuple[int, ...]
    """Number of decoder layers of each exit's branch: 1 in Ruyi, and always 1 at the last exit."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    """Size of the context: most tokens of prompt and answer together."""
    rope: Mapping[str, Any]
    """Rotary position settings with the keys of transformers: `rope_type`, `rope_theta`, and those of the type."""
    attention_bias: bool
    """Whether the q, k and v projections have biases, as in Qwen2."""
    output_bias: bool
    """Whether the output projection of the attention has a bias, as in Llama with attention_bias."""
    mlp_bias: bool
    """Whether the projections of the MLP have biases."""
    shared_heads: bool
    """Whether all exits share one LM head."""
    tied_head: bool
    """Whether the LM head is the token embedding."""
    ordinary: bool
    """Whether this is an ordinary checkpoint that was given exits; its branches are copies of the trunk layer there."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, from config.json alone."""
    probe_size: int = 0
    """Hidden size of the early branches' probes, which Ruyi does not have; 0 without probes."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The parsed config.json."""

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], *, exits: tuple[int, ...] | None = None, where: str = "config.json"
    ) -> FamilyConfig:
        """Check a config.json and read the geometry from it.

        Args:
            raw: the parsed file.
            exits: exits to give to an ordinary checkpoint; the last layer is always added.
            where: the file's name, for errors.

        Raises:
            CheckpointError: a value is missing or wrong, or `transformer.py` does not implement the architecture.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in BASES:
            raise CheckpointError(
                f"{where}: model_type is {shown(model_type)}, an architecture that is not supported; use a Llama, "
                f"Qwen2 or Qwen3 checkpoint or a Ruyi family ({', '.join(BASES)}), or a GGUF file whose "
                "general.architecture is llama, qwen2 or qwen3, as Mistral's is: ruyi-flow pull FILE.gguf"
            )
        given = check_values(ConfigFile, raw, where)
        base, num_layers = BASES[given.model_type], given.num_hidden_layers
        ordinary = given.model_type == base
        if given.quantization_config:
            raise CheckpointError(f"{where}: quantized weights (quantization_config) are not supported; use plain ones")
        if given.hidden_act not in ("silu", "swish"):
            raise CheckpointError(f"{where}: hidden_act is {given.hidden_act!r}; only silu is supported")
        if ordinary:
            points = sorted({*(exits or ()), num_layers - 1})
        elif given.early_exit_points is None:
            raise CheckpointError(f"{where}: early_exit_points is missing")
        else:
            points = given.early_exit_points
            if exits is not None and list(exits) != points:
                raise CheckpointError(
                    f"{where}: the checkpoint has its own exits {points} and cannot be given {list(exits)}; "
                    "remove exits"
                )
        if points != sorted(set(points)) or not points or points[0] < 1 or points[-1] != num_layers - 1:
            raise CheckpointError(
                f"{where}: exits are {points}; they must ascend, begin at 1 or more and end at {num_layers - 1}, "
                f"the last of {num_layers} layers"
            )
        depths = given.early_exit_branch_layers or [1] * len(points)
        if len(depths) != len(points) or depths[-1] != 1:
            raise CheckpointError(
                f"{where}: early_exit_branch_layers is {depths}; it must have one number for each of the exits "
                f"{points}, each 1 or more, and 1 for the last"
            )
        if given.tie_word_embeddings and not ordinary and not given.shared_heads:
            raise CheckpointError(
                f"{where}: tie_word_embeddings requires shared_heads: true, since the one head is the embedding"
            )
        heads, kv_heads = given.num_attention_heads, given.kv_heads
        head_dim = given.head_dim or (128 if base == "qwen3" and "head_dim" not in raw else given.hidden_size // heads)
        if head_dim < 2 or head_dim % 2:
            raise CheckpointError(
                f"{where}: head_dim is {head_dim}; it must be even, since rotary positions turn pairs of values"
            )
        if heads % kv_heads:
            raise CheckpointError(
                f"{where}: num_key_value_heads is {kv_heads}; it must divide num_attention_heads, which is {heads}"
            )
        rope, context = given.rope(where)
        if len(factors := rope.get("short_factor") or ()) not in (0, head_dim // 2):
            raise CheckpointError(
                f"{where}: rope settings: short_factor has {len(factors)} numbers; a head of {head_dim} needs "
                f"{head_dim // 2}"
            )
        if given.slides(base, context):
            raise CheckpointError(f"{where}: sliding-window attention is not supported, only full attention")
        bias = bool(given.attention_bias)
        return cls(
            base=base,
            exits=tuple(points),
            branch_layers=tuple(depths),
            vocab_size=given.vocab_size,
            hidden_size=given.hidden_size,
            intermediate_size=given.intermediate_size,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=given.rms_norm_eps,
            max_positions=context,
            rope=rope,
            attention_bias=bias or base == "qwen2",
            output_bias=bias and base != "qwen2",
            mlp_bias=bool(given.mlp_bias) and base == "llama",
            shared_heads=ordinary or bool(given.shared_heads),
            tied_head=bool(given.tie_word_embeddings),
            ordinary=ordinary,
            probe_size=given.early_exit_probe_size or 0,
            eos_token_ids=tuple(given.eos_token_id),
            raw=raw,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config.json of this family in Ruyi's layout, with exits, for an ordinary checkpoint too."""
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
        out.pop("auto_map", None)  # names Python files of the original release, which are neither copied nor run
        return out

    def stages(self, exits: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Return (first trunk layer, exit) of each stage that ends at one of these exits."""
        return tuple((0 if p == self.exits[0] else self.exits[self.exits.index(p) - 1], p) for p in exits)

    def branch_prefixes(self, exit: int) -> list[str]:
        """Return the prefixes of the published names of a branch's layers, of which Ruyi has one a branch."""
        i = self.exits.index(exit)
        if exit == self.exits[-1]:
            return [f"model.layers.{exit}"]
        return [f"model.eelayers.{i}", *(f"model.eeblocks.{i}.{j}" for j in range(self.branch_layers[i] - 1))]

    def head_name(self, exit: int) -> str:
        """Return the published name of the tensor that is the LM head of an exit."""
        if self.tied_head:
            return "model.embed_tokens.weight"
        return "lm_head.weight" if self.shared_heads else f"lm_head.{self.exits.index(exit)}.weight"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its published name."""
        h, m = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if name.startswith("lm_head") or "embed_tokens" in name:
            return self.vocab_size, h
        module, kind = name.split(".")[-2:]
        if "probes" in name:
            rows, columns = (self.probe_size, h + PROBE_TOP) if module == "up" else (1, self.probe_size)
        elif module in ("q_norm", "k_norm"):
            return (self.head_dim,)
        elif not module.endswith("_proj"):
            return (h,)
        else:
            rows, columns = {
                "q_proj": (q, h),
                "k_proj": (kv, h),
                "v_proj": (kv, h),
                "o_proj": (h, q),
                "down_proj": (h, m),
            }.get(module, (m, h))
        return (rows,) if kind == "bias" else (rows, columns)

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one decoder layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        biases = (q + 2 * kv) * self.attention_bias + h * self.output_bias + (2 * m + h) * self.mlp_bias
        norms = 2 * h + 2 * self.head_dim * (self.base == "qwen3")
        return h * (q + 2 * kv) + q * h + 3 * h * m + biases + norms

    def layer_flops(self, context: float) -> float:
        """Return the FLOPs of one position in one layer that attends to `context` positions."""
        return 2.0 * self.layer_parameters + 4.0 * self.num_heads * self.head_dim * context

    @property
    def head_flops(self) -> float:
        """FLOPs of the vocabulary logits of one position."""
        return 2.0 * self.vocab_size * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of one position in the KV cache of one layer, in a 16-bit format."""
        return 4 * self.num_kv_heads * self.head_dim

    @property
    def layer_state_bytes(self) -> int:
        """Bytes of the inputs and outputs of one layer's products for one position, in a 16-bit format."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        return 2 * (h + (q + 2 * kv) + q + h + h + 2 * m + m + h)

    def layer_bytes(self, weights: Weights) -> int:
        """Return the bytes of one decoder layer's weights; norms and biases are in a 16-bit format."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        shapes = ((q + 2 * kv, h), (h, q), (2 * m, h), (h, m))
        others = self.layer_parameters - sum(rows * columns for rows, columns in shapes)
        return sum(_matrix_bytes(rows, columns, weights) for rows, columns in shapes) + 2 * others

    def head_bytes(self, weights: Weights) -> int:
        """Return the bytes of one LM head, which has 8 bits a value where the layers have 4."""
        stored = Weights.INT8 if weights is Weights.INT4 else weights
        return _matrix_bytes(self.vocab_size, self.hidden_size, stored)

    def num_parameters(self, exit: int) -> int:
        """Count the parameters of the model that ends at this exit as published sizes do: layers and one LM head."""
        layers = exit + self.branch_layers[self.exits.index(exit)]
        return layers * self.layer_parameters + self.hidden_size + self.vocab_size * self.hidden_size


def _matrix_bytes(rows: int, columns: int, weights: Weights) -> int:
    """Return the bytes of a product's weight as `family/linear.py` stores it."""
    if weights is Weights.BF16:
        return 2 * rows * columns
    halves = 2 if weights is Weights.INT8 else 1
    padded = -(-rows // 64) * 64
    return halves * padded * (columns // 2 + columns // 32 * 4)  # 32 is linear.GROUP; importing it would import torch
