"""Folders from strangers: what is broken or hostile is refused in one line, at once, and nothing is written."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.local import load_family
from ruyi_flow.testing import tiny_family


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny family, in a folder of its own."""
    return Path(shutil.copytree(tiny, tmp_path / "source" / "family"))


def change(folder: Path, **keys: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))


def check_refused(folder: Path, home: Path, message: str) -> None:
    """`pull` refuses the folder in one line and leaves nothing behind."""
    with pytest.raises(CheckpointError, match=message) as caught:
        store.pull(str(folder), name="x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert store.names() == [] and [p for p in home.rglob("*") if p.suffix != ".lock" and p.is_file()] == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000: must be at most"),
        ({"early_exit_branch_layers": [10**9, 1, 1]}, "early_exit_branch_layers.0: 1000000000"),
        ({"early_exit_branch_layers": [16, 16, 1]}, "is missing"),
        ({"hidden_size": float("inf")}, "hidden_size: inf: must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0: must be 1 or more"),
        ({"hidden_size": 64}, r"has shape \(61, 32\), but config.json requires \(61, 64\)"),
        ({"vocab_size": 2**24}, r"has shape \(61, 32\), but config.json requires \(16777216, 32\)"),
        ({"head_dim": 1024}, "but config.json requires"),
        ({"head_dim": 15}, "head_dim is 15; it must be even"),
        ({"num_key_value_heads": 3}, "it must divide num_attention_heads"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is supported only with"),
        ({"eos_token_id": 1e30}, "eos_token_id.0"),
        ({"early_exit_points": "246"}, "early_exit_points: '246': must be a list"),
        ({"hidden_size": "x" * 100_000}, "hidden_size: 'x+...x+': must be a whole number"),
        ({"model_type": "x" * 100_000}, "model_type is 'x+...x+'"),
    ],
)
def test_sizes_that_cannot_be_are_refused_when_pulled(
    folder: Path, home: Path, keys: dict[str, Any], message: str
) -> None:
    change(folder, **keys)
    check_refused(folder, home, message)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "{" + "1" * 2**24, '{"vocab_size": 1' + "0" * 5000 + "}"]
)
def test_json_that_no_parser_should_take_is_refused(folder: Path, home: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    check_refused(folder, home, r"config\.json: (cannot be read as JSON|has \d+ bytes)")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "LICENSE"]
)
def test_a_pipe_in_place_of_a_file_is_refused(folder: Path, home: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    check_refused(folder, home, f"{name}: not a plain file")


@pytest.mark.parametrize("elsewhere", ["../other/model.safetensors", "{absolute}", "..", "", "a/b.safetensors", 5])
def test_a_weight_map_names_files_of_its_own_folder_only(folder: Path, home: Path, elsewhere: Any) -> None:
    other = folder.parent / "other" / "model.safetensors"
    other.parent.mkdir()
    shutil.move(folder / "model.safetensors", other)
    file = str(other) if elsewhere == "{absolute}" else elsewhere
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norms.0.weight": file}}))
    check_refused(folder, home, "does not map tensors to files of this folder")


def test_a_link_that_leaves_the_folder_is_not_copied(folder: Path, home: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "LICENSE").symlink_to(secret)
    check_refused(folder, home, "LICENSE: is a link to .*secret, outside of the folder; put the file itself there")
    (folder / "LICENSE").unlink()
    (folder / "real").write_text("text")
    (folder / "LICENSE").symlink_to("real")
    copied = store.pull(str(folder)) / "LICENSE"
    assert copied.read_text() == "text" and not copied.is_symlink()


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(folder: Path, home: Path) -> None:
    cache = folder.parent / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (folder / "LICENSE").write_text("text")
    for file in folder.iterdir():
        shutil.move(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    stored = store.pull(str(snapshot), name="b")
    assert (stored / "LICENSE").read_text() == "text" and not (stored / "LICENSE").is_symlink()


@pytest.mark.parametrize("exits", ["[" * 100_000, "[[2]]", "[2.0]", '"246"', "[true]", "{}", "[999999]"])
def test_metadata_that_is_no_list_of_exits_is_refused(folder: Path, exits: str) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"ruyi_flow.exits": exits})
    with pytest.raises(CheckpointError, match="its metadata names exits"):
        Checkpoint(folder)
    save_file({"model.norms.0.weight": torch.ones(32)}, folder / "b.safetensors", {"ruyi_flow.branch_exits": exits})
    with pytest.raises(CheckpointError, match=r"not a file of trained branches|its branches are for exits"):
        Checkpoint(tiny_family(folder.parent / "whole"), branches=[folder / "b.safetensors"])


def test_metadata_that_is_no_fingerprint_is_refused(folder: Path) -> None:
    for text in ("x" * 1000, "0123"):
        save_file(
            load_file(folder / "model.safetensors"), folder / "model.safetensors", {"ruyi_flow.fingerprint": text}
        )
        with pytest.raises(CheckpointError, match="its metadata names fingerprint"):
            _ = Checkpoint(folder).fingerprint


def test_a_full_disk_is_said_in_one_line(folder: Path, home: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a longer file fails as on a full disk
    try:
        check_refused(folder, home, "cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_store_that_cannot_be_made_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("RUYI_FLOW_HOME", str(folder / "file"))
    with pytest.raises(CheckpointError, match="the store at .* cannot be written"):
        store.pull(str(folder))


def test_new_files_have_the_permissions_that_the_umask_leaves(tiny: Path, tmp_path: Path) -> None:
    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            shard = cut(Checkpoint(tiny), (2,), tmp_path / oct(umask))
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in shard.iterdir()}
        assert modes == {0o666 & ~umask} and stat.S_IMODE(shard.stat().st_mode) == 0o777 & ~umask


def test_a_folder_without_a_config_hides_no_stored_family(
    tiny: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.pull(str(tiny), name="mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("results")
    assert store.locate("mine") == stored
    assert load_family("mine", dtype="float32").exits == (2, 4, 6)
    shutil.copy(tiny / "config.json", tmp_path / "mine")
    assert store.locate("mine") == Path("mine")
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        Checkpoint(store.locate(tmp_path))


@pytest.mark.parametrize("template", [5, "x" * 2**21, {"default": ["x"]}, [{"name": "default", "template": 5}]])
def test_a_chat_template_that_is_none_is_refused(spoken: Path, tmp_path: Path, template: Any) -> None:
    folder = Path(shutil.copytree(spoken, tmp_path / "f"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat template is not a text|tokenizer files cannot be read"):
        load_tokenizer(Checkpoint(folder))


def test_memory_stays_small(folder: Path) -> None:
    """What the largest numbers cost that pass the checks of config.json: names, and no tensors."""
    change(folder, num_hidden_layers=1024, early_exit_points=[2, 4, 1023], early_exit_branch_layers=[16, 16, 1])
    change(
        folder, vocab_size=2**24, hidden_size=2**17, intermediate_size=2**20, head_dim=1024, num_attention_heads=1024
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"has shape|is missing"):
        load_family(folder, dtype="float32")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_hub_whose_address_is_none_is_said() -> None:
    code = "from ruyi_flow.family.store import pull; pull('some/family')"
    environment = os.environ | {"HF_ENDPOINT": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "CheckpointError: some/family could not be fetched from Hugging Face" in done.stderr


def test_the_stores_folder_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUYI_FLOW_HOME", "~/families")
    assert store.home() == Path.home() / "families"
