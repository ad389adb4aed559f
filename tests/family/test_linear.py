"""Weights in few bits: what they stand for, the kernels that run them, and shards and nodes that hold them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CheckpointError, RuyiFlowError
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.linear import GROUP, Linear, Quantized, pack
from ruyi_flow.local import load_family
from ruyi_flow.testing import cluster, cut_topology, tiny_family
from ruyi_flow.types import Mode, NodeStatus, Weights

FEW = [Weights.INT8, Weights.INT4]
IDS = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["tied", "heads"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / request.param
    base = "llama" if request.param == "tied" else "qwen2"
    return tiny_family(folder, base=base, intermediate_size=64, tied=request.param == "tied")


def random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(("weights", "bits"), [(Weights.INT8, 8), (Weights.INT4, 4)])
def test_values_are_rounded_to_the_nearest_step(weights: Weights, bits: int) -> None:
    w = random(48, 64)
    held = Quantized.of(w, weights)
    assert held.weights is weights and held.shape == (48, 64)
    assert held.values.numel() * held.values.element_size() == 48 * 64 * bits // 8
    step = held.scales.float().reshape(48, -1).repeat_interleave(64 // held.scales.reshape(48, -1).shape[1], 1)
    assert ((held.dequantize() - w).abs() <= step * 0.51 + 0.02 * w.abs()).all()
    joined = Quantized.cat([held, held])
    assert torch.equal(joined.dequantize(), torch.cat([held.dequantize(), held.dequantize()]))
    assert torch.equal(joined.rows(48, 96).dequantize(), held.dequantize())


@pytest.mark.parametrize("weights", FEW)
def test_values_that_have_4_bits_are_kept(weights: Weights) -> None:
    steps = torch.randint(0, 16, (16, 2, GROUP), generator=torch.Generator().manual_seed(1))
    steps[..., 0], steps[..., 1] = 0, 15
    w = (steps * 8.5 - 34.0).flatten(1)  # a step of 8 bits is 1 / 17 of one of 4
    assert torch.equal(Quantized.of(w, weights).dequantize(), w)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", FEW)
def test_kernels_give_the_product_and_the_same_row_in_every_block(
    weights: Weights, dtype: torch.dtype, apart: bool, bias: bool
) -> None:
    linear = Linear(64, (32, 96), bias)
    w, b = random(128, 64), random(128, 1)[:, 0] if bias else torch.zeros(128)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(b.to(dtype))
    held = Quantized.of(w, weights)
    linear.set_kernels(held, dtype, apart=apart)
    assert linear.weight is None and linear.num_parameters() == 128 * (64 + bias)
    x = random(20, 64).to(dtype)
    expected = x.float() @ held.dequantize().T + b
    out = linear.run(x)
    assert out.dtype is dtype and (out.float() - expected).norm() < 5e-3 * expected.norm()
    if apart:
        assert torch.equal(linear.part(x, 1), out[:, 32:])
    few = torch.cat([linear.run(x[i : i + 1]) for i in range(12)])
    assert torch.equal(few, linear.run(x[:12])), "a row does not depend on the rows beside it"
    many = random(60, 64).to(dtype)
    expected = many.float() @ held.dequantize().T + b
    assert (linear.run(many).float() - expected).norm() < 5e-3 * expected.norm()
    if not apart:
        ids = torch.tensor([0, 127, 31, 32, 64, 0])
        assert torch.allclose(linear.embedding(ids).float(), held.dequantize()[ids], rtol=5e-3)


@pytest.mark.parametrize("rows", [8, 48, 200])
@pytest.mark.parametrize("weights", FEW)
def test_any_number_of_rows_can_be_held(weights: Weights, rows: int) -> None:
    linear, held = Linear(32, (rows,), False), Quantized.of(random(rows, 32), weights)
    linear.set_kernels(held, torch.float32)
    for n in (1, 60):
        x = random(n, 32)
        assert torch.allclose(linear.run(x), x @ held.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out_features", [96, 1200])  # one block; one and a part
def test_a_processor_without_bfloat16_widens_weights(
    out_features: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ruyi_flow.family.linear.lacks_bfloat16", lambda dtype, device: dtype is torch.bfloat16)
    module = Linear(64, (32, out_features - 32), bias).bfloat16()
    w, b = random(out_features, 64).bfloat16(), random(out_features, 1)[:, 0].bfloat16()
    module.weight = torch.nn.Parameter(w)
    if module.bias is not None:
        module.bias = torch.nn.Parameter(b)
    pack(module, apart=[module] if bias else [])
    assert module.weight is None
    for rows in (1, 2, 3, 40):
        x = random(rows, 64).bfloat16()
        expected = x.float() @ w.float().T + (b.float() if bias else 0.0)
        out = module.run(x)
        assert out.dtype is torch.bfloat16 and (out.float() - expected).norm() < 5e-3 * expected.norm()
        if bias:
            assert torch.equal(module.part(x, 1), out[:, 32:])
    for weights in FEW:
        few, held = Linear(64, (out_features,), False), Quantized.of(w.float(), weights)
        few.set_kernels(held, torch.bfloat16)
        x = random(60, 64).bfloat16()
        expected = x.float() @ held.dequantize().T
        assert (few.run(x).float() - expected).norm() < 5e-3 * expected.norm()


OTHER_VECTORS = """
import torch
from ruyi_flow.family.linear import Linear, Quantized
from ruyi_flow.types import NodeStatus, Weights

