"""Families and helpers that several tests share. Real parts throughout: tiny random families, real gRPC nodes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import blockbuster
import hypothesis
import numpy as np
import psutil
import pytest
import torch
import yaml

from ruyi_flow import cli
from ruyi_flow.client import Client
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import store
from ruyi_flow.family.transformer import CausalAttention, Rope
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Policy
from ruyi_flow.routing.start import READ_TOKENS
from ruyi_flow.serving.engine import Engine
from ruyi_flow.serving.node import serve
from ruyi_flow.testing import Cluster, cluster, cut_topology, tiny_family
from ruyi_flow.types import Mode
from tests.families import MIN_VOCAB, add_tokenizer

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes: several tests run at a time

# Hypothesis would fail an example that takes long, and a machine can be busy.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

Command = Callable[..., tuple[int, str, str]]
"""The command line, as the fixture `run` gives it: takes arguments, returns exit status, standard output and error."""


LOOPS = [f"ruyi_flow.{name}" for name in ("client", "http", "loop", "runtime", "serving", "stream", "transport")]
"""The modules that run on an event loop."""

MAY_BLOCK = [
    ("logging/__init__.py", {"emit", "flush"}),  # a log line goes to standard error
    ("transport/security.py", {"_stat", "_read", "_context"}),  # small files, when a connection is made
    ("psutil/_common.py", {"cat"}),  # reads /proc, which is memory
]
"""Functions on an event loop that may wait for a file."""


LONGEST = (
    "robustness/test_every_message.py",
    "robustness/test_random_faults.py",
    "robustness/test_trials.py",
    "cli/test_interrupts.py",
    "serving/test_node.py",
    "bench/test_bench.py",
)
"""The files that take longest. They begin first, so that no process is left with one of them at the end."""


SLOW = (
    "bench/test_bench.py",
    "e2e/test_several_devices.py",
    "evaluation/test_evaluation.py",
    "portability/test_systems.py",
    "sim/test_profiling.py",
    "test_end_of_programs.py",
)
"""Files whose tests are all slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files before the others, and mark those of slow files."""
    slow = {Path(__file__).parent / file for file in SLOW}
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)
    order = {Path(__file__).parent / file: i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be absent
def pytest_xdist_auto_num_workers() -> int:
    """Return a process a core and one more: many tests wait, for other processes or for time to pass."""
    return (psutil.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def nothing_blocks_an_event_loop() -> Iterator[None]:
    """Raise where the product waits for a file, a socket, a lock or a sleep on an event loop, in whatever thread."""
    with blockbuster.blockbuster_ctx(scanned_modules=LOOPS) as detector:
        for function in detector.functions.values():
            for file, names in MAY_BLOCK:
                function.can_block_in(file, names)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Ruyi family with exits 2, 4, 6."""
    return tiny_family(tmp_path_factory.mktemp("families") / "tiny")


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family with five exits, two of whose branches are deeper than Ruyi's."""
    folder = tmp_path_factory.mktemp("families") / "five"
    ours: dict[str, Any] = {"early_exit_branch_layers": [2, 1, 3, 1, 1], "early_exit_probe_size": 5}
    return tiny_family(folder, base="qwen2", exits=(1, 3, 4, 6, 7), seed=3, **ours)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family whose tokenizer knows single bytes."""
    return _spoken(tmp_path_factory.mktemp("spoken") / "spoken")


@pytest.fixture(scope="session")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in a shape whose weights can be held in 8 and 4 bits."""
    return _spoken(tmp_path_factory.mktemp("spoken") / "even", intermediate_size=64)


