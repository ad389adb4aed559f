"""Real nodes over real gRPC on loopback: exactness, bytes, limits, handshakes, deadlines, cancellation, draining."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file

from ruyi_flow.cli.display import status_table
from ruyi_flow.client import AsyncClient, Client, Reply
from ruyi_flow.config.topology import Link, Node, Topology
from ruyi_flow.errors import (
    CapacityError,
    ConfigError,
    ContextLengthError,
    DeadlineExceeded,
    HandshakeError,
    NodeError,
    NodeUnavailable,
    RequestCancelled,
    RequestError,
    RuyiFlowError,
    WireError,
)
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.local import load_family
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology, tiny_family
from ruyi_flow.transport import codec
from ruyi_flow.transport._pb import node_pb2 as pb
from ruyi_flow.transport.checksum import seal
from ruyi_flow.transport.peer import METHODS
from ruyi_flow.transport.status import error_of, error_of_call
from ruyi_flow.types import Mode, NodeStatus, Reason, Upload
from tests.conftest import Oracle, until

PROMPT = [5, 17, 9, 33, 21]
CUTS = [[[2, 4, 6]], [[2, 4], [6]], [[2], [4, 6]], [[2], [4], [6]]]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
async def test_every_cut_over_nodes_gives_the_same_tokens(tiny: Path, oracle: Oracle, cuts: list[list[int]]) -> None:
    async with cluster(cut_topology(tiny, cuts)) as nodes, AsyncClient(nodes.topology) as client:
        for draft in (0, 1, 4, 8):
            reply = await client.generate(PROMPT, mode="exact", draft=draft, max_new_tokens=20, eos_token_ids=())
            expected = oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), PROMPT, 20)
            assert [(t.id, t.exit) for t in reply.tokens] == expected
        for exit in (2, 4, 6):
            reply = await client.generate(PROMPT, mode="fixed", exit=exit, max_new_tokens=12, eos_token_ids=())
            policy = Policy.resolve(Routing(Mode.FIXED, exit=exit), (2, 4, 6))
            assert [(t.id, t.exit) for t in reply.tokens] == oracle.decide(policy, PROMPT, 12)
        for threshold in (0.3, 0.6):
            reply = await client.generate(
                PROMPT, mode="token", threshold=threshold, draft=2, max_new_tokens=20, eos_token_ids=()
            )
            policy = Policy.resolve(Routing(Mode.TOKEN, threshold=threshold), (2, 4, 6))
            judged = oracle.judge(policy, PROMPT, 20)
            assert [(t.id, t.exit) for t in reply.tokens] == [(token, exit) for token, exit, _ in judged]
            assert [t.confidence for t in reply.tokens] == pytest.approx([sure for _, _, sure in judged], abs=1e-3)
            assert all(t.node == next(n.name for n in nodes.topology.nodes if t.exit in n.exits) for t in reply.tokens)
        start = Start({2: (4.0, -1.0, 0.0, 0.0, 0.0), 4: (8.0, -1.0, 0.0, 0.0, 0.0)}, 0.5)
        cascades: list[dict[str, Any]] = [
            {"threshold": 0.3},
            {"threshold": 0.5, "back": 0.4},
            {"threshold": 0.2, "start": start},
        ]
        for options in cascades:
            cascade = Routing(Mode.CASCADE, window=3, draft=2, **options)
            reply = await client.generate(
                PROMPT, mode="cascade", window=3, draft=2, max_new_tokens=20, eos_token_ids=(), **options
            )
            policy = Policy.resolve(cascade, (2, 4, 6))
            assert [(t.id, t.exit) for t in reply.tokens] == oracle.decide(policy, PROMPT, 20)
        await nodes.settle()


async def test_nodes_serve_from_shards_of_their_own(tiny: Path, tmp_path: Path) -> None:
    topology = cut_topology(tiny, [[2], [4, 6]])
    whole = Checkpoint(tiny)
    sharded = topology.model_copy(
        update={
            "family": "nowhere",
            "nodes": tuple(
                n.model_copy(update={"shard": cut(whole, n.exits, tmp_path / n.name)}) for n in topology.nodes
            ),
        }
    )
    async with cluster(topology) as a, cluster(sharded) as b:
        replies = []
        for nodes in (a, b):
            async with AsyncClient(nodes.topology) as client:
                replies.append(await client.generate(PROMPT, max_new_tokens=10))
    assert replies[0].token_ids == replies[1].token_ids


@pytest.mark.parametrize(("dtype", "encoding"), [("float16", "f16"), ("bfloat16", "bf16"), ("bfloat16", "f32")])
async def test_an_encoding_as_wide_as_the_nodes_format_loses_nothing(tiny: Path, dtype: str, encoding: str) -> None:
    family = load_family(tiny, dtype=dtype)
    expected = family.generate(torch.tensor([PROMPT]), max_new_tokens=10, eos_token_ids=())[0].tolist()
    topology = cut_topology(tiny, [[2], [4], [6]], dtype=dtype, encoding=encoding)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        reply = await client.generate(PROMPT, mode="exact", draft=0, max_new_tokens=10, eos_token_ids=())
        assert reply.token_ids == expected


async def test_an_ordinary_checkpoint_is_cut_at_the_exits_that_a_topology_gives_it(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "plain", base="llama", ordinary=True, tied=True)
    family = load_family(folder, dtype="float32", exits=(2, 4))
    expected = family.generate(torch.tensor([PROMPT]), max_new_tokens=10, eos_token_ids=())[0].tolist()
    async with (
        cluster(cut_topology(folder, [[2], [4, 6]], exits=(2, 4))) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        for draft in (0, 4):
            reply = await client.generate(PROMPT, mode="exact", draft=draft, max_new_tokens=10, eos_token_ids=())
            assert reply.token_ids == expected
        await nodes.settle()


async def test_bytes_go_up_by_escalation_only(tiny: Path) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]], encoding="bf16"), {"n1": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        silent = await client.generate(PROMPT, mode="token", threshold=0.0, max_new_tokens=20, eos_token_ids=())
        assert relay.bytes_up == 0 and silent.stats.escalations == 0 and len(silent.stats.hops) == 1
        every = await client.generate(
            PROMPT, mode="token", threshold=1.01, draft=0, max_new_tokens=20, eos_token_ids=()
        )
        assert every.stats.escalations == 20 and {t.exit for t in every.tokens} == {6}
        [_, hop] = every.stats.hops
        assert hop.messages == 20 and hop.positions == len(PROMPT) + 19
        assert hop.bytes_up <= hop.positions * (2 * 32 + 64)
        assert relay.bytes_up >= hop.bytes_up
        await nodes.settle()


async def test_a_question_finds_what_went_up_ahead(tiny: Path) -> None:
    asked: dict[str, Any] = {
        "mode": "cascade",
        "threshold": 0.5,
        "window": 8,
        "draft": 0,
        "max_new_tokens": 60,
        "eos_token_ids": (),
    }
    answers = []
    for upload in ("on-demand", "ahead"):
        topology = cut_topology(tiny, [[2], [4, 6]])
        links = tuple(link.model_copy(update={"upload": Upload(upload)}) for link in topology.links)
        async with (
            cluster(topology.model_copy(update={"links": links})) as nodes,
            AsyncClient(nodes.topology) as client,
        ):
            answers.append(await client.generate(PROMPT, **asked))
            await nodes.settle()
    on_demand, ahead = answers
    assert on_demand.token_ids == ahead.token_ids
    [_, late], [_, early] = on_demand.stats.hops, ahead.stats.hops
    assert late.positions == early.positions and late.bytes_up < early.bytes_up, "the same states, in more messages"


@pytest.mark.parametrize(("encoding", "a_position"), [("bf16", 2 * 32 + 64), ("int8", 32 + 32)])
async def test_drafts_cost_at_most_a_state_and_a_little(tiny: Path, encoding: str, a_position: int) -> None:
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]], encoding=encoding)) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        for draft in (0, 4):
            reply = await client.generate(PROMPT, mode="exact", draft=draft, max_new_tokens=20, eos_token_ids=())
            [_, hop] = reply.stats.hops
            assert hop.positions == sum((len(PROMPT), 19, reply.stats.drafted - reply.stats.accepted))
            assert hop.bytes_up <= hop.positions * a_position


async def test_a_long_prompt_travels_in_several_messages(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "long", max_position_embeddings=4096)
    oracle = Oracle(load_family(folder, dtype="float32"))
    prompt = [3 + i * 7 % 57 for i in range(1500)]
    topology = cut_topology(
        folder, [[2], [4, 6]], limits={"max_positions": 4096, "max_message_bytes": 65536, "grace_s": 1}
    )
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        reply = await client.generate(prompt, mode="exact", draft=2, max_new_tokens=6, eos_token_ids=())
        assert [(t.id, t.exit) for t in reply.tokens] == oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), prompt, 6)
        assert reply.stats.hops[1].messages > 4
        with pytest.raises(RequestError, match="n0.*exceeds limits.max_message_bytes"):
            await client.generate("x" * 100_000)
        await nodes.settle()


async def test_stop_strings_stay_on_the_entry_node(spoken: Path) -> None:
    relay = Relay()
    topology = cut_topology(spoken, [[2], [4, 6]])
    async with cluster(topology, {"n1": relay}) as nodes, AsyncClient(nodes.topology) as client:
        bytes_up = []
        for stop in ("\u4e16", "\u4e16" * 1000):  # which the answer does not contain
            before = relay.bytes_up
            reply = await client.generate("hi", mode="exact", draft=0, max_new_tokens=4, eos_token_ids=(), stop=stop)
            assert len(reply.tokens) == 4
            await nodes.settle()
            bytes_up.append(reply.stats.hops[1].bytes_up)
            assert relay.bytes_up - before < 3000
        assert bytes_up[0] == bytes_up[1]


async def test_drafts_never_outgrow_a_message(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "long", max_position_embeddings=4096)
    oracle = Oracle(load_family(folder, dtype="float32"))
    limits = {"max_message_bytes": 64 * 1024, "max_positions": 4096}
    topology = cut_topology(folder, [[2], [4, 6]], limits=limits)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        options: dict[str, Any] = {"mode": "exact", "draft": 1024, "max_new_tokens": 1100, "eos_token_ids": ()}
        async with aclosing(client.stream(PROMPT, **options)) as stream:
            ids = [(await anext(stream)).id for _ in range(3)]
        assert ids == [token for token, _ in oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), PROMPT, 3)]
        await nodes.settle()


async def test_sessions_at_once_do_not_mix(tiny: Path, oracle: Oracle) -> None:
    prompts = [[3 + i, 20 + i, 7, 50 - i] for i in range(6)]
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:

        async def ask(prompt: list[int], draft: int) -> Reply:
            return await client.generate(prompt, mode="exact", draft=draft, max_new_tokens=15, eos_token_ids=())

        replies = await asyncio.gather(*(ask(prompt, i % 4) for i, prompt in enumerate(prompts)))
        for prompt, reply in zip(prompts, replies, strict=True):
            expected = oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), prompt, 15)
            assert [(t.id, t.exit) for t in reply.tokens] == expected
        await nodes.settle()


async def test_session_and_position_limits_are_refused_and_the_node_lives_on(tiny: Path) -> None:
    limits = {"max_sessions": 2, "max_positions": 256, "grace_s": 1, "max_waiting": 0}
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]], limits=limits)) as nodes,
        AsyncClient(nodes.topology, max_retries=0) as client,
    ):
        with pytest.raises(RequestError, match="needs 405 positions; node 'n0' has 256 in all"):
            await client.generate(PROMPT, max_new_tokens=400)
        streams = [client.stream(PROMPT, draft=0, max_new_tokens=120, eos_token_ids=()) for _ in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(CapacityError, match="node 'n0' is full: 2 sessions are running"):
            await client.generate(PROMPT, max_new_tokens=10)
        for stream in streams:
            await stream.aclose()
        await nodes.settle()
        assert len((await client.generate(PROMPT, max_new_tokens=10, eos_token_ids=())).tokens) == 10


async def test_a_request_that_never_fits_on_a_deeper_node_is_refused_by_that_node(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2], [4], [6]])
    small = topology.nodes[2].limits.model_copy(update={"max_positions": 64})
    nodes_ = (*topology.nodes[:2], topology.nodes[2].model_copy(update={"limits": small}))
    async with (
        cluster(topology.model_copy(update={"nodes": nodes_})) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        for _ in range(20):  # gRPC would lose the status when the refusal meets a block that is being written
            with pytest.raises(RequestError, match="needs 105 positions; node 'n2' has 64 in all"):
                await client.generate(PROMPT, max_new_tokens=100)
            with pytest.raises(RequestError, match="node 'n2' has 64 in all"):  # it would be so at every try
                await client.generate(PROMPT, max_new_tokens=100, fallback=True)
        await nodes.settle()
        await client.generate(PROMPT, max_new_tokens=10)


async def test_a_cancelled_request_frees_every_cache(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:
        stream = client.stream(PROMPT, max_new_tokens=400, eos_token_ids=())
        for _ in range(3):
            await anext(stream)
        assert all(engine.shard.capacity.leases for engine in nodes.engines.values())
        await stream.aclose()
        await nodes.settle()
        task = asyncio.create_task(client.generate(PROMPT, max_new_tokens=400, eos_token_ids=()))
        await until(lambda: all(engine.shard.capacity.leases for engine in nodes.engines.values()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nodes.settle()


async def test_a_request_past_its_deadline_ends_everywhere(tiny: Path) -> None:
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]]), {"n1": Relay(delay_s=0.05)}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        with pytest.raises(
            DeadlineExceeded, match=r"no complete answer within 0.4 s \(timeout_s\): node 'n0' at .* or a deeper node"
        ):
            await client.generate(PROMPT, max_new_tokens=400, timeout_s=0.4, eos_token_ids=())
        await nodes.settle()


async def test_a_node_that_hangs_is_named_after_the_links_timeout(tiny: Path) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4], [6]], timeout_s=3.0), {"n2": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        stream = client.stream(PROMPT, max_new_tokens=200, eos_token_ids=())
        await anext(stream)
        relay.frozen = True
        with pytest.raises(DeadlineExceeded, match="node 'n[12]' at .* did not answer within 3 s"):
            async for _ in stream:
                pass
        relay.frozen = False
        await nodes.settle()


async def test_a_node_that_dies_ends_the_answer_with_its_name_and_frees_the_rest(tiny: Path) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4], [6]], recover_s=0), {"n2": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        stream = client.stream(PROMPT, max_new_tokens=200, eos_token_ids=())
        await anext(stream)
        relay.cut()
        with pytest.raises(NodeUnavailable, match="node 'n2'") as caught:
            async for _ in stream:
                pass
        assert caught.value.node == "n2"
        await nodes.settle()
        assert len((await client.generate(PROMPT, max_new_tokens=5, eos_token_ids=())).tokens) == 5


async def test_with_fallback_a_node_that_dies_leaves_the_rest_to_the_one_before_it(tiny: Path, oracle: Oracle) -> None:
    relay = Relay()
    async with (
        cluster(cut_topology(tiny, [[2], [4], [6]], recover_s=0), {"n2": relay}) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        ids, reasons, exits = list(PROMPT), [], []
        async for token in client.stream(PROMPT, max_new_tokens=100, eos_token_ids=(), fallback=True, draft=0):
            ids.append(token.id)
            reasons.append(token.reason)
            exits.append(token.exit)
            if len(reasons) == 3:
                relay.cut()
        lost = reasons.index(Reason.UNREACHABLE)
        assert lost >= 3 and reasons == [Reason.DEEPEST] * lost + [Reason.UNREACHABLE] * (100 - lost)
        assert exits == [6] * lost + [4] * (100 - lost)
        policy = Policy.resolve(Routing(Mode.FIXED, exit=4), (2, 4, 6))
        expected = oracle.decide(policy, ids[: len(PROMPT) + lost], 8)
        assert ids[len(PROMPT) + lost :][:8] == [token for token, _ in expected]
        await nodes.settle()


def _with_limits(topology: Topology, node: int, **limits: int) -> Topology:
    data = topology.model_dump(mode="json", by_alias=True, exclude_none=True)
    data["nodes"][node]["limits"] |= limits
    return Topology.parse(data)


@pytest.mark.parametrize("node", [0, 1])
async def test_an_operator_can_forbid_what_is_deeper(tiny: Path, oracle: Oracle, node: int) -> None:
    topology = _with_limits(cut_topology(tiny, [[2], [4], [6]]), node, deepest=4)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        reply = await client.generate(PROMPT, max_new_tokens=12, eos_token_ids=())
        policy = Policy.resolve(Routing(Mode.FIXED, exit=4), (2, 4, 6))
        assert [(t.id, t.exit) for t in reply.tokens] == oracle.decide(policy, PROMPT, 12)
        assert {t.reason for t in reply.tokens} == {Reason.LIMIT}
        assert {hop.node for hop in reply.stats.hops} == {"n0", "n1"}
        await nodes.settle()


async def test_a_node_sends_no_more_bytes_a_minute_than_its_operator_allows(tiny: Path) -> None:
    row = 32 * 4 + 16
    topology = _with_limits(cut_topology(tiny, [[2], [4, 6]]), 0, bytes_up_per_minute=9 * row)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        reply = await client.generate(PROMPT, max_new_tokens=30, eos_token_ids=(), draft=0)
        reasons = [t.reason for t in reply.tokens]
        # The prompt's five positions and four tokens more; then one whenever its bytes have come back, if at all.
        assert reasons[:5] == [Reason.DEEPEST] * 5 and reasons[5] is Reason.BUDGET
        sent = sum(hop.bytes_up for hop in reply.stats.hops)
        assert sent == sum(t.bytes_up for t in reply.tokens)
        assert sent < 9 * row * (1 + reply.stats.total_s / 60) + 400  # the handshake
        assert [t.after_s for t in reply.tokens] == sorted(t.after_s for t in reply.tokens)
        await nodes.settle()


def connect_to(engine: Engine, node: Node, link: Link) -> None:
    """Make a node that is loaded already dial another one."""
    engine._next = node, link
    engine._replicas = engine._make_replicas(node, link)


async def test_a_node_that_is_down_is_named(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2], [4, 6]])
    down = topology.nodes[1].model_copy(update={"address": "127.0.0.1:9"})
    async with cluster(topology) as nodes:
        broken = nodes.topology.model_copy(update={"nodes": (nodes.topology.nodes[0], down)})
        nodes.engines["n0"].topology = broken
        connect_to(nodes.engines["n0"], broken.nodes[1], broken.links[0])
        async with AsyncClient(broken) as client:
            with pytest.raises(
                NodeUnavailable, match="node 'n1' at 127.0.0.1:9 cannot be reached: connection refused; is it running"
            ):
                await client.generate(PROMPT, max_new_tokens=5)
            status = await client.status(timeout_s=1)
            assert isinstance(status["n0"], NodeStatus) and isinstance(status["n1"], NodeUnavailable)
            await nodes.settle()


async def test_another_family_is_refused_with_both_fingerprints(tiny: Path, tmp_path: Path) -> None:
    other = tiny_family(tmp_path / "other", seed=5)
    async with (
        cluster(cut_topology(tiny, [[2], [4, 6]])) as mine,
        cluster(cut_topology(other, [[2], [4, 6]])) as theirs,
    ):
        connect_to(mine.engines["n0"], theirs.topology.nodes[1], mine.topology.links[0])
        async with AsyncClient(mine.topology) as client:
            with pytest.raises(HandshakeError) as caught:
                await client.generate(PROMPT, max_new_tokens=5)
        for nodes in (mine, theirs):
            assert nodes.engines["n0"].checkpoint.fingerprint in str(caught.value)
        await theirs.settle()


async def test_bad_requests_are_refused_one_by_one(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        bad: list[tuple[Any, dict[str, Any], type[RuyiFlowError], str]] = [
            ([], {}, RequestError, "prompt is empty"),
            ("", {}, RequestError, "prompt is empty"),
            ("hello", {}, RequestError, "has no tokenizer.json"),
            ([3, 61], {}, RequestError, "token ids must be 0 … 60"),
            ([5] * 512, {}, ContextLengthError, "512 tokens, which leaves no room in the family's context of 512"),
            ([5], {"mode": "fixed", "exit": 3}, RequestError, "exit 3 is not one of the exits"),
            ([5], {"mode": "token"}, RequestError, "requires a threshold"),
            ([5], {"mode": "best"}, RequestError, "mode is 'best'; known: fixed, token, exact"),
            ([5], {"temprature": 1.0}, RequestError, "unknown option 'temprature'; did you mean 'temperature'"),
            ([5], {"temperature": -1.0}, RequestError, "temperature is -1.0"),
            ([5], {"stop": ["x"]}, RequestError, "stop strings need a tokenizer"),
            ([{"role": "user"}], {}, RequestError, "this message is"),
            (None, {}, RequestError, "this is NoneType"),
            ([-1], {}, RequestError, "this list contains -1"),
            ([5], {"draft": "4"}, RequestError, "draft is '4'"),
            ([5], {"exit": 2**40}, RequestError, "exit is 1099511627776"),
            ([5], {"stop": 5}, RequestError, "stop is 5"),
            ([5], {"eos_token_ids": 1.5}, RequestError, "eos_token_ids is 1.5"),
            ([5], {"temperature": 1e-30}, RequestError, "0.0001 or more"),
            ("\ud800", {}, RequestError, "not valid Unicode"),
            ([5], {"timeout_s": "soon"}, RequestError, "timeout_s is 'soon'"),
            ([5], {"timeout_s": 0}, RequestError, "timeout_s is 0"),
        ]
        for prompt, options, kind, message in bad:
            with pytest.raises(kind, match=message):
                await client.generate(prompt, **options)
        await nodes.settle()


def options_of(nodes: Cluster, **changes: object) -> pb.SessionRequest:
    """A valid handshake for node n1, with fields changed."""
    engine = nodes.engines["n1"]
    message = pb.SessionRequest(
        open=pb.Open(
            protocol=codec.PROTOCOL,
            family=engine.checkpoint.fingerprint,
            first_layer=2,
            node="n1",
            exits=engine.node.exits,
            hidden_size=32,
            encoding=pb.ENCODING_F32,
            max_positions=32,
            prompt_length=4,
            sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_new_tokens=8),
            policy=pb.Policy(thresholds={2: 9.0, 4: 9.0}, deepest=6),
        )
    )
    for name, value in changes.items():
        if isinstance(value, pb.Policy):
            message.open.policy.CopyFrom(value)
        else:
            setattr(message.open, name, value)
    return message


def block(start: int = 0, ids: Sequence[int] = (5, 6), wants: Sequence[int] = (1,), rows: int = 2) -> pb.SessionRequest:
    states = pb.Tensor(encoding=pb.ENCODING_F32, rows=rows, data=b"\0" * rows * 32 * 4)
    return pb.SessionRequest(block=pb.Block(start=start, token_ids=ids, wants=wants, states=states))


async def test_garbage_on_the_wire_is_refused_and_the_node_lives_on(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes:
        address = str(nodes.topology.nodes[1].address)
        channel = grpc.aio.insecure_channel(address)

        async def send(*messages: bytes | pb.SessionRequest) -> pb.SessionReply:
            call = channel.stream_stream(METHODS["Session"])(timeout=5)
            try:
                for message in messages:
                    await call.write(message if isinstance(message, bytes) else seal(message.SerializeToString()))
                    reply = pb.SessionReply.FromString(await call.read())
                if reply.WhichOneof("message") != "failure":
                    return reply
                told = reply.failure
                await call.done_writing()
                with pytest.raises(grpc.aio.AioRpcError) as ended:  # the status says the same
                    await call.read()
                error = error_of(told.status, told.message, told.node)
                assert str(error_of_call(ended.value, "n1", address)) == str(error)
                raise error
            finally:
                call.cancel()

        opening = options_of(nodes)
        assert len((await send(opening, block())).verdict.decisions) == 1
        refused: list[tuple[list[pb.SessionRequest | bytes], type[RuyiFlowError], str]] = [
            ([seal(b"\xff\xff\xff")], WireError, "not a SessionRequest"),
            ([b"\xff\xff\xff"], WireError, "does not end with a checksum"),
            ([seal(opening.SerializeToString()).replace(b"n1", b"n2")], WireError, "its checksum is wrong"),
            ([options_of(nodes, node="edge")], HandshakeError, "node: the caller has edge, node 'n1' has n1"),
            ([pb.SessionRequest()], WireError, "must start with open"),
            ([block()], WireError, "must start with open, not with block"),
            ([opening, opening], WireError, "open is not allowed in the middle of a session"),
            ([options_of(nodes, protocol=9)], HandshakeError, "has protocol version 5, the caller 9"),
            ([options_of(nodes, family="x")], HandshakeError, "family fingerprint: the caller has x"),
            ([options_of(nodes, first_layer=4)], HandshakeError, "first layer: the caller has 4, node 'n1' has 2"),
            ([options_of(nodes, hidden_size=64)], HandshakeError, "hidden size: the caller has 64"),
            ([options_of(nodes, encoding=77)], WireError, "Encoding is 77"),
            ([options_of(nodes, policy=pb.Policy(deepest=5))], HandshakeError, "policy is for exits"),
            ([options_of(nodes, policy=pb.Policy(deepest=6))], HandshakeError, "policy is for exits"),
            ([options_of(nodes, policy=pb.Policy(deepest=2))], HandshakeError, "policy"),
            ([options_of(nodes, max_positions=2**31)], ContextLengthError, "the family's context has 512"),
            ([opening, block(start=3)], WireError, "starts at position 3; this session is at 0"),
            ([opening, block(wants=(5,))], WireError, "wants"),
            ([opening, block(rows=3)], WireError, "2 positions has 3 states"),
            ([opening, block(ids=())], WireError, "a block of 0 positions has 2 states"),
            ([opening, block(ids=(5, 2**31))], WireError, "token ids"),
            ([opening, block(ids=(5,) * 33, rows=33, wants=())], WireError, "the session has 32"),
        ]
        for messages, kind, text in refused:
            with pytest.raises(kind, match=text):
                await send(*messages)
        call = channel.stream_stream(METHODS["Session"])(timeout=5)
        with contextlib.suppress(grpc.aio.AioRpcError):  # whether a write that is refused fails depends on timing
            await call.write(b"\0" * (5 * 1024 * 1024))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len((await send(opening, block())).verdict.decisions) == 1
        await nodes.settle()
        await channel.close()


async def test_a_node_that_is_not_the_entry_says_who_is(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes:
        only_deep = nodes.topology.model_copy(update={"nodes": nodes.topology.nodes[1:]})
        async with AsyncClient(only_deep) as client:
            with pytest.raises(RequestError, match="node 'n1' is not the entry node; send requests to 'n0'"):
                await client.generate(PROMPT)


@pytest.mark.timeout(300)
async def test_draining_refuses_new_sessions_and_lets_running_ones_end(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2, 4, 6]], limits={"max_positions": 1024, "grace_s": 300})
    engine = await asyncio.to_thread(Engine.load, topology, "n0")
    serving = serve(engine)
    server = await serving.__aenter__()
    node = topology.nodes[0].model_copy(update={"address": server.address})
    here = topology.model_copy(update={"nodes": (node,)})
    async with AsyncClient(here, recover_s=0) as client, grpc.aio.insecure_channel(server.address) as channel:

        async def health(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)

        assert await health("") == await health("ruyi_flow.v1.Node") == health_pb2.HealthCheckResponse.SERVING
        stream = client.stream(PROMPT, max_new_tokens=200, eos_token_ids=())
        got = [await anext(stream)]
        ending = asyncio.create_task(serving.__aexit__(None, None, None))
        while await health("") == health_pb2.HealthCheckResponse.SERVING:
            pass  # each question is a round trip
        assert await health("") == await health("ruyi_flow.v1.Node") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(NodeUnavailable, match="shutting down and takes no new session"):
            await client.generate(PROMPT)
        got += [token async for token in stream]
        assert len(got) == 200
        await ending
        with pytest.raises(NodeUnavailable, match="is it running"):
            await client.generate(PROMPT)


async def test_sessions_that_outlive_the_grace_time_are_ended(tiny: Path) -> None:
    topology = cut_topology(tiny, [[2, 4], [6]], limits={"max_positions": 1024, "grace_s": 0.1})
    async with contextlib.AsyncExitStack() as stack:
        async with cluster(topology) as nodes:
            client = await stack.enter_async_context(AsyncClient(nodes.topology))
            stream = client.stream(PROMPT, max_new_tokens=500, eos_token_ids=())
            await anext(stream)
        with pytest.raises((NodeUnavailable, RequestCancelled)):
            async for _ in stream:
                pass
    for engine in nodes.engines.values():
        assert engine.shard.capacity.pool.used == 0


@pytest.mark.parametrize(
    ("cuts", "exits", "name", "message"),
    [
        (
            [[2], [4, 6]],
            None,
            "n1",
            r"node 'n1': exits: the topology gives it \[4, 6\], but its shard .* was cut for \[6\]",
        ),
        (
            [[2, 4], [6]],
            None,
            "n0",
            r"node 'n0': exits: the topology gives it \[2, 4\], but its shard .* cut for \[2\]",
        ),
        ([[2], [4], [6]], (3, 6), "n0", r"exits: the topology names \[3, 6\], but .* family with exits \[2, 4, 6\]"),
    ],
)
def test_a_shard_of_another_cut_is_refused_before_it_serves(
    tiny: Path, tmp_path: Path, cuts: list[list[int]], exits: tuple[int, ...] | None, name: str, message: str
) -> None:
    whole = Checkpoint(tiny)
    folder = cut(whole, (2,) if name == "n0" else (6,), tmp_path / name)
    topology = cut_topology(tiny, cuts, exits=exits)
    nodes = tuple(n.model_copy(update={"shard": folder}) if n.name == name else n for n in topology.nodes)
    with pytest.raises(ConfigError, match=message):
        Engine.load(topology.model_copy(update={"nodes": nodes}), name)


def test_a_shard_that_serves_only_a_part_of_its_cut_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = cut(Checkpoint(tiny), (4, 6), tmp_path / "shard")
    topology = cut_topology(tiny, [[2, 4], [6]])
    last = topology.nodes[1].model_copy(update={"shard": folder})
    with pytest.raises(ConfigError, match=r"gives it \[6\], but its shard .* was cut for \[4, 6\]"):
        Engine.load(topology.model_copy(update={"nodes": (topology.nodes[0], last)}), "n1")
    whole = topology.nodes[1].model_copy(update={"shard": tiny})  # a whole family serves as any shard
    engine = Engine.load(topology.model_copy(update={"nodes": (topology.nodes[0], whole)}), "n1")
    assert engine.shard.model.exits == (6,)
    engine.worker.shutdown()


async def test_two_nodes_cannot_listen_on_one_port(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2, 4], [6]])) as nodes:
        engine = nodes.engines["n1"]
        with pytest.raises(NodeError, match="is in use already; node 'n1' cannot listen there"):
            async with serve(engine, address=str(nodes.topology.nodes[0].address)):
                pass


async def test_status_tells_what_a_node_holds(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, [[2], [4, 6]])) as nodes, AsyncClient(nodes.topology) as client:
        status = await client.status()
        first, second = status["n0"], status["n1"]
        assert isinstance(first, NodeStatus) and isinstance(second, NodeStatus)
        assert first.exits == (2,) and (first.first_layer, first.last_layer) == (0, 2)
        assert second.exits == (4, 6) and (second.first_layer, second.last_layer) == (2, 6)
        assert first.family == second.family and first.next_node == "n1" and second.next_node == ""
        whole = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
        assert first.parameters + second.parameters == whole
        assert first.sessions == 0 and first.used_positions == 0


async def test_status_tells_how_many_sessions_wait_for_room(tiny: Path) -> None:
    limits = {"max_sessions": 1, "max_positions": 512, "grace_s": 1}
    topology = cut_topology(tiny, [[2, 4, 6]], limits=limits)
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        stream = client.stream([5, 6, 7], max_new_tokens=200, eos_token_ids=())
        await anext(stream)
        late = asyncio.create_task(client.generate([5, 6, 7], max_new_tokens=4))
        await until(lambda: nodes.engines["n0"].front_door.waiting)
        status = (await client.status())["n0"]
        assert isinstance(status, NodeStatus) and (status.sessions, status.waiting) == (1, 1)
        assert "1/1 + 1 waiting" in [str(cell) for cell in status_table({"n0": status}).columns[1].cells]
        await stream.aclose()
        await late
        status = (await client.status())["n0"]
        assert isinstance(status, NodeStatus) and status.waiting == 0
        await nodes.settle()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own import
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_whose_layers_are_compiled_decides_the_same(tiny: Path, oracle: Oracle) -> None:
    node = {"name": "whole", "exits": [2, 4, 6], "dtype": "float32", "threads": 1, "compile": True}
    with Client(Topology.parse({"family": str(tiny), "nodes": [node]})) as client:
        reply = client.generate(PROMPT, mode="exact", draft=3, max_new_tokens=12, eos_token_ids=())
        expected = oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), PROMPT, 12)
        assert [(t.id, t.exit) for t in reply.tokens] == expected


def test_a_topology_of_one_node_needs_no_network(tiny: Path, oracle: Oracle) -> None:
    topology = Topology.parse(
        {"family": str(tiny), "nodes": [{"name": "whole", "exits": [2, 4, 6], "dtype": "float32", "threads": 1}]}
    )
    with Client(topology) as client:
        reply = client.generate(PROMPT, mode="exact", draft=3, max_new_tokens=12, eos_token_ids=())
        expected = oracle.decide(Policy.resolve(Routing(), (2, 4, 6)), PROMPT, 12)
        assert [(t.id, t.exit) for t in reply.tokens] == expected
        assert [hop.node for hop in reply.stats.hops] == ["whole"]
        status = client.status()["whole"]
        assert isinstance(status, NodeStatus) and status.state == "serving"
