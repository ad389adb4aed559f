"""Simulations side by side: over processes of this machine, or over a Ray cluster."""

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

__all__ = ["play"]


def play(
    runs: Sequence[tuple[Scenario, str]], *, jobs: int | None = None, ray: str | None = None
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Simulate scenarios in parallel; gives the number and the metrics of each as it ends.

    Closing the iterator, or Ctrl-C, ends what still runs.

    Args:
        runs: with their names for messages.
        jobs: processes at a time; all cores' when left out.
        ray: address of a Ray cluster to run on instead; "local" starts one here.

    Raises:
        ConfigError: Ray is asked for and not installed; or a process was killed.
    """
    if not runs:
        return
    if ray is not None:
        yield from _on_ray(runs, ray)
        return
    before = set(multiprocessing.active_children())
    most = min(len(runs), jobs or _cores())
    pool = ProcessPoolExecutor(most, multiprocessing.get_context("spawn"), initializer=_begin)
    whole = False
    try:
        futures = {pool.submit(_run, *run): i for i, run in enumerate(runs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
        whole = True
    except BrokenProcessPool:
        raise ConfigError(
            "a process that simulated has ended (out of memory?); take fewer at a time (--jobs) and run it again"
        ) from None
    finally:
        if whole:
            pool.shutdown()
        else:
            processes = set(multiprocessing.active_children()) - before
            for process in processes:
                process.kill()
            # Nor is the pool waited for: it may wait for what a process did not send to its end.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.join()


def _run(scenario: Scenario, where: str) -> dict[str, Any]:
    return Simulation(scenario, where=where).run().metrics


def _begin() -> None:
    """In a process that simulates: Ctrl-C is for its parent, without which it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_ray(runs: Sequence[tuple[Scenario, str]], address: str) -> Generator[tuple[int, dict[str, Any]], None, None]:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray: Ray is not installed; pip install 'ruyi-flow[ray]'") from None
    ray.init(address=address, log_to_driver=False)
    try:
        remote: Callable[..., Any] = ray.remote(_run).remote
        left = {remote(*run): i for i, run in enumerate(runs)}
        while left:
            for done in ray.wait([*left])[0]:
                yield left.pop(done), ray.get(done)
    finally:
        ray.shutdown()
