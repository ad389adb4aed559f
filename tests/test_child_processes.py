"""Child processes: what they answer, and that none outlives its block or its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

import psutil
import pytest

from ruyi_flow.child_processes import child_processes

pytestmark = pytest.mark.timeout(60)


def double(connection: Connection, factor: int) -> None:
    """Send back numbers that are received, and this process's id."""
    while True:
        connection.send((factor * connection.recv(), os.getpid()))


def leave(connection: Connection) -> None:
    """End at once."""


def sleep(connection: Connection) -> None:
    """Say that this process runs, and never end."""
    connection.send(os.getpid())
    while True:
        time.sleep(1)


def test_each_process_answers_and_none_outlives_the_block() -> None:
    with child_processes(2, double, 10) as connections:
        for number, connection in enumerate(connections):
            connection.send(number)
        answers = [connection.recv() for connection in connections]
    assert [answer for answer, _ in answers] == [0, 10]
    assert not any(psutil.pid_exists(pid) for _, pid in answers)


def test_an_early_end_is_noticed() -> None:
    with child_processes(1, leave) as [connection], pytest.raises(EOFError):
        connection.recv()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_leaves_ctrl_c_to_its_parent() -> None:
    with child_processes(1, sleep) as [connection]:
        pid = connection.recv()
        os.kill(pid, signal.SIGINT)
        assert psutil.Process(pid).is_running() and not connection.poll(0.2)


def test_processes_end_with_a_parent_that_is_killed() -> None:
    code = (
        "from ruyi_flow.child_processes import child_processes\nfrom tests.test_child_processes import sleep\n"
        "if __name__ == '__main__':\n with child_processes(1, sleep) as [connection]:\n"
        "  print(connection.recv(), flush=True)\n  connection.recv()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs([child], timeout=30)[1] == []
