"""Planning: where to cut a family over given nodes, and which thresholds to use, so that an objective is met.

The candidates are all cuts (each node gets consecutive exits; all but the first may get none), with thresholds from
strict to loose, with and without drafting. The equations of `sim/estimate.py` rank them. The best ones are simulated in
two rounds: the ratio of simulated to predicted values in the first round corrects the ranking for the second. A node
without exits is neither paid for nor asked; messages past it take its two links one after the other.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Link, Node, Topology
from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.sim.analytic import check_fits
from ruyi_flow.sim.costs import profiles_of
from ruyi_flow.sim.estimate import Estimate, Samples
from ruyi_flow.sim.parallel import simulate_all
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.run import Progress, Simulation
from ruyi_flow.sim.scenario import Scenario, SimLink
from ruyi_flow.sim.sweep import MOST_FAILED, metric
from ruyi_flow.types import Mode

__all__ = ["MINIMIZE", "Candidate", "Constraint", "Plan", "cuts", "plan", "with_cut", "write_topology"]

Cut = tuple[tuple[int, ...], ...]
"""The exits of each of the scenario's nodes; an empty tuple for a node that is not used."""

_TIMES = ("first_token_s", "token_s", "total_s")
_PARTS = ("mean", "p50", "p90", "p95", "p99")
_NUMBERS = ("agreement", "bytes_up_per_token", "joules_per_token", "usd_per_million_tokens", "tokens_per_s")

