"""Checkpoint files: formats, shards, fingerprints, and everything that can be wrong with a file."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ruyi_flow.errors import CheckpointError, ConfigError
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.loading import load_slice
from ruyi_flow.local import load_family
from ruyi_flow.testing import tiny_family

IDS = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(1))


def test_shards_together_hold_each_tensor_once_and_give_the_family(tiny: Path, tmp_path: Path) -> None:
    whole = Checkpoint(tiny)
    names: list[str] = []
    for exits in ((2,), (4, 6)):
        shard = Checkpoint(cut(whole, exits, tmp_path / str(exits[0])))
        assert shard.exits == exits and shard.fingerprint == whole.fingerprint
        with safe_open(shard.folder / "model.safetensors", "pt") as file:
            names += file.keys()
        model = load_slice(shard, exits, dtype=torch.float32)
        expected = load_slice(whole, exits, dtype=torch.float32)
        for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    with safe_open(tiny / "model.safetensors", "pt") as file:
        assert sorted(names) == sorted(file.keys())


def test_a_slice_holds_only_its_own_tensors(tiny: Path) -> None:
    middle = load_slice(Checkpoint(tiny), (4,), dtype=torch.float32)
    assert middle.embed_tokens is None
    assert list(middle.layers) == ["2", "3"] and list(middle.branches) == ["4"] and len(middle.heads) == 1


def test_a_shard_does_not_serve_other_stages(tiny: Path, tmp_path: Path) -> None:
    shard = Checkpoint(cut(Checkpoint(tiny), (2,), tmp_path / "s"))
    with pytest.raises(CheckpointError, match=r"is missing.*exits \[2\]"):
        load_slice(shard, (4,), dtype=torch.float32)


def test_sharded_safetensors_with_an_index_read_the_same(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder = tmp_path / "indexed"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_family(folder, dtype="float32").logits(IDS), load_family(tiny, dtype="float32").logits(IDS))
    assert Checkpoint(folder).fingerprint == Checkpoint(tiny).fingerprint
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: no such file"):
        Checkpoint(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_an_ordinary_checkpoint_converts_to_a_family(tmp_path: Path, tied: bool) -> None:
    ordinary = tiny_family(tmp_path / "o", base="llama", ordinary=True, tied=tied)
    given = Checkpoint(ordinary, exits=(2, 4))
    converted = cut(given, given.config.exits, tmp_path / "family")
    assert Checkpoint(converted).config.exits == (2, 4, 6)
    assert Checkpoint(converted).fingerprint == given.fingerprint
    a, b = load_family(ordinary, dtype="float32", exits=(2, 4)), load_family(converted, dtype="float32")
    for exit in (2, 4, 6):
        assert torch.equal(a.logits(IDS, exit), b.logits(IDS, exit))


def test_fingerprints_tell_weights_and_geometry_apart(tmp_path: Path, tiny: Path) -> None:
    other = Checkpoint(tiny_family(tmp_path / "other", seed=9)).fingerprint
    scaled = Checkpoint(tiny_family(tmp_path / "scaled", rope_theta=5000.0)).fingerprint
    same = Checkpoint(tiny_family(tmp_path / "same")).fingerprint
    assert len({other, scaled, same}) == 3 and same == Checkpoint(tiny).fingerprint


def test_ee_qwen3_is_ruyi_qwen3(tmp_path: Path, tiny: Path) -> None:
    folder = tiny_family(tmp_path / "ee", model_type="ee_qwen3")
    assert torch.equal(load_family(folder, dtype="float32").logits(IDS), load_family(tiny, dtype="float32").logits(IDS))


def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_a_truncated_file_is_said(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(folder)


def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.eelayers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.eelayers\.1\.mlp\.up_proj\.weight is missing"):
        load_family(folder, dtype="float32")


def test_a_wrong_shape_states_both(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norms.1.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norms\.1\.weight has shape \(7,\), but config\.json requires \(32,\)"):
        load_family(folder, dtype="float32")


def test_pickles_are_never_read(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="pytorch_model.bin to safetensors: pickles are never read"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_broken_config_is_said(tiny: Path, tmp_path: Path, text: str) -> None:
    folder = copied(tiny, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(folder)


def test_files_beside_the_weights_that_are_broken_are_said(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer files cannot be read"):
        load_family(folder, dtype="float32")
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id.0: 'x': must be a whole number"):
        _ = Checkpoint(folder).eos_token_ids
    tensors = load_file(folder / "model.safetensors")
    for exits in ("x", "5", "[9]"):
        save_file(tensors, folder / "model.safetensors", {"ruyi_flow.exits": exits})
        with pytest.raises(CheckpointError, match="metadata names exits"):
            Checkpoint(folder)


def test_quantized_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"torch\.int8; only float formats"):
        load_family(folder, dtype="float32")
    with pytest.raises(CheckpointError, match="quantized weights"):
        Checkpoint(tiny_family(tmp_path / "q", ordinary=True, quantization_config={"quant_method": "fp8"}))


def test_cutting_leaves_all_or_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norms.2.weight"] = tensors["model.norms.2.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    out = tmp_path / "out" / "shard"
    with pytest.raises(CheckpointError, match=r"torch\.int32; only float"):
        cut(Checkpoint(folder), (4, 6), out)
    assert list(out.parent.iterdir()) == []
    cut(Checkpoint(tiny), (4, 6), out)
    with pytest.raises(CheckpointError, match="exists already"):
        cut(Checkpoint(tiny), (4, 6), out)


def test_load_family_says_what_is_wrong(tiny: Path, tmp_path: Path, home: Path) -> None:
    with pytest.raises(CheckpointError, match="no family 'nothing'"):
        load_family("nothing")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_family(tmp_path / "none")
    with pytest.raises(CheckpointError, match="dtype is 'int3'"):
        load_family(tiny, dtype="int3")


def test_a_tiny_family_takes_an_empty_folder_and_leaves_a_family_alone(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path)
    assert Checkpoint(folder).exits == (2, 4, 6)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="has a family already"):
        tiny_family(folder, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before
