"""A GGUF file gives transformers' logits, or an error that names what is not supported."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.gguf import convert_gguf
from ruyi_flow.family.tokenizer import end_tokens
from ruyi_flow.local import load_family
from tests.family.gguf_kit import TOKENS, dequantized, tiny_model, write_gguf

IDS = torch.tensor([[3, 17, 5, 80, 42, 9, 11, 64, 23, 7, 90, 1, 200, 33, 8, 120]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def difference(path: Path, model: Any) -> float:
    """Return the largest difference of the file's logits to the model's."""
    with torch.no_grad():
        return float((load_family(path, dtype="float32", exits=[1]).logits(IDS) - model(IDS).logits).abs().max())


def llama3_divisors(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    """Compute rope_freqs.weight as llama.cpp's converter does."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original, out = rope["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        out.append(1.0 if wavelength < original / high else factor if wavelength > original / low else between)
    return np.array(out, np.float32)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"head_dim": 16}),
        ("llama", {"attention_bias": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-3}),
    ],
)
def test_logits_are_transformers(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    model = tiny_model(arch, **changes)
    path = write_gguf(tmp_path / "m.gguf", model)
    assert difference(path, model) < 1e-4
    convert_gguf(path, tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_llama_3_frequencies_are_transformers(tmp_path: Path, head_dim: int) -> None:
    model = tiny_model("llama", head_dim=head_dim, rope_parameters=LLAMA3)
    divisors = llama3_divisors(head_dim, LLAMA3)
    assert divisors[0] == 1 and divisors[-1] == 8 and (head_dim == 8 or 1 < sorted(divisors)[4] <= 8)
    path = write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert difference(path, model) < 1e-4
    plain = write_gguf(tmp_path / "p.gguf", model, tensors={"rope_freqs.weight": np.ones(head_dim // 2, np.float32)})
    assert difference(plain, model) > 0.1
    assert converted(plain, tmp_path / "plain").config.rope["rope_type"] == "default"
    convert_gguf(path, tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(IDS).logits - model(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.factor": 4.0}),  # llama.cpp's default type
        ({"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}),  # the old name
        ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 4.0}),
        ({"rope_type": "default"}, {"scaling.type": "linear", "scaling.factor": 1.0, "scaling.finetuned": True}),
        (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}),
        (
            {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 8.0,
                "scaling.yarn_beta_slow": 2.0,
            },
        ),
    ],
)
def test_scaled_positions_are_transformers(
    tmp_path: Path, arch: str, rope: dict[str, Any], keys: dict[str, Any]
) -> None:
    model = tiny_model(arch, head_dim=16, rope_parameters={"rope_theta": 10000.0, **rope})
    metadata = {f"{arch}.rope.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "m.gguf", model, metadata=metadata)
    assert difference(path, model) < 1e-4


def test_a_bias_of_one_product_is_enough(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj.bias" in name or "gate_proj.bias" in name:
                parameter.zero_()
    gone = ("attn_output.bias", "ffn_gate.bias")
    path = write_gguf(tmp_path / "m.gguf", model, drop=lambda name: name.endswith(gone))
    assert difference(path, model) < 1e-4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_the_gguf_packages(tmp_path: Path, kind: str) -> None:
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=64)
    path = write_gguf(tmp_path / "m.gguf", model, quantize=GGMLQuantizationType[kind])
    read = converted(path, tmp_path / "folder")
    for ours, theirs in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.2.self_attn.q_proj.weight", "blk.2.attn_q.weight"),
    ):
        assert np.array_equal(read.tensor(ours).numpy(), dequantized(path, theirs))
    error = (read.tensor("lm_head.weight") - model.lm_head.weight).abs().max()
    assert error < 0.15


def test_metadata_without_effect_is_accepted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    harmless = {
        "general.name": "x",
        "general.type": "model",
        "split.count": 1,
        "quantize.imatrix.file": "x",
        "llama.attention.key_length": 8,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": 64,
        "llama.attention.scale": 8**-0.5,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": len(TOKENS),
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.logit_scale": 1.0,
        "llama.final_logit_softcapping": 0.0,
        "llama.attention.head_count": [4, 4, 4],
        "llama.feed_forward_length": [48, 48, 48],
        "tokenizer.ggml.fim_pre_token_id": 5,
    }
    assert difference(write_gguf(tmp_path / "m.gguf", model, metadata=harmless), model) < 1e-4


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("general.type", "adapter", "general.type must be model"),
        ("split.count", 2, r"part 1 of a GGUF file that was split into 2 \(split.count\); the others .*--merge"),
        ("llama.rope.scaling.type", "longrope", "llama.rope.scaling.type is not supported"),
        ("llama.rope.scaling.attn_factor", 1.5, "llama.rope.scaling.attn_factor is not supported: 1.5"),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count must be the head size, 8: 4"),
        ("llama.rope.dimension_sections", [2, 1, 1, 0], "llama.rope.dimension_sections is not supported"),
        ("llama.rope.something_new", 1, "llama.rope.something_new is not supported: 1"),
        ("llama.attention.value_length", 16, "llama.attention.value_length must be the head size"),
        ("llama.attention.key_length", 16, "wrong shapes: blk.0.attn_q.weight"),
        ("llama.attention.sliding_window", 16, "llama.attention.sliding_window is below the context"),
        ("llama.attention.scale", 1.0, r"llama.attention.scale must be 1 / sqrt\(8\)"),
        ("llama.attention.causal", False, "llama.attention.causal is not supported: False"),
        ("llama.attention.clamp_kqv", 8.0, "llama.attention.clamp_kqv is not supported: 8.0"),
        ("llama.attention.head_count", [4, 2, 4], r"llama.attention.head_count cannot be used: \[4, 2, 4\]"),
        ("llama.attention.head_count_kv", 4, "wrong shapes: blk.0.attn_k.weight"),
        ("llama.attn_logit_softcapping", 50.0, "llama.attn_logit_softcapping is not supported: 50.0"),
        ("llama.final_logit_softcapping", 30.0, "llama.final_logit_softcapping is not supported: 30.0"),
        ("llama.logit_scale", 0.5, "llama.logit_scale is not supported: 0.5"),
        ("llama.embedding_scale", 12.0, "llama.embedding_scale is not supported: 12.0"),
        ("llama.residual_scale", 0.2, "llama.residual_scale is not supported"),
        ("llama.expert_count", 8, "llama.expert_count is not supported: 8"),
        ("llama.use_parallel_residual", True, "llama.use_parallel_residual is not supported: True"),
        ("llama.vocab_size", 300, f"llama.vocab_size must be the number of rows of the embedding, {len(TOKENS)}: 300"),
        ("llama.block_count", "x", "llama.block_count cannot be used: 'x'"),
        ("llama.block_count", 4, "lacks tensors: blk.3.attn_norm.weight"),
        ("llama.block_count", 2, "not supported: blk.2.self_attn|not supported: blk.2"),
        ("llama.block_count", 0, "must be 1 or more"),
        ("llama.block_count", 4_000_000_000, "llama.block_count is too many for 30 tensors"),
        ("llama.attention.layer_norm_rms_epsilon", None, "llama.attention.layer_norm_rms_epsilon is missing"),
    ],
)
def test_metadata_that_changes_the_model_is_refused_by_name(tmp_path: Path, key: str, value: Any, told: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), metadata={key: value})
    with pytest.raises(CheckpointError, match=told) as caught:
        convert_gguf(path, tmp_path / "out")
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


def test_every_tensor_is_there_and_used(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "a.gguf", model, drop=lambda name: name == "blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match="a llama model that lacks tensors: blk.1.ffn_up.weight$"):
        load_family(path)
    path = write_gguf(tmp_path / "b.gguf", model, drop=lambda name: name.startswith("blk.2."))
    with pytest.raises(CheckpointError, match=r"lacks tensors: blk.2.attn_norm.weight, .* and 5 more$"):
        load_family(path)
    for name in (
        "blk.0.attn_q.scale",
        "blk.0.attn_qkv.weight",
        "output.bias",
        "blk.9.attn_q.bias",
        "blk.0.attn_q_norm.weight",
    ):
        path = write_gguf(tmp_path / "c.gguf", model, tensors={name: np.ones(8, np.float32)})
        with pytest.raises(
            CheckpointError, match=f"tensors that are not supported: {name}$|lacks tensors: .*attn_q.bias"
        ):
            load_family(path)
    for arch in ("qwen2", "qwen3"):
        divisors = {"rope_freqs.weight": np.ones(4, np.float32)}
        path = write_gguf(tmp_path / "d.gguf", tiny_model(arch), tensors=divisors)
        with pytest.raises(CheckpointError, match="not supported: rope_freqs.weight$"):
            load_family(path)
    path = write_gguf(tmp_path / "e.gguf", model, tensors={"rope_freqs.weight": np.full(3, 2, np.float32)})
    with pytest.raises(CheckpointError, match=r"wrong shapes: rope_freqs.weight \(3,\) instead of \(4,\)"):
        load_family(path)
    path = write_gguf(
        tmp_path / "f.gguf",
        model,
        tensors={"rope_freqs.weight": np.full(4, 2, np.float32)},
        metadata={"llama.rope.scaling.factor": 2.0},
    )
    with pytest.raises(CheckpointError, match="rope.scaling.type is not supported together with rope_freqs.weight"):
        load_family(path)
    path = write_gguf(
        tmp_path / "g.gguf", tiny_model("qwen2"), tensors={"blk.0.attn_output.bias": np.ones(32, np.float32)}
    )
    with pytest.raises(
        CheckpointError, match="a qwen2 model that has tensors that are not supported: blk.0.attn_output.b"
    ):
        load_family(path)


def test_files_that_are_no_gguf_or_end_early_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    whole, damaged = path.read_bytes(), tmp_path / "d.gguf"
    for length in (4, 20, 100, 3000, len(whole) * 2 // 3, len(whole) - 1000):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cannot be converted; truncated"):
            load_family(damaged)
    for content, told in (
        (b"GGUX" + whole[4:], "not a GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + whole[8:], "little-endian"),
        (b"GGUF\x01\x00\x00\x00" + whole[8:], "GGUF version 1"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "cannot be converted"),
    ):
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=told):
            load_family(damaged)
    with pytest.raises(CheckpointError, match="no such file"):
        load_family(tmp_path / "none.gguf")
    other = whole.replace(
        b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0llama", b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0gemma"
    )
    damaged.write_bytes(other)
    with pytest.raises(
        CheckpointError,
        match="general.architecture is not supported; use a model of one of llama, qwen2, qwen3: 'gemma'",
    ):
        load_family(damaged)


def test_an_answer_ends_where_the_folder_says(tmp_path: Path) -> None:
    """The folder that a file is converted to is gone by the time of `generate`."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    convert_gguf(path, tmp_path / "folder")
    from_file, from_folder = (load_family(source, dtype="float32", exits=[1]) for source in (path, tmp_path / "folder"))
    ids = torch.tensor([[5, 6, 7, 8]])
    free = from_folder.generate(ids, max_new_tokens=12, min_new_tokens=12, eos_token_ids=())[0].tolist()
    end = free[4]
    expected = free[: free.index(end) + 1]
    for family in (from_file, from_folder):
        assert family.generate(ids, max_new_tokens=12, eos_token_ids=(end,))[0].tolist() == expected
        assert family.checkpoint.eos_token_ids == (TOKENS.index("<end>"),)


def test_the_file_of_ends_survives(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
    family = load_family(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), metadata=metadata), exits=[1])
    ends = (TOKENS.index("<end>"), 7, 9)
    assert family.checkpoint.eos_token_ids == ends == end_tokens(family.checkpoint, family.tokenizer)


def converted(path: Path, folder: Path) -> Checkpoint:
    convert_gguf(path, folder)
    return Checkpoint(folder)
