"""One trial: traffic, a fault in the middle of it, and what came of both."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.testing import Relay
from tests.robustness.cluster import Cluster, running_cluster
from tests.robustness.faults import HARMLESS, Fault, Kind, draw_faults
from tests.robustness.traffic import (
    DEMO,
    TINY,
    Answer,
    Conversation,
    Family,
    draw_conversations,
    expected_answers,
    hold,
)
from tests.robustness.validate import longest_wait, problems_at_rest, problems_of, running_tasks, tasks_left

__all__ = ["Outcome", "Trial", "ignore_ctrl_c", "ready_cluster", "run_trial", "run_trials"]

_ANSWER_S = 30.0
"""Seconds that an answer may take, its recoveries included."""

_LIMIT_S = 100.0
"""Seconds after which a trial is taken for one that hangs."""


@dataclass(frozen=True)
class Trial:
    """The conversations and the faults of a seed and a number."""

    seed: int
    number: int
    conversations: tuple[Conversation, ...]
    kind: Kind
    faults: tuple[Fault, ...]
    replicas: int = 1
    family: Family = TINY
    keys: bool = False

    @classmethod
    def draw(cls, seed: int, number: int, replicas: int = 1, family: Family = TINY, *, keys: bool = False) -> Trial:
        """Draw a trial; it does not depend on the trials before."""
        rng = random.Random(f"{seed}/{number}")
        conversations = draw_conversations(rng, family)
        kind, faults = draw_faults(rng)
        return cls(seed, number, conversations, kind, faults, replicas, family, keys)

    @property
    def command(self) -> str:
        """The command that runs this trial alone."""
        options = "" if self.replicas == 1 else f" --replicas {self.replicas}"
        options += " --demo" if self.family == DEMO else ""
        options += " --keys" if self.keys else ""
        return f"python -m tests.robustness --seed {self.seed} --only {self.number}{options}"


@dataclass
class Outcome:
    """What came of a trial."""

    trial: Trial
    answers: int = 0
    """Answers that were to be complete."""
    exits: Counter[int] = field(default_factory=Counter)
    """Number of tokens that each exit decided."""
    errors: list[str] = field(default_factory=list)
    """Errors in which answers ended."""
    problems: list[str] = field(default_factory=list)
    """What is wrong: other tokens than without the fault, something that hangs, or something left behind."""
    recoveries: list[str] = field(default_factory=list)
    """Each node that an answer lost before it went on, and why."""
    wait_s: float | None = None
    """Longest wait for a token from the fault on; None if no answer was under way."""

    @property
    def survived(self) -> bool:
        """Whether every answer is complete."""
        return not self.errors

    @property
    def identical(self) -> bool:
        """Whether every answer is complete and as it is without the fault, and nothing else is wrong."""
        return self.survived and not self.problems


class _Arrivals:
    """Counts the tokens of a trial, and wakes those who wait for a number of them."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def count(self) -> None:
        self._count += 1
        self._wake()

    def end(self) -> None:
        """No more tokens come."""
        self._count = 2**31
        self._wake()

    async def reach(self, number: int) -> None:
        self._waiting.append((number, event := asyncio.Event()))
        self._wake()
        await event.wait()

    def _wake(self) -> None:
        for number, event in self._waiting:
            if self._count >= number:
                event.set()


