"""The SDK: prompts of every kind, streaming, text, stop strings, and the sync client as a plain wrapper."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ruyi_flow import Client
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RequestError, RuyiFlowError
from ruyi_flow.testing import Cluster, cluster, cut_topology, tiny_family
from ruyi_flow.types import Final, FinishReason, NodeStatus


@pytest.fixture
async def nodes(spoken: Path) -> AsyncIterator[Cluster]:
    async with cluster(cut_topology(spoken, [[2], [4, 6]])) as running:
        yield running
        await running.settle()


@pytest.fixture
def whole(spoken: Path) -> Iterator[Client]:
    topology = Topology.parse(
        {"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}]}
    )
    with Client(topology) as client:
        yield client


async def test_a_text_is_one_user_turn_and_raw_is_as_it_is(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        options = {"max_new_tokens": 8, "eos_token_ids": ()}
        turn = await client.generate("hi", **options)
        same = await client.generate([{"role": "user", "content": "hi"}], **options)
        raw = await client.generate("<user>hi|", raw=True, **options)
        other = await client.generate("hi", raw=True, **options)
        assert turn.token_ids == same.token_ids == raw.token_ids
        assert (raw.stats.prompt_tokens, other.stats.prompt_tokens) == (9, 2)
        for prompt in ("", "   ", [], [{"role": "user", "content": " "}]):
            with pytest.raises(RequestError, match="prompt is empty"):
                await client.generate(prompt)


async def test_streamed_text_adds_up_to_the_answer(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        for prompt in ("hi", "what?", "naïve 日本"):
            tokens, final = [], None
            async for event in client.events(prompt, max_new_tokens=40, eos_token_ids=(), repetition_penalty=1.3):
                if isinstance(event, Final):
                    final = event
                else:
                    tokens.append(event)
            assert final is not None and len(tokens) == 40 == final.stats.new_tokens
            assert "".join(t.text for t in tokens) == final.text
            assert final.finish_reason is FinishReason.LENGTH
            assert 0 < final.stats.first_token_s <= final.stats.total_s


def test_a_stop_string_ends_the_answer_before_it(whole: Client) -> None:
    options = {"max_new_tokens": 60, "eos_token_ids": (), "repetition_penalty": 1.5}
    plain = whole.generate("tell me", **options)
    assert len(plain.text) > 20
    for start in (3, 7, 12):
        for length in (1, 2, 4):
            stop = plain.text[start : start + length]
            if "\ufffd" in stop:
                continue
            reply = whole.generate("tell me", stop=("never there", stop), **options)
            assert reply.finish_reason is FinishReason.STOP
            assert reply.text == plain.text[: plain.text.index(stop)]
            assert "".join(t.text for t in reply.tokens) == reply.text
            assert reply.token_ids == plain.token_ids[: len(reply.token_ids)]
    streamed = "".join(t.text for t in whole.stream("tell me", stop=plain.text[5:9], **options))
    assert streamed == plain.text[: plain.text.index(plain.text[5:9])]


def test_the_end_of_a_sequence_ends_the_answer(whole: Client) -> None:
    plain = whole.generate("tell me", max_new_tokens=30, eos_token_ids=(), repetition_penalty=1.5)
    end = plain.token_ids[10]
    for draft in (0, 1, 4, 8):
        reply = whole.generate(
            "tell me", mode="exact", draft=draft, max_new_tokens=30, eos_token_ids=(end,), repetition_penalty=1.5
        )
        assert reply.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]
        assert reply.finish_reason is FinishReason.EOS


def test_max_new_tokens_is_cut_to_the_context(whole: Client) -> None:
    reply = whole.generate([5] * 505, max_new_tokens=8192, eos_token_ids=())
    assert len(reply.tokens) == 7 and reply.finish_reason is FinishReason.LENGTH


def test_a_seed_repeats_an_answer_and_no_seed_is_reported(whole: Client) -> None:
    options = {"temperature": 1.0, "max_new_tokens": 20, "eos_token_ids": ()}
    first, second = whole.generate("hi", **options), whole.generate("hi", **options)
    assert first.stats.seed != second.stats.seed and first.token_ids != second.token_ids
    assert whole.generate("hi", seed=first.stats.seed, **options).token_ids == first.token_ids


def test_the_demo_settings_work_in_every_mode(whole: Client) -> None:
    demo = {
        "temperature": 0.6,
        "top_k": 30,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "seed": 4,
        "max_new_tokens": 24,
        "eos_token_ids": (),
    }
    exact = [whole.generate("hi", mode="exact", draft=d, **demo).token_ids for d in (0, 3)]
    assert exact[0] == exact[1]
    for ids in (exact[0], whole.generate("hi", exit=4, **demo).token_ids):
        grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
        assert len(set(grams)) == len(grams)
    a = whole.generate("hi", mode="token", threshold=0.2, draft=0, **demo)
    b = whole.generate("hi", mode="token", threshold=0.2, draft=4, **demo)
    assert [(t.id, t.exit) for t in a.tokens] == [(t.id, t.exit) for t in b.tokens]


def test_a_reply_is_one_json_object(whole: Client) -> None:
    data = whole.generate("hi", max_new_tokens=3, eos_token_ids=()).to_dict()
    assert set(data) == {"text", "token_ids", "finish_reason", "tokens", "stats"}
    assert set(data["tokens"][0]) == {"id", "text", "exit", "node", "confidence", "reason", "after_s", "bytes_up"}
    assert {"first_token_s", "token_s", "total_s", "hops"} <= set(data["stats"])
    assert {"node", "compute_s", "queue_s", "wire_s", "messages", "bytes_up", "bytes_down"} <= set(
        data["stats"]["hops"][0]
    )


def test_the_sync_client_serves_several_threads(whole: Client) -> None:
    expected = whole.generate("hi", max_new_tokens=10, eos_token_ids=()).token_ids
    got: list[list[int]] = []

    def ask() -> None:
        got.append(whole.generate("hi", max_new_tokens=10, eos_token_ids=()).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 4


def status_of(client: Client) -> NodeStatus:
    status = client.status()["whole"]
    assert isinstance(status, NodeStatus)
    return status


def test_an_abandoned_stream_frees_its_session(whole: Client) -> None:
    for _ in range(20):
        stream = whole.stream("hi", max_new_tokens=400, eos_token_ids=())
        next(stream)
        stream.close()
    whole.generate("hi", max_new_tokens=2)
    for _ in range(500):  # a session ends on the compute thread, right after its last step
        if status_of(whole).sessions == 0:
            break
        time.sleep(0.01)
    status = status_of(whole)
    assert status.sessions == 0 and status.used_positions == 0


def test_a_client_that_closes_ends_what_other_threads_ask(spoken: Path) -> None:
    topology = Topology.parse({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    ended: list[BaseException] = []
    with Client(topology) as client:
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
    topology = Topology.parse({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    with Client(topology) as client:
        stream, other = (client.stream("hi", max_new_tokens=100, eos_token_ids=()) for _ in range(2))
        next(stream)
        next(other)
    with pytest.raises(RequestError, match="with block"):
        next(stream)
    other.close()


INTERRUPTED = """
import signal, sys
from ruyi_flow import Client
from ruyi_flow.config.topology import Topology
with Client(Topology.parse({"family": sys.argv[1], "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})) as client:
    try:
        for i, token in enumerate(client.stream("hi", max_new_tokens=450, eos_token_ids=())):
            if i == 3:
                signal.signal(signal.SIGALRM, signal.default_int_handler)  # like SIGINT, but at a time that holds
                signal.setitimer(signal.ITIMER_REAL, 0.02)
    except KeyboardInterrupt:
        print("interrupted", len(client.generate("hi", max_new_tokens=2, eos_token_ids=()).tokens))
    else:
        print("it ended by itself after", i)
"""


@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_stream_and_nothing_else(spoken: Path) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(spoken)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted 2\n"), done.stderr


def test_a_client_outside_its_block_says_so(spoken: Path) -> None:
    topology = Topology.parse({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    client = Client(topology)
    with pytest.raises(RequestError, match="with block"):
        client.generate("hi")
    for _ in range(2):
        with client:
            assert len(client.generate("hi", max_new_tokens=2, eos_token_ids=()).tokens) == 2
            with pytest.raises(RequestError, match="already open"):
                client.__enter__()
        with pytest.raises(RequestError, match="with block"):
            client.generate("hi")


async def test_the_sync_client_works_inside_a_running_loop(nodes: Cluster) -> None:
    import asyncio

    def ask() -> int:
        with Client(nodes.topology) as client:
            return len(client.generate("hi", max_new_tokens=3, eos_token_ids=()).tokens)

    assert await asyncio.to_thread(ask) == 3


@pytest.mark.parametrize(("given", "meant"), [("polcy", "policy"), ("timeout", "timeout_s"), ("modes", "mode")])
def test_an_unknown_option_gets_a_suggestion(whole: Client, given: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"unknown option '{given}'; did you mean '{meant}'"):
        whole.generate("hi", **{given: "x"})


def test_texts_that_a_family_cannot_take_are_refused(spoken: Path, tmp_path: Path) -> None:
    def client_of(folder: Path) -> Client:
        return Client(Topology.parse({"family": str(folder), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]}))

    fussy = Path(shutil.copytree(spoken, tmp_path / "fussy"))
    (fussy / "chat_template.jinja").write_text("{{ messages[0]['content'].nothing() }}")
    with client_of(fussy) as client, pytest.raises(RequestError, match="chat template refuses these messages"):
        client.generate("hi")
    wide = tiny_family(tmp_path / "wide", vocab_size=100)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(spoken / name, wide / name)
    with client_of(wide) as client, pytest.raises(RequestError, match="its vocabulary has 100"):
        client.generate("é")
    mute = Path(shutil.copytree(spoken, tmp_path / "mute"))
    tokenizer = json.loads((mute / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    (mute / "tokenizer.json").write_text(json.dumps(tokenizer))
    with client_of(mute) as client:
        with pytest.raises(RequestError, match="the prompt is empty"):
            client.generate("xxx", raw=True)
        assert len(client.generate("xyx", raw=True, max_new_tokens=1).tokens) == 1
