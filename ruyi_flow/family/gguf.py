"""Convert GGUF files to ordinary Hugging Face folders: exactly, or not at all.

Every tensor of the file is used, and every metadata key that changes what the model computes is either honoured or
refused by name. The keys and tensors are those of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.checkpoint import save_weights
from ruyi_flow.family.files import Progress, whole_or_not
from ruyi_flow.family.gguf_file import GGUFFile, Keys
from ruyi_flow.family.gguf_tokenizer import GGUFTokenizer

__all__ = ["convert_gguf"]

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Architecture, which is also the model_type in config.json -> class of transformers."""

_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_ATTENTION = {**_QKV, "attn_output": "self_attn.o_proj"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
"""Name of a tensor of a layer in the file -> its name in a Hugging Face checkpoint."""

_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.layer_norm_epsilon": None,  # of norms that these architectures do not have
    "rope.scaling.finetuned": None,
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "hidden_activation": ("silu",),
    "use_parallel_residual": (False,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys of an architecture that `_Model` does not read, with the values that change nothing; None: any value."""


def convert_gguf(path: str | Path, out: str | Path, *, report: Progress = lambda what, done, total: None) -> None:
    """Convert a GGUF file to an ordinary Hugging Face folder in float32, with its tokenizer.

    Args:
        path: the GGUF file, of architecture llama, qwen2 or qwen3.
        out: the new folder.
        report: called with (part of the work, amount done, whole amount).

    Raises:
        CheckpointError: the file cannot be read, or has something that is not supported, which the error names.
    """
    file = GGUFFile(Path(path))
    model, tokenizer = _Model(file), GGUFTokenizer(file)
    if len(tokenizer.tokens) > model.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {len(tokenizer.tokens)} tokens, but its embedding has {model.vocab_size}"
        )
    special = {f"{name}_token_id": token for name, token in tokenizer.special.items() if name != "unk"}
    with whole_or_not(Path(out)) as folder:
        file_of: dict[str, str] = {}
        size = 0
        for part, tensors in enumerate(model.parts()):
            report("converting layers", part, model.num_parts)
            name = f"model-{part:05}.safetensors"
            save_weights(tensors, folder / name, {"format": "pt"})
            file_of |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        report("converting layers", model.num_parts, model.num_parts)
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        ends = {"eos_token_id": list(tokenizer.ends)} if tokenizer.ends else {}
        for name, content in (
            ("model.safetensors.index.json", index),
            ("config.json", model.config | special),
            ("generation_config.json", special | ends),
        ):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tokenizer.to_transformers().save_pretrained(folder)


class _Model:
    """The decoder that a file describes: its config.json, and its tensors under their Hugging Face names.

    Raises:
        CheckpointError: metadata or tensors are missing or not supported.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._arch = arch = _architecture(file)
        keys = Keys(file, f"{arch}.")
        self._num_layers = keys.take("block_count", int)
        hidden = keys.take("embedding_length", int)
        heads = keys.take("attention.head_count", _same)
        kv_heads = keys.take("attention.head_count_kv", _same, heads)
        positions = keys.take("context_length", int)
        intermediate = keys.take("feed_forward_length", _same)
        epsilon = keys.take("attention.layer_norm_rms_epsilon", float)
        if min(self._num_layers, hidden, heads, kv_heads, intermediate, positions) < 1:
            raise CheckpointError(f"{file.path}: its numbers of layers, heads, positions and sizes must be 1 or more")
        if self._num_layers > len(file.shapes):
            raise keys.refusal("block_count", self._num_layers, f"is too many for {len(file.shapes)} tensors")
        head_dim = keys.take("attention.key_length", int, hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (size := keys.take(key, int, head_dim)) != head_dim:
                raise keys.refusal(key, size, f"must be the head size, {head_dim}")
        self.vocab_size = file.shapes.get("token_embd.weight", (0,))[0]
        """Number of rows of the embedding."""
        if (rows := keys.take("vocab_size", int, self.vocab_size)) != self.vocab_size:
            raise keys.refusal("vocab_size", rows, f"must be the number of rows of the embedding, {self.vocab_size}")
        window = keys.take("attention.sliding_window", int, 0)
        if 0 < window < positions:
            raise keys.refusal(
                "attention.sliding_window", window, f"is below the context of {positions}: not supported"
            )
        keys.drop("attention.sliding_window_pattern")
        if (scale := keys.take("attention.scale", float, 0.0)) and abs(scale * head_dim**0.5 - 1) > 1e-5:
            raise keys.refusal("attention.scale", scale, f"must be 1 / sqrt({head_dim})")
        if experts := keys.take("expert_count", int, 0):
            raise keys.refusal("expert_count", experts, "is not supported")
        keys.drop("expert_")
        rope = self._rope(keys, positions)
        keys.refuse_rest(_HARMLESS)

        q, kv = heads * head_dim, kv_heads * head_dim
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (hidden,))
        shapes |= {"attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, q)}
        shapes |= {"ffn_gate": (intermediate, hidden), "ffn_up": (intermediate, hidden)}
        shapes |= {"ffn_down": (hidden, intermediate)}
        if arch == "qwen3":
            shapes |= dict.fromkeys(_HEAD_NORMS, (head_dim,))
        shapes = {f"{module}.weight": shape for module, shape in shapes.items()}
        attention = _QKV if arch == "qwen2" else self._biased(_ATTENTION)
        mlp = self._biased(_MLP) if arch == "llama" else {}
        shapes |= {f"{module}.bias": shapes[f"{module}.weight"][:1] for module in (*attention, *mlp)}
        self._layer_shapes = shapes
        self._heads = {"attn_q": heads, "attn_k": kv_heads}
        self._tied = "output.weight" not in file.shapes
        self._check_tensors(hidden, head_dim)
        self.config: dict[str, Any] = {
            "architectures": [_CLASSES[arch]],
            "model_type": arch,
            "vocab_size": self.vocab_size,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": self._num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": positions,
            "rms_norm_eps": epsilon,
            "rope_parameters": rope,
            "tie_word_embeddings": self._tied,
            "dtype": "float32",
        }
        """The content of config.json, without the special tokens."""
        if arch != "qwen2":
            self.config["attention_bias"] = bool(attention)
        if arch == "llama":
            self.config["mlp_bias"] = bool(mlp)
        # transformers gives a bias to all of a group of products; llama.cpp to any of them.
        groups = ((attention, _QKV if arch == "qwen2" else _ATTENTION), (mlp, _MLP))
        self._zeros = {
            f"{hf}.bias": shapes[f"{module}.weight"][:1]
            for has, group in groups
            for module, hf in group.items()
            if has and module not in has
        }

    @property
    def num_parts(self) -> int:
        """Number of parts that `parts` yields."""
        return self._num_layers + 1

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors by their Hugging Face names: a layer's at a time, and at last those outside the layers."""
        names = {**_NORMS, **_HEAD_NORMS, **_ATTENTION, **_MLP}
        for i in range(self._num_layers):
            part = {f"model.layers.{i}.{name}": torch.zeros(shape) for name, shape in self._zeros.items()}
            for name in self._layer_shapes:
                module, kind = name.split(".")
                tensor = self._file.tensor(f"blk.{i}.{name}")
                if self._arch == "llama" and module in self._heads:
                    tensor = _unpermuted(tensor, self._heads[module])
                part[f"model.layers.{i}.{names[module]}.{kind}"] = tensor
            yield part
        last = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if not self._tied:
            last["lm_head.weight"] = "output.weight"
        yield {name: self._file.tensor(stored) for name, stored in last.items()}

    def _biased(self, modules: Collection[str]) -> list[str]:
        """Return the products of a layer that have a bias in any layer."""
        has = {name.split(".", 2)[2] for name in self._file.shapes if name.startswith("blk.") and name.count(".") > 2}
        return [module for module in modules if f"{module}.bias" in has]

    def _check_tensors(self, hidden: int, head_dim: int) -> None:
        """Check that the file has the tensors of the decoder, in their shapes, and no others."""
        found = self._file.shapes
        expected: dict[str, tuple[int, ...]] = {
            f"blk.{i}.{name}": shape for i in range(self._num_layers) for name, shape in self._layer_shapes.items()
        }
        expected |= {"token_embd.weight": (self.vocab_size, hidden), "output_norm.weight": (hidden,)}
        if not self._tied:
            expected["output.weight"] = (self.vocab_size, hidden)
        if self._arch == "llama" and "rope_freqs.weight" in found:
            expected["rope_freqs.weight"] = (head_dim // 2,)
        wrong = [name for name, shape in expected.items() if name in found and found[name] != shape]
        for names, why in (
            ([name for name in expected if name not in found], "lacks tensors"),
            ([name for name in found if name not in expected], "has tensors that are not supported"),
            ([f"{name} {found[name]} instead of {expected[name]}" for name in wrong], "has tensors of wrong shapes"),
        ):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                raise CheckpointError(
                    f"{self._file.path}: a {self._arch} model that {why}: {', '.join(names[:4])}{more}"
                )

    def _rope(self, keys: Keys, positions: int) -> dict[str, Any]:
        """Return the rotary position settings with transformers' keys."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base", float, 10000.0)}
        kind = keys.take("rope.scaling.type", str, "linear")
        old_factor = keys.take("rope.scale_linear", float, 1.0)
        factor = keys.take("rope.scaling.factor", float, old_factor) or 1.0
        original = keys.take("rope.scaling.original_context_length", int, positions)
        if kind not in ("none", "linear", "yarn"):
            raise keys.refusal("rope.scaling.type", kind, "is not supported; known: none, linear and yarn")
        if kind == "linear" and factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and factor != 1:
            rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for key in ("beta_fast", "beta_slow"):
                if value := keys.take(f"rope.scaling.yarn_{key}", float, 0.0):
                    rope[key] = value
        else:
            keys.drop("rope.scaling.yarn_")
        if self._arch == "llama" and "rope_freqs.weight" in self._file.shapes:
            divisors = self._file.tensor("rope_freqs.weight").flatten().tolist()
            if set(divisors) != {1.0}:
                if rope["rope_type"] != "default":
                    raise keys.refusal("rope.scaling.type", kind, "is not supported together with rope_freqs.weight")
                # Llama 3's settings, as the divisors that follow from them: transformers' form for any divisors.
                rope |= {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors}
                rope |= {"attention_factor": 1.0, "original_max_position_embeddings": positions}
        return rope


def _architecture(file: GGUFFile) -> str:
    """Return the architecture of a file, after checking that it is a whole model and known."""
    general, split = Keys(file, "general."), Keys(file, "split.")
    if (arch := general.take("architecture", str)) not in _CLASSES:
        raise general.refusal("architecture", arch, f"is not supported; use a model of one of {', '.join(_CLASSES)}")
    if (kind := general.take("type", str, "model")) != "model":
        raise general.refusal("type", kind, "must be model")
    if (count := split.take("count", int, 1)) > 1:
        raise CheckpointError(
            f"{file.path}: part {split.take('no', int, 0) + 1} of a GGUF file that was split into {count} "
            "(split.count); the others have the rest of its tensors; join them: llama-gguf-split --merge"
        )
    return arch


def _same(value: Any) -> int:
    """Return a number that may be given for each layer, if all layers have the same."""
    numbers = value if isinstance(value, list) else [value]
    if len(set(numbers)) != 1:
        raise ValueError
    return int(numbers[0])


def _unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key product in the order of transformers: llama.cpp interleaves a head's halves."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