def ignore_ctrl_c() -> None:
    """Leave Ctrl-C to the process that has started this one, and that ends it by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_trials(trials: Sequence[Trial]) -> list[Outcome]:
    """Run trials one after the other on the same nodes; SIGTERM ends them and the process."""

    async def run() -> list[Outcome]:
        # Python's own handler would raise within whatever runs, also where gRPC forgets exceptions.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with TemporaryDirectory(prefix="ruyi-flow-robustness-") as folder:
            family, replicas, keys = trials[0].family, trials[0].replicas, trials[0].keys
            async with ready_cluster(Path(folder), family=family, replicas=replicas, keys=keys) as cluster:
                return [await run_trial(cluster, trial) for trial in trials]

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        os._exit(128 + signal.SIGTERM)  # the pool may have given this process its next trials already


async def run_trial(cluster: Cluster, trial: Trial) -> Outcome:
    """Run a trial on nodes that are at rest."""
    expected = await expected_answers(cluster.whole, trial.conversations)
    total = sum(len(answer.tokens) for held in expected for answer in held)
    outcome, arrivals, vanished = Outcome(trial), _Arrivals(), set[int]()
    answers: list[list[Answer]] = [[] for _ in trial.conversations]
    begin = asyncio.Barrier(len(trial.conversations) + len(trial.faults))
    happened: list[float] = []
    before = running_tasks()

    async def talk(i: int) -> None:
        async with AsyncClient(cluster.topology, max_retries=0) as client:
            # A client that has never reached its entry node is told so at once: it has nothing to lose.
            await client.generate([5], exit=trial.family.exits[0], max_new_tokens=1)
            await begin.wait()
            timeout_s = _ANSWER_S * trial.family.slowness
            await hold(client, trial.conversations[i], answers[i], arrivals.count, timeout_s=timeout_s)

    talks = [asyncio.create_task(talk(i)) for i in range(len(trial.conversations))]

    async def vanish(number: int) -> None:
        number %= len(talks)
        vanished.add(number)
        talks[number].cancel()

    async def strike(fault: Fault) -> None:
        await begin.wait()
        await arrivals.reach(int(min(f.share for f in trial.faults) * total))
        if fault is not trial.faults[0]:
            await asyncio.sleep(0.5 * abs(fault.share - trial.faults[0].share))
        await asyncio.sleep(fault.then_s)
        happened.append(time.monotonic())
        await fault.happen(cluster, vanish)

    strikes = [asyncio.create_task(strike(fault)) for fault in trial.faults]
    try:
        async with asyncio.timeout(_LIMIT_S * trial.family.slowness):
            done = await asyncio.gather(*talks, return_exceptions=True)
            arrivals.end()
            await asyncio.gather(*strikes)
        outcome.problems += [f"a client raised {error!r}" for error in done if isinstance(error, Exception)]
        del done
    except TimeoutError:
        outcome.problems.append(f"the trial was not over after {_LIMIT_S * trial.family.slowness:g} s")
    finally:
        await _end(talks, strikes)
        outcome.problems += [f"{node.name} ended with {node.exit_code}" for node in cluster.nodes if node.crashed]
        cluster.mend()
    for i, (held, wanted) in enumerate(zip(answers, expected, strict=True)):
        for answer, other in zip(held, wanted, strict=False):
            if i in vanished and answer.text is None:
                continue
            outcome.answers += 1
            outcome.problems += [f"client {i}: {problem}" for problem in problems_of(answer, other)]
            if answer.error is not None:
                outcome.errors.append(f"client {i}: {type(answer.error).__name__}: {answer.error}")
            outcome.recoveries += answer.recoveries
            outcome.exits.update(token.exit for token in answer.tokens)
    if trial.kind in HARMLESS and outcome.recoveries:
        outcome.problems.append(f"sessions were given up, and nothing was lost ({', '.join(outcome.recoveries)})")
    staying = [answer for i, held in enumerate(answers) if i not in vanished for answer in held]
    waits = [longest_wait(staying, at) for at in happened]
    outcome.wait_s = max((wait for wait in waits if wait is not None), default=None)
    for answer in staying:
        answer.error = None
    gc.collect()  # an exception that was kept keeps its call, and so its connection
    outcome.problems += await tasks_left(before) + await problems_at_rest(cluster)
    return outcome


async def _end(*groups: list[asyncio.Task[None]]) -> None:
    """End tasks, and forget them with their exceptions."""
    for task in (task for tasks in groups for task in tasks):
        task.cancel()
    await asyncio.gather(*(task for tasks in groups for task in tasks), return_exceptions=True)
    for tasks in groups:
        tasks.clear()


@asynccontextmanager
async def ready_cluster(
    folder: Path,
    make_relay: type[Relay] = Relay,
    *,
    family: Family = TINY,
    replicas: int = 1,
    keys: bool = False,
    grace_s: float = 0.05,
) -> AsyncIterator[Cluster]:
    """Run nodes that have answered once and are at rest.

    Args:
        folder: where the family, the topology file and the logs are written.
        make_relay: makes the relay of each link.
        family: the family that they serve.
        replicas: number of replicas of each node.
        keys: whether every connection is TLS, between parties that prove who they are.
        grace_s: seconds for which a node that is told to end serves the sessions that it has.

    Raises:
        RuyiFlowError: they do not serve.
    """
    async with running_cluster(
        folder, make_relay, family=family, replicas=replicas, keys=keys, grace_s=grace_s
    ) as cluster:
        await asyncio.gather(*(node.status() for node in cluster.nodes))
        async with AsyncClient(cluster.topology) as client:
            await client.generate([5, 6, 7], mode="exact", max_new_tokens=4)
        if problems := await problems_at_rest(cluster):
            raise RuyiFlowError("; ".join(problems))
        gc.collect()
        gc.freeze()  # so that the collections after each trial are short
        # A replica that has served no answer yet has not reached those after it, nor have those before it reached it.
        to_come = 3 * (replicas - 1)
        cluster.fds = {node.name: node.num_fds() + to_come for node in cluster.nodes}
        try:
            yield cluster
        finally:
            gc.unfreeze()
