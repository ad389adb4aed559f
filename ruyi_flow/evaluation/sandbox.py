"""HumanEval: completions that a model wrote are run, each in a process of its own with limits.

The limits are on time, memory, files, processes and output; they stop accidents, not attacks. Run it in a container or
a virtual machine when the model is not your own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

__all__ = ["HUMANEVAL", "passes"]

_LIMITED = """
import os, resource, sys
for what, most in (("CPU", 5), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NOFILE", 32), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
exec(compile(sys.stdin.read(), "completion", "exec"), {"__name__": "__main__"})
os._exit(77)
"""
_REACHED_THE_END = 77
"""A program that leaves early, with whatever status, has not passed its tests."""


def passes(program: str, *, timeout_s: float = 10.0) -> bool:
    """Whether a program reaches its end, without an error, within its limits; nothing that it started is left."""
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, or what it left behind
            process.wait()
        return process.returncode == _REACHED_THE_END


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Share of the problems whose first completion passes its tests (Chen et al. 2021, with one sample)."""
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
"""The harness's task of this name. Its own metric is fetched from a hub and runs completions in this process's fork."""
