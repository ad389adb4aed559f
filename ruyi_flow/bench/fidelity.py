"""The simulator against the running system: three node processes over emulated links, and the same in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ruyi_flow.bench.nodes import daemons
from ruyi_flow.bench.profile.link import measure_link
from ruyi_flow.bench.report import Report, unseen
from ruyi_flow.calibration.trace import Header, Record, read_trace
from ruyi_flow.client import AsyncClient
from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.testing import Relay
from ruyi_flow.types import Stats

__all__ = ["FIGURES", "SETTINGS", "Compared", "Setting", "compare", "markdown", "questions", "summary"]

FIGURES = ("first_token_ms", "token_ms", "bytes_per_token")
"""What is compared: p50 of the time to the first token and of the time per token after it; bytes up."""

_CUTS = 3

_ABOUT = """# How true the simulator is

Written by `make bench-sim` (`ruyi-flow bench fidelity`): three node processes on one machine with relays between them,
and the same simulated with a profile that was measured beforehand ([how](benchmarks.md#fidelity)). Medians of answers:
time to the first token, time a token after it; bytes up a token. Round trips and rates are of both links.
""".splitlines()


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run three nodes."""

    mode: str
    round_trip_ms: float
    """Of each of both links."""
    mbit: float
    """Of each direction of them."""
    sessions: int
    """At once, each asking again as soon as it has its answer."""


SETTINGS = tuple(
    Setting(mode, trip, mbit, sessions)
    for (mode, trip, mbit), sessions in zip(
        itertools.product(("exact", "token", "cascade"), (5.0, 20.0, 80.0), (10.0, 100.0)),
        itertools.cycle((1, 2, 4, 8, 1)),
        strict=False,
    )
)
"""Every mode over every link, with 1 to 8 sessions in turn."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What was measured, and what was simulated."""

    setting: Setting
    measured: dict[str, float]
    simulated: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """By figure: how far the simulated one is off, as a share of the measured."""
        return {name: abs(self.simulated[name] / self.measured[name] - 1) for name in FIGURES}


def questions(count: int = 48) -> list[str]:
    """Users' texts of different lengths, to record a trace of."""
    things = ("sky", "sea", "moon", "grass", "snow", "desert", "forest", "river")
    asked = (
        "Why is the {0} the colour that it is?",
        "Write two sentences about the {0}.",
        "List three facts: the {0}.",
    )
    rest = " Think of how the {1} and the {2} look at night, at noon and in the rain, and of who lives there."
    texts = []
    for i in range(count):
        a, b, c = things[i % 8], things[(i + 3) % 8], things[(i + 5) % 8]
        texts.append((asked[i % 3] + rest * (i % 5)).format(a, b, c))
    return texts


async def compare(
    family: str,
    profile: Profile,
    trace: Path,
    prompts: Sequence[Sequence[int]],
    policy: Path,
    *,
    settings: Sequence[Setting] = SETTINGS,
    requests: int = 24,
    cores: float = 2.0,
    report: Report = unseen,
) -> list[Compared]:
    """Run every setting for real, and simulate it with the profile and the trace.

    Args:
        profile: of this machine, measured before; nothing is fitted to what is measured here.
        trace: of the family's answers to the prompts.
        policy: calibrated, for modes `exact` and `token`.
        requests: of each setting, and a third of them for each of its sessions at the least.
        cores: of this machine, which the nodes share.

    Raises:
        ConfigError: a trace of something else.
    """
    header, records = read_trace(trace)
    if len(records) < len(prompts) or any(
        record.prompt_tokens != len(prompts[record.number]) for record in records[: len(prompts)]
    ):
        raise ConfigError(f"{trace}: not a trace of these prompts")
    cuts = [part.tolist() for part in np.array_split(header.exits, _CUTS)]
    relays = await _relay_costs(family, profile, cuts, sorted({setting.round_trip_ms for setting in settings}))
    found = []
    for i, setting in enumerate(settings):
        report("settings", i, len(settings))
        count = max(requests, requests * setting.sessions // 3)
        measured = await _measured(family, profile, cuts, setting, records, prompts, policy, count)
        simulated = _simulated(
            header, cuts, setting, profile, trace, policy, count, cores, relays[setting.round_trip_ms]
        )
        found.append(Compared(setting, measured, simulated))
    report("settings", len(settings), len(settings))
    return found


async def _relay_costs(
    family: str, profile: Profile, cuts: Sequence[Sequence[int]], trips_ms: Sequence[float]
) -> dict[float, tuple[float, float]]:
    """By its nominal round trip: what a relay's really is beyond that of no relay, and its processor time, in ms.

    A link's figures are measured before they are used, as `ruyi-flow profile --link` would: timers are late by a
    millisecond or so.
    """
    relays = {i: Relay(delay_s=trip / 2000) for i, trip in enumerate((0.0, *trips_ms), 1)}
    async with daemons(cuts, family=family, dtype=profile.dtype, threads=1) as client, AsyncExitStack() as stack:
        node = str(client.topology.nodes[1].address)
        dialled = {i: await stack.enter_async_context(relay.run(node)) for i, relay in relays.items()}
        found: dict[int, list[tuple[float, float]]] = {i: [] for i in (0, *dialled)}
        for i, address in {0: node, **dialled}.items():
            rounds = 300 if i < 2 else 60  # processor time is counted in hundredths of a second
            for _ in range(3):
                before = sum(psutil.Process().cpu_times()[:2])
                link = await measure_link(address, rounds=rounds, payload=1000)
                found[i].append((link.round_trip_ms, 1e3 * (sum(psutil.Process().cpu_times()[:2]) - before) / rounds))
    middle = {i: [statistics.median(pair[k] for pair in pairs) for k in (0, 1)] for i, pairs in found.items()}
    return {
        trip: (middle[i][0] - middle[0][0], max(0.0, middle[1][1] - middle[0][1])) for i, trip in enumerate(trips_ms, 2)
    }


def _routing(setting: Setting, policy: Path) -> dict[str, Any]:
    if setting.mode == "cascade":
        return {"mode": "cascade", "threshold": 0.6, "draft": 4}
    return {"mode": setting.mode, "draft": 8, "policy": policy}


async def _measured(
    family: str,
    profile: Profile,
    cuts: Sequence[Sequence[int]],
    setting: Setting,
    records: Sequence[Record],
    prompts: Sequence[Sequence[int]],
    policy: Path,
    requests: int,
) -> dict[str, float]:
    relays = {
        i: Relay(delay_s=setting.round_trip_ms / 2000, bytes_per_s=setting.mbit * 125_000) for i in range(1, len(cuts))
    }
    routing, coming, stats = _routing(setting, policy), iter(range(requests + 1)), []
    async with AsyncExitStack() as stack:
        client: AsyncClient = await stack.enter_async_context(
            daemons(
                cuts,
                family=family,
                dtype=profile.dtype,
                weights=profile.weights or None,
                threads=profile.threads,
                relay_to=relays,
            )
        )

        async def answer(number: int) -> Stats:
            record = records[number % len(records)]
            reply = await client.generate(
                prompts[record.number], max_new_tokens=len(record.answer), eos_token_ids=(), **routing
            )
            return reply.stats

        async def user() -> None:
            for number in coming:
                stats.append(await answer(number))

        await answer(next(coming))  # connections, caches, what rounds take
        await asyncio.gather(*(user() for _ in range(setting.sessions)))
    return _figures(stats)


def _figures(stats: Sequence[Stats]) -> dict[str, float]:
    up = sum(hop.bytes_up for one in stats for hop in one.hops)
    return {
        "first_token_ms": 1e3 * statistics.median(one.first_token_s for one in stats),
        "token_ms": 1e3 * statistics.median(one.token_s for one in stats),
        "bytes_per_token": up / sum(one.new_tokens for one in stats),
    }


def _simulated(
    header: Header,
    cuts: Sequence[Sequence[int]],
    setting: Setting,
    profile: Profile,
    trace: Path,
    policy: Path,
    requests: int,
    cores: float,
    relay: tuple[float, float],
) -> dict[str, float]:
    names = [f"n{i}" for i in range(len(cuts))]
    routing = _routing(setting, policy)
    if "policy" in routing:
        routing["file"] = str(routing.pop("policy").resolve())
    trip_ms, message_ms = relay
    speed = {"round_trip_ms": trip_ms, "up_mbit": setting.mbit, "down_mbit": setting.mbit}
    data: dict[str, Any] = {
        "family": header.name,
        "nodes": [{"name": n, "exits": [*e], "profile": "measured"} for n, e in zip(names, cuts, strict=True)],
        "links": [{"from": a, "to": b, "encoding": "bf16", **speed} for a, b in itertools.pairwise(names)],
        "hosts": {"here": {"cores": cores, "nodes": names, "message_ms": message_ms}},
        "policy": routing,
        "trace": str(trace.resolve()),
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
    metrics = Simulation(scenario, where="fidelity", profiles=[profile] * len(cuts)).run().metrics
    return {
        "first_token_ms": 1e3 * metrics["first_token_s"]["p50"],
        "token_ms": 1e3 * metrics["token_s"]["p50"],
        "bytes_per_token": metrics["bytes_up_per_token"],
    }


def summary(found: Sequence[Compared]) -> dict[str, dict[str, float]]:
    """By figure: the median and the largest error."""
    errors = {name: [one.errors[name] for one in found] for name in FIGURES}
    return {name: {"median": statistics.median(values), "largest": max(values)} for name, values in errors.items()}


def markdown(found: Sequence[Compared], machine: Mapping[str, Any]) -> str:
    """docs/fidelity.md."""
    lines = [
        *_ABOUT,
        "",
        "| mode | round trip | Mbit/s | sessions | first token, ms | simulated | a token, ms | simulated | "
        "bytes a token | simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        s = one.setting
        cells = [s.mode, f"{s.round_trip_ms:g} ms", f"{s.mbit:g}", str(s.sessions)]
        for name in FIGURES:
            digits = 0 if name == "bytes_per_token" else 1
            sign = one.simulated[name] / one.measured[name] - 1
            cells += [f"{one.measured[name]:,.{digits}f}", f"{one.simulated[name]:,.{digits}f} ({sign:+.0%})"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| error | median | largest |", "|---|---|---|"]
    for name, row in summary(found).items():
        lines.append(f"| {name.replace('_', ' ')} | {row['median']:.1%} | {row['largest']:.1%} |")
    about = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}"
    return "\n".join([*lines, "", f"Machine: {about}.", ""])
