"""A benchmark of the HTTP server: the same requests through it and through the SDK, by a growing number of clients."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import yaml

from ruyi_flow.bench.measurement import Measurement, Report, Setup, available_cores, interleaved, no_report
from ruyi_flow.bench.nodes import check_token_count, running_nodes, token_times, tokenize_prompts
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import NodeError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.testing import free_ports

__all__ = ["http"]

_START_S = 30.0
"""Seconds that the server may take to start."""

Ask = Callable[[Sequence[int]], Awaitable[list[float]]]
"""Asks for an answer; returns the time of the request and of each token, in seconds of one clock."""


async def http(setup: Setup, *, clients: Sequence[int] = (1, 4, 16, 64), report: Report = no_report) -> Measurement:
    """Measure one node that has the whole family, through the SDK and through an HTTP server in a process of its own.

    Every client streams one answer at a time. The HTTP clients are as thin as a client can be: they read lines. Where
    the machine has more cores than the node has threads, the node keeps to as many of them, so that the server and the
    clients do not take its time.

    Args:
        setup: settings of the benchmark.
        clients: numbers of clients at once.
        report: called with the progress.

    Raises:
        RuyiFlowError: an answer ended early, or the server did not start.
    """
    checkpoint = Checkpoint(store.locate(setup.family))
    most = max(clients)
    prompts = tokenize_prompts(checkpoint, [f"Question {i + 1}: why is the sky blue?" for i in range(most)])
    capacity = max(map(len, prompts)) + setup.tokens + 64  # 64: the unused rest of a session's last page
    limits = {"max_sessions": most, "max_positions": max(2048, most * capacity), "grace_s": 1}
    runs = {f"{how}, {count}": (how, count) for count in clients for how in ("SDK", "HTTP")}
    took_s: dict[str, list[float]] = {name: [] for name in runs}
    first_ms: dict[str, list[float]] = {name: [] for name in runs}
    token_ms: dict[str, list[float]] = {name: [] for name in runs}
    rounds_ms: dict[str, list[float]] = {name: [] for name in runs}
    report("starting nodes", 0, 0)
    here = available_cores()
    cores = here[: setup.threads] if len(here) > setup.threads else None
    async with running_nodes([checkpoint.config.exits], **setup.node_options, limits=limits, cores=cores) as client:
        async with _server(client) as (port, idle_mb):
            model = Path(client.topology.family).name
            ask: dict[str, Ask] = {
                "SDK": lambda ids: token_times(client, ids, setup.tokens),
                "HTTP": lambda ids: _ask_server(port, model, ids, setup.tokens),
            }
            for name, is_measured in interleaved([*runs], setup.rounds, report):
                how, count = runs[name]
                times = await asyncio.gather(*(ask[how](ids) for ids in prompts[:count]))
                if is_measured:
                    took_s[name].append(max(t[-1] for t in times) - min(t[0] for t in times))
                    first_ms[name] += [1e3 * (t[1] - t[0]) for t in times]
                    each = [1e3 * (t[-1] - t[1]) / (setup.tokens - 1) for t in times]
                    token_ms[name] += each
                    rounds_ms[name].append(statistics.median(each))
    results: dict[str, dict[str, float]] = {}
    for name, (how, count) in runs.items():
        row = results[name] = {"requests_per_s": count / statistics.median(took_s[name])}
        for what, values in (("first_token", first_ms[name]), ("token", token_ms[name])):
            row |= {f"{what}_p{q}_ms": float(np.percentile(values, q)) for q in (50, 95)}
        if how == "HTTP":
            pairs = zip(rounds_ms[name], rounds_ms[f"SDK, {count}"], strict=True)
            row["added_ms_per_token"] = statistics.median(mine - bare for mine, bare in pairs)
    results["server"] = {"idle_mb": idle_mb}
    settings = asdict(setup) | {"clients": list(clients)}
    return Measurement("http", settings, results, {"ms to first token": first_ms, "ms per token": token_ms})


@asynccontextmanager
async def _server(client: AsyncClient) -> AsyncIterator[tuple[int, float]]:
    """Run an HTTP server for a client's topology; yield its port, and its resident memory before the first request."""
    [port] = free_ports(1)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "topology.yaml"
        topology = client.topology.model_dump_json(by_alias=True, exclude_none=True)
        file.write_text(yaml.safe_dump(json.loads(topology)), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ruyi_flow.cli", "serve", "--topology", str(file), "--port", str(port)),
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the server
        )
        try:
            until = time.monotonic() + _START_S
            while not await _is_ready(port):
                if process.returncode is not None or time.monotonic() > until:
                    raise NodeError(f"the HTTP server did not start within {_START_S:g} s")
                await asyncio.sleep(0.1)
            yield port, psutil.Process(process.pid).memory_info().rss / 1e6
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _is_ready(port: int) -> bool:
    try:
        async with aclosing(_lines(port, "GET", "/ready")) as lines:
            return b" 200 " in await anext(lines)
    except OSError:
        return False


async def _ask_server(port: int, model: str, ids: Sequence[int], tokens: int) -> list[float]:
    asked = {"model": model, "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "stream": True}
    asked |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "ruyi": {"mode": "exact", "draft": 0}}
    times, last = [time.perf_counter()], b""
    async with aclosing(_lines(port, "POST", "/v1/completions", json.dumps(asked).encode())) as lines:
        async for line in lines:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            last = line
            times.append(time.perf_counter())
    usage = json.loads(last.removeprefix(b"data: ")).get("usage") if last else None
    check_token_count("an answer over HTTP", usage["completion_tokens"] if usage else 0, tokens)
    return times[:-1]  # the last event is the usage


async def _lines(port: int, method: str, path: str, body: bytes = b"") -> AsyncGenerator[bytes, None]:
    """Send a request on a connection of its own, and yield the lines of the reply as they arrive."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        while line := await reader.readline():
            yield line
    finally:
        writer.close()
