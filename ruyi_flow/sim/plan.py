"""Plans: where to cut a family over given nodes, and which thresholds, so that an objective is met.

Every cut (each node gets consecutive exits; all but the first may get none), with thresholds from timid to bold, and
with the scenario's drafts and without, is put to the equations of `sim/estimate.py`. The best are simulated, in two
rounds: what the first one finds, over what was predicted, corrects the predictions that the second is chosen by. A node
that is left out is neither paid for nor asked; what goes past it takes its links one after the other.
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

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Link, Node, Topology
from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.sim.costs import profiles_of
from ruyi_flow.sim.estimate import Estimate, Samples
from ruyi_flow.sim.parallel import play
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.run import Progress, Simulation
from ruyi_flow.sim.scenario import Scenario, SimLink
from ruyi_flow.sim.sweep import MOST_FAILED
from ruyi_flow.types import Mode

__all__ = ["MINIMIZE", "Bound", "Candidate", "Plan", "cuts", "plan", "write"]

Cut = tuple[tuple[int, ...], ...]
"""The exits of each of the scenario's nodes; none of a node that is left out."""

_TIMES = ("first_token_s", "token_s", "total_s")
_PARTS = ("mean", "p50", "p90", "p95", "p99")
_NUMBERS = ("agreement", "bytes_up_per_token", "joules_per_token", "usd_per_million_tokens", "tokens_per_s")

