"""The trials: drawn alike from a seed, and able to notice what they are there to notice."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import NodeUnavailable, RequestError
from ruyi_flow.types import Reason, Token
from tests.robustness import validate
from tests.robustness.cluster import Cluster
from tests.robustness.faults import KINDS, Fault, Kind
from tests.robustness.report import failure_text, rows_of, to_json, write_page
from tests.robustness.traffic import Answer, Conversation, Turn
from tests.robustness.trial import Outcome, Trial, ready_cluster, run_trial
from tests.robustness.validate import longest_wait, problems_at_rest, problems_of, tasks_left

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process"),
]

COMMAND = [sys.executable, "-m", "tests.robustness"]


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with ready_cluster(tmp_path) as running:
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes get little time to come to rest."""
    monkeypatch.setattr(validate, "_REST_S", 0.2)


def token(id: int, exit: int = 1) -> Token:
    return Token(id, chr(id), exit, "n0", 0.5, Reason.CONFIDENT)


def answer(*tokens: Token, **changes: Any) -> Answer:
    complete = Answer(0.0, list(tokens), text="".join(one.text for one in tokens))
    return replace(complete, **changes)


def fault(kind: Kind, **changes: Any) -> Fault:
    given: dict[str, Any] = {"target": 1, "share": 0.5, "then_s": 0.0, "length_s": 0.1, "up": True, "offset": 0}
    return Fault(kind, **(given | {"bits": 1, "delay_s": 0.1, "bytes_per_s": 1e5} | changes))


def test_a_trial_follows_from_its_seed_and_its_number() -> None:
    trials = [Trial.draw(1, number) for number in range(200)]
    assert trials[7] == Trial.draw(1, 7) != Trial.draw(2, 7)
    assert {trial.kind for trial in trials} == set(KINDS)
    assert all(len(trial.faults) == 1 + (trial.kind is Kind.TWO) for trial in trials)
    modes = {turn.options["mode"] for trial in trials for held in trial.conversations for turn in held.turns}
    assert modes == {"exact", "token", "cascade", "fixed"}
    assert trials[7].command == "python -m tests.robustness --seed 1 --only 7"
    assert Trial.draw(1, 7, 2).command == "python -m tests.robustness --seed 1 --only 7 --replicas 2"


@pytest.mark.parametrize(
    ("got", "problem"),
    [
        (answer(token(65), token(66)), None),
        (answer(token(65), text=None, error=NodeUnavailable("gone")), None),
        (answer(token(65), token(67)), r"token 1 is \(67, 1\) and not \(66, 1\)"),
        (answer(token(65), token(66, exit=3)), r"token 1 is \(66, 3\) and not \(66, 1\)"),
        (answer(token(65), token(65), text=None, error=NodeUnavailable("gone")), "token 1 is"),
        (answer(token(65), token(66), token(66)), "token 2 is .* and not nothing"),
        (answer(token(65)), "ended after 1 of 2 tokens"),
        (answer(token(65), token(66), text="A"), "the text is 'A', as streamed 'AB', and not 'AB'"),
        (answer(token(65), text=None), "did not end"),
        (answer(text=None, error=RequestError("refused")), "a fault of a node was told as RequestError"),
    ],
)
def test_an_answer_is_compared_with_the_one_without_a_fault(got: Answer, problem: str | None) -> None:
    found = problems_of(got, answer(token(65), token(66)))
    if problem is None:
        assert not found
    else:
        [text] = found
        assert re.search(problem, text)


def test_the_wait_that_counts_is_the_longest_one_after_the_fault() -> None:
    held = answer(token(65), token(66), token(67), times=[1.0, 5.0, 5.5])
    assert longest_wait([held], 0.5) == 4.0
    assert longest_wait([held], 2.0) == 3.0  # it had waited for a second already
    assert longest_wait([held, answer(token(65), times=[9.0])], 2.0) == 7.0
    assert longest_wait([held], 6.0) is None


async def test_what_is_left_on_a_node_is_a_problem(nodes: Cluster, hasty: None) -> None:
    assert not await problems_at_rest(nodes)
    async with AsyncClient(nodes.topology) as client:
        stream = client.stream([5, 6, 7], mode="exact", draft=0, max_new_tokens=400, eos_token_ids=())
        await anext(stream)
        left = await problems_at_rest(nodes)
        await stream.close()
    assert {f"n{i}/1 still has 1 sessions" for i in range(3)} <= set(left)
    assert any("KV positions" in problem for problem in left)
    assert not await problems_at_rest(nodes)
    nodes.fds["n2/1"] -= 20
    [problem] = await problems_at_rest(nodes)
    assert "n2/1 still has" in problem and "file descriptors over" in problem
    nodes.fds["n2/1"] += 20
    with nodes.nodes[0].log.open("a") as log:
        log.write("Traceback (most recent call last):\n")
    [problem] = await problems_at_rest(nodes)
    assert problem.startswith("n0/1 logs an error")
    assert not await problems_at_rest(nodes), "a line of the log is told once"
    with nodes.nodes[0].log.open("a") as log:
        log.write("Traceback (most recent call last):\n")
        log.write('  File "src/aio/server.pyx.pxi", line 812, in grpc._cython.cygrpc._schedule_rpc_coro\n')
        log.write("asyncio.exceptions.CancelledError\n")
    assert not await problems_at_rest(nodes), "gRPC prints this by itself"


