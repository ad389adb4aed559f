"""Generated code runs in a separate process with limits."""

import os
import time
from pathlib import Path

import pytest

from ruyi_flow.evaluation.sandbox import passes


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
