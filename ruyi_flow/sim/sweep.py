"""Sweeps: a scenario at every point of a grid, with several seeds each, simulated in parallel and at most once.

The sweep's folder contains `<hash>.json`, a metrics.json, for each finished run. The hash covers the resolved scenario
with its seed, the content of the files that it names, and the version of Ruyi Flow. results.csv has a row for each
point, pareto.csv one for each Pareto-optimal point, and pareto.png shows them.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruyi_flow import __version__
from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.yaml_files import parse_value
from ruyi_flow.errors import ConfigError, RuyiFlowError
from ruyi_flow.sim.parallel import simulate_all
from ruyi_flow.sim.run import Progress, Simulation, metrics_text
from ruyi_flow.sim.scenario import Scenario

__all__ = [
    "METRICS",
    "MOST_FAILED",
    "Axis",
    "MeanOverSeeds",
    "Point",
    "half_width",
    "metric",
    "pareto_front",
    "plot_front",
    "sweep",
    "write_tables",
]

MOST_FAILED = 0.01
"""Largest share of failed requests at which a point is still compared with others."""

_MOST_RUNS = 100_000
"""Most simulations of a sweep."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "first_token_p50_s": ("first_token_s", "p50"),
    "first_token_p95_s": ("first_token_s", "p95"),
    "token_p50_s": ("token_s", "p50"),
    "token_p95_s": ("token_s", "p95"),
    "tokens_per_s": ("tokens_per_s",),
    "bytes_up_per_token": ("bytes_up_per_token",),
    "agreement": ("agreement",),
    "beyond_first": (),
    "joules_per_token": ("joules_per_token",),
    "usd_per_million_tokens": ("usd_per_million_tokens",),
    "failed": ("failed",),
}
"""Columns of a sweep's results, with their keys in metrics.json. `beyond_first` is the share of tokens that are not
decided on the first node, `failed` the share of requests that failed."""

_COSTS: Mapping[str, str] = {
    "token_p95_s": "p95 time per token, s",
    "bytes_up_per_token": "bytes up per token",
    "agreement": "1 - agreement",
    "usd_per_million_tokens": "$ per million tokens",
}
"""The quantities, smaller being better, that Pareto-optimal points are found by, with their labels in the plot."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A key of the scenario, and the values that it takes in a sweep."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Parse key=1,2,4 or key=low:high:step, which includes both ends.

        Raises:
            ConfigError: the text is neither.
        """
        key, equals, listed = text.partition("=")
        if not equals or not key or not listed.strip():
            raise ConfigError(f"--grid {text!r}: write key=1,2,4 or key=low:high:step, as in nodes.edge.count=1,2,4")
        if key == "seed":
            raise ConfigError(f"--grid {text!r}: the seed cannot be swept; use --repeat 5 for seeds 0 to 4")
        number = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
        if match := re.fullmatch(f"{number}:{number}:{number}", listed):
            low, high, step = (float(part) for part in match.groups())
            if step <= 0 or low > high:
                raise ConfigError(f"--grid {text!r}: low:high:step needs low <= high and a step above 0")
            count = int((high - low) / step + 1e-9) + 1
            if count > _MOST_RUNS:
                raise ConfigError(f"--grid {text!r}: {count:,} values are too many; use a larger step")
            whole = all(part.strip().lstrip("+-").isdigit() for part in match.groups())
            found = [round(low + i * step, 12) for i in range(count)]
            return cls(key, tuple(int(value) for value in found) if whole else tuple(found))
        if re.fullmatch(f"{number}:{number}", listed):
            raise ConfigError(f"--grid {text!r}: a range is low:high:step, as in {listed.strip()}:1")
        values = parse_value(f"[{listed}]", f"--grid {key}")  # YAML keeps commas in brackets within one value
        return cls(key, tuple(values))


@dataclass(frozen=True, slots=True)
class MeanOverSeeds:
    """The mean of a metric over seeds."""

    mean: float
    half: float | None
    """Half-width of the mean's 95 % confidence interval; None with a single seed."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a grid, with its results."""

    keys: Mapping[str, Any]
    statistics: Mapping[str, MeanOverSeeds]
    """The mean of each of `METRICS`."""
    answered: bool
    """Whether every run decided tokens; if not, its means have no meaning."""

    @property
    def comparable(self) -> bool:
        """Whether it is compared with other points: every run decided tokens, and hardly any request failed."""
        return self.answered and self.statistics["failed"].mean <= MOST_FAILED