async def test_a_task_that_a_client_leaves_is_a_problem(hasty: None) -> None:
    before = validate.running_tasks()
    task = asyncio.create_task(asyncio.Event().wait(), name="left")
    await asyncio.sleep(0)
    assert await tasks_left(before) == ["1 tasks are left that run Event.wait"]
    task.cancel()
    assert not await tasks_left(before)


async def test_a_node_that_ends_by_itself_is_a_problem_and_runs_again_afterwards(
    nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(self: Fault, *_: object) -> None:
        os.kill(nodes.nodes[1].pid, signal.SIGKILL)
        await nodes.nodes[1].ended()

    monkeypatch.setattr(Fault, "happen", crash)
    turn = Turn((5, 6, 7), {"exit": 1, "max_new_tokens": 20, "eos_token_ids": ()})
    trial = Trial(1, 0, (Conversation((turn,)),), Kind.KILL, (fault(Kind.KILL),))
    outcome = await run_trial(nodes, trial)
    assert "n1/1 ended with -9" in outcome.problems
    monkeypatch.undo()
    assert (await run_trial(nodes, trial)).identical


async def test_each_kind_of_fault_happens_and_ends(nodes: Cluster) -> None:
    turn = Turn((5, 6, 7), {"mode": "exact", "draft": 0, "max_new_tokens": 60, "eos_token_ids": ()})
    for kind in KINDS[: KINDS.index(Kind.TWO)]:
        pid = nodes.nodes[1].pid
        trial = Trial(1, 0, (Conversation((turn,)), Conversation((turn,))), kind, (fault(kind),))
        outcome = await run_trial(nodes, trial)
        assert outcome.identical, failure_text(outcome)
        assert outcome.answers == (1 if kind is Kind.VANISH else 2)
        assert (nodes.nodes[1].pid != pid) == (kind in (Kind.KILL, Kind.TERMINATE)), kind
        if kind in (Kind.KILL, Kind.TERMINATE, Kind.RESET, Kind.BLACKHOLE, Kind.HALF_CLOSE):
            assert any(recovery.startswith("n1") for recovery in outcome.recoveries), kind


def outcomes() -> list[Outcome]:
    kill, two = (Trial(1, 3, (), kind, (fault(Kind.KILL),)) for kind in (Kind.KILL, Kind.TWO))
    return [
        Outcome(kill, answers=1, recoveries=["n1: reset"], wait_s=0.5),
        Outcome(kill, answers=1, wait_s=1.5),
        Outcome(two, answers=1, errors=["client 0: NodeUnavailable: gone"], problems=["n1 still has 1 sessions"]),
    ]


def test_the_report_counts_by_kind_and_names_the_command() -> None:
    rows = rows_of(outcomes())
    assert [row.cells for row in rows] == [
        ["kill", "2", "1", "2", "2", "0.50 s", "1.50 s", "1.50 s"],
        ["two at once", "1", "1", "0", "0", "-", "-", "-"],
        ["all", "3", "2", "2", "2", "0.50 s", "1.50 s", "1.50 s"],
    ]
    [failure] = to_json(outcomes(), 1)["failures"]
    assert failure["command"] == "python -m tests.robustness --seed 1 --only 3"
    assert failure_text(outcomes()[2]).splitlines()[1:] == [
        "  client 0: NodeUnavailable: gone",
        "  n1 still has 1 sessions",
        "  reproduce with: python -m tests.robustness --seed 1 --only 3",
    ]


def test_the_table_of_the_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    original = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text()
    page.write_text(original)
    write_page(page, rows_of(outcomes()), seed=5)
    first = page.read_text()
    assert (
        "`make robustness FAULTS=3 SEED=5`" in first and "| kill | 2 | 1 | 2 | 2 | 0.50 s | 1.50 s | 1.50 s |" in first
    )
    write_page(page, rows_of(outcomes()[:2]), seed=6)
    second = page.read_text()
    assert "two at once | 1" not in second
    for text in (first, second):
        assert without_table(text) == without_table(original)


def without_table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith(("|", "`make robustness"))]


def test_the_command_runs_one_trial_and_prints_json() -> None:
    done = subprocess.run([*COMMAND, "--only", "3", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["failures"] == [] and found["kinds"][-1]["faults"] == 1


def test_ctrl_c_ends_all_processes() -> None:
    command = [*COMMAND, "--faults", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        process = psutil.Process(running.pid)

        def descendants() -> list[psutil.Process]:
            return process.children(recursive=True)

        while len(descendants()) < 5:  # the fork server, its tracker and three nodes
            assert running.poll() is None
            time.sleep(0.05)
        found = descendants()
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate()
        assert running.returncode == 130 and stderr.endswith("interrupted\n"), stderr
    assert psutil.wait_procs(found, timeout=10)[1] == []
