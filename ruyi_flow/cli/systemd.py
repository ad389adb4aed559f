"""Messages to systemd about the daemon that it has started: it serves, it lives, it ends (sd_notify(3))."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

__all__ = ["watched_by_systemd"]

_BEATS = 3
"""Signs of life within the time after which systemd takes the process to hang."""


@asynccontextmanager
async def watched_by_systemd(is_stuck: Callable[[], bool] = lambda: False) -> AsyncIterator[Callable[[str], None]]:
    """Send signs of life to systemd while the block lasts and the event loop runs, if the unit has a WatchdogSec.

    It yields a function that sends other messages, such as READY=1. Without systemd, nothing is sent.

    Args:
        is_stuck: returns whether the process hangs in another thread, so that no sign of life may be sent.
    """
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name:
        yield lambda message: None
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        address = f"\0{name[1:]}" if name.startswith("@") else name

        def tell(message: str) -> None:
            with suppress(OSError):  # systemd is busy, or gone; the next sign of life is soon due
                sender.sendto(message.encode(), address)

        beating = asyncio.create_task(_beat(tell, is_stuck))
        try:
            yield tell
        finally:
            beating.cancel()
            await asyncio.wait({beating})


async def _beat(tell: Callable[[str], None], is_stuck: Callable[[], bool]) -> None:
    """Send signs of life for ever, as often as the unit asks for them."""
    limit_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    while limit_s:
        if not is_stuck():
            tell("WATCHDOG=1")
        await asyncio.sleep(limit_s / _BEATS)
