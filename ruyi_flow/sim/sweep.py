"""Sweeps: a scenario at every point of a grid, with several seeds each, in parallel; what is done is not done again.

A folder holds, for each finished run, `<hash>.json` (its metrics.json), where the hash is of the resolved scenario,
seed included, and of what the files that it names hold. results.csv has a row for each point, pareto.csv the points
that no other one beats, and pareto.png shows them.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruyi_flow import __version__
from ruyi_flow.config.yaml_files import parse_value
from ruyi_flow.errors import ConfigError, RuyiFlowError
from ruyi_flow.sim.parallel import play
from ruyi_flow.sim.run import Progress, Simulation, metrics_text
from ruyi_flow.sim.scenario import Scenario

__all__ = [
    "FIGURES",
    "MOST_FAILED",
    "Axis",
    "Figure",
    "Point",
    "beyond_first",
    "draw",
    "front",
    "half_width",
    "sweep",
    "write",
]

MOST_FAILED = 0.01
"""Share of the requests that may fail: where more do, the other figures say nothing of what users get."""

_MOST_RUNS = 100_000

FIGURES: Mapping[str, tuple[str, ...]] = {
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
    "failed": (),
}
"""What is told of a point: its name, and where metrics.json has it. `beyond_first` is the share of the tokens that are
decided beyond the first node, `failed` the share of the requests that failed."""

_COSTS: Mapping[str, str] = {
    "token_p95_s": "p95 time per token, s",
    "bytes_up_per_token": "bytes up per token",
    "agreement": "1 - agreement",
    "usd_per_million_tokens": "$ per million tokens",
}
"""What a point is weighed by, and what the drawing calls it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A key of the scenario, and the values that it takes."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """From key=1,2,4 or key=low:high:step, both ends included.

        Raises:
            ConfigError: it is neither.
        """
        key, equals, listed = text.partition("=")
        if not equals or not key or not listed.strip():
            raise ConfigError(f"--grid {text!r}: write key=1,2,4 or key=low:high:step, as in nodes.edge.count=1,2,4")
        if key == "seed":
            raise ConfigError(f"--grid {text!r}: seeds are not a key to sweep; --repeat 5 takes seeds 0 to 4")
        number = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
        if match := re.fullmatch(f"{number}:{number}:{number}", listed):
            low, high, step = (float(part) for part in match.groups())
            if step <= 0 or low > high:
                raise ConfigError(f"--grid {text!r}: low:high:step needs low <= high and a step above 0")
            count = int((high - low) / step + 1e-9) + 1
            if count > _MOST_RUNS:
                raise ConfigError(f"--grid {text!r}: {count:,} values; take a larger step")
            whole = all(part.strip().lstrip("+-").isdigit() for part in match.groups())
            found = [round(low + i * step, 12) for i in range(count)]
            return cls(key, tuple(int(value) for value in found) if whole else tuple(found))
        if re.fullmatch(f"{number}:{number}", listed):
            raise ConfigError(f"--grid {text!r}: a range is low:high:step, as in {listed.strip()}:1")
        values = parse_value(f"[{listed}]", f"--grid {key}")  # commas inside of brackets belong to a value
        return cls(key, tuple(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean over seeds."""

    mean: float
    half: float | None
    """Of its 95 % confidence interval; None where there was one seed."""


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a grid, and what was found there."""

    keys: Mapping[str, Any]
    figures: Mapping[str, Figure]
    """By `FIGURES`."""
    answered: bool
    """Whether every run gave tokens; else its figures say nothing."""

    @property
    def counts(self) -> bool:
        """Whether it is compared with others: every run gave tokens, and hardly a request failed."""
        return self.answered and self.figures["failed"].mean <= MOST_FAILED


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
    """Simulate a scenario at every point of a grid, with seeds 0 … repeat-1.

    Runs that the folder has already are taken from there. Each that ends is there at once, so a sweep that was broken
    off goes on where it was.

    Args:
        jobs: processes at a time; all cores' when left out.
        ray: address of a Ray cluster to run on instead.
        progress: told how many runs are done, of how many.

    Raises:
        ConfigError: what is wrong with any point, before the first one runs.
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
    found = {name: metrics for name in runs if (metrics := _read(folder / f"{name}.json")) is not None}
    left = [name for name in runs if name not in found]
    progress(len(found), len(runs))
    with closing(play([runs[name] for name in left], jobs=jobs, ray=ray)) as ended:
        for number, metrics in ended:
            found[left[number]] = metrics
            _write_whole(folder / f"{left[number]}.json", metrics_text(metrics))
            progress(len(found), len(runs))
    return [
        _point(keys, [found[name] for name in listed], seeds[0])
        for (keys, seeds, _), listed in zip(points, names, strict=True)
    ]


def front(points: Sequence[Point]) -> list[bool]:
    """Whether no other point is as good in everything that counts and better in something.

    What counts: p95 time per token, bytes up per token, 1 - agreement, dollars per million tokens. A point where more
    than 1 % of the requests failed is none of the best and beats none.
    """
    costs = [_costs(point) for point in points]

    def beaten(i: int) -> bool:
        mine = costs[i]
        return any(
            points[j].counts and other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for j, other in enumerate(costs)
        )

    return [point.counts and not beaten(i) for i, point in enumerate(points)]


