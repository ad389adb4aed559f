"""A rolling update: the replicas of a node are ended and started one after the other, while users ask."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from ruyi_flow.client import AsyncClient
from tests.robustness.cluster import Cluster
from tests.robustness.traffic import Answer, Conversation, Turn, expected_answers, hold
from tests.robustness.trial import ready_cluster
from tests.robustness.validate import problems_of

USERS = 8


def conversation(user: int) -> Conversation:
    """Return a chat of two turns that needs every node."""
    options = {"mode": "exact", "draft": user % 3, "max_new_tokens": 60, "eos_token_ids": ()}
    return Conversation((Turn((5, 6, 7 + user), options), Turn((8,), options)))


@pytest.mark.parametrize("node", [0, 2], ids=["the entry node", "the deepest node"])
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system ends processes without a signal that they see")
@pytest.mark.timeout(180)
async def test_a_rolling_restart_changes_no_answer(tmp_path: Path, node: int) -> None:
    async with ready_cluster(tmp_path, replicas=2, grace_s=20) as cluster:
        conversations = [conversation(user) for user in range(USERS)]
        expected = await expected_answers(cluster.whole, conversations)
        over = asyncio.Event()

        async def ask(user: int) -> list[Answer]:
            answers: list[Answer] = []
            async with AsyncClient(cluster.topology, max_retries=0) as client:
                while not over.is_set():
                    held: list[Answer] = []
                    await hold(client, conversations[user], held)
                    answers += held
            return answers

        asking = [asyncio.create_task(ask(user)) for user in range(USERS)]
        await asyncio.sleep(0.5)
        for replica in range(2):
            await restart(cluster, node + 3 * replica)
        over.set()
        given = await asyncio.gather(*asking)
    recoveries = []
    for user, answers in enumerate(given):
        for i, answer in enumerate(answers):
            assert answer.error is None
            assert not problems_of(answer, expected[user][i % 2])
            recoveries += answer.recoveries
    name = "entry node" if node == 0 else f"n{node}"
    assert set(recoveries) == {f"{name}: left"}


async def restart(cluster: Cluster, number: int) -> None:
    """End a process as an update does, and start another one in its place once it has moved its sessions."""
    process = cluster.nodes[number]
    process.send(signal.SIGTERM)
    await process.ended()
    assert process.exit_code == 0
    process.start()
    await process.status()
