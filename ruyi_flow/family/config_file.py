"""The keys of config.json and generation_config.json that matter here: their types, bounds and meaning. No torch.

The files come from strangers. Each number, list and text is checked before anything is computed from it, so that a file
that cannot be a model is refused in one line, at once. The bounds are far above all published models. What a key means,
and what its absence means, is as in the transformers library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ruyi_flow.config.yaml_files import explain
from ruyi_flow.errors import CheckpointError

__all__ = ["BASES", "ConfigFile", "GenerationFile", "check_values"]

BASES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "ruyi_llama": "llama",
    "ruyi_qwen2": "qwen2",
    "ruyi_qwen3": "qwen3",
    "ee_qwen3": "qwen3",
}
"""model_type in config.json -> kind of decoder layer. The first three are ordinary Hugging Face checkpoints."""

MAX_CONTEXT = 2**27
MAX_LAYERS = 1024


def _as_list(value: object) -> object:
    return [] if value is None else value if isinstance(value, list) else [value]


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]], BeforeValidator(_as_list), Field(default=[], max_length=1024)
]
"""The forms of eos_token_id: a token id, a list of them, or null."""

Positions = Annotated[int, Field(ge=1, le=MAX_CONTEXT)]
Exits = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_LAYERS)]], Field(max_length=MAX_LAYERS)]
Factor = Annotated[float, Field(gt=0, le=1e6)]
Factors = Annotated[list[Factor], Field(min_length=1, max_length=512)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6)]


class _Values(BaseModel):
    """Keys of a JSON file. Other keys are ignored, as transformers ignores them."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class GenerationFile(_Values):
    """generation_config.json."""

    eos_token_id: TokenIds
    """Tokens that end an answer."""


class RopeSettings(_Values):
    """The settings of rotary positions, for each `rope_type`."""

    rope_type: Literal["default", "dynamic", "linear", "llama3", "longrope", "yarn"]
    """Scaling of the context. `dynamic` scales nothing up to `max_position_embeddings`, where its context ends here."""
    rope_theta: Annotated[float, Field(gt=1, le=1e15)]
    """Base of the wavelengths."""
    factor: Factor | None = None
    """The context is this many times the original one. linear, llama3, yarn; null in yarn computes it."""
    original_max_position_embeddings: Positions | None = None
    """Context of the model before the scaling. llama3, longrope, yarn."""
    low_freq_factor: Factor | None = None
    """Wavelengths above the original context divided by this are scaled. llama3."""
    high_freq_factor: Factor | None = None
    """Wavelengths below the original context divided by this are not scaled. llama3."""
    beta_fast: AtLeast0 | None = None
    """Rotations within the original context above which nothing is scaled. yarn."""
    beta_slow: AtLeast0 | None = None
    """Rotations within the original context below which all is scaled. yarn."""
    short_factor: Factors | None = None
    """Divisors of the frequencies of texts within the original context. longrope."""
    long_factor: Factors | None = None
    """Divisors of the frequencies of longer texts. longrope; they must be the same, as those of a GGUF file are."""
    attention_factor: AtLeast0 | None = None
    """Factor on cosines and sines. longrope, yarn; null computes it."""
    mscale: AtLeast0 | None = None
    """Weight of the computed `attention_factor`. yarn."""
    mscale_all_dim: AtLeast0 | None = None
    """Divisor of the computed `attention_factor`. yarn."""
    truncate: bool | None = None
    """Whether the borders of the scaled dimensions are rounded. yarn."""
    partial_rotary_factor: AtLeast0 | None = None
    """Share of a head that is rotated."""

    def problem(self) -> str | None:
        """Say what is missing or contradicts itself; None if nothing does."""
        if self.rope_type in ("dynamic", "linear", "llama3") and self.factor is None:
            return f"rope_type {self.rope_type!r} requires factor"
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or low >= high:
                return f"llama3 requires low_freq_factor below high_freq_factor, but they are {low} and {high}"
        if self.rope_type == "longrope" and (self.short_factor is None or self.short_factor != self.long_factor):
            return "rope_type 'longrope' is supported only with a short_factor and the same long_factor"
        if self.rope_type not in ("default", "dynamic") and self.partial_rotary_factor not in (None, 1):
            return f"partial_rotary_factor is {self.partial_rotary_factor}; only 1 is supported"
        return None


