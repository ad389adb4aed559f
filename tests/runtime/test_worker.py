"""The compute thread: order, errors, cancelled callers, and steps that are brief enough for the event loop."""

import asyncio
import threading
import time

import pytest

from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.runtime.worker import ThreadWorker


def here() -> int:
    return threading.get_ident()


async def test_steps_run_in_order_on_one_thread_that_outlives_errors() -> None:
    worker, order = ThreadWorker(1), []
    runs = [worker.run(lambda i=i: order.append((i, here()))) for i in range(4)]
    worker.submit(lambda: 1 / 0)
    await asyncio.gather(*runs)
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 / 0)
    assert [i for i, _ in order] == [0, 1, 2, 3] and {thread for _, thread in order}.isdisjoint({here()})
    worker.shutdown()
    with pytest.raises(NodeUnavailable):
        await worker.run(here)


async def test_a_cancelled_caller_leaves_its_step_out_of_the_queue() -> None:
    worker, began, go, ran = ThreadWorker(), threading.Event(), threading.Event(), []
    first = asyncio.create_task(worker.run(lambda: (began.set(), go.wait(10))))
    second = asyncio.create_task(worker.run(ran.append, 1))
    await asyncio.sleep(0)
    assert began.wait(10)
    second.cancel()
    await asyncio.sleep(0)
    go.set()
    await first
    await worker.run(ran.append, 2)
    assert ran == [2]
    worker.shutdown()


async def test_brief_steps_move_to_a_lent_loop_and_back_when_they_are_not_brief() -> None:
    worker = ThreadWorker(1)

    async def on_the_loop(step=here, brief: bool = True) -> bool:  # type: ignore[no-untyped-def]
        return (await worker.run(step, brief=brief))[0] == here()

    assert not await on_the_loop() and not await on_the_loop()  # a loop that is not lent is left alone
    worker.lend()
    assert not await on_the_loop()  # measured first
    assert await on_the_loop() and await on_the_loop()
    assert not await on_the_loop(brief=False)

    def slow() -> int:
        time.sleep(0.03)
        return here()

    assert await on_the_loop(slow)  # nobody could know
    assert not await on_the_loop(slow) and not await on_the_loop() and await on_the_loop()
    worker.shutdown()
