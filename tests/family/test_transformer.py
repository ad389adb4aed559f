"""The layers against transformers' own models, on random weights in float32."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from ruyi_flow.bench.engines import as_transformers
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.loading import load_slice
from ruyi_flow.local import load_family
from ruyi_flow.testing import tiny_family

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_scaling": LLAMA3_ROPE}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen2", {"rope_scaling": YARN_ROPE}),
        ("qwen3", {}),
        ("qwen3", {"tied": True, "attention_bias": True}),
    ],
    ids=str,
)
def test_logits_and_greedy_tokens_are_transformers_own(tmp_path: Path, base: str, changes: dict[str, Any]) -> None:
    folder = tiny_family(tmp_path / "m", base=base, ordinary=True, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_family(folder, dtype="float32", exits=[2, 4])
    ids = torch.randint(3, 61, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (ours.logits(ids) - expected).abs().max() < 1e-4
    greedy = theirs.generate(ids[:1], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert ours.generate(ids[:1], max_new_tokens=12, min_new_tokens=12).tolist() == greedy[:, 90:].tolist()


@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
def test_a_branch_given_to_an_ordinary_checkpoint_is_the_layer_at_its_exit(tmp_path: Path, base: str) -> None:
    folder = tiny_family(tmp_path / "m", base=base, ordinary=True)
    ids = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(1))
    shorter = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=3)
    ours = load_family(folder, dtype="float32", exits=[2])
    with torch.no_grad():
        assert (ours.logits(ids, exit=2) - shorter(ids).logits).abs().max() < 1e-4


def test_deeper_branches_are_transformers_models_of_that_depth(five: Path, tmp_path: Path) -> None:
    family = load_family(five, dtype="float32")
    assert family.config.branch_layers == (2, 1, 3, 1, 1)
    ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    for exit in family.exits:
        theirs = as_transformers(Checkpoint(five), exit=exit)
        with torch.no_grad():
            assert (family.logits(ids, exit=exit) - theirs(ids).logits).abs().max() < 1e-4
    shard = cut(Checkpoint(five), (3, 4), tmp_path / "shard")
    assert "model.eeblocks.2.1.mlp.up_proj.weight" in Checkpoint(shard).names((3, 4))
    part = load_slice(Checkpoint(shard), (3, 4), dtype=torch.float32)
    assert part.num_slots == 3 + 1 + 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
def test_packed_weights_compute_the_same(tmp_path: Path, base: str, packed: bool) -> None:
    checkpoint = Checkpoint(tiny_family(tmp_path / "f", base=base))
    plain = load_slice(checkpoint, (2, 4, 6), dtype=torch.float32, packed=False)
    model = load_slice(checkpoint, (2, 4, 6), dtype=torch.float32, packed=packed)
    ids = torch.randint(3, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    for exit in (2, 4, 6):
        assert (model.logits(ids, exit) - plain.logits(ids, exit)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tiny: Path, dtype: str) -> None:
    ids = torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    whole, half = load_family(tiny, dtype="float32").logits(ids), load_family(tiny, dtype=dtype).logits(ids)
    assert (whole - half).abs().max() < 0.1 * whole.abs().max()
    assert (whole.argmax(-1) == half.argmax(-1)).float().mean() > 0.8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_computes_the_same(tiny: Path) -> None:
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1))
    cpu, gpu = load_family(tiny, dtype="float32"), load_family(tiny, dtype="float32", device="cuda")
    assert (cpu.logits(ids) - gpu.logits(ids).cpu()).abs().max() < 1e-3
    assert cpu.generate(ids, max_new_tokens=12).tolist() == gpu.generate(ids, max_new_tokens=12).tolist()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_cuda_computes_the_same_in_few_bits(tmp_path: Path, weights: str) -> None:
    folder = tiny_family(tmp_path / "f", vocab_size=64, hidden_size=64, intermediate_size=64)
    ids = torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    cpu, gpu = (load_family(folder, weights=weights, device=device).logits(ids).cpu() for device in ("cpu", "cuda"))
    assert (cpu - gpu).abs().max() < 0.1 * cpu.abs().max()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own import
@pytest.mark.timeout(300)
def test_compiled_layers_give_the_same_tokens_and_compile_once(tiny: Path) -> None:
    plain, compiled = load_family(tiny, dtype="float32"), load_family(tiny, dtype="float32", compile=True)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for length in (1, 2, 40):
        ids = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(length))
        for options in ({"exit": 4}, {"exit": 6}, {"mode": "exact", "draft": 3}):
            ours, theirs = (f.generate(ids, max_new_tokens=12, **options) for f in (compiled, plain))
            assert ours.tolist() == theirs.tolist()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.timeout(300)
def test_an_environment_that_forbids_compiling_is_said(tiny: Path) -> None:
    code = f"from ruyi_flow import load_family; load_family({str(tiny)!r}, compile=True)"
    off = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=off)
    assert "ConfigError: compile: TORCHDYNAMO_DISABLE is set in the environment" in done.stderr


@pytest.mark.timeout(300)
def test_without_a_compiler_it_is_said(tiny: Path, tmp_path: Path) -> None:
    code = f"from ruyi_flow import load_family; load_family({str(tiny)!r}, compile=True)"
    nothing = os.environ | {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nothing)
    assert "ConfigError: compile: torch.compile needs a C++ compiler" in done.stderr
