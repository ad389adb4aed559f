"""Real processes: `up`, `generate`, `status`, `demo`, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from ruyi_flow.testing import free_ports

pytestmark = pytest.mark.timeout(120)

COMMAND = [sys.executable, "-m", "ruyi_flow.cli"]


@pytest.fixture
def topology(tmp_path: Path, tiny: Path) -> Path:
    """Three nodes as a file."""
    names = ["device", "edge", "cloud"]
    nodes = [
        {"name": n, "address": f"127.0.0.1:{port}", "exits": [p], "dtype": "float32", "threads": 1}
        for n, port, p in zip(names, free_ports(3), (2, 4, 6), strict=True)
    ]
    links = [{"from": a, "to": b, "encoding": "f32"} for a, b in zip(names, names[1:], strict=False)]
    path = tmp_path / "three.yaml"
    path.write_text(yaml.safe_dump({"family": str(tiny), "nodes": nodes, "links": links}))
    return path


class Up:
    """A running `ruyi-flow up`."""

    def __init__(self, topology: Path, log: Path, *options: str) -> None:
        self.topology, self.log = topology, log
        command = [*COMMAND, "up", str(topology), *options]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def status(self) -> dict[str, dict[str, object]]:
        done = subprocess.run([*COMMAND, "status", "-t", str(self.topology), "--json"], capture_output=True, text=True)
        answer: dict[str, dict[str, object]] = json.loads(done.stdout)
        return answer

    def ask(self) -> list[int]:
        """Token ids of an answer."""
        code = (
            "import sys; from ruyi_flow import Client\n"
            "with Client(sys.argv[1]) as c: print(c.generate([5, 6, 7], max_new_tokens=12, eos_token_ids=()).token_ids)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(self.topology)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ids: list[int] = json.loads(done.stdout)
        return ids

    def nodes(self) -> list[psutil.Process]:
        """Processes of the nodes of this topology, wherever they hang."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "node" in line and str(self.topology) in line:
                found.append(process)
        return found


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def up(topology: Path, *options: str) -> Iterator[Up]:
    running = Up(topology, topology.with_suffix(".log"), *options)
    try:
        until(lambda: "nodes serve" in running.log.read_text() or running.process.poll() is not None, 60)
        assert running.process.poll() is None, running.log.read_text()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()
        until(lambda: not running.nodes())


def test_the_nodes_of_up_share_one_trace_and_log_in_json(topology: Path) -> None:
    trace = topology.with_name("trace.json")
    with up(topology, "--trace", str(trace), "--log-json") as running:
        assert len(running.ask()) == 12
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0
        lines = [json.loads(line) for line in running.log.read_text().splitlines() if line.startswith("{")]
    (request,) = [line for line in lines if "request" in line]
    assert request["node"] == "device" and request["request"]["new_tokens"] == 12
    assert {line["node"] for line in lines} == {"device", "edge", "cloud"}
    events = json.loads(trace.read_text().removesuffix(",\n") + "]")
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    slices = {(names[event["pid"]], event["name"]) for event in events if event["ph"] == "X"}
    assert {("device", "request"), ("device", "prefill"), ("edge", "session"), ("cloud", "step")} <= slices


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_a_signal_leaves_nothing_behind(topology: Path, number: signal.Signals) -> None:
    with up(topology) as running:
        assert len(running.ask()) == 12
        status = running.status()
        assert {name: s["exits"] for name, s in status.items()} == {"device": [2], "edge": [4], "cloud": [6]}
        assert len({s["process_id"] for s in status.values()}) == 3
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        assert running.nodes() == []
        log = running.log.read_text()
        for name in ("device", "edge", "cloud"):
            assert f"{name:<6} │ " in log
        assert "Traceback" not in log


