"""The compute thread: tasks of several sessions in shared steps, errors, cancelled callers, and brief tasks."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from blockbuster import BlockingError

from ruyi_flow.errors import NodeUnavailable, RequestError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.loop.session import Pass
from ruyi_flow.loop.steps import Task, drive
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime import worker as worker_module
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.runtime.worker import _BRIEF_S as BRIEF_S
from ruyi_flow.runtime.worker import ThreadWorker
from ruyi_flow.testing import open_session
from ruyi_flow.types import Mode

POLICY = Policy.resolve(Routing(Mode.TOKEN, threshold=0.5), (2, 4, 6))


def here() -> int:
    return threading.get_ident()


def doing(call: Callable[[], object]) -> Task[object]:
    """A task that runs nothing through the layers."""
    return call()
    yield  # a generator


Parts = Sequence[tuple[Pass, int]]


def before_each_step(monkeypatch: pytest.MonkeyPatch, shard: Shard, call: Callable[[Parts], object]) -> None:
    run = shard.run

    def called(parts: Parts) -> None:
        call(parts)
        run(parts)

    monkeypatch.setattr(shard, "run", called)


@pytest.fixture
def shard(tiny: Path) -> Shard:
    return Shard(load_slice(Checkpoint(tiny), (2, 4, 6), dtype=torch.float32), max_positions=4096, max_sessions=16)


def decoding(session: ShardSession, ids: Sequence[int], count: int) -> Task[list[tuple[int, float]]]:
    """Tokens at the last exit, greedily."""
    found: list[tuple[int, float]] = []
    for _ in range(count):
        start, stop = len(session.token_ids), len(session.token_ids) + len(ids)
        session.token_ids.extend(ids)
        states = session.embed(ids)
        for stage in range(3):
            picked = yield Pass(session, stage, states, (stop - 1,))
            if stage < 2:
                states = session.take_unsent(stage, stop)
        assert picked is not None and session.positions == [stop] * 3 and start < stop
        found += picked
        ids = (picked[0][0],)
    return found


async def test_tasks_share_steps_and_see_what_they_would_see_alone(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 300, 5, 90)]
    alone = []
    for prompt in prompts:
        session = open_session(shard, POLICY, SamplingParams(), prompt_length=len(prompt), max_positions=400)
        alone.append(drive(decoding(session, prompt, 8)))
        session.close()
    steps: list[Parts] = []
    before_each_step(monkeypatch, shard, lambda parts: steps.append(list(parts)))
    worker = ThreadWorker(1, budget=64)
    sessions = [
        open_session(shard, POLICY, SamplingParams(), prompt_length=len(prompt), max_positions=400)
        for prompt in prompts
    ]
    results = await asyncio.gather(
        *(worker.run(decoding(session, prompt, 8)) for session, prompt in zip(sessions, prompts, strict=True))
    )
    for (found, queue_s, compute_s), expected in zip(results, alone, strict=True):
        assert [token for token, _ in found] == [token for token, _ in expected]
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(found, expected, strict=True))
        assert compute_s > 0 and queue_s > -1e-6
    assert max(len(parts) for parts in steps) == 4, "all sessions meet at a stage"
    assert all(len({work.stage for work, _ in parts}) == 1 for parts in steps)
    assert all(sum(rows for _, rows in parts) <= 90 + 64 for parts in steps)
    for session in sessions:
        session.close()
    await asyncio.to_thread(worker.shutdown)
    shard.capacity.check_integrity()


async def test_one_sessions_error_is_its_own(shard: Shard) -> None:
    good, bad = (open_session(shard, POLICY, SamplingParams(), prompt_length=3, max_positions=40) for _ in range(2))

    class Refusing(Sampler):
        def pick(self, *_: Any, **__: Any) -> NoReturn:
            raise RequestError("no token is left")

    bad.sampler = Refusing(SamplingParams(), 3)
    worker = ThreadWorker(1)
    results = await asyncio.gather(
        *(worker.run(decoding(session, [5, 6, 7], 4)) for session in (good, bad)), return_exceptions=True
    )
    fine, refused = results
    assert isinstance(refused, RequestError) and not isinstance(fine, BaseException) and len(fine[0]) == 4
    await asyncio.to_thread(worker.shutdown)


async def test_an_error_of_a_step_is_told_to_all_of_it_and_outlived(shard: Shard) -> None:
    worker = ThreadWorker(1)
    worker.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await worker.run(doing(lambda: 1 / 0))
    session = open_session(shard, POLICY, SamplingParams(), prompt_length=1, max_positions=40)

    def wrong() -> Task[None]:
        yield Pass(session, 0, torch.zeros(1, 7), ())  # of another width

    with pytest.raises(RuntimeError):
        await worker.run(wrong())
    session.token_ids.clear()
    assert len((await worker.run(decoding(session, [5], 2)))[0]) == 2
    assert (await worker.run(doing(here)))[0] != here()
    await asyncio.to_thread(worker.shutdown)
    with pytest.raises(NodeUnavailable):
        await worker.run(doing(here))


async def test_a_cancelled_caller_leaves_its_task_out_and_frees_its_session_safely(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, go = ThreadWorker(1), threading.Event()
    loop, began, going = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def first_task() -> None:
        loop.call_soon_threadsafe(began.set)
        go.wait(10)

    first = asyncio.create_task(worker.run(doing(first_task)))
    session = open_session(shard, POLICY, SamplingParams(), prompt_length=1, max_positions=400)
    before_each_step(monkeypatch, shard, lambda parts: loop.call_soon_threadsafe(going.set))
    second = asyncio.create_task(worker.run(decoding(session, [5], 300)))
    await began.wait()
    go.set()
    await first
    await going.wait()
    second.cancel()
    await asyncio.sleep(0)
    worker.submit(session.close)
    assert (await worker.run(doing(lambda: len(shard.capacity.leases))))[0] == 0
    held = len(session.token_ids)
    await worker.run(doing(here))
    assert held < 300 and len(session.token_ids) == held, "it does not go on"
    shard.capacity.check_integrity()
    await asyncio.to_thread(worker.shutdown)


async def test_a_shutdown_on_an_event_loop_is_found_since_it_waits() -> None:
    worker = ThreadWorker(1)
    with pytest.raises(BlockingError):
        worker.shutdown()
    await asyncio.to_thread(worker.shutdown)


class HandClock:
    """Takes the place of the worker's `time`: a step takes as long as a test says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> HandClock:
    made = HandClock()

    def step(parts: Parts) -> None:
        made.now += made.step_s

    before_each_step(monkeypatch, shard, step)
    monkeypatch.setattr(worker_module, "time", made)
    return made


