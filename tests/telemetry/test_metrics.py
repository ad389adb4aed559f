"""Metrics: what real nodes and a real server count is what happened, under names that one file lists."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import CapacityError, ConfigError
from ruyi_flow.local import load_family
from ruyi_flow.telemetry import names
from ruyi_flow.telemetry.counters import NodeCounters, ServerCounters
from ruyi_flow.telemetry.exposition import make_registry, node_metrics, page, serve_page
from ruyi_flow.telemetry.names import Kind, Where
from ruyi_flow.testing import cluster, cut_topology, free_ports
from ruyi_flow.types import NodeStatus

OURS = "ruyi_"
STATUS = NodeStatus("n", "t", "serving", "f", (2,), 0, 2, 9, 8, 7, "float32", "cpu", 1, 2, 10, 3, 4, 5.5, "", "", 6)


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample by its name, and by its labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith(OURS) and "reason" not in labels:
                assert labels.pop("node") and labels.pop("tier")
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
    return found


def counted(values: dict[tuple[tuple[str, str], ...], float]) -> dict[tuple[tuple[str, str], ...], float]:
    """The values that are not 0."""
    return {labels: value for labels, value in values.items() if value}


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def test_names_are_unique_and_follow_prometheus() -> None:
    assert len({metric.name for metric in names.ALL}) == len(names.ALL)
    for metric in names.ALL:
        assert metric.name.startswith(OURS) and metric.help.endswith((".", ")."))
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert metric.labels[: len(names.NODE_LABELS)] != names.NODE_LABELS
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.readers and metric.bound


def test_every_name_is_counted_by_a_node_or_the_server() -> None:
    counted = {one.metric.name for one in (*NodeCounters().all, *ServerCounters().all)}
    gauges = {metric.name for metric in names.ALL if metric.kind is Kind.GAUGE}
    assert counted | gauges == {metric.name for metric in names.ALL}


async def test_nodes_count_what_they_do(spoken: Path) -> None:
    ports = free_ports(3)
    plain = cut_topology(spoken, [[2], [4], [6]])
    nodes = [n.model_copy(update={"metrics": f"127.0.0.1:{p}"}) for n, p in zip(plain.nodes, ports, strict=True)]
    async with cluster(plain.model_copy(update={"nodes": tuple(nodes)})) as running:
        async with AsyncClient(running.topology, max_retries=0) as client:
            options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": (), "repetition_penalty": 1.3}
            replies = [
                await client.generate("hi", mode="exact", draft=3, **options),
                await client.generate("tell me", thresholds={2: 0.05, 4: 0.05}, draft=2, **options),
            ]
            stream = client.stream("hi", mode="exact", **options | {"max_new_tokens": 400})
            await anext(stream)
            await stream.close()
            with pytest.raises(CapacityError):
                for engine in running.engines.values():
                    engine.shard.capacity.max_sessions = 0
                running.engines["n0"].front_door._admission._max_waiting = 0
                await client.generate("hi", **options)
        await running.settle()
        entry, middle, last = [
            samples(await asyncio.to_thread(read, f"http://127.0.0.1:{port}/metrics")) for port in ports
        ]
        health = await asyncio.to_thread(read, f"http://127.0.0.1:{ports[0]}/health")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(read, f"http://127.0.0.1:{ports[0]}/")
    assert json.loads(health) == {"status": "ok"}
    tokens = entry["ruyi_tokens_total"]
    for token in {(t.exit, t.node, str(t.reason)) for r in replies for t in r.tokens}:
        found = (("exit", str(token[0])), ("node", token[1]), ("reason", token[2]), ("tier", token[1]))
        count = sum((t.exit, t.node, t.reason) == token for r in replies for t in r.tokens)
        assert count <= tokens[found] <= count + 30, "the answer that was broken off had some tokens"
    done = sum(len(r.tokens) for r in replies)
    assert done <= entry["ruyi_generation_tokens_total"][()] == sum(tokens.values())
    prompts = (*replies, replies[0])  # the answer that was broken off had the first one's prompt
    assert entry["ruyi_prompt_tokens_total"][()] == sum(r.stats.prompt_tokens for r in prompts)
    assert counted(entry["ruyi_request_success_total"]) == {(("finished_reason", "length"),): 2}
    assert counted(entry["ruyi_request_failure_total"]) == {(("cause", "cancelled"),): 1, (("cause", "full"),): 1}
    assert entry["ruyi_time_to_first_token_seconds_count"][()] == 3
    assert entry["ruyi_e2e_request_latency_seconds_count"][()] == 2
    assert counted(entry["ruyi_refusals_total"]) == {(("cause", "full"),): 1}
    assert entry["ruyi_admissions_total"][()] == entry["ruyi_request_queue_time_seconds_count"][()] == 3
    assert entry["ruyi_num_requests_running"][()] == entry["ruyi_kv_cache_usage_perc"][()] == 0
    assert entry["ruyi_escalations_total"][()] >= sum(r.stats.escalations for r in replies)
    assert entry["ruyi_draft_tokens_total"][()] >= sum(r.stats.drafted for r in replies) > 0
    assert entry["ruyi_link_bytes_total"][(("direction", "up"), ("to", "n1"))] >= sum(
        r.stats.hops[1].bytes_up for r in replies if len(r.stats.hops) > 1
    )
    assert middle["ruyi_link_messages_total"][(("to", "n2"),)] > 0 and not last.get("ruyi_link_messages_total")
    assert not middle.get("ruyi_tokens_total"), "answers are counted once, by the entry node"
    for node, exit in ((entry, "2"), (middle, "4"), (last, "6")):
        steps = node["ruyi_step_duration_seconds_count"][(("exit", exit),)]
        assert node["ruyi_step_rows_sum"][(("exit", exit),)] >= steps == node["ruyi_step_rows_count"][(("exit", exit),)]
        assert steps > 0 and node["ruyi_weight_bytes"][()] > 0
        assert node["ruyi_node_info"].popitem()[1] == 1
    for node in (entry, middle, last):
        known = {metric.name.removesuffix("_total"): metric for metric in names.ALL}
        for name in node:
            base = name
            for suffix in ("_total", "_bucket", "_count", "_sum"):
                base = base.removesuffix(suffix)
            if name.startswith(OURS):
                metric = known[base]
                assert metric.where is not Where.SERVER
                for labels in node[name]:
                    assert {label for label, _ in labels} - {"le"} == set(metric.labels)
    told = {name.removesuffix("_bucket") for node in (entry, middle) for name in node}
    assert {metric.name for metric in names.ALL if metric.where is not Where.SERVER} <= told


async def test_drafts_that_the_last_exit_was_asked_about_show_what_calibration_is_worth(spoken: Path) -> None:
    family = load_family(spoken, dtype="float32")
    async with cluster(cut_topology(spoken, [[2], [4, 6]])) as running, AsyncClient(running.topology) as client:
        options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_ids": ()}
        reply = await client.generate("hi", mode="exact", draft=1, **options)
        counters = running.engines["n0"].counters
        verified, contradicted = dict(counters.verified.values), dict(counters.contradicted.values)
        await client.generate("hi", mode="fixed", exit=4, draft=1, **options)
        await client.generate("hi", mode="exact", draft=1, temperature=1.0, **options)
        assert counters.verified.values == verified, "only the last exit's greedy tokens say what calibration promised"
    assert 0 < sum(contradicted.values()) <= sum(verified.values())
    ids = [*map(ord, "<user>hi|")]
    differ = 0
    for token in reply.tokens:  # each position was looked at by the first branch, and decided by the last exit
        own = int((await asyncio.to_thread(family.logits, torch.tensor([ids]), 2))[0, -1].argmax())
        differ += own != token.id
        ids.append(token.id)
    assert sum(contradicted.values()) >= differ > 0
    assert {(exit, calibrated) for exit, _, calibrated in verified} == {(2, "false")}
    assert contradicted.keys() == verified.keys() == counters.expected.values.keys()


def test_a_page_survives_garbage_and_an_address_in_use_is_an_error() -> None:
    registry = make_registry(node_metrics(NodeCounters(), lambda: STATUS))
    with serve_page("127.0.0.1:0", registry, "here") as port:
        for garbage in (b"\x00\xff\r\n\r\n", b"GET", b"POST /metrics HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 100_000):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
                one.sendall(garbage)
        slow = socket.create_connection(("127.0.0.1", port), timeout=5)  # sends nothing
        assert 'ruyi_generation_tokens_total{node="n",tier="t"} 0.0' in read(f"http://127.0.0.1:{port}/metrics")
        slow.close()
        with pytest.raises(ConfigError, match=f"here: cannot listen on 127.0.0.1:{port}"):
            with serve_page(f"127.0.0.1:{port}", registry, "here"):
                raise AssertionError("not reached")
    text, content_type = page(registry, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text") and text.endswith(b"# EOF\n")


def test_addresses_of_metrics_are_checked(tiny: Path) -> None:
    data = json.loads(cut_topology(tiny, [[2], [4, 6]]).model_dump_json(by_alias=True, exclude_none=True))
    first, second = data["nodes"]
    first["address"], second["address"] = "127.0.0.1:7101", "127.0.0.1:7102"
    first["metrics"] = second["metrics"] = "127.0.0.1:9101"
    with pytest.raises(ConfigError, match=r"nodes.1.metrics: 127.0.0.1:9101 is already used by nodes.0.metrics"):
        Topology.parse(data)
    second["metrics"] = "127.0.0.1:7101"
    with pytest.raises(ConfigError, match=r"nodes.1.metrics: 127.0.0.1:7101 is already used by nodes.0.address"):
        Topology.parse(data)
    one = {"family": str(tiny), "nodes": [{"name": "a", "exits": [2, 4, 6], "metrics": "127.0.0.1:9101"}]}
    with pytest.raises(ConfigError, match=r"nodes.0.metrics: a node without an address runs inside its clients"):
        Topology.parse(one)
