"""The life of a client: it connects when it is used, serves threads and loops, and ends without a trace."""

import asyncio
import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow import Client
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import CheckpointError, RequestError, RuyiFlowError
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology
from ruyi_flow.types import NodeStatus
from tests.conftest import until

SHORT: dict[str, Any] = {"max_new_tokens": 3, "eos_token_ids": ()}
LONG: dict[str, Any] = {"max_new_tokens": 400, "eos_token_ids": ()}


def in_process(family: Path) -> Topology:
    return Topology.parse({"family": str(family), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})


USES: list[Callable[[Client], object]] = [
    lambda client: client.generate("hi", **SHORT),
    lambda client: next(client.stream("hi", **SHORT)),
    lambda client: next(client.events("hi", **SHORT)),
    lambda client: client.status(),
]


def count_threads(name: str) -> int:
    return [thread.name for thread in threading.enumerate()].count(name)


def status_of(client: Client) -> NodeStatus:
    [status] = client.status().values()
    assert isinstance(status, NodeStatus)
    return status


def wait_until_idle(client: Client) -> NodeStatus:
    """A session ends on the compute thread, right after its last step."""
    while status_of(client).sessions:
        time.sleep(0.01)
    return status_of(client)


# ---- Connecting ----


async def test_an_async_client_connects_when_it_is_used(nodes: Cluster, spoken: Path) -> None:
    for topology in (nodes.topology, in_process(spoken)):
        calls: list[Callable[[AsyncClient], Awaitable[object]]] = [
            lambda client: client.generate("hi", **SHORT),
            lambda client: anext(client.stream("hi", **SHORT)),
            lambda client: anext(client.events("hi", **SHORT)),
            lambda client: client.status(),
        ]
        for call in calls:
            client = AsyncClient(topology)
            assert "not connected yet" in repr(client)
            await call(client)
            assert "; connected" in repr(client)
            await client.close()
            assert "; closed" in repr(client)


def test_a_client_connects_when_it_is_used(spoken: Path) -> None:
    for call in USES:
        client = Client(in_process(spoken))
        assert "not connected yet" in repr(client)
        call(client)
        assert repr(client) == f"Client({spoken} on whole; connected)"
        client.close()
        assert "; closed" in repr(client)


async def test_a_client_that_nobody_uses_connects_to_nothing(nodes: Cluster) -> None:
    before = threading.active_count()
    Client(nodes.topology).close()
    await AsyncClient(nodes.topology).close()
    assert threading.active_count() == before


def test_a_closed_client_says_so(spoken: Path) -> None:
    for was_used in (False, True):
        client = Client(in_process(spoken))
        if was_used:
            client.status()
        client.close()
        client.close()
        for call in [*USES, Client.__enter__]:
            with pytest.raises(RequestError, match="this client is closed; make another one"):
                call(client)


async def test_a_closed_async_client_says_so(nodes: Cluster) -> None:
    for was_used in (False, True):
        client = AsyncClient(nodes.topology)
        if was_used:
            await client.status()
        await client.close()
        await client.close()
        for call in (
            client.generate("hi"),
            anext(client.stream("hi")),
            anext(client.events("hi")),
            client.status(),
            client.__aenter__(),
        ):
            with pytest.raises(RequestError, match="this client is closed; make another one"):
                await call


def test_a_block_closes_the_client_that_it_uses(spoken: Path) -> None:
    before = count_threads("compute"), count_threads("ruyi-flow client")
    client = Client(in_process(spoken))
    client.generate("hi", **SHORT)
    with client as same:
        assert same is client and client.generate("hi", **SHORT)
    assert (count_threads("compute"), count_threads("ruyi-flow client")) == before
    with pytest.raises(RequestError, match="this client is closed"):
        client.generate("hi")