MINIMIZE: Mapping[str, tuple[str, ...]] = {
    "bytes": ("bytes_up_per_token",),
    "cost": ("usd_per_million_tokens",),
    "energy": ("joules_per_token",),
    "latency": ("token_s", "mean"),
}
"""The quantities that can be minimized, and their keys in metrics.json."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A limit on a metric."""

    metric: str
    part: str
    """Which statistic of the metric: "mean" or a percentile; empty for a plain number."""
    most: bool
    """Whether `value` is the largest allowed value; otherwise it is the smallest."""
    value: float

    @classmethod
    def parse(cls, text: str) -> list[Constraint]:
        """Parse an objective such as "p95 token_s < 0.08", or several of them joined by "and".

        Raises:
            ConfigError: the text is malformed or names an unknown metric.
        """
        found = []
        for one in re.split(r"\s+and\s+|,", text.strip()):
            match = re.fullmatch(r"(?:(\w+)\s+)?(\w+)\s*(<=?|>=?)\s*(\d+\.?\d*(?:[eE]-?\d+)?|\.\d+)", one.strip())
            if match is None:
                raise ConfigError(f"--objective {one!r}: write a metric, < or >, and a number: 'p95 token_s < 0.08'")
            part, metric, sign, number = match.groups()
            if metric not in _TIMES + _NUMBERS:
                known = _TIMES + _NUMBERS
                hint = f"known: {', '.join(known)}{did_you_mean(metric, known)}"
                raise ConfigError(f"--objective {one!r}: unknown metric {metric!r}; {hint}")
            if (metric in _TIMES) != (part in _PARTS):
                hint = f"write {', '.join(_PARTS)} before {metric}" if metric in _TIMES else f"{metric} has no {part!r}"
                raise ConfigError(f"--objective {one!r}: {hint}, as in 'p95 token_s < 0.08' or 'agreement > 0.9'")
            found.append(cls(metric, part or "", sign[0] == "<", float(number)))
        return found

    @property
    def path(self) -> tuple[str, ...]:
        """The metric's keys in metrics.json."""
        return (self.metric, self.part) if self.part else (self.metric,)

    @property
    def label(self) -> str:
        """The metric as written in an objective."""
        return f"{self.part} {self.metric}".strip()

    def __str__(self) -> str:
        return f"{self.label} {'<' if self.most else '>'} {self.value:g}"

    def excess(self, value: float) -> float:
        """Return by how much a value violates the constraint, relative to it; 0 if the constraint is met."""
        excess = value - self.value if self.most else self.value - value
        return max(0.0, excess / max(1e-12, abs(self.value)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cut with thresholds, and the values that candidates are compared by.

    The values are those of the constraints in order, then the minimized one, then the p95 time per token.
    """

    cut: Cut
    thresholds: Mapping[int, float]
    """The threshold of every early exit; above 1 the exit never decides."""
    draft: int
    predicted: tuple[float, ...]
    simulated: tuple[float, ...] = ()
    """Empty before the simulation."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """What distinguishes the candidate from others."""
        return self.cut, self.draft, *self.thresholds.values()

    def order(self, constraints: Sequence[Constraint], values: Sequence[float]) -> tuple[float, ...]:
        """Return a sort key, smaller is better: the violation of all constraints, then the values that break ties."""
        violation = sum(one.excess(value) for one, value in zip(constraints, values, strict=False))
        return (violation, *values[len(constraints) :])


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of a search."""

    scenario: Scenario
    constraints: tuple[Constraint, ...]
    labels: tuple[str, ...]
    """Names of the candidates' values, in order."""
    finalists: tuple[Candidate, ...]
    """The simulated candidates, the best first."""
    met: bool
    """Whether the best finalist meets the constraints in the simulation."""
    tried: int
    """Number of candidates of all cuts."""
    impossible: tuple[tuple[Cut, str], ...]
    """Cuts that are not possible, each with the reason."""


def plan(
    scenario: Scenario,
    objective: str,
    *,
    minimize: str = "bytes",
    min_agreement: float = 0.95,
    finalists: int = 6,
    jobs: int | None = None,
    where: str = "scenario",
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Search for the cut and the thresholds that meet an objective and minimize a quantity.

    Args:
        scenario: the nodes, links and load.
        objective: see `Constraint.parse`.
        minimize: one of `MINIMIZE`.
        min_agreement: smallest allowed share of tokens that agree with the last exit's.
        finalists: number of candidates to simulate.
        jobs: most simulations at a time. Default: one per core.
        where: name of the scenario's file, for error messages.
        progress: called with the number of cuts and finalists done, and of all.

    Raises:
        ConfigError: the scenario cannot be simulated, the objective is malformed, or no cut is possible.
    """
    if minimize not in MINIMIZE:
        raise ConfigError(
            f"--minimize: unknown {minimize!r}; known: {', '.join(MINIMIZE)}{did_you_mean(minimize, [*MINIMIZE])}"
        )
    constraints = (
        *Constraint.parse(objective),
        Constraint("agreement", "", False, min_agreement),
        Constraint("failed", "", True, MOST_FAILED),
    )
    wanted = [*(one.path for one in constraints), MINIMIZE[minimize], ("token_s", "p95")]
    profiles = profiles_of(scenario, where)
    _check(scenario, profiles, where)
    samples = Samples.draw(scenario, Simulation(scenario, where=where).scripts, where)
    every = cuts(scenario.all_exits, len(scenario.nodes))
    prices = max(4, min(24, 2000 // len(every)))
    candidates: list[Candidate] = []
    impossible: list[tuple[Cut, str]] = []
    total = len(every) + finalists
    for done, cut in enumerate(every):
        progress(done, total)
        used = [k for k, exits in enumerate(cut) if exits]
        try:
            for k in used:
                node, machine = scenario.nodes[k], profiles[k].machine
                memory = machine.get("memory_bytes") or 1e9 * machine.get("memory_gb", 0) or math.inf
                stages = [profiles[k].stage(p) for p in cut[k]]
                check_fits(node.name, stages, memory_bytes=memory, positions=node.limits.max_positions)
            arranged = with_cut(scenario, cut, where=where)
        except ConfigError as error:
            impossible.append((cut, str(error)))
            continue
        estimate = Estimate(arranged, [profiles[k] for k in used], samples)
        for thresholds, draft in itertools.product(estimate.thresholds(prices), {0, scenario.policy.routing().draft}):
            estimated = estimate.metrics(thresholds, draft)
            predicted = tuple(metric(estimated, path) for path in wanted)
            candidates.append(Candidate(cut, thresholds, draft, predicted))
    if not candidates:
        raise ConfigError(f"{where}: no cut is possible: {impossible[0][1]}")
    found: list[Candidate] = []
    with tempfile.TemporaryDirectory() as folder:
        for count, most in ((-(-finalists // 2), 1), (finalists // 2, 2)):
            chosen = _best(candidates, found, count, most_per_cut=most, constraints=constraints)
            runs = [
                (with_cut(scenario, c.cut, c, policy_file=Path(folder) / f"{len(found) + i}.yaml", where=where), where)
                for i, c in enumerate(chosen)
            ]
            ended = {}
            with closing(simulate_all(runs, jobs=jobs)) as ended_runs:
                for i, metrics in ended_runs:
                    ended[i] = replace(chosen[i], simulated=tuple(metric(metrics, path) for path in wanted))
                    progress(len(every) + len(found) + len(ended), total)
            found += [ended[i] for i in sorted(ended)]
    progress(total, total)  # also if there were fewer candidates than finalists to be
    found.sort(key=lambda c: c.order(constraints, c.simulated))
    labels = [one.label for one in constraints] + [minimize, "p95 token_s"]
    met = found[0].order(constraints, found[0].simulated)[0] == 0
    return Plan(
        scenario=scenario,
        constraints=constraints,
        labels=tuple(labels),
        finalists=tuple(found),
        met=met,
        tried=len(candidates),
        impossible=tuple(impossible),
    )


def cuts(exits: Sequence[int], nodes: int) -> list[Cut]:
    """Return every way to give consecutive exits to nodes in order; all nodes but the first may get none."""
    out: list[Cut] = []
    for count in range(1, min(nodes, len(exits)) + 1):
        for used in itertools.combinations(range(1, nodes), count - 1):
            for ends in itertools.combinations(range(1, len(exits)), count - 1):
                parts = [tuple(exits[a:b]) for a, b in itertools.pairwise((0, *ends, len(exits)))]
                given = dict(zip((0, *used), parts, strict=True))
                out.append(tuple(given.get(k, ()) for k in range(nodes)))
    return out


def with_cut(
    scenario: Scenario,
    cut: Cut,
    chosen: Candidate | None = None,
    *,
    policy_file: Path | None = None,
    where: str = "scenario",
) -> Scenario:
    """Return a scenario with another cut and a candidate's policy.

    Args:
        chosen: the candidate whose thresholds and drafts to use. Default: the scenario's own policy.
        policy_file: file to write the thresholds to, if the scenario's policy is a file.
        where: name of the scenario's file, for error messages.

    Raises:
        ConfigError: the cut contradicts another key of the scenario.
    """
    data = scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    used = [k for k, exits in enumerate(cut) if exits]
    names = [scenario.nodes[k].name for k in used]
    data["nodes"] = [data["nodes"][k] | {"exits": list(cut[k])} for k in used]
    data["links"] = [
        _in_series([link for i in range(a, b) if (link := scenario.link_after(i)) is not None])
        for a, b in itertools.pairwise(used)
    ]
    hosts = {name: [n for n in host.nodes if n in names] for name, host in scenario.hosts.items()}
    data["hosts"] = {name: data["hosts"][name] | {"nodes": nodes} for name, nodes in hosts.items() if nodes}
    if chosen is not None:
        data["policy"] = _policy(scenario, chosen, policy_file)
    made = Scenario.from_data(data, base=Path(), where=where)
    return made.model_copy(update={"family": scenario.family})  # keep a name even if a folder is called so here


def write_topology(found: Plan, out: Path, base: Path) -> None:
    """Write the best finalist as a topology file for `ruyi-flow up`, whole or not at all.

    If the scenario's policy is a file, one with the new thresholds is written next to `out`.

    Args:
        found: the result of the search.
        out: the file to write.
        base: the scenario's folder, which its relative paths refer to.
    """
    best, scenario = found.finalists[0], found.scenario
    planned = with_cut(scenario, best.cut, best, policy_file=out.with_suffix(".policy.yaml"))
    taken = {address for node in planned.nodes for address in node.addresses}
    free = (address for port in itertools.count(7101) if (address := f"127.0.0.1:{port}") not in taken)
    nodes = []
    for node in planned.nodes:
        row = node.model_dump(mode="json", include={*Node.model_fields} - {"shard"}, exclude_defaults=True)
        row["address"] = node.address or next(free)
        if (
            node.shard is not None and node.exits == scenario.node(node.name).exits
        ):  # another cut needs other shard files
            row["shard"] = str((base / node.shard).resolve())
        nodes.append(row)
    known = {*Link.model_fields}
    links = [
        link.model_dump(mode="json", by_alias=True, include=known, exclude_defaults=True) for link in planned.links
    ]
    policy = _policy(scenario, best, planned.policy.file)
    if planned.policy.file is not None:
        policy["file"] = planned.policy.file.name
    data: dict[str, Any] = {
        "family": planned.family,
        "exits": planned.exits and list(planned.exits),
        "nodes": nodes,
        "links": links,
    }
    data = {key: value for key, value in data.items() if value} | {"policy": policy}
    text = f"# Written by ruyi-flow plan.\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}"
    with atomic_file(out) as new:
        new.write_text(text, encoding="utf-8")
        Topology.load(new)


# ---- the search ----


def _best(
    candidates: Sequence[Candidate],
    found: Sequence[Candidate],
    count: int,
    *,
    most_per_cut: int,
    constraints: Sequence[Constraint],
) -> list[Candidate]:
    """Return the `count` best candidates not yet simulated, at most `most_per_cut` of a cut while others are left."""
    ratios: dict[Cut, list[tuple[float, ...]]] = {}
    for one in found:
        pairs = zip(one.simulated, one.predicted, strict=True)
        ratios.setdefault(one.cut, []).append(tuple(s / p if p and math.isfinite(p) and s else 1.0 for s, p in pairs))
    every = [ratio for of_cut in ratios.values() for ratio in of_cut]

    def corrected(one: Candidate) -> list[float]:
        of_cut = ratios.get(one.cut, every)
        factors = (
            [statistics.median(column) for column in zip(*of_cut, strict=True)]
            if of_cut
            else [1.0] * len(one.predicted)
        )
        return [value * factor for value, factor in zip(one.predicted, factors, strict=True)]

    seen = {one.setting for one in found}
    new = [one for one in candidates if one.setting not in seen]
    new.sort(key=lambda one: one.order(constraints, corrected(one)))
    taken: dict[Cut, int] = {}
    first: list[Candidate] = []
    rest: list[Candidate] = []
    for one in new:
        taken[one.cut] = taken.get(one.cut, 0) + 1
        (first if taken[one.cut] <= most_per_cut else rest).append(one)
    return [*first, *rest][:count]


def _check(scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """Refuse a scenario whose cuts or thresholds cannot be searched."""
    for i, (node, profile) in enumerate(zip(scenario.nodes, profiles, strict=True)):
        if profile.exits != scenario.all_exits:
            raise ConfigError(
                f"{where}: nodes.{i}.profile: has stages at exits {list(profile.exits)}, but a plan needs those of all "
                f"exits of the nodes, {list(scenario.all_exits)}, on every machine: profile the whole family for "
                f"{node.name!r}, and give each exit to a node"
            )
    if scenario.policy.routing().mode is Mode.CASCADE:
        raise ConfigError(
            f"{where}: policy: mode 'cascade' cannot be planned, as its thresholds mean something else; set mode: token"
        )


def _in_series(links: Sequence[SimLink]) -> dict[str, Any]:
    """Merge links that follow one another into one, as scenario data; encoding and sharing are the first one's."""
    first = links[0].model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if len(links) == 1:
        return first
    merged: dict[str, Any] = {
        "to": links[-1].target,
        "timeout_s": max(link.timeout_s for link in links),
        "round_trip_ms": sum(link.round_trip_ms for link in links),
        "jitter_ms": math.hypot(*(link.jitter_ms for link in links)),
        "loss": min(0.49, 1 - math.prod(1 - link.loss for link in links)),
        "price_per_gb": sum(link.price_per_gb for link in links),
        "down": [span.model_dump() for link in links for span in link.down],
    }
    for key in ("up_mbit", "down_mbit"):
        if limits := [value for link in links if (value := getattr(link, key)) is not None]:
            merged[key] = min(limits)
    first.pop("address", None)  # the address is not the next node's
    return first | merged


def _policy(scenario: Scenario, chosen: Candidate, file: Path | None) -> dict[str, Any]:
    """Return a candidate's policy as topology data; thresholds of a policy file are written to a file of their own."""
    old, thresholds = scenario.policy, dict(chosen.thresholds)
    same = {"draft": chosen.draft, "fallback": old.routing().fallback}
    if old.file is None:
        return {"mode": "token", "thresholds": thresholds, **same}
    assert file is not None
    promise = {"note": f"thresholds of ruyi-flow plan, curves of {old.file.name}; no bound was tested"}
    PolicyFile.load(old.file).model_copy(update={"thresholds": thresholds, "promise": promise}).save(file)
    return {"file": str(file), **same}
