"""The results of a simulation: statistics, timelines and events, in memory that does not grow with the requests."""

from __future__ import annotations

import csv
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ddsketch import DDSketch

from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.telemetry.chrome_trace import ChromeTrace
from ruyi_flow.types import Hop, Recovery

__all__ = ["AddSlice", "Distribution", "Recorder", "RequestOutcome", "Result", "TimedAmount", "Timeline"]

PARTS = ("room", "compute", "queue", "wire")
"""The parts of a request's time on a node: waiting for admission, computing, waiting for a step, and the network."""

AddSlice = Callable[..., None]
"""`ChromeTrace.slice` of a certain process and thread."""

TimedAmount = tuple[float, float, float]
"""A start in seconds, an amount, and the seconds from the start over which the amount is spread evenly."""

_ACCURACY = 0.002
"""Relative accuracy of percentiles (Masson, Rim and Lee 2019, DDSketch)."""

_BINS = 400
"""Most bins of a timeline; when it needs more, bins are merged in pairs."""

_SLOWEST = 4
"""Number of the slowest requests that are kept whole."""


@dataclass(slots=True)
class RequestOutcome:
    """The course of one request."""

    number: int
    device: int
    at_s: float
    prompt_tokens: int
    new_tokens: int = 0
    first_token_s: float = 0.0
    """Seconds from the arrival to the first token."""
    total_s: float = 0.0
    agreed: int = 0
    """Tokens that agree with the last exit's."""
    drafted: int = 0
    accepted: int = 0
    escalations: int = 0
    reused_tokens: int = 0
    """Tokens of the prompt whose caches were parked on the entry node."""
    longest_gap_s: float = 0.0
    """Longest time between two tokens."""
    recoveries: list[Recovery] = field(default_factory=list)
    """The times that the entry node was lost and the answer taken up again."""
    error: str = ""
    """Name of the error that it failed with; empty if it was answered."""
    exits: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Number of tokens decided at each exit."""
    admission_s: dict[str, float] = field(default_factory=dict)
    """Seconds of waiting for admission, by node."""
    hops: dict[str, Hop] = field(default_factory=dict)
    """What each node spent, by its name."""

    def add(self, hop: Hop) -> None:
        """Add what a node spent on one more round."""
        if hop.node in self.hops:
            self.hops[hop.node].add(hop)
        else:
            self.hops[hop.node] = hop

    @property
    def all_recoveries(self) -> list[Recovery]:
        """The times that any node was lost and the answer went on."""
        return self.recoveries + [one for hop in self.hops.values() for one in hop.recoveries]

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds by part (`PARTS`), then by node."""
        hops = self.hops.items()
        return {
            "room": self.admission_s,
            "compute": {node: hop.compute_s for node, hop in hops},
            "queue": {node: hop.queue_s for node, hop in hops},
            "wire": {node: hop.wire_s for node, hop in hops},
        }

    @property
    def bytes_up(self) -> int:
        """Bytes that all links carried upwards."""
        return sum(hop.bytes_up for hop in self.hops.values())

    @property
    def bytes_down(self) -> int:
        """Bytes that all links carried downwards."""
        return sum(hop.bytes_down for hop in self.hops.values())

    @property
    def token_s(self) -> float:
        """Seconds per token after the first."""
        return (self.total_s - self.first_token_s) / max(1, self.new_tokens - 1)


class Distribution:
    """Mean and percentiles of a stream of values."""

    def __init__(self) -> None:
        self._sketch = DDSketch(_ACCURACY)
        self._sum = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self._sketch.add(value)
        self._sum += value
        self.count += 1

    def at(self, share: float) -> float:
        """Return the quantile at a share from 0 to 1, within 0.2 % of its value; 0 without values."""
        found = self._sketch.get_quantile_value(share)
        return 0.0 if found is None else float(found)

    def summary(self) -> dict[str, float]:
        """Return mean, p50, p90, p95 and p99."""
        mean = self._sum / self.count if self.count else 0.0
        return {"mean": mean, **{f"p{q}": self.at(q / 100) for q in (50, 90, 95, 99)}}

    def points(self, count: int = 100) -> list[tuple[float, float]]:
        """Return `count` points (value, share of values at or below it) of the cumulative distribution."""
        return [(self.at(i / count), i / count) for i in range(1, count + 1)] if self.count else []