MINIMIZE: Mapping[str, tuple[str, str]] = {
    "bytes": ("bytes_up_per_token", ""),
    "cost": ("usd_per_million_tokens", ""),
    "energy": ("joules_per_token", ""),
    "latency": ("token_s", "mean"),
}
"""What may be minimized, and where metrics.json has it."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure may be: at most so much, or at least."""

    figure: str
    part: str
    most: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> list[Bound]:
        """From "p95 token_s < 0.08", or several of the kind with "and" between.

        Raises:
            ConfigError: it says what to write.
        """
        found = []
        for one in re.split(r"\s+and\s+|,", text.strip()):
            match = re.fullmatch(r"(?:(\w+)\s+)?(\w+)\s*(<=?|>=?)\s*(\d+\.?\d*(?:[eE]-?\d+)?|\.\d+)", one.strip())
            if match is None:
                raise ConfigError(f"--objective {one!r}: write a figure, < or >, and a number: 'p95 token_s < 0.08'")
            part, figure, sign, number = match.groups()
            if figure not in _TIMES + _NUMBERS:
                known = _TIMES + _NUMBERS
                raise ConfigError(
                    f"--objective {one!r}: no figure {figure!r}; known: {', '.join(known)}{did_you_mean(figure, known)}"
                )
            if (figure in _TIMES) != (part in _PARTS):
                hint = f"say {', '.join(_PARTS)} of {figure}" if figure in _TIMES else f"{figure} has no {part!r}"
                raise ConfigError(f"--objective {one!r}: {hint}, as in 'p95 token_s < 0.08' or 'agreement > 0.9'")
            found.append(cls(figure, part or "", sign[0] == "<", float(number)))
        return found

    @property
    def label(self) -> str:
        """As one writes it."""
        return f"{self.part} {self.figure}".strip()

    def __str__(self) -> str:
        return f"{self.label} {'<' if self.most else '>'} {self.value:g}"

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound, over the bound; 0 where it is kept."""
        beyond = value - self.value if self.most else self.value - value
        return max(0.0, beyond / max(1e-12, abs(self.value)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cut and thresholds, with the figures that count.

    They are the bounds' in order, then what is minimized, then p95 time per token.
    """

    cut: Cut
    thresholds: Mapping[int, float]
    """Of every early exit; above 1 is never."""
    draft: int
    predicted: tuple[float, ...]
    simulated: tuple[float, ...] = ()
    """Empty before."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """What tells it from the others."""
        return self.cut, self.draft, *self.thresholds.values()

    def order(self, bounds: Sequence[Bound], values: Sequence[float]) -> tuple[float, ...]:
        """Less is better: how far the bounds are missed, all together, then the figures that break ties."""
        missed = sum(bound.excess(value) for bound, value in zip(bounds, values, strict=False))
        return (missed, *values[len(bounds) :])


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found."""

    scenario: Scenario
    bounds: tuple[Bound, ...]
    labels: tuple[str, ...]
    """Of the figures that count."""
    finalists: tuple[Candidate, ...]
    """Simulated, the best first."""
    met: bool
    """Whether the first one keeps the bounds in the simulation."""
    tried: int
    """Candidates, over all cuts."""
    impossible: tuple[tuple[Cut, str], ...]
    """Cuts that cannot be, and why."""


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
    """Search for the cut and the thresholds that keep the bounds and minimize something.

    Args:
        objective: see `Bound.parse`.
        minimize: one of `MINIMIZE`.
        min_agreement: share of the tokens that are the last exit's, at the least.
        finalists: so many are simulated.
        jobs: processes at a time.
        progress: told how many cuts and finalists are done, of how many.

    Raises:
        ConfigError: a scenario that cannot be simulated, an objective that says nothing, or no cut that can be.
    """
    if minimize not in MINIMIZE:
        raise ConfigError(
            f"--minimize is {minimize!r}; known: {', '.join(MINIMIZE)}{did_you_mean(minimize, [*MINIMIZE])}"
        )
    bounds = (
        *Bound.parse(objective),
        Bound("agreement", "", False, min_agreement),
        Bound("failed", "", True, MOST_FAILED),
    )
    wanted = [(b.figure, b.part) for b in bounds] + [MINIMIZE[minimize], ("token_s", "p95")]
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
        kept = [k for k, exits in enumerate(cut) if exits]
        try:
            for k in kept:
                _check_fits(scenario, k, profiles[k], cut[k])
            there = arranged(scenario, cut, where=where)
        except ConfigError as error:
            impossible.append((cut, str(error)))
            continue
        estimate = Estimate(there, [profiles[k] for k in kept], samples)
        for thresholds, draft in itertools.product(estimate.thresholds(prices), {0, scenario.policy.routing().draft}):
            predicted = _values(estimate.metrics(thresholds, draft), wanted)
            candidates.append(Candidate(cut, thresholds, draft, predicted))
    if not candidates:
        raise ConfigError(f"{where}: no cut can be: {impossible[0][1]}")
    found: list[Candidate] = []
    with tempfile.TemporaryDirectory() as folder:
        for count, most in ((-(-finalists // 2), 1), (finalists // 2, 2)):
            chosen = _best(candidates, found, count, most, bounds)
            runs = [
                (arranged(scenario, c.cut, c, Path(folder) / f"{len(found) + i}.yaml", where=where), where)
                for i, c in enumerate(chosen)
            ]
            ended = {}
            with closing(play(runs, jobs=jobs)) as playing:
                for i, metrics in playing:
                    ended[i] = replace(chosen[i], simulated=_values(metrics, wanted))
                    progress(len(every) + len(found) + len(ended), total)
            found += [ended[i] for i in sorted(ended)]
    found.sort(key=lambda c: c.order(bounds, c.simulated))
    labels = [b.label for b in bounds] + [minimize, "p95 token_s"]
    met = found[0].order(bounds, found[0].simulated)[0] == 0
    return Plan(scenario, bounds, tuple(labels), tuple(found), met, len(candidates), tuple(impossible))


def cuts(exits: Sequence[int], nodes: int) -> list[Cut]:
    """Every way to give consecutive exits to nodes in order, where all but the first may get none."""
    out: list[Cut] = []
    for count in range(1, min(nodes, len(exits)) + 1):
        for kept in itertools.combinations(range(1, nodes), count - 1):
            for ends in itertools.combinations(range(1, len(exits)), count - 1):
                parts = [tuple(exits[a:b]) for a, b in itertools.pairwise((0, *ends, len(exits)))]
                given = dict(zip((0, *kept), parts, strict=True))
                out.append(tuple(given.get(k, ()) for k in range(nodes)))
    return out


def arranged(
    scenario: Scenario,
    cut: Cut,
    chosen: Candidate | None = None,
    policy_file: Path | None = None,
    *,
    where: str = "scenario",
) -> Scenario:
    """A scenario with another cut, and the policy of what was chosen.

    Args:
        policy_file: written with the thresholds, where the scenario's policy is a file.

    Raises:
        ConfigError: the cut contradicts something else in the scenario.
    """
    data = scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    kept = [k for k, exits in enumerate(cut) if exits]
    names = [scenario.nodes[k].name for k in kept]
    data["nodes"] = [data["nodes"][k] | {"exits": list(cut[k])} for k in kept]
    data["links"] = [
        _in_series([link for i in range(a, b) if (link := scenario.link_after(i)) is not None])
        for a, b in itertools.pairwise(kept)
    ]
    hosts = {name: [n for n in host.nodes if n in names] for name, host in scenario.hosts.items()}
    data["hosts"] = {name: data["hosts"][name] | {"nodes": there} for name, there in hosts.items() if there}
    if chosen is not None:
        data["policy"] = _policy(scenario, chosen, policy_file)
    made = Scenario.from_data(data, base=Path(), where=where)
    return made.model_copy(update={"family": scenario.family})  # a name, whatever folder of that name is here


def write(found: Plan, out: Path, base: Path) -> None:
    """Write the best finalist as a topology file that `ruyi-flow up` takes, whole or not at all.

    Where the scenario's policy is a file, one with the new thresholds is written beside it.

    Args:
        base: the scenario's folder, which relative paths are meant from.
    """
    best, scenario = found.finalists[0], found.scenario
    out.parent.mkdir(parents=True, exist_ok=True)
    there = arranged(scenario, best.cut, best, out.with_suffix(".policy.yaml"))
    taken = {node.address for node in there.nodes}
    free = (address for port in itertools.count(7101) if (address := f"127.0.0.1:{port}") not in taken)
    nodes = []
    for node in there.nodes:
        row = node.model_dump(mode="json", include={*Node.model_fields} - {"shard"}, exclude_defaults=True)
        row["address"] = node.address or next(free)
        if node.shard is not None and node.exits == scenario.node(node.name).exits:  # another cut needs other shards
            row["shard"] = str((base / node.shard).resolve())
        nodes.append(row)
    known = {*Link.model_fields}
    links = [link.model_dump(mode="json", by_alias=True, include=known, exclude_defaults=True) for link in there.links]
    policy = _policy(scenario, best, there.policy.file)
    if there.policy.file is not None:
        policy["file"] = there.policy.file.name
    data: dict[str, Any] = {
        "family": there.family,
        "exits": there.exits and list(there.exits),
        "nodes": nodes,
        "links": links,
    }
    data = {key: value for key, value in data.items() if value} | {"policy": policy}
    new = out.with_name(f".{out.name}.new")
    try:
        new.write_text(f"# Written by ruyi-flow plan.\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}")
        Topology.load(new)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)


# ---- the search ----


def _best(
    candidates: Sequence[Candidate], found: Sequence[Candidate], count: int, most: int, bounds: Sequence[Bound]
) -> list[Candidate]:
    """The best candidates that were not simulated, so many of one cut at the most while there are others."""
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
    new.sort(key=lambda one: one.order(bounds, corrected(one)))
    taken: dict[Cut, int] = {}
    first: list[Candidate] = []
    rest: list[Candidate] = []
    for one in new:
        taken[one.cut] = taken.get(one.cut, 0) + 1
        (first if taken[one.cut] <= most else rest).append(one)
    return [*first, *rest][:count]


def _values(metrics: Mapping[str, Any], wanted: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    out = []
    for figure, part in wanted:
        value = metrics[figure] / max(1, metrics["requests"]) if figure == "failed" else metrics[figure]
        out.append(float(value[part] if part else value))
    return tuple(out)


def _check(scenario: Scenario, profiles: Sequence[Profile], where: str) -> None:
    """What would make a search pointless."""
    for i, (node, profile) in enumerate(zip(scenario.nodes, profiles, strict=True)):
        if profile.exits != scenario.all_exits:
            raise ConfigError(
                f"{where}: nodes.{i}.profile: has stages at exits {list(profile.exits)}, and the nodes hold "
                f"{list(scenario.all_exits)}: any cut needs all of them on every machine; profile the whole family "
                f"for {node.name!r}, and give each exit to a node"
            )
    if scenario.policy.routing().mode is Mode.CASCADE:
        raise ConfigError(
            f"{where}: policy: a plan chooses thresholds of mode 'token'; 'cascade' has others: say token"
        )


def _check_fits(scenario: Scenario, k: int, profile: Profile, exits: Sequence[int]) -> None:
    """Refuse stages that are more than a machine's memory, where its profile says how much that is."""
    memory = profile.machine.get("memory_bytes") or 1e9 * profile.machine.get("memory_gb", 0)
    stages, node = [profile.stage(p) for p in exits], scenario.nodes[k]
    weights = sum(stage.weight_bytes for stage in stages)
    caches = node.limits.max_positions * sum(stage.kv_bytes for stage in stages)
    if memory and weights + caches > memory:
        raise ConfigError(
            f"{node.name}: exits {', '.join(map(str, exits))} take {weights / 1e9:.2f} GB and {caches / 1e9:.2f} GB "
            f"of keys and values (limits.max_positions); it has {memory / 1e9:g} GB"
        )


def _in_series(links: Sequence[SimLink]) -> dict[str, Any]:
    """Links one after the other as one, in a scenario's words; the first one's encoding and sharing."""
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
    first.pop("address", None)  # of something before the next node
    return first | merged


def _policy(scenario: Scenario, chosen: Candidate, file: Path | None) -> dict[str, Any]:
    """As a topology says it; the thresholds of a policy file go into a file of their own."""
    old, thresholds = scenario.policy, dict(chosen.thresholds)
    same = {"draft": chosen.draft, "fallback": old.routing().fallback}
    if old.file is None:
        return {"mode": "token", "thresholds": thresholds, **same}
    assert file is not None
    promise = {"note": f"thresholds of ruyi-flow plan, curves of {old.file.name}; no bound was tested"}
    PolicyFile.load(old.file).model_copy(update={"thresholds": thresholds, "promise": promise}).save(file)
    return {"file": str(file), **same}
