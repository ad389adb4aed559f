"""What a check finds, and how a check is kept from waiting for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

__all__ = ["Check", "Group", "Mark", "ended", "on_thread"]

T = TypeVar("T")


class Mark(StrEnum):
    """How a check ended."""

    OK = "ok"
    """Nothing is wrong."""
    WARNING = "warning"
    """Something may get in the way."""
    FAILED = "failed"
    """Something does not work."""


class Group(StrEnum):
    """What a check is about."""

    MACHINE = "this machine"
    """This machine's software, processor, memory and store."""
    TOPOLOGY = "topology"
    """The topology file, and what it needs on this machine."""
    NODES = "nodes"
    """Each node: whether it is reached, serves, and agrees with the topology and the other nodes."""
    LINKS = "links"
    """Each link: from here to the nodes, and from each node to the next one."""


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found."""

    group: Group
    """What it is about."""
    name: str
    """A short name: python, memory, a node's name, a link as `device → edge`."""
    mark: Mark
    """How it ended."""
    text: str
    """What was found, in one sentence."""
    fix: str = ""
    """What to do about it; empty if nothing has to be done."""


def ended(text: str) -> str:
    """Return a sentence with a full stop, unless it ends with a mark already, as the errors of others may."""
    return text if text.endswith((".", "?", "!", "…")) else f"{text}."


async def on_thread(function: Callable[[], T], *, limit_s: float) -> T:
    """Run a blocking function on a thread that does not keep the process alive, and wait for its result.

    Args:
        function: the function. It goes on when the time is over, and its result is dropped.
        limit_s: seconds to wait.

    Raises:
        TimeoutError: the time is over.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(limit_s):
        return await future
