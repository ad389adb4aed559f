"""Generated code runs in a separate process with limits."""

import os
import sys
import time
from pathlib import Path

import pytest

from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation import sandbox
from ruyi_flow.evaluation.sandbox import check_limits, passes


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert sum(range(4)) == 6", True),
        ("assert 1 == 2", False),
        ("def f(:", False),
        ("import sys; sys.exit(3)", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = bytearray(2 << 30)", False),
        ("open('x', 'wb').write(b'x' * (2 << 20))", False),
        ("import os; assert 'HOME' not in os.environ and os.listdir('.') == []", True),
        ("print('x' * 10_000_000)", True),
    ],
)
def test_programs(program: str, expected: bool) -> None:
    assert passes(program) is expected


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(mark)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    assert not passes(program, timeout_s=3.0)  # the program would outlast the test
    if mark.exists():  # the limit on processes does not apply to root
        pid = int(mark.read_text())
        for _ in range(100):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
                break
            time.sleep(0.05)
        else:
            pytest.fail("its child is still there")


REFUSES = """
import resource
real = resource.setrlimit
def refuse(what, limits):
    if what == resource.RLIMIT_{name}:
        raise ValueError("current limit exceeds maximum limit")
    real(what, limits)
resource.setrlimit = refuse
"""


def test_a_system_that_cannot_limit_memory_keeps_the_other_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limited = sandbox._LIMITED
    monkeypatch.setattr(sandbox, "_LIMITED", REFUSES.format(name="AS") + limited)  # as macOS does
    assert passes("assert True") and not passes("open('x', 'wb').write(b'x' * (2 << 20))")
    monkeypatch.setattr(sandbox, "_LIMITED", REFUSES.format(name="CPU") + limited)
    assert not passes("assert True")


def test_a_group_of_processes_that_macos_calls_forbidden_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(group: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "killpg", forbid)
    assert passes("assert True")


def test_a_system_without_limits_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    check_limits()
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    with pytest.raises(ConfigError, match="this system has no limits for it; run it on Linux or macOS"):
        check_limits()