def write(folder: Path, points: Sequence[Point]) -> list[Path]:
    """Write results.csv and pareto.csv: keys, then each figure's mean and half-width, empty where there is none."""
    best = front(points)
    written = []
    for name, rows in (
        ("results.csv", points),
        ("pareto.csv", [p for p, is_best in zip(points, best, strict=True) if is_best]),
    ):
        lines = [[*points[0].keys, *(column for figure in FIGURES for column in (figure, f"{figure}_half"))]]
        for point in rows:
            pairs = [(f"{f.mean:.6g}", "" if f.half is None else f"{f.half:.3g}") for f in point.figures.values()]
            lines.append([*map(str, point.keys.values()), *itertools.chain.from_iterable(pairs)])
        new = folder / f".{name}.{os.getpid()}.new"
        with new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        written.append(new.replace(folder / name))
    return written


def draw(folder: Path, points: Sequence[Point]) -> Path:
    """Write pareto.png: time per token against traffic, quality and cost, the front marked.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise ConfigError("pareto.png needs the extra: pip install 'ruyi-flow[sim]'") from None
    shown = [(point, best) for point, best in zip(points, front(points), strict=True) if point.counts]
    drawing = Drawing(figsize=(13, 4.2), layout="constrained")
    (x_name, x_label), *others = _COSTS.items()
    for panel, (name, label) in zip(drawing.subplots(1, 3), others, strict=True):
        for marked, style in ((False, {"color": "0.6", "marker": "o"}), (True, {"color": "tab:red", "marker": "D"})):
            here = [point for point, best in shown if best is marked]
            xs, ys = [_cost(point, x_name) for point in here], [_cost(point, name) for point in here]
            errors = [[p.figures[n].half or 0.0 for p in here] for n in (x_name, name)]
            text = "no other point is better" if marked else "the others"
            panel.errorbar(xs, ys, errors[1], errors[0], linestyle="", elinewidth=0.6, label=text, **style)
        panel.set(xlabel=x_label, ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    new = folder / f".pareto.{os.getpid()}.new"
    drawing.savefig(new, dpi=120, format="png")
    return new.replace(folder / "pareto.png")


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % confidence interval of a mean (Student's t); None for fewer than two values."""
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
    """Keys, a scenario a seed, and the name in messages, of each point of the grid."""
    if repeat < 1:
        raise ConfigError(f"--repeat is {repeat}; it must be 1 or more")
    keys = [axis.key for axis in axes]
    for override in overrides:
        if override.partition("=")[0] == "seed":
            raise ConfigError(f"--set {override}: every point has seeds of its own; --repeat 5 takes seeds 0 to 4")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--grid: {twice[0]} is there twice; give all of its values in one")
    count = math.prod(len(axis.values) for axis in axes)
    if count * repeat > _MOST_RUNS:
        raise ConfigError(f"--grid: {count:,} points with {repeat} seeds each; {_MOST_RUNS:,} runs are the most")
    found, wrong = [], []
    for values in itertools.product(*(axis.values for axis in axes)):
        point = dict(zip(keys, values, strict=True))
        set_here = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in point.items()]
        where = f"{scenario} at {', '.join(f'{key}={value}' for key, value in point.items())}"
        try:
            first = Scenario.read(scenario, [*overrides, *set_here, "seed=0"])
            Simulation(first, where=where)
        except RuyiFlowError as error:
            said = str(error).removeprefix(f"{where}: ").removeprefix(f"{scenario}: ").removeprefix("--set ")
            wrong.append(f"{where}: {said}")
            continue
        found.append((point, [first.model_copy(update={"seed": seed}) for seed in range(repeat)], where))
    if wrong:
        others = f" ({len(wrong) - 1} more of the {count} points are wrong)" if len(wrong) > 1 else ""
        raise ConfigError(wrong[0] + others)
    return found


def _hash(scenario: Scenario, digests: dict[Path, str], where: str) -> str:
    """Of what determines a run's figures: the scenario with its seed, the files that it names, and this program."""
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
                    raise ConfigError(
                        f"{where}: {key}: {file} cannot be read: {error.strerror}; name another"
                    ) from None
            whole.update(digests[file].encode())
    return whole.hexdigest()[:24]


def _point(keys: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], scenario: Scenario) -> Point:
    figures = {}
    for name, path in FIGURES.items():
        values = []
        for metrics in runs:
            if name == "beyond_first":
                values.append(beyond_first(metrics, scenario))
            elif name == "failed":
                values.append(metrics["failed"] / max(1, metrics["requests"]))
            else:
                value: Any = metrics
                for part in path:
                    value = value[part]
                values.append(float(value))
        figures[name] = Figure(math.fsum(values) / len(values), half_width(values))
    return Point(keys, figures, all(metrics["tokens"] for metrics in runs))


def beyond_first(metrics: Mapping[str, Any], scenario: Scenario) -> float:
    """The share of the tokens that are decided beyond the first node."""
    own = {str(p) for p in scenario.nodes[0].exits}
    return math.fsum(share for p, share in metrics["decided"].items() if p not in own)


def _cost(point: Point, name: str) -> float:
    mean = point.figures[name].mean
    return 1 - mean if name == "agreement" else mean


def _costs(point: Point) -> tuple[float, ...]:
    return tuple(_cost(point, name) for name in _COSTS)


def _student_975(df: int) -> float:
    """The 0.975 quantile of Student's t, by bisection of its distribution (Abramowitz and Stegun 26.7.3, 26.7.4)."""

    def inside(t: float) -> float:
        """The chance of a value between -t and t."""
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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_whole(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
