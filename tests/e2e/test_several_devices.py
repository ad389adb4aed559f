"""Two devices that share an edge and a cloud, as real processes started from the example's files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.testing import free_ports, tiny_family
from ruyi_flow.types import NodeStatus
from tests.e2e.test_daemons import COMMAND, until, up

pytestmark = pytest.mark.timeout(180)

EXAMPLE = Path(__file__).parents[2] / "configs"
PROMPTS = {"phone": [5, 6, 7, 8], "tablet": [30, 31, 32]}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The example's files for a tiny family in float32, on free ports."""
    family = tiny_family(tmp_path / "family", exits=(5, 11, 17, 23, 29))
    data = {name: yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text()) for name in PROMPTS}
    addresses = sorted({node["address"] for topology in data.values() for node in topology["nodes"]})
    new = dict(zip(addresses, (f"127.0.0.1:{port}" for port in free_ports(len(addresses))), strict=True))
    assert len(new) == 4, "two devices, one edge, one cloud"
    for name, topology in data.items():
        topology["family"] = str(family)
        for node in topology["nodes"]:
            node |= {"address": new[node["address"]], "dtype": "float32"}
        for link in topology["links"]:
            link["encoding"] = "f32"
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(topology))
    return {name: tmp_path / f"{name}.yaml" for name in data}


@contextmanager
def node(name: str, topology: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one node until it is ended."""
    log = topology.with_suffix(".node.log")
    with log.open("wb") as file:
        process = subprocess.Popen([*COMMAND, "node", name, "-t", str(topology)], stdout=file, stderr=file)
    try:
        until(lambda: "serves exits" in log.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


async def test_two_devices_share_an_edge_and_a_cloud(files: dict[str, Path]) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": ()}
    topologies = [await asyncio.to_thread(Topology.load, files[name]) for name in PROMPTS]
    with up(files["phone"]), node("tablet", files["tablet"]) as tablet:
        async with AsyncClient(topologies[0]) as phone, AsyncClient(topologies[1]) as other:
            clients = {"phone": phone, "tablet": other}
            alone = {n: (await client.generate(PROMPTS[n], **asked)).token_ids for n, client in clients.items()}
            assert alone["phone"] != alone["tablet"]
            replies = await asyncio.gather(*(clients[n].generate(PROMPTS[n], **asked) for n in [*PROMPTS] * 3))
            assert [reply.token_ids for reply in replies] == [*alone.values()] * 3

            streams = {n: client.stream(PROMPTS[n], **asked) for n, client in clients.items()}
            begun = {n: [(await anext(stream)).id] for n, stream in streams.items()}
            assert await sessions(phone) == {"phone": 1, "edge": 2, "cloud": 2}
            tablet.kill()
            with pytest.raises(NodeError):
                begun["tablet"] += [token.id async for token in streams["tablet"]]
            assert begun["phone"] + [token.id async for token in streams["phone"]] == alone["phone"]
            async with asyncio.timeout(30):
                while any((await sessions(phone)).values()):  # noqa: ASYNC110 (they are other processes)
                    await asyncio.sleep(0.05)
            assert (await phone.generate(PROMPTS["phone"], **asked)).token_ids == alone["phone"]


async def test_an_answer_goes_on_at_another_device_that_is_alike(files: dict[str, Path]) -> None:
    data = yaml.safe_load(files["phone"].read_text())
    data["nodes"][0]["address"] = [data["nodes"][0]["address"], f"127.0.0.1:{free_ports(1)[0]}"]
    files["phone"].write_text(yaml.safe_dump(data))
    asked: dict[str, Any] = {"max_new_tokens": 300, "eos_token_ids": (), "mode": "exact", "draft": 0}
    topology = await asyncio.to_thread(Topology.load, files["phone"])
    with up(files["phone"]) as running:
        async with AsyncClient(topology) as client:
            alone = (await client.generate(PROMPTS["phone"], **asked)).token_ids
            stream = client.stream(PROMPTS["phone"], **asked)
            begun = [(await anext(stream)).id for _ in range(20)]
            [busy] = [name for name, count in (await sessions(client)).items() if count and name.startswith("phone/")]
            status = (await client.status())[busy]
            assert isinstance(status, NodeStatus)
            os.kill(status.process_id, signal.SIGKILL)
            assert begun + [token.id async for token in stream] == alone
            assert len(stream.reply.stats.recoveries) == 1
            async with asyncio.timeout(60):
                while set(await sessions(client)) != {"phone/1", "phone/2", "edge", "cloud"}:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
        assert f"{busy} │ ended with -9; starting it again" in running.log.read_text()


async def sessions(client: AsyncClient) -> dict[str, int]:
    """The number of open sessions on each node."""
    return {n: s.sessions for n, s in (await client.status()).items() if isinstance(s, NodeStatus)}


def test_up_of_the_second_device_says_what_to_start(files: dict[str, Path]) -> None:
    with up(files["phone"]):
        done = subprocess.run([*COMMAND, "up", str(files["tablet"])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "start only the nodes that do not run yet: ruyi-flow node NAME" in done.stderr
