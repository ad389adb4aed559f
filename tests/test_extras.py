"""A plain install: what it imports, and how what is not installed is told."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ruyi_flow.errors import MissingExtra
from ruyi_flow.extras import EXTRAS, is_installed, missing_extra, needed_by, require
from tests.conftest import Command

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = packages_distributions()

NOT_PLAIN = [
    *("torch", "transformers", "accelerate", "gguf", "safetensors", "tokenizers", "huggingface_hub", "jinja2"),
    "matplotlib",
]
"""Modules that a plain install does not have."""

PLAIN = f"import sys; sys.modules.update(dict.fromkeys({NOT_PLAIN}));"
"""Code that makes Python behave as if they were not installed."""


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements name, with those of this project's extras that they name."""
    found = set()
    for requirement in requirements:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()  # type: ignore[union-attr]
        if name == "ruyi-flow":
            found |= {n for extra in extras.split(",") for n in names(PROJECT["optional-dependencies"][extra])}
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def plain(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code as in a plain install, in a folder."""
    return subprocess.run([sys.executable, "-c", f"{PLAIN} {code}"], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("module", EXTRAS)
def test_each_extra_of_the_table_brings_the_module(module: str) -> None:
    known = {"llama_cpp": "llama-cpp-python", "lm_eval": "lm-eval"}  # of modules that need not be installed here
    distribution = known.get(module) or DISTRIBUTIONS.get(module, [module])[0].lower().replace("_", "-")
    assert distribution not in names(PROJECT["dependencies"])
    bringing = [extra for extra in PROJECT["optional-dependencies"] if extra not in ("dev", "docs")]
    for extra in bringing:
        brings = distribution in names(PROJECT["optional-dependencies"][extra])
        assert brings or extra not in EXTRAS[module], (extra, distribution)


def test_no_plain_library_is_in_the_list_of_those_that_are_not() -> None:
    distributions = {d.lower().replace("_", "-") for m in NOT_PLAIN for d in DISTRIBUTIONS.get(m, [m])}
    assert not distributions & names(PROJECT["dependencies"])


@pytest.mark.parametrize(
    "imports",
    [
        "from ruyi_flow import AsyncClient, Client, Reply, RuyiFlowError, SamplingParams, Token, Topology",
        "import ruyi_flow.transport.peer, ruyi_flow.serving.supervisor",
        "import ruyi_flow.sim.run, ruyi_flow.sim.sweep, ruyi_flow.sim.plan",
        "import ruyi_flow.calibration.thresholds, ruyi_flow.calibration.cascade",
        "import ruyi_flow.cli.commands",
    ],
)
def test_a_plain_install_imports(imports: str, tmp_path: Path) -> None:
    done = plain(imports, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("demo", "node"),
        ("up", "node"),
        ("pull smollm2", "node"),
        ("node device", "node"),
        ("shard --out shards", "node"),
        ("trace p.jsonl --family smollm2", "node"),
        ("explain -p x", "node"),
        ("generate -t one -p x", "node"),
        ("profile smollm2", "node"),
        ("train recipe.yaml", "train"),
        ("eval --family smollm2", "eval"),
        ("bench decode", "bench"),
    ],
)
def test_a_command_says_which_extra_it_needs(command: str, extra: str, tmp_path: Path) -> None:
    code = f"sys.argv = ['ruyi-flow', *{command.split()}]; from ruyi_flow.cli import main; main()"
    done = plain("sys.modules['lm_eval'] = None; " + code, tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    user = "a node in the client's process" if command.startswith("generate") else f"ruyi-flow {command.split()[0]}"
    needs = rf"error: {user} needs [\w -]+, which is not installed: pip install 'ruyi-flow\[{extra}\]'\n"
    assert re.fullmatch(needs, done.stderr), done.stderr


@pytest.mark.parametrize("name", ["load_family", "Family"])
def test_the_sdk_says_which_extra_it_needs(name: str, tmp_path: Path) -> None:
    done = plain(f"from ruyi_flow import {name}", tmp_path)
    assert (
        f"{name} needs PyTorch, which is not installed: pip install 'ruyi-flow[node]'" in done.stderr.splitlines()[-1]
    )


def test_it_is_an_import_error_and_one_of_ours() -> None:
    with pytest.raises(ImportError, match="this needs PyTorch") as caught, needed_by("this"):
        raise ModuleNotFoundError("No module named 'torch._C'", name="torch._C")
    assert isinstance(caught.value, MissingExtra)


def test_other_modules_are_no_extras() -> None:
    error = ModuleNotFoundError("No module named 'other'", name="other")
    assert missing_extra(error, "this") is None
    with pytest.raises(ModuleNotFoundError) as caught, needed_by("this"):
        raise error
    assert caught.value is error


def test_a_module_is_looked_for_without_its_import() -> None:
    assert is_installed("torch") and not is_installed("no_such_module")
    with pytest.raises(ModuleNotFoundError) as caught:
        require("no_such_module")
    assert caught.value.name == "no_such_module"


def test_without_an_extra_a_simulation_has_no_plots(tmp_path: Path) -> None:
    code = "sys.argv = ['ruyi-flow', 'simulate', 'factory', '--set', 'load.requests=5', '--json']"
    done = plain(f"{code}; from ruyi_flow.cli import main; main()", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "they need matplotlib" in (tmp_path / "runs/sim/factory/report.html").read_text()


def test_a_command_of_this_process_says_it_too(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    error = "error: ruyi-flow up needs PyTorch, which is not installed: pip install 'ruyi-flow[node]'\n"
    assert run("up", "local") == (2, "", error)
