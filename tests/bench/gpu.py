"""`make gpu`: all that needs a GPU, on one NVIDIA GPU, in ten minutes; a table, and one line of JSON at the end.

    python -m tests.bench.gpu [STEP …] [--minutes 10] [--device cuda] [--small]

| step | what it does |
|---|---|
| machine | measures how fast the GPU copies memory and multiplies matrices |
| tests | `pytest -m cuda` |
| demo-family | takes the demo family from the store, or writes one of its geometry with random weights |
| nodes | three node processes behind one another must answer as the whole family in one process does |
| demo-decode, demo-prefill, demo-sessions | speed against the GPU's bound and against transformers |
| ruyi-family, ruyi-decode, ruyi-prefill, ruyi-sessions | the same for Ruyi-7B's geometry with random weights |

Each step is a process with a time limit. What a step that fails or hangs has to say is in the results, and the next one
runs. Nothing is fetched from the internet. The exit status is 0 if all steps succeeded, 1 if not, and 2 without a GPU.
`--small` runs all steps with tiny families, also with `--device cpu`: for the tests of this script.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement

STEPS = {
    "machine": 40,
    "tests": 120,
    "demo-family": 40,
    "nodes": 80,
    "demo-decode": 50,
    "demo-prefill": 40,
    "demo-sessions": 70,
    "ruyi-family": 90,
    "ruyi-decode": 90,
    "ruyi-prefill": 70,
    "ruyi-sessions": 110,
}
"""The steps in their order, and the seconds after which each is ended. Each is expected to take half of them."""

ROOT = Path(__file__).parent.parent.parent


def unmet_requirements() -> list[str]:
    """List the requirements of this project and its tests that the packages of this Python do not meet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["node"], *(r for r in extras["dev"] if r.startswith("pytest"))]
    unmet = []
    for requirement in map(Requirement, wanted):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            unmet.append(f"{requirement} (not installed)")
        else:
            if not requirement.specifier.contains(found, prereleases=True):
                unmet.append(f"{requirement} (has {found})")
    return unmet


def run_step(command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a step's process; return the figures that it prints, `ok`, `seconds`, and `error` if it failed."""
    began, error = time.monotonic(), None
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            error = f"it was ended after its limit of {limit_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too; nodes end when it is gone
    found: dict[str, Any] = {}
    if error is None:
        try:
            found = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            error = f"it ended with status {process.returncode} and without figures; see its output"
    if error is not None:
        found["error"] = error
    return {"ok": "error" not in found, "seconds": time.monotonic() - began} | found


def rounded(value: Any) -> Any:
    """Return figures with four digits that count; rows within rows, too."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print each step's figures, one row of figures a line."""
    for name, found in results.items():
        state = "ok" if found["ok"] else f"FAILED: {found.get('error')}"
        print(f"{name:15} {found['seconds']:6.1f} s  {state}")
        figures = {key: value for key, value in found.items() if key not in ("ok", "seconds", "error")}
        rows = {key: value for key, value in figures.items() if isinstance(value, dict)}
        for row, values in ({"": {k: v for k, v in figures.items() if k not in rows}} | rows).items():
            if values:
                print(f"    {row:13}", ", ".join(f"{key} {value}" for key, value in values.items()))


def find_gpu() -> str | None:
    """Return why this Python cannot compute on an NVIDIA GPU; None if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name a Python with a CUDA build of torch: make gpu PYTHON=…"
    if torch.cuda.is_available():
        return None
    build = torch.version.cuda or "none: it is a CPU build"
    return f"no NVIDIA GPU can be used here (torch {torch.__version__}, CUDA {build})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help="steps to run, in this order (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="end after this many minutes (default: 10)")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--small", action="store_true", help="tiny families and sizes, for tests of this script")
    given = parser.parse_args(arguments)
    if given.device == "cpu" and not given.small:
        parser.error("--device cpu requires --small: the families are too large for it")
    if given.device != "cpu" and (reason := find_gpu()):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    if unmet := unmet_requirements():
        print(
            f"{sys.executable} lacks {', '.join(unmet)}. Steps that need them may fail. Install them into this Python, "
            "or into a folder that PYTHONPATH names.",
            file=sys.stderr,
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the step that runs, and prints what there is
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    deadline = time.monotonic() + 60 * given.minutes - 10  # 10 s to end the last step and to remove the families
    results: dict[str, dict[str, Any]] = {}
    machine = {"torch": version("torch"), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    names, sizes = given.steps or [*STEPS], "small" if given.small else "full"
    with TemporaryDirectory(prefix="ruyi-flow-gpu-") as folder:
        try:
            for name in names:
                # Tiny families on a busy machine: only a step that hangs must be ended.
                limit_s = min(STEPS[name] * (5 if given.small else 1), deadline - time.monotonic())
                print(f"{name}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "tests.bench.gpu_steps", name, folder, given.device, sizes]
                results[name] = (
                    rounded(run_step(command, limit_s)) if limit_s > 0 else not_run("there was no time left")
                )
                machine |= results[name].pop("machine", {})
                print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pass
    results |= {name: not_run("interrupted") for name in names if name not in results}
    print_table(results)
    settings = {"device": given.device, "sizes": sizes, "minutes": given.minutes, "unmet_requirements": unmet}
    print(json.dumps({"bench": "gpu", "settings": settings, "results": results, "machine": machine}))
    return int(not all(found["ok"] for found in results.values()))


def not_run(reason: str) -> dict[str, Any]:
    """Return the result of a step that did not run, or not to its end."""
    return {"ok": False, "seconds": 0.0, "error": reason}


if __name__ == "__main__":
    sys.exit(main())
