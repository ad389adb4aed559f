"""Nodes and links from outside: real nodes that serve, are down, hang, are others, or are behind a slow link."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from ruyi_flow.config.topology import Topology
from ruyi_flow.doctor import nodes as doctor_nodes
from ruyi_flow.doctor.checks import Check, Mark
from ruyi_flow.testing import Relay, cluster, cut_topology, free_ports, tiny_family
from ruyi_flow.transport import codec
from ruyi_flow.transport import link as transport_link
from ruyi_flow.transport._pb import node_pb2 as pb
from tests.conftest import with_replica
from tests.doctor.conftest import Examined

pytestmark = pytest.mark.timeout(120)

CUTS = [[2], [4], [6]]


def elsewhere(topology: Topology, name: str, **changes: object) -> Topology:
    """The topology with another node of that name."""
    there = [n.model_copy(update=changes) if n.name == name else n for n in topology.nodes]
    return topology.model_copy(update={"nodes": tuple(there)})


def only(checks: list[Check]) -> Check:
    [check] = checks
    return check


async def test_nodes_that_agree_are_all_right(tiny: Path, examined: Examined) -> None:
    async with cluster(cut_topology(tiny, CUTS)) as nodes:
        found = await examined(nodes.topology)
    for name in ("n0", "n1", "n2", "here → n0", "here → n1", "here → n2", "n0 → n1", "n1 → n2", "file"):
        assert only(found[name]).mark is Mark.OK, found[name]
    assert "serves exit 4 with ruyi-flow" in found["n1"][0].text
    assert "From n0 to n1: a round trip takes" in found["n0 → n1"][0].text


async def test_a_node_that_does_not_run_is_named_with_the_command_that_starts_it(
    tiny: Path, examined: Examined
) -> None:
    async with cluster(cut_topology(tiny, CUTS)) as nodes:
        topology = elsewhere(nodes.topology, "n2", address=f"127.0.0.1:{free_ports(1)[0]}")
        found = await examined(topology)
    down = only(found["n2"])
    assert down.mark is Mark.FAILED and "does not run; its port" in down.text
    assert down.fix.startswith("start it: ruyi-flow node n2 --topology three.yaml; or start the tunnel, ")
    assert [c.mark for c in found["n1"]] == [Mark.OK, Mark.WARNING]  # it serves, and reaches n2 at another address
    assert "here → n2" not in found and only(found["here → n1"]).mark is Mark.OK


async def test_each_replica_has_a_row_of_its_own(tiny: Path, examined: Examined) -> None:
    [port] = free_ports(1)
    async with cluster(cut_topology(tiny, CUTS)) as nodes, with_replica(nodes.topology, "n1") as topology:
        first, second = topology.node("n1").addresses
        found = await examined(elsewhere(topology, "n1", address=(first, second, f"127.0.0.1:{port}")))
    for name, address in (("n1/1", first), ("n1/2", second)):
        assert only(found[name]).mark is Mark.OK and f"Node {name!r} at {address} serves" in found[name][0].text
        assert only(found[f"here → {name}"]).mark is only(found[f"{name} → n2"]).mark is Mark.OK
    down = only(found["n1/3"])
    assert down.mark is Mark.FAILED and f"Node 'n1/3' does not run; its port {port} is free." == down.text
    assert down.fix.startswith("start it: ruyi-flow node n1 --replica 3 --topology three.yaml; or start the tunnel")
    assert "n1" not in found and "here → n1/3" not in found


async def test_the_addresses_of_a_name_are_visited_one_by_one(
    tiny: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: object, **kwargs: object) -> object:
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "n2.example" else [host]
        return [found for one in hosts for found in real(one, *args, **kwargs)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with cluster(cut_topology(tiny, CUTS)) as nodes:
        port = str(nodes.topology.nodes[2].address).rpartition(":")[2]
        found = await examined(elsewhere(nodes.topology, "n2", address=f"n2.example:{port}"))
    assert only(found["n2/1"]).mark is Mark.OK and f"at 127.0.0.1:{port} serves" in found["n2/1"][0].text
    assert only(found["n2/2"]).fix.startswith("start it: ruyi-flow node n2 --topology"), "no number in the topology"


async def test_nodes_that_were_not_started_are_no_failure(tiny: Path, examined: Examined) -> None:
    ports = iter(free_ports(3))
    topology = cut_topology(tiny, CUTS)
    for node in topology.nodes:
        topology = elsewhere(topology, node.name, address=f"127.0.0.1:{next(ports)}")
    found = await examined(topology)
    assert only(found["all"]).mark is Mark.WARNING and "No node runs yet" in found["all"][0].text
    assert not [c for checks in found.values() for c in checks if c.mark is Mark.FAILED]


async def test_a_node_that_hangs_holds_nobody_up(
    tiny: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_nodes, "_LIMIT_S", 1.0)
    monkeypatch.setattr(transport_link, "_METER_S", 1.0)
    relay = Relay()
    async with cluster(cut_topology(tiny, CUTS), {"n1": relay}) as nodes:
        relay.frozen = True
        found = await examined(nodes.topology)
        hung, link = only(found["n1"]), only(found["n0 → n1"])
        assert hung.mark is link.mark is Mark.FAILED
        assert "accepts connections" in hung.text and "does not answer within 1 s: it hangs" in hung.text
        assert "does not reach node 'n1'" in link.text and "nc -vz 127.0.0.1 " in link.fix
        assert only(found["n0"]).mark is only(found["n2"]).mark is Mark.OK
        relay.frozen = False


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_another_program_on_a_port_is_no_node(
    tiny: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    monkeypatch.setattr(doctor_nodes, "_LIMIT_S", 2.0)

    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(greeting)
        with suppress(ConnectionError):
            await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    topology = elsewhere(cut_topology(tiny, CUTS), "n0", address=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for node, port in zip(topology.nodes[1:], free_ports(2), strict=True):
        topology = elsewhere(topology, node.name, address=f"127.0.0.1:{port}")
    found = only((await examined(topology))["n0"])
    server.close()
    await server.wait_closed()
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0.05)  # the transports end
    assert found.mark is Mark.FAILED and "(process " in found.text
    assert ("is not node 'n0'" if greeting else "or another program listens there") in found.text


async def test_a_name_that_does_not_exist_is_said(tiny: Path, examined: Examined) -> None:
    topology = elsewhere(cut_topology(tiny, CUTS), "n1", address="no-such-machine.invalid:7102")
    topology = elsewhere(topology, "n0", address=f"127.0.0.1:{free_ports(1)[0]}")
    topology = elsewhere(topology, "n2", address=f"127.0.0.1:{free_ports(1)[0]}")
    found = await examined(topology)
    assert "The name 'no-such-machine.invalid' of node 'n1' cannot be resolved" in only(found["n1"]).text
    assert only(found["n0"]).mark is Mark.FAILED  # another node is at fault, too, so it is not simply too early


async def test_other_exits_are_noticed(tiny: Path, examined: Examined) -> None:
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes:
        topology = elsewhere(elsewhere(nodes.topology, "n1", exits=(4, 6)), "n2", exits=(7,))
        found = await examined(topology)
    assert found["n1"][1].mark is Mark.FAILED
    assert "Node 'n1' serves exits [4]; " in found["n1"][1].text and "gives it [4, 6]" in found["n1"][1].text
    assert "cut its shard again" in found["n1"][1].fix


async def test_a_node_of_another_family_is_noticed(tiny: Path, tmp_path: Path, examined: Examined) -> None:
    other = tiny_family(tmp_path / "other", seed=7)
    async with cluster(cut_topology(tiny, CUTS)) as ours, cluster(cut_topology(other, CUTS)) as theirs:
        foreign = theirs.topology.node("n2").address
        found = await examined(elsewhere(ours.topology, "n2", address=foreign))
    assert found["n2"][1].mark is Mark.FAILED and "has family fingerprint" in found["n2"][1].text
    assert "and node 'n0' has" in found["n2"][1].text and "cut the family once" in found["n2"][1].fix


async def test_a_slow_link_is_measured_by_the_node_and_from_here(tiny: Path, examined: Examined) -> None:
    relay = Relay(delay_s=0.05, bytes_per_s=2_500_000)  # a round trip of 100 ms, 20 Mbit/s
    async with cluster(cut_topology(tiny, CUTS), {"n1": relay}) as nodes:
        slow = await nodes.engines["n0"].status_with_link()
        fast = await nodes.engines["n1"].status_with_link()
        assert slow.link is not None and fast.link is not None
        assert 100 <= slow.link.round_trip_ms < 1000 and slow.link.round_trip_ms > fast.link.round_trip_ms
        assert 2 < slow.link.up_mbit < 30 < fast.link.up_mbit
        found = await examined(nodes.topology)
    assert only(found["here → n1"]).mark is only(found["n0 → n1"]).mark is Mark.OK


async def test_who_asks_often_measures_once(tiny: Path) -> None:
    relay = Relay()
    async with cluster(cut_topology(tiny, CUTS), {"n1": relay}) as nodes:
        engine = nodes.engines["n0"]
        found = await asyncio.gather(*(engine.status_with_link() for _ in range(20)))
        again = await engine.status_with_link()
        assert found[0].link is not None and all(status.link is found[0].link for status in [*found, again])
        assert relay.bytes_up < 1_200_000, "about 1 MB, for 21 requests"
        assert (await nodes.engines["n2"].status_with_link()).link is None  # the deepest node has no link


async def test_a_caller_that_goes_away_ends_no_measurement_of_others(tiny: Path) -> None:
    async with cluster(cut_topology(tiny, CUTS)) as nodes:
        engine = nodes.engines["n0"]
        gone, stays = (asyncio.create_task(engine.status_with_link()) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await stays).link is not None
        late = asyncio.create_task(nodes.engines["n1"].status_with_link())
        await asyncio.sleep(0)
        await nodes.engines["n1"].close()
        assert "the node stops" in (await late).link_error


async def test_a_node_that_drains_measures_nothing(tiny: Path, examined: Examined) -> None:
    relay = Relay()
    async with cluster(cut_topology(tiny, CUTS), {"n1": relay}) as nodes:
        nodes.engines["n0"].front_door.draining = True
        status = await nodes.engines["n0"].status_with_link()
        assert status.link is None and "is draining" in status.link_error and relay.bytes_up == 0
        found = await examined(nodes.topology)
    assert only(found["n0"]).mark is Mark.WARNING and "takes no new sessions" in found["n0"][0].text
    assert only(found["n0 → n1"]).mark is Mark.FAILED


async def test_an_operators_byte_budget_bounds_a_measurement(tiny: Path) -> None:
    relay = Relay()
    limits = {"max_positions": 2048, "grace_s": 1, "bytes_up_per_minute": 40_000}
    topology = cut_topology(tiny, CUTS)
    small = elsewhere(topology, "n0", limits=topology.nodes[0].limits.model_copy(update=limits))
    async with cluster(small, {"n1": relay}) as nodes:
        assert (await nodes.engines["n0"].status_with_link()).link is not None
        assert relay.bytes_up < 40_000 / 6, "it can be asked for six times a minute"


async def test_a_machine_that_swallows_packets_is_waited_for_a_while(
    tiny: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_nodes, "_LIMIT_S", 1.0)
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):  # a full queue of connections drops further ones without a word
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        topology = elsewhere(cut_topology(tiny, CUTS), "n0", address=f"127.0.0.1:{full.getsockname()[1]}")
        for node, port in zip(topology.nodes[1:], free_ports(2), strict=True):
            topology = elsewhere(topology, node.name, address=f"127.0.0.1:{port}")
        found = only((await examined(topology))["n0"])
    assert found.mark is Mark.FAILED and "cannot be reached: no answer within 1 s" in found.text
    assert "in the firewall of its machine" in found.fix


@asynccontextmanager
async def old_node(reply: pb.StatusReply) -> AsyncIterator[str]:
    """A node of an older version, which knows no field beyond 21."""

    async def status(data: bytes, _: object) -> bytes:
        return reply.SerializeToString()

    server = grpc.aio.server()
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    handlers = {"Status": grpc.unary_unary_rpc_method_handler(status)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ruyi_flow.v1.Node", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_what_an_older_node_does_not_say_is_unknown_and_no_failure(tiny: Path, examined: Examined) -> None:
    async with cluster(cut_topology(tiny, CUTS)) as nodes:
        old = codec.status_to_pb(nodes.engines["n0"].status())
        for field in ("version", "next_address", "next_encoding"):
            old.ClearField(field)
        async with old_node(old) as address:
            found = await examined(elsewhere(nodes.topology, "n0", address=address))
    assert only(found["n0"]).mark is Mark.OK and "its version of ruyi-flow is unknown" in found["n0"][0].text
    assert only(found["n0 → n1"]).mark is Mark.WARNING and "is unknown" in found["n0 → n1"][0].text


async def test_a_name_server_that_does_not_answer_is_waited_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    released = asyncio.Event()
    loop = asyncio.get_running_loop()

    def silent(*_: object, **__: object) -> None:
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result()

    monkeypatch.setattr(doctor_nodes, "_LIMIT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    [place] = await doctor_nodes.find(cut_topology(tiny, CUTS).nodes[0])
    assert "did not answer within 0.2 s" in place.error
    released.set()
    await asyncio.sleep(0.05)