def sweep(
    scenario: Path,
    axes: Sequence[Axis],
    folder: Path,
    *,
    overrides: Sequence[str] = (),
    repeat: int = 5,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Point]:
    """Simulate a scenario at every point of a grid, with seeds 0 to repeat - 1.

    Runs that the folder already contains are not repeated. Each run is saved when it ends, so an interrupted sweep
    resumes where it stopped.

    Args:
        scenario: the scenario's file.
        axes: the keys to vary, and their values.
        folder: the sweep's folder.
        overrides: keys to replace at every point, as key=value.
        repeat: number of seeds of each point.
        jobs: most processes at a time. Default: one per core.
        ray: address of a Ray cluster to run on instead of processes; see `simulate_all`.
        progress: called with the number of runs done, and of all.

    Raises:
        ConfigError: the scenario is wrong at some point. This is raised before the first run.
    """
    points = _points(scenario, axes, overrides, repeat)
    runs: dict[str, tuple[Scenario, str]] = {}
    names: list[list[str]] = []
    digests: dict[Path, str] = {}
    for _, seeds, where in points:
        hashed = [(_hash(one, digests, where), one) for one in seeds]
        names.append([name for name, _ in hashed])
        runs.update((name, (one, where)) for name, one in hashed)
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: metrics for name in runs if (metrics := _read_metrics(folder / f"{name}.json")) is not None}
    left = [name for name in runs if name not in found]
    progress(len(found), len(runs))
    with closing(simulate_all([runs[name] for name in left], jobs=jobs, ray=ray)) as ended:
        for number, metrics in ended:
            found[left[number]] = metrics
            with atomic_file(folder / f"{left[number]}.json") as new:
                new.write_text(metrics_text(metrics), encoding="utf-8")
            progress(len(found), len(runs))
    return [
        _point(keys, [found[name] for name in listed], seeds[0])
        for (keys, seeds, _), listed in zip(points, names, strict=True)
    ]


def pareto_front(points: Sequence[Point]) -> list[bool]:
    """Return for each point whether it is Pareto-optimal: no other point is as good in all costs and better in one.

    The costs are p95 time per token, bytes up per token, 1 - agreement, and dollars per million tokens. Points where
    more than 1 % of the requests failed are not compared.
    """
    costs = [_costs(point) for point in points]

    def beaten(i: int) -> bool:
        mine = costs[i]
        return any(
            points[j].comparable and other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for j, other in enumerate(costs)
        )

    return [point.comparable and not beaten(i) for i, point in enumerate(points)]


def write_tables(folder: Path, points: Sequence[Point]) -> list[Path]:
    """Write results.csv and pareto.csv: the keys, then the mean and the half-width, if any, of each metric."""
    best = pareto_front(points)
    written = []
    for name, rows in (
        ("results.csv", points),
        ("pareto.csv", [p for p, is_best in zip(points, best, strict=True) if is_best]),
    ):
        lines = [[*points[0].keys, *(column for metric in METRICS for column in (metric, f"{metric}_half"))]]
        for point in rows:
            pairs = [(f"{f.mean:.6g}", "" if f.half is None else f"{f.half:.3g}") for f in point.statistics.values()]
            lines.append([*map(str, point.keys.values()), *itertools.chain.from_iterable(pairs)])
        with atomic_file(folder / name) as new, new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        written.append(folder / name)
    return written