def test_a_node_that_crashes_is_started_again(topology: Path) -> None:
    with up(topology) as running:
        before = running.ask()
        killed = int(str(running.status()["edge"]["process_id"]))
        os.kill(killed, signal.SIGKILL)
        until(lambda: "edge" in (s := running.status()) and s["edge"].get("process_id", killed) != killed, 60)
        assert running.ask() == before
        assert "starting it again" in running.log.read_text()


def test_up_runs_all_replicas_of_this_machine(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    edge, other = data["nodes"][1]["address"], f"127.0.0.1:{free_ports(1)[0]}"
    data["nodes"][1] |= {"address": [edge, "203.0.113.1:7101", other]}
    topology.write_text(yaml.safe_dump(data))
    with up(topology) as running:
        status = running.status()
        assert list(status) == ["device", "edge/1", "edge/2", "edge/3", "cloud"]
        assert [status[name]["address"] for name in ("edge/1", "edge/2", "edge/3")] == data["nodes"][1]["address"]
        assert status["edge/2"]["error"] and status["edge/2"]["node"] == "edge"
        assert len({one["process_id"] for one in status.values() if "process_id" in one}) == 4 == len(running.nodes())
        log = running.log.read_text()
        for name in ("device", "edge/1", "edge/3", "cloud"):
            assert re.search(rf"^{name:<6} │ .* INFO {name} serves exits ", log, re.MULTILINE), log
        assert "edge/2 at 203.0.113.1:7101 belongs on another machine; start it there: ruyi-flow node edge" in log
        assert "all 3 nodes serve in 4 processes; ask them" in log
        os.kill(int(str(status["edge/3"]["process_id"])), signal.SIGKILL)
        until(lambda: "edge/3 │ ended with -9; starting it again" in running.log.read_text(), 60)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0 and running.nodes() == []


def test_a_node_finds_out_by_itself_which_replica_it_is(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    data["nodes"][2]["address"] = ["203.0.113.1:7101", *(f"127.0.0.1:{port}" for port in free_ports(2))]
    topology.write_text(yaml.safe_dump(data))
    other = f"127.0.0.1:{free_ports(1)[0]}"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in (
            ("cloud/2", []),
            ("cloud/3", []),
            ("cloud/1", ["--replica", "1", "--listen", other, "--log-json"]),
        ):
            log = topology.with_name(f"{name.replace('/', '-')}.log")
            with log.open("wb") as file:
                command = [*COMMAND, "node", "cloud", "-t", str(topology), *options]
                processes.append(subprocess.Popen(command, stdout=file, stderr=file))
            until(lambda log=log: "serves exits" in log.read_text() or processes[-1].poll() is not None, 60)  # type: ignore[misc]
            assert f"{name} serves exits [6]" in log.read_text(), log.read_text()
        assert (
            f"on {other} after" in log.read_text() and json.loads(log.read_text().splitlines()[0])["node"] == "cloud/1"
        )
        late = subprocess.run([*COMMAND, "node", "cloud", "-t", str(topology)], capture_output=True, text=True)
        assert late.returncode == 2 and "all addresses of node 'cloud' on this machine are in use" in late.stderr
    finally:
        for process in processes:
            process.terminate()
        assert [process.wait(30) for process in processes] == [0, 0, 0]


def test_nodes_end_with_the_supervisor_that_was_killed(topology: Path) -> None:
    with up(topology) as running:
        assert len(running.nodes()) == 3
        running.process.kill()
        until(lambda: not running.nodes())


STREAM = (
    "import sys; from ruyi_flow import Client\n"
    "with Client(sys.argv[1]) as c:\n"
    "    for i, t in enumerate(c.stream([5, 6, 7], mode='exact', draft=0, max_new_tokens=480, eos_token_ids=())):\n"
    "        print(i, flush=True)\n"
)
"""A client that prints the number of each token."""


def test_a_client_that_is_killed_frees_every_cache(topology: Path) -> None:
    with up(topology) as running:
        with subprocess.Popen([sys.executable, "-c", STREAM, str(topology)], stdout=subprocess.PIPE) as client:
            assert client.stdout is not None and client.stdout.readline() == b"0\n"
            client.kill()
        until(lambda: all(s["sessions"] == s["used_positions"] == 0 for s in running.status().values()))


def test_sigterm_lets_a_running_answer_end(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    whole = {**data["nodes"][0], "exits": [2, 4, 6], "limits": {"grace_s": 30}}
    topology.write_text(yaml.safe_dump({"family": data["family"], "nodes": [whole]}))
    with up(topology) as running:
        [node] = running.nodes()
        with subprocess.Popen([sys.executable, "-c", STREAM, str(topology)], stdout=subprocess.PIPE) as client:
            assert client.stdout is not None and client.stdout.readline() == b"0\n"
            node.terminate()
            assert client.stdout.read().splitlines()[-1] == b"479"
        until(lambda: "stopped" in running.log.read_text())
        assert "outlive" not in running.log.read_text()


def test_a_port_in_use_is_said(topology: Path) -> None:
    port = int(yaml.safe_load(topology.read_text())["nodes"][1]["address"].split(":")[1])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = subprocess.run([*COMMAND, "up", str(topology)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use already; node 'edge' cannot listen there" in done.stderr
    assert f"the nodes may be running already: ruyi-flow generate -t {topology} -p …" in done.stderr


def test_a_node_that_cannot_start_ends_up_with_its_reason(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    data["nodes"][2]["device"] = "cuda:77"
    topology.write_text(yaml.safe_dump(data))
    done = subprocess.run([*COMMAND, "up", str(topology)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "node 'cloud' ended with 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system keeps no process on cores")
def test_a_node_stays_on_its_cores(topology: Path) -> None:
    data = yaml.safe_load(topology.read_text())
    core = min(os.sched_getaffinity(0))
    data["nodes"][1]["cores"] = [core]
    topology.write_text(yaml.safe_dump(data))
    with up(topology) as running:
        process = running.status()["edge"]["process_id"]
        assert isinstance(process, int) and os.sched_getaffinity(process) == {core}
    data["nodes"][1]["cores"] = [core, 4096]
    topology.write_text(yaml.safe_dump(data))
    done = subprocess.run([*COMMAND, "node", "edge", "-t", str(topology)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not all among this process's cores" in done.stderr


def test_the_demo_lists_tokens_only_when_asked(topology: Path, spoken: Path) -> None:
    topology.write_text(yaml.safe_dump(yaml.safe_load(topology.read_text()) | {"family": str(spoken)}))
    command = [*COMMAND, "demo", "hi", "-t", str(topology), "--max-new-tokens", "3"]
    for options, tables in (([], 0), (["--tokens"], 1)):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^device │ \d\d:\d\d:\d\d INFO device serves ", done.stderr, re.MULTILINE)
        assert done.stderr.count("┃ confidence ┃") == done.stderr.count("(mean confidence") == tables
        assert "bytes returned" in done.stderr and done.stderr.splitlines()[-1].startswith("Of 3 tokens, the device ")


@pytest.mark.model
def test_the_demo_answers_and_ends(smollm2: Path, tmp_path: Path) -> None:
    source = yaml.safe_load((Path(__file__).parents[2] / "configs" / "local.yaml").read_text())
    for node, port in zip(source["nodes"], free_ports(3), strict=True):
        node["address"] = f"127.0.0.1:{port}"
    source["policy"]["file"] = str(Path(__file__).parents[2] / "configs" / source["policy"]["file"])
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(source))
    command = [*COMMAND, "demo", "-t", str(path), "--max-new-tokens", "8", "--tokens"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris") and done.stdout.count("\n") == 1
    assert {"confident", "deepest"} <= set(done.stderr.split()), "early exits decide some tokens, the cloud others"
    found = re.search(r"Of 8 tokens, the device decided (\d) and the edge decided (\d)\. That avoided", done.stderr)
    assert found and int(found[1]) > 0
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]
