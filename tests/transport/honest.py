"""Callers that keep to the protocol while a node is attacked, and what a run of the fuzzer has seen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import CapacityError, DeadlineExceeded
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.peer import Peer
from ruyi_flow.transport.remote import RemoteStage
from ruyi_flow.types import Block

__all__ = ["HIDDEN", "PATIENCE_S", "Honest", "Report"]

HIDDEN = 32

PATIENCE_S = 60.0
"""Seconds after which a call that has no answer is a fault."""

OPTIONS: list[dict[str, Any]] = [
    {"mode": "exact", "draft": 3},
    {"mode": "token", "threshold": 0.4, "draft": 2},
    {"mode": "cascade", "threshold": 0.3, "window": 3},
    {"mode": "exact", "temperature": 0.8, "top_k": 20, "seed": 7},
    {"mode": "fixed", "exit": 4},
]
"""What the honest callers ask with."""


@dataclass
class Report:
    """What a run of the fuzzer has seen."""

    messages: int = 0
    """Messages sent."""
    conversations: int = 0
    honest: int = 0
    """Answers of honest callers that were checked."""
    refused: int = 0
    """Honest requests that found the nodes full."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """How hostile calls and messages were answered, and how often."""
    worst_stop_s: float = 0.0
    """Longest time that the event loop of callers and nodes computed without a pause, other processes left out."""
    grown_mb: int = 0
    """How much memory the process had more at the most than before."""
    faults: list[str] = field(default_factory=list)
    """What must not happen."""


STATES = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(5))
IDS = tuple(3 + i * 7 % 50 for i in range(12))


async def over_a_hop(peer: Peer, opening: pb.Open) -> list[Any]:
    """A session with node n1 as node n0 has it: a prompt, then position after position."""
    stage = RemoteStage(peer, codec.open_from_pb(opening), timeout_s=PATIENCE_S)
    decisions: list[Any] = []
    try:
        for start, stop in ((0, 6), *((i, i + 1) for i in range(6, 12))):
            block = Block(start, STATES[start:stop], IDS[start:stop], (stop - 1,))
            decisions += (await stage.advance(block)).decisions
    finally:
        await stage.close()
    return decisions


async def look(peer: Peer) -> list[Any]:
    """Ask node n1 for its status and its link to n2; no decision comes back, and an error would be a fault."""
    status = await peer.status(timeout_s=PATIENCE_S, measure_link=True)
    if status.link is None:
        raise ValueError(f"the link was not measured: {status.link_error}")
    return []


class Honest:
    """Callers that keep to the protocol, and the answers that each of them gets when it is alone."""

    def __init__(self, client: AsyncClient, peer: Peer, opening: pb.Open, report: Report) -> None:
        self._report = report
        self._jobs: list[Callable[[], Coroutine[Any, Any, list[Any]]]] = [
            *(partial(self._ask, client, options) for options in OPTIONS),
            *[partial(over_a_hop, peer, opening)] * 3,  # these share batches
            partial(look, peer),
        ]
        self._alone: list[list[Any]] = []

    @staticmethod
    async def _ask(client: AsyncClient, options: dict[str, Any]) -> list[Any]:
        reply = await client.generate(
            [5, 17, 9, 33], max_new_tokens=10, eos_token_ids=(), timeout_s=PATIENCE_S, **options
        )
        return list(reply.tokens)

    async def learn(self) -> None:
        """Ask one after the other, and then all at once, so that the streams are open that sessions share."""
        self._alone = [await job() for job in self._jobs]
        await asyncio.gather(*(job() for job in self._jobs))

    async def go_on(self, which: int, done: asyncio.Event) -> None:
        """Ask again and again."""
        while not done.is_set():
            try:
                got = await self._jobs[which]()
            except (CapacityError, DeadlineExceeded):
                self._report.refused += 1
                await asyncio.sleep(0.05)
                continue
            except Exception as error:
                self._report.faults.append(f"honest caller {which}: {type(error).__name__}: {error}")
                continue
            self._report.honest += 1
            if [_what(a) for a in got] != [_what(a) for a in self._alone[which]]:
                self._report.faults.append(f"honest caller {which} got {got}, alone {self._alone[which]}")

    @property
    def count(self) -> int:
        return len(self._jobs)


def _what(answer: Any) -> tuple[int, int, float]:
    """Token, exit and confidence, rounded: sums of floating point numbers depend on who else is in a step."""
    token = answer.id if hasattr(answer, "id") else answer.token
    return token, answer.exit, round(answer.confidence, 2)
