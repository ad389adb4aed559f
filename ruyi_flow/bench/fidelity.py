"""A comparison of the simulator with the running system: the same nodes, links and requests, measured and simulated."""

from __future__ import annotations

import asyncio
import itertools
import signal as signals
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ruyi_flow.bench.measurement import Report, no_report
from ruyi_flow.bench.nodes import generate_exactly, running_nodes
from ruyi_flow.bench.recovery import MOST_DEATHS, strike
from ruyi_flow.calibration.trace import read_trace
from ruyi_flow.errors import ConfigError
from ruyi_flow.loop.replicas import SIGN_S
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.testing import Relay
from ruyi_flow.transport.link import measure_link
from ruyi_flow.types import Stats

__all__ = [
    "FAILURES",
    "METRICS",
    "SETTINGS",
    "Comparison",
    "Failure",
    "FailureComparison",
    "Setting",
    "compare",
    "compare_failures",
    "example_prompts",
    "markdown",
    "summary",
]

METRICS = ("first_token_ms", "token_ms", "bytes_per_token")
"""Compared metrics: median time to first token, median time per token after it, and bytes sent up per token."""

_NODES = 3

_INTRODUCTION = """# How accurate the simulator is

Written by `make bench-sim` (`ruyi-flow bench fidelity`). Three node processes on one machine, connected by relays that
emulate slow links, answer requests. The simulator plays the same requests, with a profile that was measured beforehand
([method](benchmarks.md#fidelity)). Times are medians over the answers: time to first token (TTFT) and time per output
token (TPOT). Bytes are sent upward, per token. Both links have the round trip and the rate of the row.
""".splitlines()


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination of mode, links and load for three nodes."""

    mode: str
    """Routing mode: exact, token or cascade."""
    round_trip_ms: float
    """Round trip of each of the two links, in milliseconds."""
    mbit: float
    """Rate of each link in each direction, in Mbit/s."""
    sessions: int
    """Users, each of whom sends the next request when the last one is answered."""


SETTINGS = tuple(
    Setting(mode, round_trip_ms, mbit, sessions)
    for (mode, round_trip_ms, mbit), sessions in zip(
        itertools.product(("exact", "token", "cascade"), (5.0, 20.0, 80.0), (10.0, 100.0)),
        itertools.cycle((1, 2, 4, 8, 1)),
        strict=False,
    )
)
"""Every mode over every link, with numbers of sessions from 1 to 8."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The measured and the simulated metrics of one setting."""

    setting: Setting
    measured: dict[str, float]
    """Measured value of each of `METRICS`."""
    simulated: dict[str, float]
    """Simulated value of each of `METRICS`."""

    @property
    def errors(self) -> dict[str, float]:
        """Error of each simulated metric, as a fraction of the measured one."""
        return {name: abs(self.simulated[name] / self.measured[name] - 1) for name in METRICS}


@dataclass(frozen=True, slots=True)
class Failure:
    """A way to lose a process of the deepest node, which has two replicas, in the middle of an answer."""

    kind: str
    """Name of the outage in a scenario: crash (SIGKILL) or hang (SIGSTOP)."""
    context: int = 256
    """Tokens of the prompt and the answer when the process is lost."""


FAILURES = (Failure("crash"), Failure("hang"))
"""A process that is killed, and one that hangs."""

_BEFORE, _AFTER = 40, 60
"""Tokens of an answer before a process is lost, and after it; some more come before it is struck."""


@dataclass(frozen=True, slots=True)
class FailureComparison:
    """The longest pause in each answer, measured and simulated, in milliseconds."""

    failure: Failure
    measured: list[float]
    simulated: list[float]

    @property
    def error(self) -> float:
        """Error of the simulated median, as a fraction of the measured one, with its sign."""
        return statistics.median(self.simulated) / statistics.median(self.measured) - 1


def example_prompts(count: int = 48) -> list[str]:
    """Return user messages of different lengths, from which a trace is recorded."""
    topics = ("sky", "sea", "moon", "grass", "snow", "desert", "forest", "river")
    questions = (
        "Why is the {0} the colour that it is?",
        "Write two sentences about the {0}.",
        "List three facts: the {0}.",
    )
    rest = " Think of how the {1} and the {2} look at night, at noon and in the rain, and of who lives there."
    texts = []
    for i in range(count):
        a, b, c = topics[i % 8], topics[(i + 3) % 8], topics[(i + 5) % 8]
        texts.append((questions[i % 3] + rest * (i % 5)).format(a, b, c))
    return texts


