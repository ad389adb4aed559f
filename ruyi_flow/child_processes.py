"""Child processes that compute for this one: Ctrl-C reaches only their parent, and they end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["child_processes"]


@contextmanager
def child_processes(count: int, target: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Run target(connection, *arguments) in `count` new processes; they are killed when the block is left.

    They share no lock and no queue, so killing one breaks nothing of another. A process that ends early closes its
    connection: receiving from it raises EOFError.

    Args:
        count: number of processes.
        target: a function of a module, whose first argument is the process's end of its connection.
        arguments: further arguments of the function.

    Yields:
        This process's end of each connection.
    """
    context = multiprocessing.get_context("spawn")
    children: list[Any] = []
    with ExitStack() as stack:
        try:
            connections = []
            with _interrupt_delayed():
                for _ in range(count):
                    ours, theirs = context.Pipe()
                    connections.append(stack.enter_context(ours))
                    child = context.Process(target=_run, args=(theirs, target, *arguments), daemon=True)
                    child.start()
                    children.append(child)
                    theirs.close()  # the child's copy is the only one, so that its end is noticed
            yield connections
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.join()


def _run(connection: Connection, target: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    target(connection, *arguments)


@contextmanager
def _interrupt_delayed() -> Iterator[None]:
    """Block SIGINT during the block, so that processes started in it inherit this and import without stack traces."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it later would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
