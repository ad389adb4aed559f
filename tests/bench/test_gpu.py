"""`make gpu` on a CPU with tiny families: its steps, its last line, and steps that fail. No test depends on times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ruyi_flow.family.config import FamilyConfig
from tests.bench import gpu, gpu_steps
from tests.conftest import Oracle

pytestmark = pytest.mark.timeout(600)

STEPS = [name for name in gpu.STEPS if not name.startswith("ruyi-") and name != "tests"]
"""The steps that are tested here; the code of Ruyi-7B's is that of the demo family's."""

ENGINES = ("ruyi-flow", "transformers")


def last_line(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the script with tiny families; return its exit status, its JSON object and its table."""
    command = [sys.executable, "-m", "tests.bench.gpu", "--device", "cpu", "--small", *arguments]
    done = subprocess.run(command, cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)
    table, _, line = done.stdout.rstrip("\n").rpartition("\n")
    return done.returncode, json.loads(line), table


@pytest.mark.slow
def test_the_steps_run_on_a_cpu_with_tiny_families() -> None:
    status, found, table = last_line(*STEPS)
    assert set(found) == {"bench", "settings", "results", "machine"} and found["bench"] == "gpu"
    assert found["machine"].keys() >= {"processor", "torch", "transformers", "flash_attn", "date"}
    results = found["results"]
    assert list(results) == STEPS and set(gpu.STEPS) == set(gpu_steps.STEPS)
    assert {name: step.get("error") for name, step in results.items()} == dict.fromkeys(STEPS) and status == 0
    assert all(step["ok"] and step["seconds"] > 0 for step in results.values())
    assert all(f"\n{name} " in f"\n{table}" for name in STEPS)

    assert results["machine"].keys() >= {"copy_gb_per_s", "bf16_tflop_per_s"}
    for variant in gpu_steps.VARIANTS:
        assert results["nodes"][variant] == {"answers": 3, "equal": 3}
    assert results["demo-family"]["weights"] == "random"
    for step, unit in (("demo-decode", "token"), ("demo-prefill", "prompt")):
        rows = results[step]
        assert all(rows[engine].keys() >= {f"ms_per_{unit}", "share_of_bound"} for engine in ENGINES)
        assert "ratio" in rows["transformers"]
    rows = results["demo-sessions"]
    assert all(rows[row].keys() >= {"tokens_per_s", "share_of_bound"} for row in ("alone", "together", "transformers"))
    assert "ratio" in rows["together"]


def test_a_step_that_fails_does_not_end_the_others() -> None:
    status, found, table = last_line("ruyi-prefill", "machine")  # without ruyi-family before it
    failed, ran = found["results"]["ruyi-prefill"], found["results"]["machine"]
    assert status == 1 and not failed["ok"] and "config.json" in failed["error"]
    assert ran["ok"] and ran["copy_gb_per_s"] > 0 and "FAILED: " in table


def test_steps_that_there_is_no_time_for_are_in_the_results() -> None:
    status, found, _ = last_line("--minutes", "0")
    assert status == 1 and list(found["results"]) == list(gpu.STEPS)
    assert all("no time left" in step["error"] for step in found["results"].values())


@pytest.mark.parametrize(
    ("source", "limit_s", "error"),
    [
        ("import time; time.sleep(60)", 0.5, "ended after its limit"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 30, "ended with status -9 and without figures"),
        ("print('{}, almost')", 30, "ended with status 0 and without figures"),
        ("print('first\\n{\"figure\": 1}')", 30, None),
    ],
)
def test_a_step_that_hangs_or_dies_is_a_result(source: str, limit_s: float, error: str | None) -> None:
    found = gpu.run_step([sys.executable, "-c", source], limit_s)
    assert found["ok"] == (error is None) and found["seconds"] > 0
    assert found["figure"] == 1 if error is None else error in found["error"]


def test_reading_an_answer_again_gives_the_most_probable_tokens(oracle: Oracle) -> None:
    family, prompt = oracle.family, [5, 17, 40]
    answer = family.generate(torch.tensor([prompt]), max_new_tokens=6)[0].tolist()
    assert gpu_steps.read_again(family, prompt, answer) == answer
    assert gpu_steps.read_again(family, prompt, [*answer[:2], answer[2] + 1])[2] == answer[2]


def test_the_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    config = FamilyConfig.parse(
        {
            "model_type": "ruyi_qwen2",
            "early_exit_points": [27],
            "num_hidden_layers": 28,
            "rms_norm_eps": 1e-6,
            **{key: value for key, value in gpu_steps.RUYI_7B.items() if key not in ("base", "exits")},
        }
    )
    assert config.num_parameters(27) == pytest.approx(7.07e9, rel=1e-3)
    memory = gpu_steps.Gpu(bytes_per_s=1e12, flops_per_s=1e18).least_s(config, positions=1, sessions=1, context=1000)
    assert memory == pytest.approx((2 * 7.07e9 + 1000 * 28 * 2048) / 1e12, rel=1e-3)
    products = gpu_steps.Gpu(bytes_per_s=1e18, flops_per_s=1e12).least_s(config, positions=9, sessions=1, context=0)
    layers = 28 * config.layer_parameters
    assert products == pytest.approx(2 * (9 * layers + 152064 * 3584) / 1e12, rel=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("make gpu: no NVIDIA GPU can be used here") and err.count("\n") == 1


def test_a_cpu_is_refused_for_the_large_families(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu"])
    assert ended.value.code == 2 and "requires --small" in capsys.readouterr().err


def test_lacking_requirements_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["not-there>=2", "numpy>=99"]\n'
        'optional-dependencies.node = ["torch>=1", "torch>=99"]\n'
        'optional-dependencies.dev = ["pytest>=1", "pytest-not-there", "ruff"]\n'
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    lacks = gpu.unmet_requirements()
    assert [text.split(" (")[0] for text in lacks] == ["not-there>=2", "numpy>=99", "torch>=99", "pytest-not-there"]
    assert lacks[1].startswith("numpy>=99 (has ") and lacks[0].endswith("(not installed)")