async def compare(
    family: str,
    profile: Profile,
    trace: Path,
    prompts: Sequence[Sequence[int]],
    *,
    policy: Path,
    settings: Sequence[Setting] = SETTINGS,
    requests: int = 24,
    cores: float = 2.0,
    report: Report = no_report,
) -> list[Comparison]:
    """Run every setting with real nodes, and simulate it with the profile and the trace.

    Args:
        family: folder of the family, or its name in the store.
        profile: profile of this machine, measured beforehand; nothing is fitted to the runs compared here.
        trace: trace of the family's answers to the prompts.
        prompts: token ids of the prompts.
        policy: calibrated policy file for the modes exact and token.
        settings: settings to compare.
        requests: requests per setting, and at least a third of this number per session.
        cores: cores of this machine that the nodes share.
        report: called with the progress.

    Raises:
        ConfigError: the trace is not a trace of these prompts.
    """
    experiment = _Experiment(family, profile, trace, prompts, policy=policy, cores=cores)
    relay_costs = await experiment.relay_costs(sorted({setting.round_trip_ms for setting in settings}))
    found = []
    for i, setting in enumerate(settings):
        report("settings", i, len(settings))
        count = max(requests, requests * setting.sessions // 3)
        measured = await experiment.measure(setting, count)
        found.append(
            Comparison(setting, measured, experiment.simulate(setting, count, *relay_costs[setting.round_trip_ms]))
        )
    report("settings", len(settings), len(settings))
    return found


async def compare_failures(
    family: str,
    profile: Profile,
    ids: Sequence[int],
    *,
    failures: Sequence[Failure] = FAILURES,
    strikes: int = 2 * MOST_DEATHS,
    cores: float = 2.0,
    report: Report = no_report,
) -> list[FailureComparison]:
    """Lose real processes in the middle of answers, and simulate it with the profile.

    Args:
        family: folder of the family, or its name in the store.
        profile: profile of this machine, measured beforehand; nothing is fitted to the runs compared here.
        ids: token ids, which are repeated until they are a prompt.
        failures: failures to compare.
        strikes: number of processes that are lost for each failure, evenly over the time between two signs of life.
        cores: cores of this machine that the nodes share.
        report: called with the progress.
    """
    cuts = [part.tolist() for part in np.array_split(profile.exits, _NODES)]
    options: dict[str, Any] = {"dtype": profile.dtype, "weights": profile.weights or None, "threads": profile.threads}
    found = []
    for failure in failures:
        prompt = [*itertools.islice(itertools.cycle(ids), failure.context - _BEFORE)]
        signal = {"crash": signals.SIGKILL, "hang": signals.SIGSTOP}[failure.kind]
        delays_s = [SIGN_S * i / strikes for i in range(strikes)]
        measured: list[float] = []
        for start in range(0, strikes, MOST_DEATHS):
            limits = {"max_positions": 8192, "grace_s": 1}
            async with running_nodes(cuts, family=family, **options, limits=limits, replicas=2) as client:
                await generate_exactly(client, prompt, _BEFORE)  # warms up connections and caches
                for delay_s in delays_s[start : start + MOST_DEATHS]:
                    report(failure.kind, len(measured), strikes)
                    struck = await strike(client, prompt, signal, before=_BEFORE, after=_AFTER, delay_s=delay_s)
                    measured.append(1e3 * struck.pause_s)
        simulated = [1e3 * _simulated_pause_s(failure, profile, cuts, delay_s, cores) for delay_s in delays_s]
        found.append(FailureComparison(failure, measured, simulated))
    return found


def _simulated_pause_s(
    failure: Failure, profile: Profile, cuts: Sequence[Sequence[int]], delay_s: float, cores: float
) -> float:
    """Simulate one answer whose process is lost, and return its longest pause in seconds."""
    names = [f"n{i}" for i in range(_NODES)]

    def simulate(tokens: int, down: Sequence[dict[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {
            "family": profile.family,
            "nodes": [{"name": n, "exits": [*e], "profile": "measured"} for n, e in zip(names, cuts, strict=True)],
            "links": [{"from": a, "to": b, "encoding": "bf16"} for a, b in itertools.pairwise(names)],
            "hosts": {"here": {"cores": cores, "nodes": names}},
            "policy": {"mode": "exact", "draft": 0},
            "behaviour": {"agreement": dict.fromkeys(profile.exits[:-1], 0.5)},  # which mode exact does not ask
            "load": {
                "arrivals": {"kind": "even", "rate": 1},
                "prompts": {"tokens": failure.context - _BEFORE},
                "answers": {"tokens": tokens},
                "requests": 1,
            },
        }
        data["nodes"][-1] |= {"replicas": 2, "down": [*down]}
        scenario = Scenario.from_data(data, base=Path(), where="fidelity")
        return Simulation(scenario, where="fidelity", profiles=[profile] * _NODES).run().metrics

    at_s = 1 + simulate(_BEFORE, [])["total_s"]["mean"] + delay_s  # the request comes at second 1
    down = {"at_s": at_s, "for_s": 60, "kind": failure.kind}
    hit = (simulate(_BEFORE + _AFTER, [{**down, "replicas": [replica]}]) for replica in (1, 2))
    return float(next(one["gap_s"]["worst"] for one in hit if one["recoveries"]["count"]))


class _Experiment:
    """The nodes and requests that are both measured and simulated; see `compare` for the arguments."""

    def __init__(
        self,
        family: str,
        profile: Profile,
        trace: Path,
        prompts: Sequence[Sequence[int]],
        *,
        policy: Path,
        cores: float,
    ) -> None:
        self._profile, self._trace, self._prompts, self._policy, self._cores = profile, trace, prompts, policy, cores
        self._header, self._records = read_trace(trace)
        if len(self._records) < len(prompts) or any(
            record.prompt_tokens != len(prompts[record.number]) for record in self._records[: len(prompts)]
        ):
            raise ConfigError(f"{trace}: not a trace of these prompts; record it with the same prompts")
        self._cuts = [part.tolist() for part in np.array_split(self._header.exits, _NODES)]
        self._node_options: dict[str, Any] = {"family": family, "dtype": profile.dtype}

    async def relay_costs(self, round_trips_ms: Sequence[float]) -> dict[float, tuple[float, float]]:
        """Measure what relays add to a direct link: milliseconds per round trip, and of CPU time per message.

        The actual delay is simulated, not the nominal one, as `ruyi-flow profile --link` would measure it: timers are
        late by about a millisecond.

        Returns:
            Both numbers for each nominal round trip.
        """
        relays = {i: Relay(delay_s=trip / 2000) for i, trip in enumerate((0.0, *round_trips_ms), 1)}
        async with running_nodes(self._cuts, **self._node_options, threads=1) as client, AsyncExitStack() as stack:
            direct = str(client.topology.nodes[1].address)
            addresses = {i: await stack.enter_async_context(relay.run(direct)) for i, relay in relays.items()}
            found: dict[int, list[tuple[float, float]]] = {i: [] for i in (0, *addresses)}
            for i, address in {0: direct, **addresses}.items():
                rounds = 300 if i < 2 else 60  # many where CPU time counts, since it has steps of 10 ms
                for _ in range(3):
                    before = _cpu_seconds()
                    link = await measure_link(address, rounds=rounds, payload=1000)
                    found[i].append((link.round_trip_ms, 1e3 * (_cpu_seconds() - before) / rounds))
        medians = {i: [statistics.median(pair[k] for pair in pairs) for k in (0, 1)] for i, pairs in found.items()}
        message_ms = max(0.0, medians[1][1] - medians[0][1])
        return {trip: (medians[i][0] - medians[0][0], message_ms) for i, trip in enumerate(round_trips_ms, 2)}

    def _routing(self, setting: Setting) -> dict[str, Any]:
        if setting.mode == "cascade":
            return {"mode": "cascade", "threshold": 0.6, "draft": 4}
        return {"mode": setting.mode, "draft": 8, "policy": self._policy}

    async def measure(self, setting: Setting, requests: int) -> dict[str, float]:
        """Run the nodes behind relays, and return the metrics."""
        profile, stats = self._profile, list[Stats]()
        delay_s, bytes_per_s = setting.round_trip_ms / 2000, setting.mbit * 125_000
        relays = {i: Relay(delay_s=delay_s, bytes_per_s=bytes_per_s) for i in range(1, _NODES)}
        numbers = iter(range(requests + 1))
        async with running_nodes(
            self._cuts,
            **self._node_options,
            weights=profile.weights or None,
            threads=profile.threads,
            relay_to=relays,
        ) as client:

            async def answer(number: int) -> Stats:
                record = self._records[number % len(self._records)]
                options = self._routing(setting) | {"max_new_tokens": len(record.answer), "eos_token_ids": ()}
                return (await client.generate(self._prompts[record.number], **options)).stats

            async def user() -> None:
                for number in numbers:
                    stats.append(await answer(number))

            await answer(next(numbers))  # warms up connections, caches and estimates of round trips
            await asyncio.gather(*(user() for _ in range(setting.sessions)))
        return {
            "first_token_ms": 1e3 * statistics.median(one.first_token_s for one in stats),
            "token_ms": 1e3 * statistics.median(one.token_s for one in stats),
            "bytes_per_token": sum(hop.bytes_up for one in stats for hop in one.hops)
            / sum(one.new_tokens for one in stats),
        }

    def simulate(self, setting: Setting, requests: int, round_trip_ms: float, message_ms: float) -> dict[str, float]:
        """Simulate the same nodes with the measured costs of the relays, and return the metrics."""
        names = [f"n{i}" for i in range(_NODES)]
        routing = self._routing(setting)
        if "policy" in routing:
            routing["file"] = str(routing.pop("policy").resolve())
        speed = {"round_trip_ms": round_trip_ms, "up_mbit": setting.mbit, "down_mbit": setting.mbit}
        data: dict[str, Any] = {
            "family": self._header.name,
            "nodes": [
                {"name": n, "exits": [*e], "profile": "measured"} for n, e in zip(names, self._cuts, strict=True)
            ],
            "links": [{"from": a, "to": b, "encoding": "bf16", **speed} for a, b in itertools.pairwise(names)],
            "hosts": {"here": {"cores": self._cores, "nodes": names, "message_ms": message_ms}},
            "policy": routing,
            "trace": str(self._trace.resolve()),
            "load": {
                "arrivals": {"kind": "closed", "users": setting.sessions},
                "turns": {"think_s": 0},
                "prompts": {"kind": "trace"},
                "answers": {"kind": "trace"},
                "before": 1,
                "requests": requests,
            },
        }
        scenario = Scenario.from_data(data, base=Path(), where="fidelity")
        metrics = Simulation(scenario, where="fidelity", profiles=[self._profile] * _NODES).run().metrics
        return {
            "first_token_ms": 1e3 * metrics["first_token_s"]["p50"],
            "token_ms": 1e3 * metrics["token_s"]["p50"],
            "bytes_per_token": metrics["bytes_up_per_token"],
        }


def _cpu_seconds() -> float:
    """CPU time of this process so far."""
    return sum(psutil.Process().cpu_times()[:2])


def summary(found: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """Return the median and the largest error of each metric, as fractions."""
    errors = {name: [one.errors[name] for one in found] for name in METRICS}
    return {name: {"median": statistics.median(values), "largest": max(values)} for name, values in errors.items()}


def markdown(found: Sequence[Comparison], failures: Sequence[FailureComparison], machine: Mapping[str, Any]) -> str:
    """Return the text of docs/results/fidelity.md."""
    lines = [
        *_INTRODUCTION,
        "",
        "| mode | round trip | Mbit/s | sessions | TTFT, ms | simulated | TPOT, ms | simulated | "
        "bytes per token | simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        s = one.setting
        cells = [s.mode, f"{s.round_trip_ms:g} ms", f"{s.mbit:g}", str(s.sessions)]
        for name in METRICS:
            digits = 0 if name == "bytes_per_token" else 1
            error = one.simulated[name] / one.measured[name] - 1
            cells += [f"{one.measured[name]:,.{digits}f}", f"{one.simulated[name]:,.{digits}f} ({error:+.0%})"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| error of the simulation | median | largest |", "|---|---|---|"]
    for title, row in zip(("TTFT", "TPOT", "bytes per token"), summary(found).values(), strict=True):
        lines.append(f"| {title} | {row['median']:.1%} | {row['largest']:.1%} |")
    lines += [
        "",
        "Then one of two processes of the deepest node is lost in the middle of an answer, on loopback without relays,",
        "and the answer goes on on the other one. The pause is the longest time between two tokens, in milliseconds.",
        "",
        "| lost by | times | tokens of context | pause, median | simulated | pause, longest | simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    for lost in failures:
        cells = [{"crash": "SIGKILL", "hang": "SIGSTOP"}[lost.failure.kind], str(len(lost.measured))]
        cells += [str(lost.failure.context)]
        cells += [f"{statistics.median(lost.measured):,.0f}"]
        cells += [f"{statistics.median(lost.simulated):,.0f} ({lost.error:+.0%})"]
        cells += [f"{max(lost.measured):,.0f}", f"{max(lost.simulated):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    here = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, "", f"Machine: {here}.", ""])
