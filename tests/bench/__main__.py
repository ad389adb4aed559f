"""`make bench`: measures the system on this machine; prints tables and one line of JSON. Not part of the tests.

Compared runs are interleaved because machines are noisy; the results are medians.

    python -m tests.bench [NAME …] [--rounds N] [--trace FILE …]

`bound` and `cascade` need traces (ruyi-flow trace) and run only with --trace. `simulator-long` takes ten minutes and
runs only when it is named. `--help` lists the names.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from ruyi_flow.bench import Against
from ruyi_flow.bench.in_process import decode
from ruyi_flow.bench.measurement import Measurement, Setup, describe_machine
from ruyi_flow.bench.nodes import PROMPT, generate_exactly, running_nodes
from ruyi_flow.bench.over_links import hop, wan
from ruyi_flow.family import store
from ruyi_flow.testing import free_ports
from ruyi_flow.types import NodeStatus
from tests.bench.disconnects import bench_disconnects
from tests.bench.event_loop import bench_event_loop
from tests.bench.messages import bench_messages, bench_tls
from tests.bench.recovery import bench_recovery
from tests.bench.routing import bench_bound, bench_cascade, bench_drafts, bench_policy
from tests.bench.simulator import bench_simulator, bench_simulator_long
from tests.bench.telemetry import bench_telemetry

console = Console(width=110)


def flat(found: Measurement) -> dict[str, Any]:
    """Return a benchmark's results as one flat dictionary."""
    return {f"{name}_{key}": value for name, row in found.results.items() for key, value in row.items()}


def bench_whole(rounds: int) -> dict[str, Any]:
    """Decode: the whole family in one process against transformers; bf16, batch 1, 2 threads."""
    found = decode(Setup(store.DEMO, rounds=rounds), against=[Against.TRANSFORMERS])
    return flat(found) | {"goal": "ratio >= 1.15"}


async def bench_hop(rounds: int) -> dict[str, Any]:
    """Cost of a hop: three node processes against one process; last exit, one token per round trip."""
    found = await hop(Setup(store.DEMO, threads=1, tokens=48, rounds=4 * rounds))
    return flat(found) | {"goal": "three_beyond_process <= 1.5 ms per hop"}


async def bench_bytes(rounds: int) -> dict[str, Any]:
    """Bytes sent up per position in mode exact, with and without drafts."""
    found: dict[str, Any] = {}
    for encoding, limit in (("bf16", 2 * 576 + 64), ("int8", 576 + 32)):
        async with running_nodes([[5, 11], [17, 23], [29]], encoding=encoding) as client:
            for draft in (0, 4):
                hop = (await generate_exactly(client, PROMPT, 32, draft=draft)).stats.hops[1]
                found[f"{encoding}_draft_{draft}_bytes_per_position"] = hop.bytes_up / hop.positions
        found[f"{encoding}_goal"] = f"<= {limit}"
    return found


async def bench_wan(rounds: int) -> dict[str, Any]:
    """Drafts against one token per round trip; two nodes, link with a round trip of 20 ms."""
    return flat(await wan(Setup(store.DEMO, threads=1, tokens=48, rounds=rounds), round_trip_ms=20, drafts=(1, 4, 8)))


