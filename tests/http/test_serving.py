"""The server and its commands: models, health, addresses, ports, and a stop by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.http.models import Models
from ruyi_flow.http.serving import Listening, serve
from ruyi_flow.testing import Cluster, Relay, cluster, cut_topology, free_ports
from tests.conftest import Command, with_replica, write_topology
from tests.http.conftest import chat, client_of

CHAT = "/v1/chat/completions"


async def test_every_way_to_decide_is_a_model(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    names = ["spoken", "spoken@exit-2", "spoken@exit-4", "spoken@exit-6", "spoken@token", "spoken@exact"]
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == names
    for model in listed["data"]:
        assert model["object"] == "model" and model["owned_by"] == "ruyi-flow" and model["max_model_len"] == 512
        assert (await http.get(f"/v1/models/{model['id']}")).json() == model
    reply = await http.get("/v1/models/spoken@exit-3")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    assert all(name in reply.json()["error"]["message"] for name in names)


def policy_file(folder: Path) -> Path:
    file = folder / "policy.yaml"
    curves = {p: {"temperature": 1.0, "scores": [0.0, 1.0], "chances": [0.0, 1.0]} for p in (2, 4)}
    policy = {"family": "x", "mode": "token", "score": "max_probability", "thresholds": {2: 0.2, 4: 2.0}}
    file.write_text(yaml.safe_dump({**policy, "curves": curves}))
    return file


async def test_a_policy_file_is_a_model(three: Cluster, tmp_path: Path) -> None:
    file = policy_file(tmp_path)
    text = yaml.safe_load(file.read_text())
    text["family"] = three.engines["n0"].status().family
    file.write_text(yaml.safe_dump(text))
    async with serve(three.topology, port=0, policies={"careful": file}, grace_s=1) as listening:
        async with client_of(listening) as http:
            assert "spoken@careful" in [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
            asked = chat(model="spoken@careful", ruyi={"details": True})
            answer = (await http.post(CHAT, json=asked)).json()
            exits = {token["exit"] for token in answer["choices"][0]["ruyi"]["tokens"]}
            assert exits == {2, 6}  # never by exit 4, whose threshold cannot be reached
            asked["ruyi"]["mode"] = "exact"
            answer = (await http.post(CHAT, json=asked)).json()
            assert {token["exit"] for token in answer["choices"][0]["ruyi"]["tokens"]} == {6}
            asked["ruyi"]["mode"] = "cascade"
            assert "calibrated for mode 'token'" in (await http.post(CHAT, json=asked)).json()["error"]["message"]


def test_policies_that_cannot_be_models_are_refused(spoken: Path, tmp_path: Path) -> None:
    topology = cut_topology(spoken, [[4], [6]])
    for name in ("token", "exit-4", "a b", ""):
        with pytest.raises(ConfigError, match="the name must be"):
            Models(topology, {name: policy_file(tmp_path)})
    with pytest.raises(ConfigError, match="exit 2 is not one of the exits"):
        Models(topology, {"careful": policy_file(tmp_path)})


@pytest.mark.parametrize(
    ("model", "ruyi", "expected"),
    [
        ("spoken", {"draft": 0}, {"draft": 0}),
        ("spoken@exit-2", {"mode": "exact"}, {"mode": "exact"}),
        ("spoken@exit-2", {"draft": 2}, {"mode": "fixed", "exit": 2, "draft": 2}),
        ("spoken@token", {"mode": "token"}, {"mode": "token", "threshold": 0.9}),
        ("spoken@token", {"threshold": 0.5}, {"threshold": 0.5}),
        ("spoken@token", {"thresholds": {2: 0.5}}, {"thresholds": {2: 0.5}}),
    ],
)
def test_a_request_overrides_what_the_name_says(
    spoken: Path, model: str, ruyi: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert Models(cut_topology(spoken, [[2], [4], [6]])).find(model).routing(ruyi) == expected


def test_token_has_the_thresholds_of_the_topology(spoken: Path) -> None:
    raw = json.loads(cut_topology(spoken, [[2], [4], [6]]).model_dump_json(by_alias=True, exclude_none=True))
    raw["policy"] = {"mode": "token", "threshold": 0.3}
    assert Models(Topology.parse(raw)).find("spoken@token").options == {"mode": "token"}


async def test_details_tell_who_decided_each_token(http: httpx.AsyncClient) -> None:
    asked = chat(ruyi={"details": True, "mode": "token", "thresholds": {"2": 0.3}, "draft": 0}, max_tokens=12)
    answer = (await http.post(CHAT, json=asked)).json()
    tokens = answer["choices"][0]["ruyi"]["tokens"]
    assert len(tokens) == 12 and {token["node"] for token in tokens} == {"n0", "n2"}
    for token in tokens:
        assert set(token) == {
            *("id", "text", "exit", "node", "tier", "confidence", "reason", "after_s", "bytes_up"),
        }
        assert (token["reason"], token["exit"]) == (("confident", 2) if token["node"] == "n0" else ("deepest", 6))
        assert (token["confidence"] >= 0.3) or token["exit"] == 6
    stats = answer["ruyi"]["stats"]
    assert stats["escalations"] > 0 and [hop["node"] for hop in stats["hops"]] == ["n0", "n1", "n2"]
    assert sum(token["bytes_up"] for token in tokens) == sum(hop["bytes_up"] for hop in stats["hops"])
    async with http.stream("POST", CHAT, json={**asked, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("ruyi", {}).get("tokens", ())]
    assert [(t["id"], t["exit"]) for t in streamed] == [(t["id"], t["exit"]) for t in tokens]
    assert chunks[-1]["ruyi"]["stats"]["new_tokens"] == 12 and all("ruyi" not in chunk for chunk in chunks[:-1])


async def test_ready_tells_which_node_does_not_serve(spoken: Path) -> None:
    relay = Relay()
    async with cluster(cut_topology(spoken, [[2], [4], [6]]), {"n1": relay}) as nodes:
        async with serve(nodes.topology, port=0, grace_s=1) as listening, client_of(listening) as http:
            ready = await http.get("/ready")
            assert ready.status_code == 200
            assert ready.json() == {"status": "ready", "nodes": {"n0": "serving", "n1": "serving", "n2": "serving"}}
            relay.frozen = True  # the node hangs: its connection stays, and nothing answers
            await asyncio.sleep(1.1)
            replies = await asyncio.gather(*(http.get("/ready") for _ in range(5)))
            for reply in replies:
                states = reply.json()
                assert reply.status_code == 503 and states["status"] == "not ready"
                assert states["nodes"].pop("n1") != "serving" and set(states["nodes"].values()) == {"serving"}
            assert (await http.get("/health")).json() == {"status": "ok"}
            relay.frozen = False


async def test_a_node_is_ready_while_one_of_its_replicas_serves(spoken: Path) -> None:
    relay = Relay()
    async with cluster(cut_topology(spoken, [[2], [4], [6]]), {"n1": relay}) as nodes:
        async with with_replica(nodes.topology, "n1") as topology, AsyncExitStack() as stack:
            listening = await stack.enter_async_context(serve(topology, port=0, grace_s=1))
            http = await stack.enter_async_context(client_of(listening))
            serving = {name: "serving" for name in ("n0", "n1/1", "n1/2", "n2")}
            assert (await http.get("/ready")).json() == {"status": "ready", "nodes": serving}
            relay.frozen = True
            await asyncio.sleep(1.1)
            ready = await http.get("/ready")
            assert ready.status_code == 200 and ready.json()["status"] == "ready"
            assert ready.json()["nodes"].pop("n1/1") != "serving" and ready.json()["nodes"]["n1/2"] == "serving"
            relay.frozen = False


async def test_no_node_is_ready_when_all_replicas_of_one_are_lost(spoken: Path) -> None:
    async with cluster(cut_topology(spoken, [[2], [4], [6]])) as nodes:
        lost = nodes.topology.nodes[1].model_copy(update={"address": tuple(f"127.0.0.1:{p}" for p in free_ports(2))})
        topology = nodes.topology.model_copy(update={"nodes": (nodes.topology.nodes[0], lost, nodes.topology.nodes[2])})
        async with serve(topology, port=0, grace_s=1) as listening, client_of(listening) as http:
            ready = await http.get("/ready")
    assert ready.status_code == 503 and ready.json()["status"] == "not ready"
    assert [name for name, state in ready.json()["nodes"].items() if state != "serving"] == ["n1/1", "n1/2"]


def two_nodes(family: Path) -> Topology:
    """Make a topology of two nodes on fixed ports."""
    topology, ports = cut_topology(family, [[2], [4, 6]]), free_ports(2)
    nodes = [n.model_copy(update={"address": f"127.0.0.1:{p}"}) for n, p in zip(topology.nodes, ports, strict=True)]
    return topology.model_copy(update={"nodes": tuple(nodes)})


async def test_a_server_starts_before_its_nodes(spoken: Path) -> None:
    topology = two_nodes(spoken)
    async with serve(topology, port=0, grace_s=1) as listening, client_of(listening) as http:
        assert (await http.get("/ready")).status_code == 503
        assert "max_model_len" not in (await http.get("/v1/models/spoken")).json()
        reply = await http.post(CHAT, json=chat())
        assert reply.status_code == 503 and reply.headers["retry-after"] and reply.headers["retry-after-ms"]
        async with cluster(topology):
            await asyncio.sleep(1.1)
            assert (await http.get("/ready")).status_code == 200
            assert (await http.post(CHAT, json=chat())).json()["system_fingerprint"].startswith("fp_")


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("0.0.0.0", "can be reached from other machines"),
        ("::", "can be reached from other machines"),
        ("nowhere.invalid", "cannot be resolved"),
        ("192.0.2.7", "can be reached from other machines"),
    ],
)
async def test_only_loopback_is_listened_on(spoken: Path, host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        async with serve(cut_topology(spoken, [[2, 4, 6]]), host=host, port=0):
            pass


async def test_insecure_listens_anywhere_and_a_name_on_all_its_addresses(three: Cluster) -> None:
    async with serve(three.topology, host="0.0.0.0", port=0, insecure=True, grace_s=1) as listening:
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"http://127.0.0.1:{listening.port}/health")).status_code == 200
    async with serve(three.topology, host="localhost", port=0, grace_s=1) as listening, client_of(listening) as http:
        assert (await http.get("/health")).status_code == 200
    with pytest.raises(ConfigError, match="cannot listen on 192.0.2.7"):
        async with serve(three.topology, host="192.0.2.7", port=0, insecure=True):
            pass


async def test_a_port_in_use_is_told(server: Listening, three: Cluster) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port} is in use already"):
        async with serve(three.topology, port=server.port):
            pass


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command that goes on until it is stopped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ruyi_flow.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    """Read what a command says until it says where its server listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"is at (http://\S+)/v1; ask it:", line):
            return found[1]
    raise AssertionError("the command ended")


