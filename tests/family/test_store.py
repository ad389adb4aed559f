"""The local store: complete families or none, and where they come from."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, pre_tokenizers

from ruyi_flow import __version__
from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.local import load_family
from ruyi_flow.testing import tiny_family
from ruyi_flow.training.recipe import Recipe
from tests.conftest import Command
from tests.family.gguf_kit import TOKENS, tiny_model, write_gguf

DIGITS, DIGITS_IDS = " 4 ½ months", [216, 36, 216, 16738, 2704]
"""A text that SmolLM2 splits before its digits, and its tokens."""


def test_a_local_folder_is_pulled_once(tmp_path: Path, home: Path, tiny: Path) -> None:
    folder = store.pull(str(tiny))
    assert folder == home / "families" / "tiny" and store.names() == ["tiny"]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert store.pull(str(tiny)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert store.locate("tiny") == folder
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_family("tiny", dtype="float32").logits(ids), load_family(tiny, dtype="float32").logits(ids))


def test_exits_are_given_to_an_ordinary_folder(tmp_path: Path, home: Path) -> None:
    ordinary = tiny_family(tmp_path / "plain", base="llama", ordinary=True)
    folder = store.pull(str(ordinary), name="mine", exits=(2, 4), dtype="bfloat16")
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.exits == (2, 4, 6)
    assert checkpoint.tensor("model.eelayers.1.mlp.up_proj.weight").dtype is torch.bfloat16
    with pytest.raises(CheckpointError, match=r"exists already, with exits \[2, 4, 6\]"):
        store.pull(str(ordinary), name="mine", exits=(3,))
    assert store.pull(str(ordinary), name="mine", exits=(2, 4), dtype="bfloat16") == folder


def test_what_a_family_lacks_is_told(tmp_path: Path, home: Path) -> None:
    said: list[str] = []
    store.pull(str(tiny_family(tmp_path / "plain", base="llama", ordinary=True)), say=said.append)
    assert said[:2] == [
        "it has one exit, 6, so it cannot be split; --exits adds more",
        "it has no tokenizer, so prompts for it must be token ids",
    ]


def test_what_is_there_must_be_what_is_asked_for(tmp_path: Path, home: Path, tiny: Path) -> None:
    store.pull(str(tiny), dtype="bfloat16")
    with pytest.raises(CheckpointError, match="exists already, in bfloat16, not float32; give another --name"):
        store.pull(str(tiny), dtype="float32")
    other = tiny_family(tmp_path / "elsewhere" / "tiny", seed=5)
    with pytest.raises(CheckpointError, match=f"exists already, from {tiny}, not {other}"):
        store.pull(str(other))
    with pytest.raises(CheckpointError, match="dtype is 'float8'; known: float32"):
        store.pull(str(tiny), name="new", dtype="float8")


def test_a_failed_pull_leaves_nothing(tmp_path: Path, home: Path) -> None:
    broken = tiny_family(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        store.pull(str(broken))
    assert store.names() == []
    assert [p for p in (home / "partial").iterdir() if p.is_dir()] == []


def test_a_pull_after_one_that_was_killed_starts_clean(home: Path, tiny: Path) -> None:
    left = home / "partial" / "tiny" / "family"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    assert store.names() == []
    folder = store.pull(str(tiny))
    assert Checkpoint(folder).config.exits == (2, 4, 6) and store.names() == ["tiny"]
    assert not left.exists()


def test_what_is_no_source_is_said(home: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder"):
        store.pull("qwen")
    with pytest.raises(CheckpointError, match="no family 'qwen'.*no families yet.*ruyi-flow pull SOURCE --name qwen"):
        store.locate("qwen")
    with pytest.raises(CheckpointError, match=r"no family 'smollm2'.*fetch it: ruyi-flow pull smollm2$"):
        store.locate("smollm2")
    with pytest.raises(CheckpointError, match="did you mean 'smollm2'"):
        store.pull("smolm2")
    for source in ("~nosuchuser/x", "x" * 5000):
        with pytest.raises(CheckpointError, match="cannot be a source"):
            store.pull(source)
    with pytest.raises(CheckpointError, match="no family 'xxx"):
        store.locate("x" * 5000)


def test_modelscope_needs_its_extra(run: Command, home: Path) -> None:
    try:
        import modelscope  # noqa: F401
    except ImportError:
        code, _, error = run("pull", "modelscope:Qwen/Qwen3-0.6B")
        assert code == 2 and "needs ModelScope's client" in error and "'ruyi-flow[modelscope]'" in error


def test_a_gguf_family_of_an_older_version_must_be_pulled_again(home: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    folder = store.pull(str(path), exits=(1,))
    assert store.pull(str(path), exits=(1,)) == folder
    assert Checkpoint(folder).eos_token_ids == (TOKENS.index("<end>"),)
    (folder / "source.txt").write_text(str(path))  # what older versions wrote, whose tokens may be wrong
    with pytest.raises(
        CheckpointError, match=r"exists already, from .*m.gguf, not .*llama.cpp's; .* remove that folder"
    ):
        store.pull(str(path), exits=(1,))


def test_an_empty_store_has_no_older_demo(home: Path) -> None:
    assert not store._is_older_demo(home / "families" / store.DEMO, "smollm2 with its branches 0")


@pytest.mark.model
def test_the_demo_family_is_smollm2_in_bfloat16(smollm2: Path) -> None:
    checkpoint = Checkpoint(smollm2)
    assert checkpoint.config.exits == (5, 11, 17, 23, 29)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight").dtype is torch.bfloat16
    assert round(checkpoint.config.num_parameters(29) / 1e6) == 135
    assert checkpoint.eos_token_ids == (2,)


@pytest.mark.model
def test_the_demo_familys_branches_are_the_packages(smollm2: Path, home: Path) -> None:
    checkpoint = Checkpoint(smollm2)
    assert checkpoint.config.branch_layers == (1, 2, 2, 2, 1)
    with safe_open(store._DEMO_FOLDER / "branches.safetensors", "pt") as handle:
        described = json.loads(handle.metadata()["ruyi_flow.recipe"])
        for name in handle.keys():
            assert torch.equal(checkpoint.tensor(name), handle.get_tensor(name))
    recipe = Recipe.load(store._DEMO_FOLDER / "recipe.yaml").described()
    assert len(described) > 20 and all(recipe[key] == value for key, value in described.items() if key in recipe)
    # A store that an older version filled gets the new branches without fetching anything.
    old = home / "families" / store.DEMO
    shutil.copytree(smollm2, old)
    (old / "source.txt").write_text(f"{store.DEMO} with its branches 000000000000")
    tokenizer = Tokenizer.from_file(str(old / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(old / "tokenizer.json"))
    assert load_tokenizer(Checkpoint(old))(DIGITS)["input_ids"] != DIGITS_IDS
    told: list[str] = []
    assert store.pull(store.DEMO, say=told.append) == old and "updating the branches" in told[0]
    assert Checkpoint(old).fingerprint == checkpoint.fingerprint
    for folder in (old, smollm2):
        assert load_tokenizer(Checkpoint(folder))(DIGITS)["input_ids"] == DIGITS_IDS
    assert store.pull(store.DEMO, say=told.append) == old and len(told) == 2


def demo_wheel(folder: Path, branches: bytes | None = None) -> None:
    """Write the wheel of the demo family's branches, as the package index has it."""
    info = f"ruyi_flow_demo-{__version__}.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"ruyi_flow_demo-{__version__}-py3-none-any.whl", "w") as wheel:
        for file in store._DEMO_TRAINED:
            original = (store._DEMO_FOLDER / file).read_bytes()
            wheel.writestr(f"ruyi_flow_demo/{file}", original if branches is None else branches)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.4\nName: ruyi-flow-demo\nVersion: {__version__}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("branches", [None, b"other bytes"])
def test_an_installed_package_fetches_the_demos_branches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branches: bytes | None
) -> None:
    demo_wheel(tmp_path / "index", branches)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    originals = [(store._DEMO_FOLDER / name).read_bytes() for name in store._DEMO_TRAINED]
    monkeypatch.setattr(store, "_DEMO_FOLDER", tmp_path / "none")  # as in an installed package
    said: list[str] = []
    if branches is None:
        files = store._demo_trained(tmp_path, said.append, bars=False)
        assert [file.read_bytes() for file in files] == originals
    else:
        with pytest.raises(CheckpointError, match="branches.safetensors: its SHA-256 is .*, not 684efe7f16dc"):
            store._demo_trained(tmp_path, said.append, bars=False)
    assert said == [f"fetching ruyi-flow-demo=={__version__} from the Python package index, 39 MB"]


def test_branches_that_no_index_has_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(store, "_DEMO_FOLDER", tmp_path / "none")
    with pytest.raises(CheckpointError, match=rf"ruyi-flow-demo=={__version__} could not be fetched with pip: .*ERROR"):
        store._demo_trained(tmp_path, lambda step: None, bars=False)