async def test_brief_tasks_move_to_a_lent_loop_and_back_when_they_are_not_brief(shard: Shard, clock: HandClock) -> None:
    worker = ThreadWorker(1)
    session = open_session(shard, POLICY, SamplingParams(), prompt_length=1, max_positions=400)

    async def on_the_loop(*, brief: bool = True, takes: float = 0.1) -> bool:
        """Run a task of one step, and say whether it ended on the event loop.

        Args:
            takes: seconds that its step takes, as a share of what a brief task may take.
        """
        clock.step_s = takes * BRIEF_S

        def task() -> Task[int]:
            position = len(session.token_ids)
            session.token_ids.append(5)
            yield Pass(session, 0, session.embed((5,)), (position,))
            return here()

        return (await worker.run(task(), brief=brief))[0] == here()

    assert not await on_the_loop() and not await on_the_loop()  # a loop that is not lent is left alone
    worker.lend()
    assert not await on_the_loop()  # measured first
    assert await on_the_loop() and await on_the_loop()
    assert not await on_the_loop(brief=False)
    assert not await on_the_loop(takes=1.5)  # nobody could know; it goes on in the thread
    assert not await on_the_loop(takes=1.5) and not await on_the_loop() and await on_the_loop()
    await asyncio.to_thread(worker.shutdown)


async def test_a_task_that_turns_out_long_leaves_the_lent_loop_and_loses_nothing(
    shard: Shard, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ThreadWorker(1)
    worker.lend()
    alone = drive(
        decoding(open_session(shard, POLICY, SamplingParams(), prompt_length=3, max_positions=100), (5, 6, 7), 8)
    )
    await worker.run(
        decoding(open_session(shard, POLICY, SamplingParams(), prompt_length=3, max_positions=100), (5, 6, 7), 1),
        brief=True,
    )  # measured
    on: list[int] = []
    before_each_step(monkeypatch, shard, lambda parts: on.append(here()))
    clock.step_s = BRIEF_S / 4
    session = open_session(shard, POLICY, SamplingParams(), prompt_length=3, max_positions=100)
    found, _, compute_s = await worker.run(decoding(session, (5, 6, 7), 8), brief=True)
    assert found == alone and len(on) == 24
    assert [thread == here() for thread in on] == [True] * 4 + [False] * 20
    assert compute_s == pytest.approx(24 * clock.step_s)
    await asyncio.to_thread(worker.shutdown)