def get(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data=data), timeout=30) as reply:
        return json.load(reply)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_without_torch_and_ends_at_a_signal(spoken: Path, tmp_path: Path, number: int) -> None:
    file = write_topology(two_nodes(spoken), tmp_path / "two.yaml")
    with running("serve", str(file), "--port", "0") as process:
        url = url_of(process)
        assert get(f"{url}/health") == {"status": "ok"} and get(f"{url}/v1/models")["data"]
        maps = Path(f"/proc/{process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()
        process.send_signal(number)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 0 and rest.splitlines()[-1] == "ending the server"


@pytest.mark.timeout(180)
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_up_serves_beside_its_nodes(spoken: Path, tmp_path: Path) -> None:
    file = write_topology(two_nodes(spoken), tmp_path / "two.yaml")
    with running("up", str(file), "--serve", "--port", "0") as process:
        url = url_of(process)  # which it says when the nodes serve
        assert len(get(f"{url}{CHAT}", chat())["choices"][0]["message"]["content"]) > 0
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_wrong_options_are_one_line(run: Command, spoken: Path, tmp_path: Path) -> None:
    file = str(write_topology(two_nodes(spoken), tmp_path / "two.yaml"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (("serve", file, "--port", port), f"127.0.0.1:{port} is in use already"),
            (("serve", file, "--host", "0.0.0.0"), "--insecure"),
            (("serve", file, "--policy", "careful"), "write NAME=FILE"),
            (("serve", file, "--policy", "careful=none.yaml"), "none.yaml"),
            (("serve", str(tmp_path / "none.yaml")), "none.yaml"),
            (("up", file, "--port", "7"), "add --serve"),
        ):
            code, out, err = run(*arguments)
            assert (code, out) == (2, "") and err.startswith("error: ") and words in err and err.count("\n") == 1
