"""Files, signals, cores and ports where the system has other rules."""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ruyi_flow.bench.measurement import available_cores
from ruyi_flow.cli.options import on_end_of_input, on_signals
from ruyi_flow.config.topology import Node
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.harness import ResultCache
from ruyi_flow.serving.node import stay_on_cores
from ruyi_flow.serving.supervisor import _in_use
from ruyi_flow.testing import free_ports


@pytest.fixture
def plain_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Event loops without signal handlers, as on Windows, for the test."""

    def refuse(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", refuse)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_on_a_loop_without_signal_handlers(number: signal.Signals, plain_loop: None) -> None:
    async def wait() -> None:
        stop = on_signals()
        asyncio.get_running_loop().call_later(0.05, signal.raise_signal, number)
        await stop.wait()

    asyncio.run(wait())
    with pytest.raises(KeyboardInterrupt):  # the loop is closed
        signal.raise_signal(number)


def test_the_end_of_standard_input_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = os.pipe()
    real = os.read
    monkeypatch.setattr(os, "read", lambda file, size: real(theirs if file == 0 else file, size))

    async def wait() -> None:
        stop = asyncio.Event()
        on_end_of_input(stop)
        os.write(ours, b"input that nobody reads\n")
        await asyncio.sleep(0.05)
        assert not stop.is_set()
        os.close(ours)
        await stop.wait()

    asyncio.run(wait())
    os.close(theirs)


def test_a_system_without_pinning_refuses_cores_and_lists_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    assert available_cores() == []
    stay_on_cores(Node(name="a", exits=(2,)), "file")
    with pytest.raises(ConfigError, match="file: node 'a': cores: this system cannot pin a process to cores; remove"):
        stay_on_cores(Node(name="a", exits=(2,), cores=(0,)), "file")


async def test_a_port_in_use_is_found_with_the_option_that_windows_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = free_ports(1)
    # On Windows, SO_REUSEADDR would bind the port all the same, as SO_REUSEPORT does here.
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    monkeypatch.setattr(socket, "SO_REUSEADDR", socket.SO_REUSEPORT)
    assert not await _in_use("127.0.0.1", port)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert await _in_use("127.0.0.1", port)


def test_a_cache_of_results_keeps_its_bytes_where_lines_end_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "linesep", "\r\n")  # Python's own implementation of files obeys it
    monkeypatch.setattr(Path, "open", lambda path, mode, **options: _pyio.open(path, mode, **options))
    for i in range(3):
        with ResultCache(tmp_path / "known") as cache:
            for j in range(5):
                cache[f"é{i}{j}"] = 5 * i + j
    with ResultCache(tmp_path / "known") as cache:
        assert [cache[f"é{i}{j}"] for i in range(3) for j in range(5)] == list(range(15))