def _spoken(folder: Path, **changes: Any) -> Path:
    return add_tokenizer(tiny_family(folder, vocab_size=MIN_VOCAB, eos_token_id=258, **changes))


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    """The uncached, unsplit truth about `tiny`."""
    return Oracle(load_family(tiny, dtype="float32"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo family, fetched once into the local store."""
    try:
        return store.pull(store.DEMO)
    except CheckpointError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(f"the demo family is not in the store and cannot be fetched: {error}")


def confidence(family: Family, policy: Policy, exit: int, ids: list[int], logits: torch.Tensor) -> float:
    """What a branch's confidence after some tokens is by its definition."""
    curve = None if policy.routing.scale is None else policy.routing.scale.curves.get(exit)
    if policy.routing.scale is None or curve is None:
        return float(logits.softmax(-1).max())
    if policy.routing.scale.score is Score.PROBE:
        model = family.model
        cos, sin = Rope(family.config, torch.float32, torch.device("cpu")).at(0, len(ids))
        given: dict[str, Any] = {"rope": (cos, sin), "attention": CausalAttention(1)}
        x = model.run(model.embed(torch.tensor(ids)), 0, exit, **given)
        read, probe = model.branch_states(exit, x, **given), model.branch_at[exit].probe
        assert read is not None and probe is not None
        unit = read[-1] / (read[-1].square().mean() + 1e-7).sqrt()
        seen = torch.cat([unit, logits.log_softmax(-1).topk(16).values])
        odds = probe.down(torch.nn.functional.silu(probe.up(seen))) / curve.temperature
        return float(np.interp(float(odds.sigmoid()), curve.scores, curve.chances))
    chances = (logits / curve.temperature).softmax(-1)
    first, second = chances.topk(2).values.tolist()
    score = {
        Score.MAX_PROBABILITY: first,
        Score.MARGIN: first - second,
        Score.NEGATIVE_ENTROPY: float((chances * chances.log()).sum()),
    }[policy.routing.scale.score]
    return float(np.interp(score, curve.scores, curve.chances))


class Oracle:
    """What the loop must amount to: whole sequences, no cache, no split, one token after the other."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def decide(
        self,
        policy: Policy,
        prompt: Sequence[int],
        count: int,
        pick: Callable[[torch.Tensor, list[int]], int] | None = None,
        eos: Sequence[int] = (),
    ) -> list[tuple[int, int]]:
        """(token, exit) of each new token: the shallowest exit that is sure, given the prefix as decided."""
        return [(token, exit) for token, exit, _ in self.judge(policy, prompt, count, pick, eos)]

    def judge(
        self,
        policy: Policy,
        prompt: Sequence[int],
        count: int,
        pick: Callable[[torch.Tensor, list[int]], int] | None = None,
        eos: Sequence[int] = (),
    ) -> list[tuple[int, int, float]]:
        """The same, and how sure that exit is."""
        ids, decided = list(prompt), []
        first = self._first(policy, ids)
        seen: dict[int, list[float]] = {p: [] for p in self.family.exits}
        gone: set[int] = set()
        for _ in range(count):
            for exit in self.family.exits:
                if exit < first:
                    continue
                logits = self.family.logits(torch.tensor([ids]), exit)[0, -1]
                sure = confidence(self.family, policy, exit, ids, logits)
                if policy.routing.mode is Mode.CASCADE and exit != policy.deepest:
                    threshold = policy.thresholds[exit]
                    seen[exit].append(sure)
                    window = ([1.0] * policy.routing.window + seen[exit])[-policy.routing.window :]
                    mean = sum(window) / policy.routing.window
                    if exit not in gone and mean < threshold:
                        gone.add(exit)
                    elif exit in gone and policy.routing.back is not None and len(seen[exit]) >= policy.routing.window:
                        gone -= {exit} if mean >= policy.routing.back and threshold <= 1 else set()
                    decides = exit not in gone
                else:
                    decides = exit == policy.deepest or sure >= policy.thresholds[exit]
                if decides:
                    token = int(logits.argmax()) if pick is None else pick(logits, ids)
                    break
            ids.append(token)
            decided.append((token, exit, sure))
            if token in eos:
                break
        return decided

    def _first(self, policy: Policy, prompt: list[int]) -> int:
        """The exit that begins, from the first one's reading of the prompt."""
        exit = self.family.exits[0]
        if policy.routing.start is None:
            return exit
        logits = self.family.logits(torch.tensor([prompt]), exit)[0]
        read = logits[:-1].log_softmax(-1)
        loss = -read[torch.arange(len(prompt) - 1), prompt[1:]][-READ_TOKENS:]
        entropy = -(read.exp() * read).sum(-1)[-READ_TOKENS:]
        means = [float(x.mean()) if len(x) else 0.0 for x in (loss, entropy)]
        sure = confidence(self.family, policy, exit, prompt, logits[-1])
        x = (1.0, *means, math.log(len(prompt)), sure)
        for p, weights in sorted(policy.routing.start.weights.items()):
            odds = sum(a * b for a, b in zip(weights, x, strict=True))
            if p < policy.deepest and 1 / (1 + math.exp(-odds)) >= policy.routing.start.chance:
                return p
        return policy.deepest


@pytest.fixture
async def nodes(spoken: Path) -> AsyncIterator[Cluster]:
    """Two nodes of the tiny family that has a tokenizer."""
    async with cluster(cut_topology(spoken, [[2], [4, 6]])) as running:
        yield running
        await running.settle()


@pytest.fixture
def whole(spoken: Path) -> Iterator[Client]:
    """A client of one node that runs in this process."""
    topology = Topology.parse(
        {"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6], "dtype": "float32"}]}
    )
    with Client(topology) as client:
        yield client


@asynccontextmanager
async def with_replica(topology: Topology, name: str) -> AsyncIterator[Topology]:
    """Run one more replica of a node of running nodes, and yield their topology with its address."""
    engine = await asyncio.to_thread(Engine.load, topology, name)
    async with serve(engine, address="127.0.0.1:0") as server:
        update = {"address": (*topology.node(name).addresses, server.address)}
        nodes = tuple(n.model_copy(update=update) if n.name == name else n for n in topology.nodes)
        yield topology.model_copy(update={"nodes": nodes})


def write_topology(topology: Topology, file: Path) -> Path:
    """Write a topology as a file, with the addresses of its running nodes."""
    file.write_text(yaml.safe_dump(json.loads(topology.model_dump_json(by_alias=True, exclude_none=True))))
    return file


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop go on until a condition holds. The timeout of the test ends a wait for what never comes."""
    while not condition():  # noqa: ASYNC110 (what a test waits for has no event)
        await asyncio.sleep(0.005)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local store."""
    monkeypatch.setenv("RUYI_FLOW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line with these arguments; gives exit status, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ruyi-flow", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