def test_threads_that_use_a_client_first_connect_once(spoken: Path) -> None:
    before = count_threads("compute"), count_threads("ruyi-flow client")
    got: list[list[int]] = []
    begin = threading.Barrier(4)
    client = Client(in_process(spoken))

    def ask() -> None:
        begin.wait()
        got.append(client.generate("hi", max_new_tokens=10, eos_token_ids=()).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [client.generate("hi", max_new_tokens=10, eos_token_ids=()).token_ids] * 4
    assert (count_threads("compute"), count_threads("ruyi-flow client")) == (before[0] + 1, before[1] + 1)
    client.close()


async def test_tasks_that_use_an_async_client_first_load_once(spoken: Path) -> None:
    before = count_threads("compute")
    client = AsyncClient(in_process(spoken))
    replies = await asyncio.gather(*(client.generate("hi", **SHORT) for _ in range(4)))
    assert len({tuple(reply.token_ids) for reply in replies}) == 1
    assert count_threads("compute") == before + 1
    await client.close()
    assert count_threads("compute") == before


async def test_a_caller_that_is_cancelled_while_a_client_loads_disturbs_nobody(spoken: Path) -> None:
    client = AsyncClient(in_process(spoken))
    first = asyncio.create_task(client.generate("hi", **SHORT))
    await until(lambda: client.is_connected)  # it loads
    second = asyncio.create_task(client.generate("hi", **SHORT))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert len((await second).tokens) == 3
    await client.close()


async def test_a_client_that_cannot_be_loaded_tries_again_and_leaves_nothing(spoken: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(spoken, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    before = count_threads("compute")
    client = AsyncClient(in_process(broken))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="tokenizer files cannot be read"):
            await client.generate("hi")
        with pytest.raises(CheckpointError, match="tokenizer files cannot be read"):
            await AsyncClient(client.topology).__aenter__()
    assert count_threads("compute") == before
    shutil.copyfile(spoken / "tokenizer.json", broken / "tokenizer.json")
    for _ in range(2):
        entering = asyncio.create_task(AsyncClient(client.topology).__aenter__())
        await asyncio.sleep(0.002)  # a thread has begun to load
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    assert count_threads("compute") == before
    assert len((await client.generate("hi", **SHORT)).tokens) == 3
    await client.close()
    assert count_threads("compute") == before


def test_a_block_that_cannot_be_entered_leaves_nothing(tmp_path: Path) -> None:
    before = count_threads("compute"), count_threads("ruyi-flow client")
    with pytest.raises(CheckpointError), Client(in_process(tmp_path / "none")):
        pass
    assert (count_threads("compute"), count_threads("ruyi-flow client")) == before


@pytest.mark.parametrize("last", [False, True])
async def test_a_closed_client_has_closed_its_connection(spoken: Path, last: bool) -> None:
    relay, options = Relay(), SHORT if last else LONG
    async with cluster(cut_topology(spoken, [[2, 4, 6]]), {"n0": relay}) as running:
        gc.disable()  # it would close a connection that its objects keep open in a circle
        try:
            async with AsyncClient(running.topology) as client, client.stream("hi", **options) as stream:
                async for _ in stream:
                    if not last:
                        break
                assert relay.connections == 1
            await until(lambda: not relay.connections)
        finally:
            gc.enable()


# ---- Threads, event loops, processes ----


async def test_clients_of_several_loops_serve_each_its_own(nodes: Cluster) -> None:
    def ask() -> int:
        with Client(nodes.topology) as client:
            return len(client.generate("hi", **SHORT).tokens)

    assert await asyncio.to_thread(ask) == 3


async def test_an_async_client_says_that_it_belongs_to_another_loop(nodes: Cluster) -> None:
    client = AsyncClient(nodes.topology)
    await client.status()

    def elsewhere() -> None:
        calls: list[Callable[[], Awaitable[object]]] = [lambda: client.generate("hi"), client.status, client.close]
        for call in calls:

            async def run(call: Callable[[], Awaitable[object]] = call) -> None:
                await call()

            with pytest.raises(RequestError, match="first used on another event loop.*: make one client for each"):
                asyncio.run(run())

    await asyncio.to_thread(elsewhere)
    assert len((await client.generate("hi", **SHORT)).tokens) == 3
    await client.close()


def test_a_call_on_the_clients_own_thread_is_an_error(spoken: Path) -> None:
    client = Client(in_process(spoken))

    async def inside() -> None:
        client.status()

    with pytest.raises(RequestError, match="this thread runs the client's own event loop"):
        client._loop.run(inside)
    assert len(client.generate("hi", **SHORT).tokens) == 3
    client.close()


def test_a_stream_that_the_garbage_collector_ends_on_the_clients_own_thread_ends(spoken: Path) -> None:
    client = Client(in_process(spoken))
    box = [client.stream("hi", **LONG)]
    next(box[0])

    async def collect() -> None:
        box.clear()
        gc.collect()

    client._loop.run(collect)
    wait_until_idle(client)
    client.close()


def test_a_client_that_nobody_has_any_more_ends(spoken: Path) -> None:
    before = count_threads("compute"), count_threads("ruyi-flow client")
    stream = Client(in_process(spoken)).stream("hi", max_new_tokens=20, eos_token_ids=())
    assert len(list(stream)) == 20, "a stream keeps its client"
    del stream
    while (count_threads("compute"), count_threads("ruyi-flow client")) != before:
        gc.collect()
        time.sleep(0.01)


# ---- The end of answers ----


def test_an_abandoned_stream_frees_its_session(whole: Client) -> None:
    for _ in range(20):
        stream = whole.stream("hi", **LONG)
        next(stream)
        stream.close()
    whole.generate("hi", max_new_tokens=2)
    assert wait_until_idle(whole).used_positions == 0


def test_a_client_that_closes_ends_what_other_threads_ask(spoken: Path) -> None:
    ended: list[BaseException] = []
    with Client(in_process(spoken)) as client:
        begun = threading.Event()

        def ask() -> None:
            try:
                for _ in client.stream("hi", max_new_tokens=450, eos_token_ids=()):
                    begun.set()
            except RuyiFlowError as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(20)
    thread.join(20)
    assert not thread.is_alive() and len(ended) == 1


def test_a_stream_that_outlives_its_client_ends(spoken: Path) -> None:
    with Client(in_process(spoken)) as client:
        stream, other = (client.stream("hi", max_new_tokens=100, eos_token_ids=()) for _ in range(2))
        next(stream)
        next(other)
    with pytest.raises(RequestError, match="this client is closed"):
        next(stream)
    other.close()


INTERRUPTED = """
import signal, sys, time
from ruyi_flow import Client
from ruyi_flow.config.topology import Topology
whole = {"name": "whole", "exits": [2, 4, 6], "limits": {"max_positions": 65536}}
options = {"max_new_tokens": 60000, "eos_token_ids": ()}  # for minutes, unless it is interrupted
signal.signal(signal.SIGALRM, signal.default_int_handler)  # like SIGINT, but at a time that the test chooses
client = Client(Topology.parse({"family": sys.argv[1], "nodes": [whole]}))
try:
    if sys.argv[2] == "loading":
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        client.generate("hi", **options)
    client.status()
    if sys.argv[2] == "generate":
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        client.generate("hi", **options)
    stream = client.stream("hi", **options)
    for i, token in enumerate(stream):
        if i == 3:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
except KeyboardInterrupt:
    if sys.argv[2] == "stream":
        assert len(stream.tokens) > 3 and next(stream, None) is None, "an interrupted stream keeps what arrived"
    for _ in range(2000):  # a session ends on the compute thread, right after its last step
        if not client.status()["whole"].sessions:
            break
        time.sleep(0.01)
    print(client.status()["whole"].sessions, len(client.generate("hi", max_new_tokens=2, eos_token_ids=()).tokens))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", ["loading", "generate", "stream"])
def test_ctrl_c_ends_an_answer_and_nothing_else(spoken: Path, tmp_path: Path, call: str) -> None:
    long = Path(shutil.copytree(spoken, tmp_path / "long"))
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 65536}))
    command = [sys.executable, "-c", INTERRUPTED, str(long), call]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 2\n"), done.stderr


async def test_clients_that_close_leave_nothing_to_other_event_loops(nodes: Cluster) -> None:
    """gRPC hands what completes after a loop is closed to any other loop, where it would be a stack trace."""
    traces: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: traces.append(str(context)))

    def leave_in_the_middle() -> None:
        with Client(nodes.topology) as client:
            stream = client.stream([5, 6], max_new_tokens=50, eos_token_ids=())
            next(stream)
            stream.close()

    for _ in range(40):
        await asyncio.to_thread(leave_in_the_middle)
    assert not [trace for trace in traces if "loop is closed" in trace]
