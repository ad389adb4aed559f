"""What must hold after a trial: the tokens are right, nothing hangs, and nothing is left behind."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence

from ruyi_flow.errors import NodeError
from tests.robustness.cluster import Cluster, Node
from tests.robustness.traffic import Answer

__all__ = ["longest_wait", "problems_at_rest", "problems_of", "running_tasks", "tasks_left"]

_REST_S = 15.0
"""Seconds in which a node must have given back what a session had, also on a busy machine."""

_SPARE_FDS = 3
"""File descriptors that a node may have more than at first: connections come and go at any moment."""


_OF_GRPC = re.compile(
    r"Traceback \(most recent call last\):\n  File .*server\.pyx\.pxi.*_schedule_rpc_coro\n"
    r"asyncio\.exceptions\.CancelledError\n"
)
"""What gRPC prints, past the log, of a call that arrives in the moment in which its server ends. It means nothing."""


def problems_of(answer: Answer, expected: Answer) -> list[str]:
    """Return what is wrong with an answer, whether it is complete or ended in an error."""
    got, wanted = answer.decided, expected.decided
    wrong = next((i for i, pair in enumerate(got) if i >= len(wanted) or pair != wanted[i]), None)
    if wrong is not None:
        there = wanted[wrong] if wrong < len(wanted) else "nothing"
        return [f"token {wrong} is {got[wrong]} and not {there} (token, exit) of {len(wanted)} tokens"]
    if answer.error is not None:
        return [] if isinstance(answer.error, NodeError) else [f"a fault of a node was told as {answer.error!r}"]
    if answer.text is None:
        return ["the answer did not end"]
    if len(got) != len(wanted):
        return [f"the answer ended after {len(got)} of {len(wanted)} tokens"]
    streamed = "".join(token.text for token in answer.tokens)
    if not answer.text == streamed == expected.text:
        return [f"the text is {answer.text!r}, as streamed {streamed!r}, and not {expected.text!r}"]
    for i, (token, other) in enumerate(zip(answer.tokens, expected.tokens, strict=True)):
        if (token.logprobs is None) != (other.logprobs is None):
            return [f"token {i} has log-probabilities {token.logprobs} and not {other.logprobs}"]
        if token.logprobs and other.logprobs and abs(token.logprobs.logprob - other.logprobs.logprob) > 1e-3:
            return [f"token {i} has log-probability {token.logprobs.logprob} and not {other.logprobs.logprob}"]
    return []


def longest_wait(answers: Sequence[Answer], fault_at: float) -> float | None:
    """Return the longest time that an answer under way waited for a token from the fault on; None if there was none.

    Tokens that were on their way at the fault arrive at once, so the first wait alone would tell nothing.
    """
    waits = []
    for answer in answers:
        arrivals = [answer.began, *answer.times]
        waits += [
            after - max(before, fault_at)
            for before, after in zip(arrivals, arrivals[1:], strict=False)
            if after > fault_at
        ]
    return max(waits, default=None)


def running_tasks() -> Counter[str]:
    """Return the functions that this event loop's tasks run, without those of relays and of gRPC's core."""
    names = Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return Counter({name: count for name, count in names.items() if not name.startswith(("Relay", "AioServer"))})


async def tasks_left(before: Counter[str]) -> list[str]:
    """Return the tasks that are running and were not before, after they had time to end."""
    deadline = time.monotonic() + _REST_S
    while left := running_tasks() - before:
        if time.monotonic() > deadline:
            return [f"{count} tasks are left that run {name}" for name, count in left.items()]
        await asyncio.sleep(0.01)
    return []


async def problems_at_rest(cluster: Cluster) -> list[str]:
    """Return what the nodes have kept of the trial, after they had time to forget it, and what their logs say."""
    found = await asyncio.gather(*(_left_on(cluster, node) for node in cluster.nodes))
    return [problem for problems in found for problem in problems]


async def _left_on(cluster: Cluster, node: Node) -> list[str]:
    problems: list[str] = []
    deadline = time.monotonic() + _REST_S
    most_fds = cluster.fds.get(node.name, 10_000) + _SPARE_FDS
    while True:
        try:
            status = await node.status()
        except NodeError as error:
            return [str(error)]
        left = {
            "sessions": status.sessions,
            "KV positions": status.used_positions,
            "waiting sessions": status.waiting,
            f"file descriptors over {most_fds}": max(0, node.num_fds() - most_fds),
        }
        if not any(left.values()):
            break
        if time.monotonic() > deadline:
            problems += [f"{node.name} still has {count} {what}" for what, count in left.items() if count]
            break
        await asyncio.sleep(0.02)
    log = _OF_GRPC.sub("", node.new_log())
    if re.search(r"Traceback|\bERROR\b", log):
        problems.append(f"{node.name} logs an error:\n{log}")
    return problems
