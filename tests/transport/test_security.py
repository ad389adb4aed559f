"""TLS between nodes: who may make which call, renewed certificates, and answers that are the same."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.security import Keys, Security, node_identity
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, NodeUnavailable
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.keys.authority import Authority, keys_of_user
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.telemetry import exposition  # noqa: F401 (its import reads files, which no event loop may wait for)
from ruyi_flow.testing import Cluster, cluster, cut_topology, free_ports, with_keys
from ruyi_flow.transport.peer import METHODS, Peer
from ruyi_flow.transport.security import Files
from ruyi_flow.transport.server import HEALTH_CALLS, NEEDS
from tests.config.test_policy_file import write
from tests.conftest import write_topology

CUTS = [[2], [4], [6]]
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}

BEFORE = {"n0": set[str](), "n1": {"n0"}, "n2": {"n0", "n1"}}
"""The nodes that the topology places before each one."""


def allowed(call: str, node: str) -> set[str]:
    """The right credentials with which a node answers a call, as docs/design/0011-trust.md has them."""
    user = {"operator"}
    if call in ("Session", "Together"):
        return BEFORE[node]
    if call in ("Generate", "Tokenize"):
        return user if node == "n0" else set()
    if call == "Owed":
        return user if node == "n0" else BEFORE[node]
    if call == "Alive":
        return {node} | (user if node == "n0" else BEFORE[node])
    assert call in ("Status", *HEALTH_CALLS)
    return {node} | user | BEFORE[node]


@asynccontextmanager
async def connected(address: str, node: str, ca: Path, keys: Keys | None) -> AsyncIterator[grpc.aio.Channel]:
    """A channel with a certificate of one's choice."""
    pair = (None, None) if keys is None else (keys.key.read_bytes(), keys.certificate.read_bytes())
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
    options = [("grpc.ssl_target_name_override", node_identity(node, "test")), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        yield channel


async def outcome(channel: grpc.aio.Channel, call: str) -> tuple[grpc.StatusCode, str]:
    """Make a call with an empty message, and return its status; OK as soon as it is answered."""
    path = METHODS.get(call, f"/grpc.health.v1.Health/{call}")
    running = channel.stream_stream(path)(timeout=10)
    try:
        await running.write(b"")
        await running.done_writing()
        if await running.read() is not grpc.aio.EOF:
            return grpc.StatusCode.OK, ""
    except grpc.aio.AioRpcError:
        pass
    except asyncio.InvalidStateError:  # it was refused before the message was written
        pass
    finally:
        code = await running.code() if running.done() else None
        running.cancel()
    return (grpc.StatusCode.OK, "") if code is None else (code, await running.details() or "")


def made(authority: Authority, security: Security) -> dict[str, Keys]:
    """Certificates of the right CA that must not work."""
    other = Authority.create(
        Security(deployment="test", ca=security.folder / "other" / "ca.pem"), days=1
    )  # of the same deployment's name
    stranger = Security(deployment="other", ca=security.ca)
    return {
        "wrong CA": other.issue_user("operator", days=1),
        "expired": authority.issue_user("late", days=0),
        "other deployment": Authority(stranger).issue_user("ann", days=1),
    }


async def test_every_call_is_answered_to_those_who_may_make_it_and_to_nobody_else(tiny: Path, tmp_path: Path) -> None:
    assert set(NEEDS) == {*METHODS, *HEALTH_CALLS}
    async with cluster(cut_topology(tiny, CUTS), keys=tmp_path) as nodes:
        security = nodes.topology.security
        assert security is not None
        right = {name: security.of_node(name, None) for name in BEFORE} | {"operator": security.of_user()}
        wrong = await asyncio.to_thread(made, Authority(security), security)
        await asyncio.sleep(1.1)  # certificates end at whole seconds
        credentials: dict[str, Keys | None] = {"none": None, **wrong, **right}
        for node in nodes.topology.nodes:
            for name, keys in credentials.items():
                async with connected(node.addresses[0], node.name, security.ca, keys) as channel:
                    for call in NEEDS:
                        code, text = await outcome(channel, call)
                        cell = f"{call} at {node.name} with {name}: {code.name} {text}"
                        assert (code not in REFUSED) == (name in allowed(call, node.name)), cell
                        if name == "other deployment":
                            assert code is grpc.StatusCode.UNAUTHENTICATED and "deployment 'test'" in text, cell
                        elif name in right and code in REFUSED:
                            assert code is grpc.StatusCode.PERMISSION_DENIED and f"answers {call} to" in text, cell
        await nodes.settle()


async def test_a_caller_refuses_a_node_of_another_name(tiny: Path, tmp_path: Path) -> None:
    async with cluster(cut_topology(tiny, CUTS), keys=tmp_path) as nodes:
        keys = nodes.topology.user_keys
        peer = Peer("n1", nodes.topology.nodes[2].addresses[0], max_message_bytes=2**20, keys=keys)
        with pytest.raises(NodeUnavailable, match="its certificate is not one of this node in this deployment"):
            await peer.status(timeout_s=5)
        await peer.close()


async def test_tls_1_2_is_answered_to_nobody(tiny: Path, tmp_path: Path) -> None:
    """gRPC itself accepts TLS 1.2, so it is refused with every call: as if the certificate had not been shown."""
    async with cluster(cut_topology(tiny, [[2, 4, 6]]), keys=tmp_path) as nodes:
        keys = nodes.topology.user_keys
        assert keys is not None
        address = nodes.topology.entry.addresses[0]
        assert await asyncio.to_thread(ask_by_hand, address, keys, ssl.TLSVersion.TLSv1_2) == b"16"
        assert await asyncio.to_thread(ask_by_hand, address, keys, ssl.TLSVersion.TLSv1_3) == b"0"


def ask_by_hand(address: str, keys: Keys, version: ssl.TLSVersion) -> bytes:
    """Call Status over HTTP/2 made of bytes, with one version of TLS, and return the number of the gRPC status."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(keys.ca)
    context.load_cert_chain(keys.certificate, keys.key)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def field(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(
        field(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", METHODS["Status"].encode()),
            (b":authority", b"localhost"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        with context.wrap_socket(raw, server_hostname=node_identity("n0", "test")) as wire:
            wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            wire.sendall(frame(1, 4, 1, headers) + frame(0, 1, 1, b"\x00" * 5))
            found = b""
            while b"grpc-status" not in found:
                data = wire.recv(65536)
                assert data, found
                found += data
            rest = found.partition(b"grpc-status")[2]
            return rest[1 : 1 + rest[0]]


async def answer(client: AsyncClient) -> list[int]:
    reply = await client.generate([5, 6, 7], mode="exact", max_new_tokens=12, eos_token_ids=())
    return [token.id for token in reply.tokens]


async def test_a_renewed_certificate_counts_from_the_next_connection_on(tiny: Path, tmp_path: Path) -> None:
    plain = cut_topology(tiny, CUTS)
    async with cluster(plain) as nodes, AsyncClient(nodes.topology) as client:
        expected = await answer(client)
    async with cluster(plain, keys=tmp_path) as nodes, AsyncClient(nodes.topology) as client:
        assert await answer(client) == expected
        before = await asyncio.to_thread(shown, nodes)
        await asyncio.to_thread(renew_all, nodes)
        after = await asyncio.to_thread(shown, nodes)
        assert len({*before, *after}) == 6  # each node shows its new certificate
        assert await answer(client) == expected  # over the connections of before
        async with AsyncClient(nodes.topology) as second:
            assert await answer(second) == expected
        await nodes.settle()


def renew_all(nodes: Cluster) -> None:
    security = nodes.topology.security
    assert security is not None
    authority = Authority(security)
    for name in BEFORE:
        authority.renew(security.of_node(name, None), days=2)
    authority.renew(keys_of_user(security, "operator"), days=2)


def shown(nodes: Cluster) -> list[bytes]:
    """The certificates that the nodes show to a new connection."""
    security = nodes.topology.security
    assert security is not None
    own, found = security.of_user(), []
    for node in nodes.topology.nodes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(own.ca)
        context.load_cert_chain(own.certificate, own.key)
        context.set_alpn_protocols(["h2"])
        host, _, port = node.addresses[0].rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            with context.wrap_socket(raw, server_hostname=node_identity(node.name, "test")) as wire:
                found.append(wire.getpeercert(binary_form=True) or b"")
    return found


def test_files_that_do_not_fit_leave_those_of_before_in_use(tiny: Path, tmp_path: Path) -> None:
    topology = with_keys(cut_topology(tiny, CUTS), tmp_path)
    keys, other = topology.keys_of("n0"), topology.keys_of("n1")
    assert keys is not None and other is not None
    files = Files(keys)
    before = files.read()
    keys.certificate.write_bytes(other.certificate.read_bytes())  # its key is still to come
    assert not files.changed()
    keys.key.write_bytes(other.key.read_bytes())
    assert files.changed() and files.read() != before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
def test_a_key_that_others_may_read_is_refused(tiny: Path, tmp_path: Path) -> None:
    keys = with_keys(cut_topology(tiny, CUTS), tmp_path).keys_of("n0")
    assert keys is not None and keys.key.stat().st_mode & 0o777 == 0o600
    keys.key.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others .mode 0644.; chmod 600"):
        Files(keys).read()


@pytest.mark.parametrize("key", ["listen", "metrics"])
async def test_a_node_without_keys_listens_on_loopback_only(tiny: Path, key: str) -> None:
    topology = cut_topology(tiny, [[2, 4, 6]])
    node = topology.entry.model_copy(update={key: "0.0.0.0:0"})
    engine = await asyncio.to_thread(Engine.load, topology.model_copy(update={"nodes": (node,)}), node.name)
    with pytest.raises(ConfigError, match="other machines can reach, and the topology has no keys: .* keys init"):
        async with serve(engine):
            pass
    if key == "listen":
        async with serve(engine, insecure=True) as server:
            assert server.address.startswith("0.0.0.0:")


async def test_metrics_are_told_over_tls_to_callers_with_a_certificate(tiny: Path, tmp_path: Path) -> None:
    [port] = free_ports(1)
    topology = cut_topology(tiny, [[2, 4, 6]])
    node = topology.entry.model_copy(update={"metrics": f"127.0.0.1:{port}"})
    async with cluster(topology.model_copy(update={"nodes": (node,)}), keys=tmp_path / "keys") as nodes:
        keys = nodes.topology.user_keys
        assert keys is not None
        context = ssl.create_default_context(cafile=keys.ca)
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context) as http:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await http.get("/metrics")
        context.load_cert_chain(keys.certificate, keys.key)
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context) as http:
            assert "ruyi_num_requests_running" in (await http.get("/metrics")).text
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/metrics")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
def test_a_shard_and_a_policy_that_everyone_may_write_are_refused_with_keys(tiny: Path, tmp_path: Path) -> None:
    shard, policy = tmp_path / "shard", tmp_path / "policy.yaml"
    topology = cut_topology(tiny, [[2, 4, 6]])
    cut(Checkpoint(tiny), (2, 4, 6), shard)
    node = topology.entry.model_copy(update={"shard": shard})
    keyless = topology.model_copy(update={"nodes": (node,)})
    keyed = with_keys(keyless, tmp_path / "keys")
    shard.chmod(0o777)
    Engine.load(keyless, node.name)
    with pytest.raises(ConfigError, match="every user of this machine may change .*; chmod o-w"):
        Engine.load(keyed, node.name)
    shard.chmod(0o755)
    Engine.load(keyed, node.name)
    write(policy, family=Checkpoint(tiny).fingerprint)
    policy.chmod(0o666)
    node = topology.entry.model_copy(update={"address": "127.0.0.1:7199"})
    policies = topology.policy.model_copy(update={"file": policy})
    topology = topology.model_copy(update={"policy": policies, "nodes": (node,)})
    file = write_topology(topology, tmp_path / "topology.yaml")
    Topology.load(file)
    with file.open("a") as out:
        out.write(f"security:\n  deployment: test\n  ca: {tmp_path / 'keys' / 'ca.pem'}\n")
    with pytest.raises(ConfigError, match="every user of this machine may change this policy"):
        Topology.load(file)
