"""Parallel simulations: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

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
    before = set(multiprocessing.active_children())
    most = min(len(runs), jobs or _cores())
    pool = ProcessPoolExecutor(most, multiprocessing.get_context("spawn"), initializer=_prepare)
    finished = False
    try:
        futures = {pool.submit(_run, *run): i for i, run in enumerate(runs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
        finished = True
    except BrokenProcessPool:
        raise ConfigError(
            "a simulating process was killed (out of memory?); run again with fewer at a time (--jobs)"
        ) from None
    finally:
        if finished:
            pool.shutdown()
        else:
            processes = set(multiprocessing.active_children()) - before
            for process in processes:
                process.kill()
            # Do not wait for the pool: it may itself wait for the rest of what a killed process was sending.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.join()


def _run(scenario: Scenario, where: str) -> dict[str, Any]:
    return Simulation(scenario, where=where).run().metrics


def _prepare() -> None:
    """Prepare a simulating process: it leaves Ctrl-C to its parent, and exits when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


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
