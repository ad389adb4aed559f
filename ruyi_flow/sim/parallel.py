"""Parallel simulations: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ruyi_flow.child_processes import child_processes
from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario

__all__ = ["simulate_all"]


def simulate_all(
    runs: Sequence[tuple[Scenario, str]], *, jobs: int | None = None, ray: str | None = None
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Simulate scenarios in parallel; yield the index and the metrics of each when it ends.

    Closing the generator, or Ctrl-C, stops the simulations that still run.

    Args:
        runs: scenarios, each with the name of its file for error messages.
        jobs: most processes at a time. Default: one per core.
        ray: address of a Ray cluster to run on instead of processes; "local" starts one here.

    Raises:
        ConfigError: a process was killed.
    """
    if not runs:
        return
    if ray is not None:
        yield from _on_ray(runs, ray)
        return
    waiting, running = deque(enumerate(runs)), dict[Any, int]()
    with child_processes(min(len(runs), jobs or _cores()), _answer) as connections:
        try:
            for connection in connections:
                running[connection], run = waiting.popleft()
                connection.send(run)
            while running:
                ready: list[Any] = wait([*running])
                for connection in ready:
                    found, number = connection.recv(), running.pop(connection)
                    if waiting:
                        running[connection], run = waiting.popleft()
                        connection.send(run)
                    if isinstance(found, Exception):
                        raise found
                    yield number, found
        except (EOFError, ConnectionError):
            raise ConfigError(
                "a simulating process was killed (out of memory?); run again with fewer at a time (--jobs)"
            ) from None


def _answer(connection: Connection) -> None:
    """Simulate every scenario that is received, and send its metrics, or the error, back."""
    while True:
        try:
            connection.send(_run(*connection.recv()))
        except (EOFError, ConnectionError):
            return
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            connection.send(error)


def _run(scenario: Scenario, where: str) -> dict[str, Any]:
    return Simulation(scenario, where=where).run().metrics


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_ray(runs: Sequence[tuple[Scenario, str]], address: str) -> Generator[tuple[int, dict[str, Any]], None, None]:
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        remote: Callable[..., Any] = ray.remote(_run).remote
        running = {remote(*run): i for i, run in enumerate(runs)}
        while running:
            for done in ray.wait([*running])[0]:
                yield running.pop(done), ray.get(done)
    finally:
        ray.shutdown()