async def bench_start(rounds: int) -> dict[str, Any]:
    """Seconds until three nodes serve, their memory, and seconds of an import."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    async with running_nodes([[5, 11], [17, 23], [29]]) as client:
        found["three_daemons_serve_after_s"] = time.perf_counter() - began
        await generate_exactly(client, PROMPT, 32)
        for name, status in (await client.status()).items():
            assert isinstance(status, NodeStatus)
            found[f"{name}_resident_mb"] = status.resident_bytes / 1e6
            found[f"{name}_tensors_mb"] = status.tensor_bytes / 1e6
    for module in ("ruyi_flow", "torch"):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)  # noqa: ASYNC221
            seconds.append(time.perf_counter() - began)
        found[f"import_{module}_s"] = statistics.median(seconds)
    found["goal"] = "a node serves within 10 s"
    return found


def bench_train(rounds: int) -> dict[str, Any]:
    """Training of branches with 1, 1, 2 and 2 layers on a frozen trunk whose states are on disk."""
    steps = 30
    found: dict[str, Any] = {}
    cores = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        here = Path(folder)
        text = "".join(file.read_text() for file in sorted(Path("docs").rglob("*.md")))
        (here / "text.txt").write_text(text)
        plan: dict[str, Any] = {
            "family": store.DEMO,
            "out": "out",
            "branch_layers": {17: 2, 23: 2},
            "data": [{"path": "text.txt"}],
        }
        plan |= {"validate_every": 1000, "save_every": 1000, "learning_rate": 1e-4}

        def tokens_per_s(processes: int, batch: int, steps: int) -> float:
            (here / "recipe.yaml").write_text(yaml.safe_dump(plan | {"batch": batch, "steps": steps}))
            shutil.rmtree(here / "out" / "state", ignore_errors=True)
            (here / "out" / "metrics.jsonl").unlink(missing_ok=True)
            command = [sys.executable, "-m"]
            if processes > 1:
                launch = ["torch.distributed.run", "--nproc_per_node", str(processes)]
                command += [*launch, "--master_port", str(free_ports(1)[0]), "-m"]
            command += ["ruyi_flow.cli", "train", str(here / "recipe.yaml"), "--json"]
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // processes))}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            return float(json.loads((here / "out" / "metrics.jsonl").read_text().splitlines()[-1])["tokens_per_s"])

        found["first_pass_with_the_trunk"] = tokens_per_s(
            1, 8, 30
        )  # more steps than the text has, so all trunk states are on disk afterwards
        variants = {f"processes_{n}_of_batch_{b}": (n, b) for n, b in ((1, 16), (1, 8), (cores, 4))}
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(max(1, rounds // 2)):
            for name, (processes, batch) in variants.items():
                speeds[name].append(tokens_per_s(processes, batch, steps))
        found |= {name: statistics.median(values) for name, values in speeds.items()}
    return found | {"unit": "tokens per second", "goal": ">= 1100 at any batch size"}


BENCHES: dict[str, Callable[[int], Any]] = {
    "whole": bench_whole,
    "hop": bench_hop,
    "bytes": bench_bytes,
    "wan": bench_wan,
    "messages": bench_messages,
    "tls": bench_tls,
    "event-loop": bench_event_loop,
    "telemetry": bench_telemetry,
    "disconnects": bench_disconnects,
    "recovery": bench_recovery,
    "start": bench_start,
    "train": bench_train,
    "policy": bench_policy,
    "drafts": bench_drafts,
    "simulator": bench_simulator,
    "simulator-long": bench_simulator_long,
}
TRACE_BENCHES: dict[str, Callable[..., Any]] = {"bound": bench_bound, "cascade": bench_cascade}


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benches", nargs="*", choices=[*BENCHES, *TRACE_BENCHES, []], help="benchmarks to run (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each variant (default: 5)")
    parser.add_argument(
        "--trace",
        type=Path,
        action="append",
        default=[],
        help="trace file for bound and cascade; may be given several times",
    )
    arguments = parser.parse_args()
    store.pull(store.DEMO)
    results: dict[str, Any] = {"machine": describe_machine(torch.get_num_threads())}
    for name in arguments.benches or [
        *(name for name in BENCHES if name != "simulator-long"),
        *(TRACE_BENCHES if arguments.trace else ()),
    ]:
        bench = BENCHES.get(name) or partial(TRACE_BENCHES[name], traces=arguments.trace)
        title = (TRACE_BENCHES | BENCHES)[name].__doc__
        with console.status(f"{name}: {title}"):
            found = bench(arguments.rounds)
            if asyncio.iscoroutine(found):
                found = asyncio.run(found)
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in found.items():
            table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
        console.print(table)
        results[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
