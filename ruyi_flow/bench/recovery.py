"""What a user sees when a node process is lost in the middle of an answer, measured with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruyi_flow.client import AsyncClient
from ruyi_flow.types import NodeStatus

__all__ = ["MOST_DEATHS", "Struck", "strike"]

MOST_DEATHS = 3
"""Number of times that nodes may die under one supervisor, which gives up those that die too often."""


@dataclass(frozen=True, slots=True)
class Struck:
    """An answer whose deepest node was lost."""

    times: tuple[float, ...]
    """Time of each token in seconds of one clock."""
    struck_s: float
    """Time of the loss."""
    token_ids: tuple[int, ...]
    """The answer's tokens."""

    @property
    def _longest(self) -> tuple[float, float]:
        """The longest time without a token that ends after the loss, as (from, to)."""
        pairs = [pair for pair in zip(self.times, self.times[1:], strict=False) if pair[1] >= self.struck_s]
        return max(pairs, key=lambda pair: pair[1] - pair[0])

    @property
    def pause_s(self) -> float:
        """Seconds between the last token before the loss is felt and the next one."""
        start, stop = self._longest
        return stop - start

    @property
    def wait_s(self) -> float:
        """Seconds from the loss until that next token."""
        return self._longest[1] - self.struck_s


async def strike(
    client: AsyncClient, ids: Sequence[int], sent: signal.Signals, *, before: int, after: int, delay_s: float = 0.0
) -> Struck:
    """Ask for an answer, signal the replica of the deepest node in use in the middle, and wait until all nodes serve.

    Args:
        client: a client of supervised nodes, the deepest of which has replicas.
        ids: token ids of the prompt.
        sent: SIGKILL to end the process, or SIGSTOP to let it hang.
        before: tokens before the signal.
        after: tokens after it, at least.
        delay_s: seconds by which the signal comes later.
    """
    options: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": before + after, "eos_token_ids": ()}
    times: list[float] = []
    striking: asyncio.Task[tuple[int, float]] | None = None
    async with client.stream(ids, **options) as stream:
        async for _ in stream:
            times.append(time.perf_counter())
            if len(times) == before:
                striking = asyncio.create_task(_signal(client, sent, delay_s))
    assert striking is not None, "the answer ended before the signal"
    process_id, struck_s = await striking
    if sent == signal.SIGSTOP:  # its supervisor would notice, too
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    await _until_all_serve(client)
    return Struck(tuple(times), struck_s, tuple(token.id for token in stream.tokens))


async def _signal(client: AsyncClient, sent: signal.Signals, delay_s: float) -> tuple[int, float]:
    """Signal the replica in use; return its process id and the time."""
    await asyncio.sleep(delay_s)
    states = await client.status()
    used = next(s.process_id for s in states.values() if isinstance(s, NodeStatus) and not s.next_node and s.sessions)
    struck_s = time.perf_counter()
    os.kill(used, sent)
    return used, struck_s


async def _until_all_serve(client: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while any(not isinstance(s, NodeStatus) for s in (await client.status()).values()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