for weights in (Weights.INT8, Weights.INT4):
    held, linear = Quantized.of(torch.randn(136, 64), weights), Linear(64, (136,), False)
    linear.set_kernels(held, torch.float32)
    for rows in (1, 60):
        x = torch.randn(rows, 64)
        assert torch.allclose(linear.run(x), x @ held.dequantize().T, atol=1e-3)
    assert torch.allclose(linear.embedding(torch.arange(136)), held.dequantize(), atol=1e-5)
"""


@pytest.mark.parametrize("vectors", ["default", "avx2"])
def test_a_processor_with_other_vectors_gives_the_product_too(vectors: str) -> None:
    settings = os.environ | {"ATEN_CPU_CAPABILITY": vectors}  # read once, when torch is imported
    run = subprocess.run([sys.executable, "-c", OTHER_VECTORS], env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("weights", FEW)
def test_few_bits_refuse_columns_that_are_no_whole_groups(weights: Weights) -> None:
    with pytest.raises(
        CheckpointError, match=rf"x.down_proj has shape 48 x 40, but {weights} needs a multiple of 32 col"
    ):
        Quantized.of(random(48, 40), weights, "x.down_proj")


@pytest.mark.parametrize("weights", FEW)
def test_a_shard_holds_few_bits_and_gives_what_the_family_in_few_bits_gives(
    family: Path, tmp_path: Path, weights: Weights
) -> None:
    whole = Checkpoint(family)
    expected = load_family(family, dtype="float32", weights=weights)
    shard = Checkpoint(cut(whole, whole.exits, tmp_path / "few", weights=weights))
    assert shard.weights is weights and shard.fingerprint == whole.fingerprint
    for name in shard.names(shard.exits):
        assert (isinstance(shard.weight(name), Quantized)) == (
            name.endswith("_proj.weight") or "lm_head" in name or (whole.config.tied_head and "embed" in name)
        )
    wide = load_family(family, dtype="float32").logits(IDS)
    for exit in whole.exits:
        ours = load_family(shard.folder, dtype="float32").logits(IDS, exit)
        assert torch.equal(ours, expected.logits(IDS, exit))
    assert 0 < (expected.logits(IDS) - wide).norm() < (0.1 if weights is Weights.INT8 else 0.8) * wide.norm()
    sizes = [(f / "model.safetensors").stat().st_size for f in (shard.folder, family)]
    assert sizes[0] < sizes[1] / 2
    with pytest.raises(CheckpointError, match=f"are already {weights}, so they cannot become"):
        cut(shard, shard.exits, tmp_path / "again", weights=next(w for w in FEW if w is not weights))
    with pytest.raises(CheckpointError, match="only float formats"):
        shard.tensor("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("weights", FEW)
async def test_exact_over_nodes_in_few_bits_is_the_family_in_few_bits(family: Path, weights: Weights) -> None:
    whole = load_family(family, dtype="float32", weights=weights)
    prompt = IDS[0].tolist()
    for exit, mode in ((6, Mode.EXACT), (4, Mode.FIXED)):
        expected = whole.generate(IDS[:1], exit=exit, max_new_tokens=24, eos_token_ids=())[0].tolist()
        topology = cut_topology(family, [[2], [4, 6]], weights=weights)
        async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
            for draft in (0, 4):
                reply = await client.generate(
                    prompt,
                    mode=mode,
                    exit=exit if mode is Mode.FIXED else None,
                    draft=draft,
                    max_new_tokens=24,
                    eos_token_ids=(),
                )
                assert reply.token_ids == expected
            for status in (await client.status()).values():
                assert isinstance(status, NodeStatus) and str(weights) in status.dtype
            await nodes.settle()


def test_formats_that_cannot_be(family: Path, tmp_path: Path) -> None:
    with pytest.raises(RuyiFlowError, match="weights is 'int3'; known: bf16, int8, int4"):
        load_family(family, weights="int3")
    with pytest.raises(RuyiFlowError, match="bf16 requires dtype: bfloat16, but dtype is float32"):
        load_family(family, dtype="float32", weights="bf16")
    narrow = tiny_family(tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(RuyiFlowError, match=r"int4 needs a multiple of 32 columns; set weights: bf16"):
        load_family(narrow, weights="int4")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("weights", FEW)
def test_few_bits_run_as_plain_weights_where_torch_has_no_product_with_them(
    family: Path, weights: Weights, dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_family(family, dtype=dtype, weights=weights)
    monkeypatch.setattr("ruyi_flow.family.loading.has_int4", lambda device: False)
    plain = load_family(family, dtype=dtype, weights=weights)
    assert plain.model.embed_tokens is not None
    for exit in plain.exits:
        expected = packed.logits(IDS, exit).float()
        assert (plain.logits(IDS, exit).float() - expected).norm() < error * expected.norm()


def test_a_shard_whose_tensors_do_not_fit_is_refused(family: Path, tmp_path: Path) -> None:
    shard = cut(Checkpoint(family), (2, 4, 6), tmp_path / "few", weights=Weights.INT4)
    file, name = shard / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for key, value in ((f"{name}_scale", tensors[f"{name}_scale"][1:]), (name, tensors[name].to(torch.int8))):
        save_file(tensors | {key: value.contiguous()}, file, metadata)
        with pytest.raises(CheckpointError, match=r"up_proj.weight and its scales do not fit together"):
            load_family(shard)
    save_file(tensors, file, metadata | {"ruyi_flow.weights": "int3"})
    with pytest.raises(CheckpointError, match="its metadata names weights 'int3'"):
        load_family(shard)
