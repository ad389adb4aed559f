"""`make bench`: what the system reaches on this machine; tables, then one JSON line. Never part of the tests.

Everything that is compared runs in turn in one run, since machines are noisy, and medians are shown.

    python -m tests.bench [NAME …] [--rounds N] [--trace FILE …]

`bound` and `cascade` compute on traces (ruyi-flow trace) and are left out without one; `simulator-long`, which
takes ten minutes, unless it is named. `--help` lists the names.
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
from ruyi_flow.bench.nodes import PROMPT, ask, daemons
from ruyi_flow.bench.over_links import hop, wan
from ruyi_flow.bench.report import Measured, Setup, machine
from ruyi_flow.family import store
from ruyi_flow.testing import free_ports
from ruyi_flow.types import NodeStatus
from tests.bench.messages import bench_messages
from tests.bench.routing import bench_bound, bench_cascade, bench_drafts, bench_policy
from tests.bench.simulator import bench_simulator, bench_simulator_long

console = Console(width=110)


def flat(found: Measured) -> dict[str, Any]:
    """A bench's figures in one row."""
    return {f"{name}_{key}": value for name, row in found.results.items() for key, value in row.items()}


def bench_whole(rounds: int) -> dict[str, Any]:
    """The whole family in one process against transformers' generate: bf16, batch 1, 2 threads."""
    found = decode(Setup(store.DEMO, rounds=rounds), against=[Against.TRANSFORMERS])
    return flat(found) | {"goal": "ratio >= 1.15"}


async def bench_hop(rounds: int) -> dict[str, Any]:
    """Three node processes, last exit, one token a round trip, against the same stages in one process."""
    found = await hop(Setup(store.DEMO, threads=1, tokens=48, rounds=4 * rounds))
    return flat(found) | {"goal": "three_beyond_process <= 1.5 a hop"}


async def bench_bytes(rounds: int) -> dict[str, Any]:
    """Bytes of a position on the wire, exact with and without drafts."""
    found: dict[str, Any] = {}
    for encoding, most in (("bf16", 2 * 576 + 64), ("int8", 576 + 32)):
        async with daemons([[5, 11], [17, 23], [29]], encoding=encoding) as client:
            for draft in (0, 4):
                hop = (await ask(client, PROMPT, 32, draft=draft)).stats.hops[1]
                found[f"{encoding}_draft_{draft}_bytes_per_position"] = hop.bytes_up / hop.positions
        found[f"{encoding}_goal"] = f"<= {most}"
    return found


async def bench_wan(rounds: int) -> dict[str, Any]:
    """A link of 20 ms round trip between the device and the rest: drafts against one token a round trip."""
    return flat(await wan(Setup(store.DEMO, threads=1, tokens=48, rounds=rounds), round_trip_ms=20, drafts=(1, 4, 8)))


async def bench_start(rounds: int) -> dict[str, Any]:
    """From the start of a process to a serving node, what it holds, and what an import costs."""
    found: dict[str, Any] = {}
    began = time.perf_counter()
    async with daemons([[5, 11], [17, 23], [29]]) as client:
        found["three_daemons_serve_after_s"] = time.perf_counter() - began
        await ask(client, PROMPT, 32)
        for name, status in (await client.status()).items():
            assert isinstance(status, NodeStatus)
            found[f"{name}_resident_mb"] = status.resident_bytes / 1e6
            found[f"{name}_tensors_mb"] = status.tensor_bytes / 1e6
    for module in ("ruyi_flow", "torch"):
        spent = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)  # noqa: ASYNC221
            spent.append(time.perf_counter() - began)
        found[f"import_{module}_s"] = statistics.median(spent)
    found["goal"] = "a daemon serves after 10 s at the most"
    return found


def bench_train(rounds: int) -> dict[str, Any]:
    """Training branches of 1, 1, 2 and 2 layers on a frozen trunk, once what the trunk gives is on disk."""
    steps, found = 30, {}
    cores = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        here = Path(folder)
        text = "".join(file.read_text() for file in sorted(Path("docs").rglob("*.md")))
        (here / "text.txt").write_text(text)
        plan = {"family": store.DEMO, "out": "out", "branch_layers": {17: 2, 23: 2}, "data": [{"path": "text.txt"}]}
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

        found["first_pass_with_the_trunk"] = tokens_per_s(1, 8, 30)  # longer than the text, so everything is kept then
        sides = {f"processes_{n}_of_batch_{b}": (n, b) for n, b in ((1, 16), (1, 8), (cores, 4))}
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(max(1, rounds // 2)):
            for name, (processes, batch) in sides.items():
                speeds[name].append(tokens_per_s(processes, batch, steps))
        found |= {name: statistics.median(values) for name, values in speeds.items()}
    return found | {"unit": "tokens a second", "goal": "1100 or more at a batch of choice"}


BENCHES = {
    "whole": bench_whole,
    "hop": bench_hop,
    "bytes": bench_bytes,
    "wan": bench_wan,
    "messages": bench_messages,
    "start": bench_start,
    "train": bench_train,
    "policy": bench_policy,
    "drafts": bench_drafts,
    "simulator": bench_simulator,
    "simulator-long": bench_simulator_long,
}
ON_TRACES = {"bound": bench_bound, "cascade": bench_cascade}


LONG = "simulator-long"


def main() -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, *ON_TRACES, []], help="all of them when none is named")
    parser.add_argument("--rounds", type=int, default=5, help="counted runs of each side (default 5)")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="for bound and cascade")
    arguments = parser.parse_args()
    store.pull(store.DEMO)
    results: dict[str, Any] = {"machine": machine(torch.get_num_threads())}
    for name in arguments.benches or [
        *(name for name in BENCHES if name != LONG),
        *(ON_TRACES if arguments.trace else ()),
    ]:
        bench = BENCHES.get(name) or partial(ON_TRACES[name], traces=arguments.trace)
        meaning = (ON_TRACES | BENCHES)[name].__doc__
        with console.status(f"{name}: {meaning}"):
            found = bench(arguments.rounds)
            if asyncio.iscoroutine(found):
                found = asyncio.run(found)
        table = Table(title=meaning, title_justify="left", show_header=False)
        for key, value in found.items():
            table.add_row(key, f"{value:.3f}" if isinstance(value, float) else str(value))
        console.print(table)
        results[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