class Series:
    """One quantity over time, in the bins of its timeline."""

    __slots__ = ("_pending", "_timeline", "add", "sums")

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._pending = array("d")
        self.add: Callable[[TimedAmount], None] = self._pending.extend
        """Add an amount; it goes into its bins at the next `fold`. A method in C, because a token adds several."""
        self.sums = np.zeros(0)
        """The sum of each bin; bins past the end are 0."""

    def fold(self) -> None:
        """Put the pending amounts into their bins."""
        if not self._pending:
            return
        at_s, amount, for_s = np.array(self._pending).reshape(-1, 3).T
        del self._pending[:]
        until_s = at_s + for_s
        width = self._timeline.widened(until_s.max())
        first, last = (at_s / width).astype(int), (until_s / width).astype(int)
        count = max(len(self.sums), last.max() + 1)
        over = last > first
        pace = np.divide(amount, for_s, out=np.zeros_like(amount), where=over)
        head = np.where(over, pace * ((first + 1) * width - at_s), amount)
        inner = np.where(over, pace * width, 0.0)
        sums = np.zeros(count)
        sums[: len(self.sums)] = self.sums
        np.add.at(sums, first, head)
        np.add.at(sums, last, np.where(over, amount - head - inner * (last - first - 1), 0.0))
        steps = np.zeros(count)  # every bin between the first and the last gets the same
        np.add.at(steps, np.minimum(first + 1, last), inner)
        np.subtract.at(steps, last, inner)
        self.sums = sums + np.cumsum(steps)


class Timeline:
    """Several quantities over time, in bins that widen as the run gets longer."""

    def __init__(self) -> None:
        self._width_s = 0.01
        self._series: dict[str, Series] = {}

    def series(self, name: str) -> Series:
        """Return a quantity's series, made when it is first asked for."""
        if name not in self._series:
            self._series[name] = Series(self)
        return self._series[name]

    def fold(self) -> None:
        """Put all pending amounts into their bins. Call it now and then, so that memory stays small."""
        for series in self._series.values():
            series.fold()

    def widened(self, until_s: float) -> float:
        """Widen the bins until they reach a moment; return their width in seconds."""
        while until_s / self._width_s >= _BINS:
            self._width_s *= 2
            for series in self._series.values():
                sums = np.append(series.sums, np.zeros(len(series.sums) % 2))
                series.sums = sums[::2] + sums[1::2]
        return self._width_s

    @property
    def width_s(self) -> float:
        """Width of a bin in seconds."""
        self.fold()
        return self._width_s

    def rate(self, name: str) -> list[float]:
        """Return a quantity's amount per second, by bin."""
        self.fold()
        rates: list[float] = (self.series(name).sums / self.width_s).tolist()
        return rates

    @property
    def names(self) -> list[str]:
        """The quantities that have any amount."""
        self.fold()
        return [name for name, series in self._series.items() if len(series.sums)]


