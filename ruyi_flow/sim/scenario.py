"""Scenario files: a topology whose nodes are many and cost something, whose links are slow, and a load.

YAML in, frozen and validated models out, with the same messages as for topologies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ruyi_flow.config.topology import Float, Int, Link, Model, Node, Topology, resolve_folder
from ruyi_flow.config.yaml_files import did_you_mean, explain, parse_value, read_yaml
from ruyi_flow.errors import ConfigError

__all__ = ["Arrivals", "Behaviour", "Host", "Lengths", "Load", "Scenario", "SimLink", "SimNode", "Span", "Turns"]

Positive = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]


class Span(Model):
    """A time when something is down."""

    at_s: Weight
    for_s: Positive


class SimNode(Node):
    """A node, or as many alike as `count` says."""

    count: Int = Field(default=1, ge=1, le=10_000_000)
    """Of them; each talks to one of the next tier, shared out evenly."""
    profile: Path | None = None
    """What its stages cost (`ruyi-flow profile`)."""
    hardware: str | None = None
    """Compute the costs for this instead: a machine of docs/simulation-costs.md."""
    speed: Positive = 1.0
    """Steps go so many times as fast as the profile says."""
    idle_w: Weight | None = None
    busy_w: Weight | None = None
    """Power of one of them while no step runs, and while one does; the hardware's own when left out."""
    price_per_hour: Weight | None = None
    """Of one of them, in dollars; the hardware's own when left out."""
    down: tuple[Span, ...] = ()
    """When all of them are down; their sessions are lost."""
    mtbf_s: Annotated[Float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Each goes down by itself after such a time on average, and is back after `mttr_s`."""
    mttr_s: Positive = 60.0


class SimLink(Link):
    """A link, one for each node at its lower end."""

    round_trip_ms: Weight = 0.0
    """Of an empty message and its answer."""
    jitter_ms: Weight = 0.0
    """Standard deviation of what each way takes beyond that; never less."""
    up_mbit: Positive | None = None
    down_mbit: Positive | None = None
    """Bandwidth, which the link's flows share; None is no limit."""
    shared: bool = False
    """Whether all nodes at the lower end share that bandwidth, as phones in one cell do."""
    loss: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0
    """Share of segments that are lost and sent again."""
    down: tuple[Span, ...] = ()
    price_per_gb: Weight = 0.0
    """In dollars, both ways."""
    joules_per_mb: Weight = 0.0
    """That the lower end's radio takes."""


class Lengths(Model):
    """A distribution of numbers of tokens."""

    kind: Literal["constant", "uniform", "lognormal", "trace"] = "constant"
    tokens: Int = Field(default=64, ge=1, le=2**20)
    """`constant`"""
    low: Int = Field(default=1, ge=1)
    high: Int = Field(default=128, ge=1, le=2**20)
    """`uniform`, both included"""
    median: Annotated[Float, Field(gt=0, le=2**20)] = 64.0
    sigma: Annotated[Float, Field(ge=0, le=10)] = 0.7
    """`lognormal`: of its logarithm"""
    most: Int = Field(default=2048, ge=1, le=2**20)
    """`lognormal` and `trace`: no more than that."""


class Arrivals(Model):
    """When conversations begin."""

    kind: Literal["poisson", "even", "bursty", "diurnal", "closed", "replay"] = "poisson"
    rate: Annotated[Float, Field(ge=1e-6, allow_inf_nan=False)] = 1.0
    """A second, over all devices, on average."""
    busy_factor: Annotated[Float, Field(ge=1)] = 4.0
    """`bursty`: how much higher the rate is in a burst than between bursts."""
    burst_s: Positive = 10.0
    calm_s: Positive = 50.0
    """`bursty`: how long bursts and calms last on average (a Markov-modulated Poisson process of two states)."""
    peak_factor: Annotated[Float, Field(ge=1, le=2)] = 1.8
    """`diurnal`: the highest rate over the mean one, of a sine."""
    period_s: Positive = 86400.0
    users: Int = Field(default=1, ge=1)
    """`closed`: each asks again as soon as it has an answer and has thought."""
    file: Path | None = None
    """`replay`: a CSV with a column at_s, and prompt_tokens, answer_tokens and device (from 0) where it has them."""


class Turns(Model):
    """Questions of a conversation."""

    mean: Annotated[Float, Field(ge=1, le=1000)] = 1.0
    """Of a geometric distribution. Each takes all before it as its prompt."""
    think_s: Weight = 10.0
    """From an answer's end to the next question, on average (exponential)."""


class Load(Model):
    """What users ask."""

    arrivals: Arrivals = Arrivals()
    prompts: Lengths = Lengths()
    answers: Lengths = Lengths()
    turns: Turns = Turns()
    requests: Int | None = Field(default=None, ge=1)
    """The run ends with so many answers."""
    duration_s: Positive | None = None
    """Or conversations begin for so long, and what runs then ends."""
    before: Int = Field(default=0, ge=0)
    """So many requests are asked one by one before the load begins, and not counted: a system that has been running has
    measured what its rounds take."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """This share of `requests`, or of a replay's, the first ones, is not counted; nor are those that come in this share
    of `duration_s`. Nodes and links are counted from then on, too."""

    @model_validator(mode="after")
    def _ends(self) -> Load:
        if self.requests is None and self.duration_s is None and self.arrivals.kind != "replay":
            raise ValueError("say when it ends: requests: 1000, or duration_s: 600")
        return self


class Behaviour(Model):
    """What branches say, drawn where there is no trace; see `sim/behaviour.py: Drawn`."""

    agreement: dict[Int, Annotated[Float, Field(gt=0, lt=1)]]
    """Of each early exit with the last one."""
    spread: Weight = 0.9
    correlation: Share = 0.55
    """Both as the demo family's recorded answers have them (docs/simulation.md)."""


class Host(Model):
    """A machine whose cores several nodes share."""

    cores: Positive
    message_ms: Weight = 0.0
    """Processor time that a question between nodes takes on it beyond the profile's: of a proxy, a tunnel, a relay."""
    nodes: tuple[str, ...] = Field(min_length=1)


class Scenario(Topology):
    """A deployment, and what is asked of it."""

    nodes: tuple[SimNode, ...] = Field(min_length=1)
    links: tuple[SimLink, ...] = ()
    workload: Load = Field(alias="load")
    trace: Path | None = None
    """Of `ruyi-flow trace`: what the branches say."""
    behaviour: Behaviour | None = None
    profile: Path | None = None
    """Of the nodes that name none."""
    hosts: dict[str, Host] = {}
    client_ms: Weight = 0.0
    """What a user's request takes on the entry node before its first step, beyond the profile's."""
    seed: Int = Field(default=0, ge=0)

    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> Scenario:
        """Read a scenario, with keys replaced.

        Args:
            overrides: key=value, as in nodes.edge.count=4 or links.0.round_trip_ms=80.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        path = Path(path)
        data = read_yaml(path, "scenario")
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: a scenario is a mapping with the keys of a topology and load")
        data = _on_topology(data, path)
        for override in overrides:
            replace_key(data, override, str(path))
        return cls.from_data(data, base=path.parent, where=str(path))

    @classmethod
    def from_data(cls, data: dict[str, Any], *, base: Path, where: str) -> Scenario:
        """Check a scenario that is a mapping already; relative paths are meant from `base`."""
        data = copy.deepcopy(data)
        if isinstance(data.get("family"), str):
            data["family"] = resolve_folder(data["family"], base.resolve(), where)
        places: list[tuple[Any, str]] = [(data, "trace"), (data, "profile"), (data.get("policy"), "file")]
        load = data.get("load")
        places += [(node, "profile") for node in data.get("nodes") or ()] if isinstance(data.get("nodes"), list) else []
        places.append((load.get("arrivals") if isinstance(load, dict) else None, "file"))
        for mapping, key in places:
            if isinstance(mapping, dict) and isinstance(mapping.get(key), str):
                mapping[key] = str((base / Path(mapping[key]).expanduser()).resolve())
        try:
            scenario = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None
        scenario._cross_check(where)
        scenario._check_rest(where)
        return scenario

    def text(self) -> str:
        """As a scenario file that says all that this one does."""
        data = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def link_after(self, tier: int) -> SimLink | None:
        """From the nodes of a tier, 0 being the entry's, to the next; None after the last."""
        if tier + 1 == len(self.nodes):
            return None
        ends = self.nodes[tier].name, self.nodes[tier + 1].name
        return next(link for link in self.links if (link.source, link.target) == ends)

    def _check_addresses(self, where: str) -> None:
        """A scenario needs none."""

    def _check_rest(self, where: str) -> None:
        names = [node.name for node in self.nodes]
        for host, machine in self.hosts.items():
            for name in machine.nodes:
                if name not in names:
                    raise ConfigError(f"{where}: hosts.{host}.nodes: no node {name!r}{did_you_mean(name, names)}")
        for i, node in enumerate(self.nodes):
            if node.profile and node.hardware:
                raise ConfigError(f"{where}: nodes.{i}: give a profile or a hardware, not both")
            if not (node.profile or node.hardware or self.profile):
                raise ConfigError(
                    f"{where}: nodes.{i}.profile: nobody knows what {node.name!r} costs; measure this machine "
                    "(ruyi-flow profile FAMILY --out this.msgpack) and name the file, or name a hardware"
                )
            if i and node.count > self.nodes[i - 1].count:
                raise ConfigError(
                    f"{where}: nodes.{i}.count: {node.count} of {node.name!r} for {self.nodes[i - 1].count} of "
                    f"{self.nodes[i - 1].name!r}: some would have nobody to serve"
                )
        if self.trace is not None and self.behaviour is not None:
            raise ConfigError(f"{where}: give a trace or a behaviour, not both")
        early = self.all_exits[:-1]
        if self.behaviour is not None and set(self.behaviour.agreement) != set(early):
            raise ConfigError(
                f"{where}: behaviour.agreement: names exits {sorted(self.behaviour.agreement)}; "
                f"the early exits here are {list(early)}"
            )
        for what, lengths in (("prompts", self.workload.prompts), ("answers", self.workload.answers)):
            if lengths.kind == "trace" and self.trace is None:
                raise ConfigError(f"{where}: load.{what}.kind: there is no trace to take them from; name one")
            if lengths.kind == "uniform" and lengths.low > lengths.high:
                raise ConfigError(f"{where}: load.{what}: low is above high")
        arrivals = self.workload.arrivals
        if arrivals.kind == "replay" and (arrivals.file is None or not arrivals.file.exists()):
            missing = "what to replay is missing" if arrivals.file is None else f"{arrivals.file} is not there"
            raise ConfigError(f"{where}: load.arrivals.file: {missing}; name a CSV file")


def _on_topology(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """A scenario that names a topology's file: that, with the scenario's keys over it, nodes and links by name."""
    named = data.pop("topology", None)
    if named is None:
        return data
    if not isinstance(named, str):
        raise ConfigError(f"{path}: topology: must be the path of a topology file")
    file = path.parent / Path(named).expanduser()
    below = read_yaml(file, "topology")
    if not isinstance(below, dict):
        raise ConfigError(f"{file}: a topology is a mapping with the keys family, nodes, links and policy")
    if isinstance(below.get("family"), str):
        below["family"] = resolve_folder(below["family"], file.parent.resolve(), str(file))
    for node in below["nodes"] if isinstance(below.get("nodes"), list) else ():
        if isinstance(node, dict) and isinstance(node.get("shard"), str):
            node["shard"] = str((file.parent / node["shard"]).resolve())
    policy = below.get("policy")
    if isinstance(policy, dict) and isinstance(policy.get("file"), str):
        policy["file"] = str((file.parent / policy["file"]).resolve())
    merged = {**below, **data}
    for key, names in (("nodes", ("name",)), ("links", ("from", "to"))):
        mine = data.get(key)
        if not isinstance(mine, list) or not isinstance(below.get(key), list):
            continue
        rows = [dict(row) for row in below[key] if isinstance(row, dict)]
        for row in mine:
            match = [r for r in rows if isinstance(row, dict) and all(r.get(n) == row.get(n) for n in names)]
            if not match:
                raise ConfigError(f"{path}: {key}: {row!r} is not in {file}; name what is there")
            match[0].update(row)
        merged[key] = rows
    return merged


def replace_key(data: dict[str, Any], override: str, where: str) -> None:
    """Set a key of a file's data.

    Args:
        override: key=value; in lists a key is a number, or a node's name, or a link's as from-to.

    Raises:
        ConfigError: there is no such place.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write key=value, as in nodes.edge.count=4")
    value = parse_value(text, f"--set {key}")
    *path, last = key.split(".")
    here: Any = data
    for i, part in enumerate([*path, last]):
        final = i == len(path)
        if isinstance(here, list):
            index = _index(here, part)
            if index is None:
                names = [name for row in here if (name := _name(row))] or [str(i) for i in range(len(here))]
                raise ConfigError(
                    f"{where}: --set {key}: no {part!r} in {'.'.join(path[:i])}; "
                    f"it has {', '.join(names) or 'nothing'}{did_you_mean(part, names)}"
                )
            if final:
                here[index] = value
            else:
                here = here[index]
        elif isinstance(here, dict):
            part_key: Any = int(part) if part.isdigit() and int(part) in here else part
            if final:
                here[part_key] = value
            else:
                here = here.setdefault(part_key, {})
        else:
            raise ConfigError(f"{where}: --set {key}: {'.'.join(path[:i])} has no keys in it")


def _index(rows: list[Any], part: str) -> int | None:
    if part.isdigit() and int(part) < len(rows):
        return int(part)
    return next((i for i, row in enumerate(rows) if part and part == _name(row)), None)


def _name(row: Any) -> str:
    """What a node or a link is called; nothing where it has no name."""
    if not isinstance(row, dict):
        return ""
    return str(row.get("name") or "-".join(str(row[end]) for end in ("from", "to") if end in row))
