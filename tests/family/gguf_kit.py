"""Tiny GGUF files, made from random models of transformers as llama.cpp's converter makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

_CLASSES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The 256 symbols of a byte-level vocabulary."""
TOKENS = [*BYTES, "ab", "<s>", "<end>"]
"""A vocabulary of bytes, a merged pair, a begin and an end token."""


def tiny_model(arch: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a random model with far from uniform logits."""
    config_class, model_class = _CLASSES[arch]
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    head = {"head_dim": 16} if arch == "qwen3" else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**{**sizes, **head, "tie_word_embeddings": False, **changes})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.3)
    model.tie_weights()
    return model


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantize: GGMLQuantizationType | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    drop: Callable[[str], bool] = lambda name: False,
) -> Path:
    """Write a GGUF file.

    Args:
        path: the file.
        model: a model of `tiny_model`. With `quantize`, its weights become what the file has.
        quantize: number format of the matrices. Default: float32.
        metadata: keys to add, or to replace; None removes one.
        tensors: tensors to add.
        drop: whether to leave a key or tensor out.
    """
    config = model.config
    arch = config.model_type
    given: dict[str, Any] = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **vocabulary(TOKENS, ["a b"], {"<s>": 3, "<end>": 3}),
        "tokenizer.ggml.bos_token_id": TOKENS.index("<s>"),
        "tokenizer.ggml.eos_token_id": TOKENS.index("<end>"),
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim != config.hidden_size // config.num_attention_heads:
        given |= {f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    writer = GGUFWriter(path, arch)
    for key, value in (given | dict(metadata or {})).items():
        if value is not None and not drop(key):
            add(writer, key, value)
    stored = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = parameter.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:  # llama.cpp rotates neighbours, transformers a head's halves
            array = array.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        stored[_stored_name(name)] = np.ascontiguousarray(array)
    for name, array in (stored | dict(tensors or {})).items():
        if drop(name):
            continue
        if quantize is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(
    tokens: Sequence[str], merges: Sequence[str], types: Mapping[str, int], pre: str | None = "default"
) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary; `types` has the types of the tokens that are not normal."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": list(merges),
    }


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata key."""
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def dequantized(path: Path, name: str) -> np.ndarray:
    """Return a tensor of a file, read by the `gguf` package."""
    [found] = [tensor for tensor in GGUFReader(path).tensors if tensor.name == name]
    return gguf.dequantize(found.data, found.tensor_type)


def _stored_name(name: str) -> str:
    prefix, suffix = name.rsplit(".", 1)
    if prefix in _OUTSIDE:
        return f"{_OUTSIDE[prefix]}.{suffix}"
    _, _, layer, module = prefix.split(".", 3)
    return f"blk.{layer}.{_NAMES[module]}.{suffix}"