class ConfigFile(_Values):
    """config.json."""

    model_type: str
    """Architecture, one of `BASES`."""
    vocab_size: int = Field(ge=1, le=2**24)
    """Rows of the embedding."""
    hidden_size: int = Field(ge=2, le=2**17)
    """Size of a boundary state."""
    intermediate_size: int = Field(ge=1, le=2**20)
    """Inner size of the MLP."""
    num_hidden_layers: int = Field(ge=2, le=MAX_LAYERS)
    """Decoder layers; the last one is the branch of the last exit."""
    num_attention_heads: int = Field(ge=1, le=1024)
    """Query heads."""
    num_key_value_heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Key and value heads. Null means as many as query heads; see `kv_heads`."""
    head_dim: Annotated[int, Field(ge=2, le=1024)] | None = None
    """Size of a head. Default: 128 in Qwen3, else the hidden size divided by the heads."""
    max_position_embeddings: Positions
    """Context, before yarn."""
    rms_norm_eps: float = Field(gt=0, lt=1)
    """Added under the root of the norms. With 0 a row of zeros would have no norm."""
    rope_theta: Annotated[float, Field(gt=1, le=1e15)] | None = None
    """Base of the wavelengths. Default: 10000."""
    rope_scaling: dict[str, Any] | None = None
    """Settings of rotary positions, up to transformers 4."""
    rope_parameters: dict[str, Any] | None = None
    """Settings of rotary positions, from transformers 5 on."""
    original_max_position_embeddings: Positions | None = None
    """Context before scaling, where it is not among the settings of rotary positions."""
    partial_rotary_factor: AtLeast0 | None = None
    """Share of a head that is rotated, where it is not among the settings of rotary positions."""
    attention_bias: bool | None = None
    """Whether the attention's projections have biases; Qwen2 has them on q, k and v in any case."""
    mlp_bias: bool | None = None
    """Whether the MLP's projections have biases. Llama only."""
    tie_word_embeddings: bool | None = None
    """Whether the LM head is the embedding."""
    hidden_act: str = "silu"
    """Activation of the MLP."""
    use_sliding_window: bool | None = None
    """Whether layers from `max_window_layers` on attend to a window. Qwen only."""
    sliding_window: int | None = None
    """Size of that window. Default: 4096."""
    max_window_layers: int = 28
    """Number of layers without a window."""
    layer_types: Annotated[list[str], Field(max_length=MAX_LAYERS)] | None = None
    """Attention of each layer, instead of the three keys before."""
    quantization_config: Any = None
    """Set in checkpoints with quantized weights."""
    eos_token_id: TokenIds
    """Tokens that end an answer."""
    shared_heads: bool | None = None
    """Whether all exits share one LM head. Ruyi."""
    early_exit_points: Exits | None = None
    """Exits. Ruyi."""
    early_exit_branch_layers: list[Annotated[int, Field(ge=1, le=64)]] | None = Field(
        default=None, max_length=MAX_LAYERS
    )
    """Decoder layers of each exit's branch, where branches are trained deeper than Ruyi's."""
    early_exit_probe_size: Annotated[int, Field(ge=0, le=4096)] | None = None
    """Hidden size of the probes."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads. A Qwen config without the key has 32, as transformers' classes do."""
        if self.num_key_value_heads is None and "num_key_value_heads" not in self.model_fields_set:
            return self.num_attention_heads if BASES[self.model_type] == "llama" else 32
        return self.num_key_value_heads or self.num_attention_heads

    def rope(self, where: str) -> tuple[dict[str, Any], int]:
        """Return the settings of rotary positions in one form, and the context.

        transformers 5 nests all settings in `rope_parameters`; older files have `rope_scaling` beside `rope_theta`. The
        context of yarn is the original one times the factor, even where `max_position_embeddings` still has the
        original one, as in Qwen's recipe for long texts.
        """
        rope = dict(self.rope_scaling or self.rope_parameters or {})
        if isinstance(rope.get("full_attention"), dict):  # settings for each kind of layer
            rope = dict(rope["full_attention"])
        legacy = rope.pop("type", None)
        rope["rope_type"] = rope.get("rope_type") or legacy or "default"
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = 10000.0 if self.rope_theta is None else self.rope_theta
        if self.partial_rotary_factor is not None:
            rope.setdefault("partial_rotary_factor", self.partial_rotary_factor)
        settings = check_values(RopeSettings, rope, f"{where}: rope settings")
        if problem := settings.problem():
            raise CheckpointError(f"{where}: rope settings: {problem}")
        rope["rope_theta"] = settings.rope_theta
        context = self.max_position_embeddings
        if settings.rope_type in ("llama3", "longrope", "yarn"):
            original = self.original_max_position_embeddings or settings.original_max_position_embeddings or context
            rope["original_max_position_embeddings"] = original
            if settings.rope_type == "yarn":
                rope["factor"] = settings.factor or context / original
                context = max(context, int(original * rope["factor"]))
        if context > MAX_CONTEXT:
            raise CheckpointError(
                f"{where}: rope settings make a context of {context}; it must be at most {MAX_CONTEXT}"
            )
        return rope, context

    def slides(self, base: str, context: int) -> bool:
        """Whether a layer attends to less than the whole context. Flags that have no effect do not count.

        In Llama, transformers does not slide but its KV cache forgets, so it is refused there as well.
        """
        window = 4096 if "sliding_window" not in self.model_fields_set else self.sliding_window
        if self.layer_types is not None:
            kinds = set(self.layer_types)
            whole = base != "llama" and self.use_sliding_window and window is not None and window >= context
            return len(self.layer_types) != self.num_hidden_layers or not kinds <= (
                {"full_attention", "sliding_attention"} if whole else {"full_attention"}
            )
        if base == "llama":
            return self.sliding_window is not None and self.sliding_window < context
        return bool(
            self.use_sliding_window
            and window is not None
            and window < context
            and self.max_window_layers < self.num_hidden_layers
        )


_M = TypeVar("_M", bound=_Values)


def check_values(model: type[_M], raw: Mapping[str, Any], where: str) -> _M:
    """Check the values of a file.

    Args:
        model: the keys that matter.
        raw: the parsed file.
        where: the file's name, for errors.

    Raises:
        CheckpointError: a value is missing, of another type or out of bounds; in one line, about the first one.
    """
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        first, *others = explain(error, model, where).splitlines()
        raise CheckpointError(first + (f" (and {len(others)} more)" if others else "")) from None