class Recorder:
    """Collects the requests of a run into statistics, requests.csv and trace.json.

    Args:
        folder: where requests.csv and trace.json are written during the run; None writes no files.
        exits: the family's exits.
        nodes: names of the nodes, the entry node first.
        skip: requests with a lower number are not counted.
        chosen: most requests, spread evenly over the run, that are kept whole.
    """

    def __init__(
        self, folder: Path | None, *, exits: Sequence[int], nodes: Sequence[str], skip: float = 0, chosen: int = 12
    ) -> None:
        self.exits, self.nodes, self.skip = tuple(exits), tuple(nodes), skip
        self.first, self.token, self.whole = Distribution(), Distribution(), Distribution()
        self.gap, self.recovery = Distribution(), Distribution()
        self.longest_gap_s = self.longest_recovery_s = 0.0
        self.recovered: dict[str, int] = {}
        """Number of recoveries by cause."""
        self.replayed = self.prompt_tokens = self.reused_tokens = self.recovered_requests = 0
        self.timeline = Timeline()
        self.chosen: list[RequestOutcome] = []
        self._most_chosen, self._stride = chosen, 1
        self.slowest: list[RequestOutcome] = []
        """The slowest requests, the slowest one first."""
        self.spent: dict[str, dict[str, float]] = {node: dict.fromkeys(PARTS, 0.0) for node in self.nodes}
        """Seconds of all answered requests together: by node, then by part."""
        self.done = self.counted = self.failed = 0
        self.tokens = self.agreed = self.drafted = self.accepted = self.escalations = 0
        self.bytes_up = self.bytes_down = 0
        self.errors: dict[str, int] = {}
        self.decided = dict.fromkeys(self.exits, 0)
        self.began_s, self.ended_s = math.inf, 0.0
        self._file = None if folder is None else (folder / "requests.csv").open("w", newline="", encoding="utf-8")
        self._rows = None if self._file is None else csv.writer(self._file)
        self.events = None if folder is None else ChromeTrace(folder / "trace.json")
        """The Chrome trace; None without a folder."""
        if self._rows is not None:
            self._rows.writerow(
                ["number", "device", "at_s", "prompt_tokens", "new_tokens", "first_token_s", "token_s", "total_s"]
                + ["agreement", "drafted", "accepted", "escalations", "bytes_up", "bytes_down", "error"]
                + ["reused_tokens", "recoveries", "recovery_s", "longest_gap_s"]
                + [f"exit_{p}" for p in self.exits]
                + [f"{node}_{part}_s" for node in self.nodes for part in PARTS]
            )

    def add(self, one: RequestOutcome) -> None:
        """Add a request that has ended."""
        recoveries = one.all_recoveries
        if self._rows is not None:
            self._rows.writerow(
                [one.number, one.device, f"{one.at_s:.6f}", one.prompt_tokens, one.new_tokens]
                + [f"{t:.6f}" for t in (one.first_token_s, one.token_s, one.total_s)]
                + [f"{one.agreed / max(1, one.new_tokens):.4f}", one.drafted, one.accepted, one.escalations]
                + [one.bytes_up, one.bytes_down, one.error]
                + [one.reused_tokens, len(recoveries), f"{sum(r.seconds for r in recoveries):.6f}"]
                + [f"{one.longest_gap_s:.6f}"]
                + [one.exits.get(p, 0) for p in self.exits]
                + [f"{one.parts[part].get(node, 0.0):.6f}" for node in self.nodes for part in PARTS]
            )
        if self.events is not None:
            self.events.request(
                one.number,
                one.at_s,
                one.first_token_s if one.new_tokens else None,
                one.total_s,
                tokens=one.new_tokens,
                prompt=one.prompt_tokens,
                device=one.device,
                error=one.error,
            )
        self.done += 1
        if one.number < self.skip:
            return
        self.counted += 1
        self.began_s, self.ended_s = min(self.began_s, one.at_s), max(self.ended_s, one.at_s + one.total_s)
        if one.error:
            self.failed += 1
            self.errors[one.error] = self.errors.get(one.error, 0) + 1
        else:
            self._keep(one)
            for part, times in one.parts.items():
                for node, seconds in times.items():
                    self.spent[node][part] += seconds
            self.first.add(one.first_token_s)
            self.whole.add(one.total_s)
            if one.new_tokens > 1:
                self.token.add(one.token_s)
                self.gap.add(one.longest_gap_s)
                self.longest_gap_s = max(self.longest_gap_s, one.longest_gap_s)
        self.recovered_requests += bool(recoveries)
        for recovery in recoveries:
            self.recovery.add(recovery.seconds)
            self.longest_recovery_s = max(self.longest_recovery_s, recovery.seconds)
            self.replayed += recovery.positions
            self.recovered[recovery.cause] = self.recovered.get(recovery.cause, 0) + 1
        self.prompt_tokens += one.prompt_tokens
        self.reused_tokens += one.reused_tokens
        self.tokens += one.new_tokens
        self.agreed += one.agreed
        self.drafted, self.accepted = self.drafted + one.drafted, self.accepted + one.accepted
        self.escalations += one.escalations
        self.bytes_up, self.bytes_down = self.bytes_up + one.bytes_up, self.bytes_down + one.bytes_down
        for p, count in one.exits.items():
            self.decided[p] += count

    def _keep(self, one: RequestOutcome) -> None:
        """Keep every n-th request, where n doubles whenever there are too many, and the slowest ones."""
        if self.whole.count % self._stride == 0:
            self.chosen.append(one)
            if len(self.chosen) > self._most_chosen:
                self.chosen, self._stride = self.chosen[::2], 2 * self._stride
        if len(self.slowest) < _SLOWEST or one.total_s > self.slowest[-1].total_s:
            self.slowest.append(one)
            self.slowest.sort(key=lambda a: -a.total_s)
            del self.slowest[_SLOWEST:]

    def statistics(self) -> dict[str, Any]:
        """Return statistics of the counted requests; latencies are of the answered ones only."""
        span, tokens = max(1e-9, self.ended_s - self.began_s), max(1, self.tokens)
        answered = max(1, self.whole.count)
        return {
            "requests": self.counted,
            "failed": self.failed,
            "errors": dict(sorted(self.errors.items())),
            "tokens": self.tokens,
            "span_s": span if self.tokens else 0.0,
            "tokens_per_s": self.tokens / span if self.tokens else 0.0,
            "first_token_s": self.first.summary(),
            "token_s": self.token.summary(),
            "total_s": self.whole.summary(),
            "gap_s": {**self.gap.summary(), "worst": self.longest_gap_s},
            "recoveries": {
                "count": self.recovery.count,
                "requests": self.recovered_requests,
                "causes": dict(sorted(self.recovered.items())),
                "positions": self.replayed,
                "seconds": {**self.recovery.summary(), "worst": self.longest_recovery_s},
            },
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "spent_s": {node: {k: s / answered for k, s in parts.items()} for node, parts in self.spent.items()},
            "decided": {str(p): count / tokens for p, count in self.decided.items()},
            "agreement": self.agreed / tokens,
            "escalations_per_token": self.escalations / tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "bytes_up_per_token": self.bytes_up / tokens,
            "bytes_down_per_token": self.bytes_down / tokens,
        }

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self.events is not None:
            self.events.close()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a simulation."""

    scenario: Scenario
    metrics: dict[str, Any]
    """The content of metrics.json. It only depends on the scenario and its seed, not on the machine that simulated."""
    recorder: Recorder
    name: str
    """Name of the scenario's file, without the suffix."""