def plot_front(folder: Path, points: Sequence[Point]) -> Path:
    """Write pareto.png: time per token against traffic, quality and cost, with Pareto-optimal points marked."""
    from matplotlib.figure import Figure

    shown = [(point, best) for point, best in zip(points, pareto_front(points), strict=True) if point.comparable]
    drawing = Figure(figsize=(13, 4.2), layout="constrained")
    (x_name, x_label), *others = _COSTS.items()
    for panel, (name, label) in zip(drawing.subplots(1, 3), others, strict=True):
        for marked, style in ((False, {"color": "0.6", "marker": "o"}), (True, {"color": "tab:red", "marker": "D"})):
            here = [point for point, best in shown if best is marked]
            xs, ys = [_cost(point, x_name) for point in here], [_cost(point, name) for point in here]
            errors = [[p.statistics[n].half or 0.0 for p in here] for n in (x_name, name)]
            text = "Pareto-optimal" if marked else "others"
            panel.errorbar(xs, ys, errors[1], errors[0], linestyle="", elinewidth=0.6, label=text, **style)
        panel.set(xlabel=x_label, ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    with atomic_file(folder / "pareto.png") as new:
        drawing.savefig(new, dpi=120)
    return folder / "pareto.png"


def half_width(values: Sequence[float]) -> float | None:
    """Return the half-width of a mean's 95 % confidence interval (Student's t); None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return _student_975(n - 1) * deviation / math.sqrt(n)


# ---- points ----


def _points(
    scenario: Path, axes: Sequence[Axis], overrides: Sequence[str], repeat: int
) -> list[tuple[dict[str, Any], list[Scenario], str]]:
    """Return the keys, a scenario per seed, and the name in messages, of each point of the grid."""
    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: it must be 1 or more")
    keys = [axis.key for axis in axes]
    for override in overrides:
        if override.partition("=")[0] == "seed":
            raise ConfigError(f"--set {override}: a sweep sets the seeds itself; use --repeat 5 for seeds 0 to 4")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--grid: {twice[0]} is given twice; give all of its values in one --grid")
    count = math.prod(len(axis.values) for axis in axes)
    if count * repeat > _MOST_RUNS:
        raise ConfigError(
            f"--grid: {count:,} points with {repeat} seeds each are more than {_MOST_RUNS:,} runs; use fewer values"
        )
    found, wrong = [], []
    for values in itertools.product(*(axis.values for axis in axes)):
        point = dict(zip(keys, values, strict=True))
        set_here = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in point.items()]
        where = f"{scenario} at {', '.join(f'{key}={value}' for key, value in point.items())}"
        try:
            first = Scenario.read(scenario, [*overrides, *set_here, "seed=0"])
            Simulation(first, where=where)
        except RuyiFlowError as error:
            reason = str(error).removeprefix(f"{where}: ").removeprefix(f"{scenario}: ").removeprefix("--set ")
            wrong.append(f"{where}: {reason}")
            continue
        found.append((point, [first.model_copy(update={"seed": seed}) for seed in range(repeat)], where))
    if wrong:
        others = f" ({len(wrong) - 1} more of the {count} points are wrong)" if len(wrong) > 1 else ""
        raise ConfigError(wrong[0] + others)
    return found


def _hash(scenario: Scenario, digests: dict[Path, str], where: str) -> str:
    """Return a hash of all that determines a run's metrics: the scenario, its seed and files, and our version."""
    files = {
        "trace": scenario.trace,
        "profile": scenario.profile,
        "policy.file": scenario.policy.file,
        "load.arrivals.file": scenario.workload.arrivals.file,
        **{f"nodes.{i}.profile": node.profile for i, node in enumerate(scenario.nodes)},
    }
    shape = Path(scenario.family) / "config.json"
    if shape.exists():
        files["family"] = shape
    whole = hashlib.sha256(f"{__version__}\n{scenario.seed}\n{scenario.text()}".encode())
    for key, file in files.items():
        if file is not None:
            if file not in digests:
                try:
                    digests[file] = hashlib.sha256(file.read_bytes()).hexdigest()
                except OSError as error:
                    raise ConfigError(f"{where}: {key}: {file} cannot be read: {error.strerror}") from None
            whole.update(digests[file].encode())
    return whole.hexdigest()[:24]


def _point(keys: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], scenario: Scenario) -> Point:
    means = {}
    for name, path in METRICS.items():
        values = [metric(m, path) if path else share_beyond_first(m, scenario) for m in runs]
        means[name] = MeanOverSeeds(math.fsum(values) / len(values), half_width(values))
    return Point(keys, means, all(metrics["tokens"] for metrics in runs))


def metric(metrics: Mapping[str, Any], path: Sequence[str]) -> float:
    """Return a number of metrics.json by its keys; "failed" is turned into a share of the requests."""
    value: Any = metrics
    for key in path:
        value = value[key]
    return float(value / max(1, metrics["requests"]) if path == ("failed",) else value)


def share_beyond_first(metrics: Mapping[str, Any], scenario: Scenario) -> float:
    """Return the share of tokens that are not decided on the first node."""
    own = {str(p) for p in scenario.nodes[0].exits}
    return math.fsum(share for p, share in metrics["decided"].items() if p not in own)


def _cost(point: Point, name: str) -> float:
    mean = point.statistics[name].mean
    return 1 - mean if name == "agreement" else mean


def _costs(point: Point) -> tuple[float, ...]:
    return tuple(_cost(point, name) for name in _COSTS)


def _student_975(df: int) -> float:
    """Return the 0.975 quantile of Student's t, by bisection of its CDF (Abramowitz and Stegun 26.7.3, 26.7.4)."""

    def inside(t: float) -> float:
        """Return the probability of a value between -t and t."""
        angle = math.atan(t / math.sqrt(df))
        sine, square = math.sin(angle), math.cos(angle) ** 2
        odd = df % 2
        term = math.cos(angle) if odd else 1.0
        total = 0.0 if df == 1 else term
        for i in range(2 + odd, df - 1, 2):
            term *= square * (i - 1) / i
            total += term
        return (angle + sine * total) * 2 / math.pi if odd else sine * total

    low, high = 1.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


# ---- files ----


def _read_metrics(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
