"""The SDK: prompts of every kind, streaming, text, stop strings, and the sync client as a plain wrapper."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from ruyi_flow import Client
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError, RequestError
from ruyi_flow.testing import Cluster, cluster, cut_topology, free_ports, tiny_family
from ruyi_flow.transport.link import measure_link
from ruyi_flow.types import Final, FinishReason, NodeStatus
from tests.conftest import with_replica


async def test_a_text_is_one_user_turn_and_raw_is_as_it_is(nodes: Cluster) -> None:
    async with AsyncClient(nodes.topology) as client:
        options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_ids": ()}
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


async def test_nodes_are_not_asked_through_a_proxy(spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_ports(1)[0]}")  # where nothing listens
    async with cluster(cut_topology(spoken, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        assert len((await client.generate("hi", max_new_tokens=2, eos_token_ids=(), timeout_s=20)).tokens) == 2
        assert (await measure_link(str(nodes.topology.nodes[1].address), rounds=1)).round_trip_ms > 0


async def test_status_has_one_entry_for_each_replica(nodes: Cluster) -> None:
    [port] = free_ports(1)
    async with with_replica(nodes.topology, "n1") as topology:
        first = topology.node("n1").addresses[0]
        several = {"address": (first, f"127.0.0.1:{port}", topology.node("n1").addresses[1])}
        moved = [topology.nodes[0], topology.nodes[1].model_copy(update=several)]
        async with AsyncClient(topology.model_copy(update={"nodes": tuple(moved)})) as client:
            found = await client.status()
    assert list(found) == ["n0", "n1/1", "n1/2", "n1/3"]
    down = found.pop("n1/2")
    assert isinstance(down, NodeError) and f"at 127.0.0.1:{port} cannot be reached" in str(down)
    assert {name: status.node for name, status in found.items() if isinstance(status, NodeStatus)} == {
        "n0": "n0",
        "n1/1": "n1",
        "n1/3": "n1",
    }


async def test_status_asks_each_address_of_a_name(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(nodes.topology.nodes[1].address).rpartition(":")[2]
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "n1.example" else [host]
        return [found for one in hosts for found in real(one, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    named = nodes.topology.nodes[1].model_copy(update={"address": f"n1.example:{port}"})
    topology = nodes.topology.model_copy(update={"nodes": (nodes.topology.nodes[0], named)})
    async with AsyncClient(topology) as client:
        found = await client.status()
    assert list(found) == ["n0", "n1/1", "n1/2"]
    assert isinstance(found["n1/1"], NodeStatus) and f"127.0.0.2:{port}" in str(found["n1/2"])


def test_a_stop_string_ends_the_answer_before_it(whole: Client) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "eos_token_ids": (), "repetition_penalty": 1.5}
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
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 20, "eos_token_ids": ()}
    first, second = whole.generate("hi", **options), whole.generate("hi", **options)
    assert first.stats.seed != second.stats.seed and first.token_ids != second.token_ids
    assert whole.generate("hi", seed=first.stats.seed, **options).token_ids == first.token_ids


def test_the_demo_settings_work_in_every_mode(whole: Client) -> None:
    demo: dict[str, Any] = {
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


@pytest.mark.parametrize("timeout_s", [0, -1, True, float("nan"), float("inf"), "3"])
async def test_a_timeout_that_cannot_be_is_refused_everywhere(nodes: Cluster, timeout_s: Any) -> None:
    with pytest.raises(RequestError, match="timeout_s is"):
        AsyncClient(nodes.topology, timeout_s=timeout_s)
    async with AsyncClient(nodes.topology) as client:
        for call in (client.status, lambda timeout_s: client.generate("hi", timeout_s=timeout_s)):
            with pytest.raises(RequestError, match="timeout_s is"):
                await call(timeout_s=timeout_s)
        assert (await client.generate("hi", timeout_s=None, max_new_tokens=1)).tokens


@pytest.mark.parametrize(("given", "meant"), [("polcy", "policy"), ("timeout", "timeout_s"), ("modes", "mode")])
def test_an_unknown_option_gets_a_suggestion(whole: Client, given: str, meant: str) -> None:
    options: dict[str, Any] = {given: "x"}
    with pytest.raises(RequestError, match=f"unknown option '{given}'; did you mean '{meant}'"):
        whole.generate("hi", **options)


def test_roles_are_those_of_the_chat_template(whole: Client, spoken: Path, tmp_path: Path) -> None:
    for role in ("robot", "tool", "developer"):
        with pytest.raises(RequestError, match=f"the role '{role}', which the family's chat template does not name"):
            whole.generate([{"role": role, "content": "beep"}])
    tools = Path(shutil.copytree(spoken, tmp_path / "tools"))
    (tools / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}x{% endif %}y{% endfor %}"
    )
    with Client(Topology.parse({"family": str(tools), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})) as client:
        messages = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant", "tool")]
        assert client.generate(messages, max_new_tokens=1).stats.prompt_tokens == 5
        with pytest.raises(RequestError, match="the role 'robot'"):
            client.generate([*messages, {"role": "robot", "content": "hi"}])


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
