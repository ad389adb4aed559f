"""Checks of a machine: packages against what is required, processors, and what torch and the store say."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from ruyi_flow.doctor import machine
from ruyi_flow.doctor.checks import Mark
from ruyi_flow.doctor.examination import examine
from ruyi_flow.doctor.torch_report import Folder, ask_torch
from ruyi_flow.family.checkpoint import Checkpoint, cut


def installed(folder: Path, packages: dict[str, str], requires: list[str], python: str = ">=3.11") -> None:
    """Write the metadata of ruyi-flow and of packages, as pip does."""
    lines = ["Metadata-Version: 2.1", "Name: ruyi-flow", "Version: 0.1.0", f"Requires-Python: {python}"]
    lines += ["Provides-Extra: node", *(f"Requires-Dist: {one}" for one in requires)]
    for name, version, text in [("ruyi_flow", "0.1.0", "\n".join(lines))] + [
        (name, version, f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")
        for name, version in packages.items()
    ]:
        there = folder / f"{name}-{version}.dist-info"
        there.mkdir(parents=True)
        (there / "METADATA").write_text(text + "\n")


@pytest.mark.parametrize(
    ("packages", "mark", "text", "fix"),
    [
        ({"aaa": "1.2", "bbb": "3.0"}, {Mark.OK}, "The 1 packages that a node needs are here", ""),
        ({"aaa": "1.2"}, {Mark.OK, Mark.WARNING}, "it cannot run a node: it does not have bbb.", "'ruyi-flow[node]'"),
        ({"aaa": "0.9", "bbb": "3.0"}, {Mark.FAILED, Mark.OK}, "package aaa is 0.9, but >=1 is required", "'aaa>=1'"),
        ({"bbb": "3.0"}, {Mark.FAILED, Mark.OK}, "package aaa is missing", "pip install --upgrade 'aaa>=1'"),
        ({"aaa": "1", "bbb": "9"}, {Mark.FAILED, Mark.OK}, "package bbb is 9, but <4,>=3 is required", "--upgrade"),
    ],
)
def test_packages_are_compared_with_what_is_required(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packages: dict[str, str],
    mark: set[Mark],
    text: str,
    fix: str,
) -> None:
    installed(tmp_path, packages, ["aaa>=1", "bbb>=3,<4; extra == 'node'", "ccc; extra == 'docs'"])
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = machine.package_checks()
    assert {check.mark for check in found} == mark
    assert text in " ".join(check.text for check in found) and fix in " ".join(check.fix for check in found)


def test_a_python_that_is_too_new_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {}, [], python=">=2.7,<3.0")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = machine.python_check()
    assert found.mark is Mark.FAILED and "needs Python >=2.7,<3.0" in found.text and found.fix


@pytest.mark.parametrize(
    ("features", "mark", "text"),
    [
        ({"sse4_2"}, Mark.WARNING, "without AVX2"),
        ({"avx2"}, Mark.OK, "without AVX-512. There are no products in bfloat16"),
        ({"avx2", "avx512f"}, Mark.OK, "with AVX-512."),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, Mark.OK, "with AVX-512, bfloat16 instructions and AMX."),
    ],
)
def test_a_processor_is_described_by_what_it_means(features: set[str], mark: Mark, text: str) -> None:
    found = machine.processor_check(features, "x86_64")
    assert found.mark is mark and text in found.text


def test_the_figures_of_the_processors_are_those_of_the_log() -> None:
    log = (Path(__file__).parents[2] / "docs/log.md").read_text()
    text = machine.processor_check({"avx2"}, "x86_64").text
    assert "26.1 ms" in text and "bf16 26.1 ms a token" in log
    assert "19.6 ms" in text and "bf16 19.6 ms a token" in log


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        [few] = machine.open_files_checks()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert few.mark is Mark.WARNING and "256 files" in few.text and few.fix == "ulimit -n 1024"


def test_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert machine.proxy_checks() == []
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    [found] = machine.proxy_checks()
    assert "HTTPS_PROXY is set" in found.text and "proxy:3128" not in found.text  # it may contain a password


def test_features_are_read_from_the_kernels_file(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n")
    assert machine.processor_features(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512f"}
    assert machine.processor_features(tmp_path / "none") == set()


async def test_torch_and_the_store_are_asked_in_a_process_of_their_own(tiny: Path, tmp_path: Path, home: Path) -> None:
    shard = cut(Checkpoint(tiny), (4,), tmp_path / "shard")
    folders = (Folder("n1", str(shard)), Folder("", str(tiny)), Folder("n2", str(tmp_path / "none")))
    report = await ask_torch(folders)
    assert report.is_installed and report.version and not report.error
    assert report.store == str(home) and report.families == () and report.free_bytes > 0
    one, whole, none = report.folders
    assert one.exits == (4,) and one.family_exits == whole.exits == (2, 4, 6) and one.bytes > 0
    assert one.fingerprint == whole.fingerprint == Checkpoint(tiny).fingerprint
    assert "no such folder" in none.error


async def test_a_torch_that_cannot_be_loaded_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    found = [check async for check in examine(None)]
    [broken] = [check for check in found if check.name == "torch"]
    assert broken.mark is Mark.FAILED and "OSError: libgomp.so.1: cannot open shared object file" in broken.text


async def test_a_topology_is_compared_with_the_shards_that_are_here(tiny: Path, tmp_path: Path) -> None:
    whole = Checkpoint(tiny)
    cut(whole, (2,), tmp_path / "a"), cut(whole, (4, 6), tmp_path / "b")
    nodes = [
        {"name": "a", "address": "127.0.0.1:1", "exits": [2], "shard": "a", "device": "cuda:7"},
        {"name": "b", "address": "127.0.0.1:2", "exits": [4], "shard": "b"},
        {"name": "c", "address": "127.0.0.1:3", "exits": [6], "shard": "missing"},
    ]
    links = [{"from": "a", "to": "b"}, {"from": "b", "to": "c"}]
    (tmp_path / "t.yaml").write_text(json.dumps({"family": str(tiny), "nodes": nodes, "links": links}))
    found = [check async for check in examine(tmp_path / "t.yaml")]
    texts = [check.text for check in found if check.mark is Mark.FAILED]
    assert any("The shard of node 'b' was cut for exits [4, 6]; " in text for text in texts)
    assert any("The shard of node 'c' cannot be read: " in text for text in texts)
    assert any("Node 'a' has device: cuda:7, which torch" in text for text in texts)
    assert any(check.name == "a" and " MB with exit 2." in check.text for check in found)
    assert any(check.name == "memory" and "The weights of b, c take" in check.text for check in found)
