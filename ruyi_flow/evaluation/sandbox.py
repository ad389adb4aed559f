"""HumanEval, which runs the code that a model wrote, each completion in a process with limits.

The limits on time, memory, files, processes and output stop accidents, not attacks. Use a container or a virtual
machine for models that you do not trust. macOS has no limit on memory, and Windows has none of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from typing import Any

from ruyi_flow.errors import ConfigError

__all__ = ["HUMANEVAL", "check_limits", "passes"]

_LIMITED = """
import os, resource, sys
for what, most in (("CPU", 5), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NOFILE", 32), ("NPROC", 0), ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
    except ValueError:
        if what != "AS":  # macOS refuses to limit the memory
            raise
exec(compile(sys.stdin.read(), "completion", "exec"), {"__name__": "__main__"})
os._exit(77)
"""
_REACHED_THE_END = 77
"""Exit status of a program that reached its end; a program that exits early has not passed its tests."""


def check_limits() -> None:
    """Check that this system can limit what a process uses.

    Raises:
        ConfigError: it cannot, as Windows.
    """
    if find_spec("resource") is None:
        raise ConfigError(
            "humaneval runs code that the model wrote, and this system has no limits for it; run it on Linux or macOS"
        )


def passes(program: str, *, timeout_s: float = 10.0) -> bool:
    """Run a program and its children with limits; tell whether it reached its end without an error."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # Of a group whose processes have ended, Linux says that there is none, and macOS that it is not permitted.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # the program, or children that it left behind
            process.wait()
        return process.returncode == _REACHED_THE_END


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Return the share of problems whose first completion passes its tests (Chen et al. 2021, with one sample)."""
    pairs = zip(predictions, references, strict=True)
    passed = [passes(f"{completions[0]}\n{test}") for completions, test in pairs]
    return sum(passed) / len(passed)


def _completed(responses: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]


HUMANEVAL: dict[str, Any] = {
    "task": "humaneval",
    "unsafe_code": True,
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "metric_list": [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 512,
        "do_sample": False,
    },
    "repeats": 1,
    "num_fewshot": 0,
    "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": _completed}]}],
}
"""The harness's task with another metric: its own is downloaded, and runs completions in a fork of this process."""
