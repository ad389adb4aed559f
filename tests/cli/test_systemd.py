"""What a node tells systemd; a socket of this test is in the place of systemd's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ruyi_flow.testing import free_ports
from tests.cli.conftest import COMMAND, SHELL

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no systemd")


@pytest.fixture
def told() -> Iterator[socket.socket]:
    """The socket that a daemon sends its messages to: an abstract one, as systemd may use."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0ruyi-flow-test-{os.getpid()}")
        receiver.settimeout(30)
        yield receiver


@pytest.fixture
def file(tmp_path: Path, tiny: Path) -> Path:
    """A topology of one node."""
    node = {"name": "whole", "address": f"127.0.0.1:{free_ports(1)[0]}", "exits": [2, 4, 6], "threads": 1}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"family": str(tiny), "nodes": [node]}))
    return path


def until_told(told: socket.socket, message: str) -> list[str]:
    """The messages up to one of this text."""
    messages = [told.recv(100).decode()]
    while messages[-1] != message:
        messages.append(told.recv(100).decode())
    return messages


def test_systemd_is_told_that_a_node_serves_lives_and_ends(file: Path, told: socket.socket) -> None:
    name = str(told.getsockname().decode()).replace("\0", "@")
    environment = SHELL | {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "300000"}
    with subprocess.Popen([*COMMAND, "node", "whole", "-t", str(file)], env=environment) as process:
        try:
            until_told(told, "READY=1")
            assert [told.recv(100) for _ in range(5)] == [b"WATCHDOG=1"] * 5
            process.send_signal(signal.SIGSTOP)  # it hangs: no sign of life arrives
            told.settimeout(1)
            with pytest.raises(TimeoutError):
                until_told(told, "none")
            process.send_signal(signal.SIGCONT)
            told.settimeout(30)
            process.terminate()
            assert set(until_told(told, "STOPPING=1")) <= {"WATCHDOG=1", "STOPPING=1"}
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_unit_without_a_watchdog_gets_no_signs_of_life(file: Path, told: socket.socket) -> None:
    name = str(told.getsockname().decode()).replace("\0", "@")
    with subprocess.Popen([*COMMAND, "node", "whole", "-t", str(file)], env=SHELL | {"NOTIFY_SOCKET": name}) as process:
        assert until_told(told, "READY=1") == ["READY=1"]
        process.terminate()
        assert until_told(told, "STOPPING=1") == ["STOPPING=1"]
