"""Scenario files: a topology with the number and cost of its nodes, the speed of its links, and a load.

YAML is parsed into frozen and validated models, with the same error messages as for topologies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from ruyi_flow.config.examples import Kind, find
from ruyi_flow.config.topology import (
    Float,
    Int,
    Link,
    Model,
    Node,
    Topology,
    resolve_file,
    resolve_folder,
    resolve_path,
)
from ruyi_flow.config.yaml_files import explain, parse_value, read_yaml
from ruyi_flow.errors import ConfigError, did_you_mean, shown

__all__ = ["Arrivals", "Behaviour", "Host", "Lengths", "Load", "Scenario", "SimLink", "SimNode", "Span", "Turns"]

Positive = Annotated[Float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]


class Span(Model):
    """A planned outage of a link."""

    at_s: Weight
    """Second at which it begins."""
    for_s: Positive
    """Length in seconds."""


class NodeSpan(Span):
    """A planned outage of a node. Outages that overlap count as one, of the first one's kind."""

    kind: Literal["crash", "hang", "drain"] = "crash"
    """What happens: `crash` ends the process, which callers notice at once. `hang` makes it answer nothing, which they
    notice when signs of life are missing. `drain` lets sessions move to another replica first, for at most
    `limits.grace_s`. Afterwards a new process serves; what the old one had parked is lost."""
    replicas: tuple[Annotated[Int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    """Numbers, from 1, of the replicas that it concerns. Default: all."""


class SimNode(Node):
    """A node, or `count` identical nodes, each with `replicas` replicas."""

    count: Int = Field(default=1, ge=1, le=10_000_000)
    """Number of identical nodes. They are spread evenly over the nodes of the next tier."""
    replicas: Int = Field(default=1, ge=1, le=1024)
    """Number of replicas of each of the `count` nodes. Each replica is a machine with the node's limits, costs, power
    and price, and fails by itself. The nodes of the tier before choose one for each session, as the running system
    does; of the entry node's replicas, the client of the device does."""
    profile: Path | None = None
    """File with the costs of its stages (`ruyi-flow profile`). Default: the scenario's profile."""
    hardware: str | None = None
    """Machine of docs/reference/simulation-costs.md to compute the costs for, instead of a profile."""
    speed: Positive = 1.0
    """Factor on the speed of all steps."""
    idle_w: Weight | None = None
    """Power of one node in watts while no step runs. Default: the hardware's, or 0."""
    busy_w: Weight | None = None
    """Power of one node in watts while a step runs. Default: the hardware's, or 0."""
    price_per_hour: Weight | None = None
    """Price of one node in dollars per hour. Default: the hardware's, or 0."""
    down: tuple[NodeSpan, ...] = ()
    """Planned outages of all these nodes. Default: none."""
    mtbf_s: Annotated[Float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Mean seconds until a node, or one of its replicas, fails by itself: it crashes. Default: it never does."""
    mttr_s: Positive = 60.0
    """Seconds until a node that failed by itself is up again."""

    @property
    def machines(self) -> int:
        """Number of machines: all replicas of all these nodes."""
        return self.count * self.replicas


class SimLink(Link):
    """A link; each node at its lower end has one of its own."""

    round_trip_ms: Weight = 0.0
    """Round trip of an empty message and its answer, in milliseconds."""
    jitter_ms: Weight = 0.0
    """Standard deviation, in milliseconds, of the normal value whose absolute is added to each way."""
    up_mbit: Positive | None = None
    """Bandwidth upwards in Mbit/s. Default: unlimited."""
    down_mbit: Positive | None = None
    """Bandwidth downwards in Mbit/s. Default: unlimited."""
    shared: bool = False
    """Whether all nodes at the lower end share that bandwidth, as phones in one cell do."""
    loss: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0
    """Share of TCP segments that are lost and sent again."""
    down: tuple[Span, ...] = ()
    """Planned outages. Default: none."""
    price_per_gb: Weight = 0.0
    """Price of traffic in either direction, in dollars per gigabyte."""
    joules_per_mb: Weight = 0.0
    """Energy of the lower end's radio in joules per megabyte."""


class Lengths(Model):
    """A distribution of numbers of tokens."""

    kind: Literal["constant", "uniform", "lognormal", "trace"] = "constant"
    tokens: Int = Field(default=64, ge=1, le=2**20)
    """Number of tokens of kind "constant"."""
    low: Int = Field(default=1, ge=1)
    """Smallest number of tokens of kind "uniform"."""
    high: Int = Field(default=128, ge=1, le=2**20)
    """Largest number of tokens of kind "uniform"."""
    median: Annotated[Float, Field(gt=0, le=2**20)] = 64.0
    """Median number of tokens of kind "lognormal"."""
    sigma: Annotated[Float, Field(ge=0, le=10)] = 0.7
    """Standard deviation of the logarithm of kind "lognormal"."""
    most: Int = Field(default=2048, ge=1, le=2**20)
    """Largest number of tokens of kinds "lognormal" and "trace"; larger ones are cut to it."""


class Arrivals(Model):
    """The process by which conversations begin."""

    kind: Literal["poisson", "even", "bursty", "diurnal", "closed", "replay"] = "poisson"
    rate: Annotated[Float, Field(ge=1e-6, allow_inf_nan=False)] = 1.0
    """Mean number of conversations per second, over all devices."""
    busy_factor: Annotated[Float, Field(ge=1)] = 4.0
    """Rate in a burst divided by the rate between bursts, for kind "bursty" (a two-state Markov-modulated Poisson
    process)."""
    burst_s: Positive = 10.0
    """Mean length of a burst in seconds, for kind "bursty"."""
    calm_s: Positive = 50.0
    """Mean time between bursts in seconds, for kind "bursty"."""
    peak_factor: Annotated[Float, Field(ge=1, le=2)] = 1.8
    """Highest rate divided by the mean rate, for kind "diurnal" (a sine)."""
    period_s: Positive = 86400.0
    """Period of the sine in seconds, for kind "diurnal"."""
    users: Int = Field(default=1, ge=1)
    """Number of users, for kind "closed": each asks again after its answer and its thinking time."""
    file: Path | None = None
    """CSV file, for kind "replay". Columns: at_s; optionally prompt_tokens, answer_tokens and device (from 0)."""


class Turns(Model):
    """The questions of a conversation. The prompt of each contains the whole conversation before it."""

    mean: Annotated[Float, Field(ge=1, le=1000)] = 1.0
    """Mean number of questions, of a geometric distribution."""
    think_s: Weight = 10.0
    """Mean seconds from an answer to the next question, of an exponential distribution."""


class Load(Model):
    """The users' requests."""

    arrivals: Arrivals = Arrivals()
    """When conversations begin."""
    prompts: Lengths = Lengths()
    """Tokens of a question; the prompt also contains the conversation before it."""
    answers: Lengths = Lengths()
    """Tokens of an answer."""
    turns: Turns = Turns()
    """Questions of a conversation."""
    requests: Int | None = Field(default=None, ge=1)
    """Number of requests after which the run ends. Default: `duration_s` ends it."""
    duration_s: Positive | None = None
    """Seconds during which conversations begin; those under way are then finished. Default: `requests` ends the run."""
    before: Int = Field(default=0, ge=0)
    """Number of requests asked one by one before the load begins and not counted, so that nodes have measured the times
    that drafting is decided by."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """First share of `requests`, of a replay's rows, or of `duration_s`, that is not counted: neither its requests nor
    the activity of nodes and links until then."""

    @model_validator(mode="after")
    def _ends(self) -> Load:
        if self.requests is None and self.duration_s is None and self.arrivals.kind != "replay":
            raise ValueError("it never ends; set requests: 1000 or duration_s: 600")
        return self


class Behaviour(Model):
    """A model of the branches' predictions, for when there is no trace; see `sim/behaviour.py: DrawnScripts`."""

    agreement: dict[Int, Annotated[Float, Field(gt=0, lt=1)]]
    """Share of tokens at which each early exit agrees with the last one."""
    spread: Weight = 0.9
    """How much confidence varies over positions. Default: as in the demo family's recorded answers."""
    correlation: Share = 0.55
    """Correlation of the early exits' confidences. Default: as in the demo family's recorded answers."""


class Host(Model):
    """A machine whose cores several nodes share."""

    cores: Positive
    """Number of cores; it may be a fraction."""
    message_ms: Weight = 0.0
    """Extra processor time of a question between nodes in milliseconds, for example of a proxy or a tunnel."""
    nodes: tuple[str, ...] = Field(min_length=1)
    """Names of the nodes that run on it."""


class Scenario(Topology):
    """A deployment and its load."""

    nodes: tuple[SimNode, ...] = Field(min_length=1, max_length=1024)
    links: tuple[SimLink, ...] = ()
    workload: Load = Field(alias="load")
    """The users' requests."""
    trace: Path | None = None
    """File of `ruyi-flow trace` with the branches' predictions. Default: they are drawn, see `behaviour`."""
    behaviour: Behaviour | None = None
    """Model of the branches' predictions, instead of a trace."""
    profile: Path | None = None
    """File with the costs of the nodes that have neither a profile nor a hardware (`ruyi-flow profile`)."""
    hosts: dict[str, Host] = {}
    """Machines whose cores several nodes share, by name. Default: each node has a core of its own."""
    client_ms: Weight = 0.0
    """Extra milliseconds of a request on the entry node before its first step, in addition to the profile's."""
    client_recover_s: Weight = 10.0
    """Seconds for which a client takes up an answer again after its entry node was lost; as `recover_s` of the SDK."""
    seed: Int = Field(default=0, ge=0)
    """Seed of all random draws."""

    @property
    def may_fail(self) -> bool:
        """Whether any node or link has outages."""
        return any(node.down or node.mtbf_s is not None for node in self.nodes) or any(link.down for link in self.links)

    @property
    def parks(self) -> bool:
        """Whether a session may be taken back after its end: by the next turn, or by a caller that only lost a link."""
        return self.workload.turns.mean > 1 or self.may_fail

    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> Scenario:
        """Read a scenario file, or an example such as `city`, and replace keys.

        Args:
            path: the file, or the name of an example.
            overrides: keys to replace as key=value, for example nodes.edge.count=4 or links.0.round_trip_ms=80.

        Raises:
            ConfigError: the file cannot be read, or a key is wrong.
        """
        path = find(path, "scenario")
        data = read_yaml(path, "scenario")
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: a scenario must be a mapping with the keys of a topology and the key load")
        data = _on_topology(data, path)
        for override in overrides:
            replace_key(data, override, str(path))
        return cls.from_data(data, base=path.parent, where=str(path))

    @classmethod
    def from_data(cls, data: dict[str, Any], *, base: Path, where: str) -> Scenario:
        """Validate a scenario that is already parsed; relative paths in it refer to the folder `base`."""
        data = copy.deepcopy(data)
        if isinstance(data.get("family"), str):
            data["family"] = resolve_folder(data["family"], base.resolve(), where)
        load = data.get("load")
        arrivals = load.get("arrivals") if isinstance(load, dict) else None
        places = [(data, "trace"), (data, "profile"), (arrivals, "file")]
        for mapping, key in [*places, *((node, key) for node in _rows(data, "nodes") for key in ("profile", "shard"))]:
            _make_absolute(mapping, key, base, where)
        _make_absolute(data.get("policy"), "file", base, where, "policy")
        try:
            scenario = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None
        scenario._cross_check(where)
        scenario._check_rest(where)
        return scenario

    def text(self) -> str:
        """Return the text of an equivalent scenario file with absolute paths."""
        data = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def link_after(self, tier: int) -> SimLink | None:
        """Return the link from the nodes of a tier, counted from 0, to the next tier; None after the last one."""
        if tier + 1 == len(self.nodes):
            return None
        ends = self.nodes[tier].name, self.nodes[tier + 1].name
        return next(link for link in self.links if (link.source, link.target) == ends)

    def _check_addresses(self, where: str) -> None:
        """Accept nodes without addresses, which a simulation does not need."""

    def _check_rest(self, where: str) -> None:
        names = [node.name for node in self.nodes]
        for host, machine in self.hosts.items():
            for name in machine.nodes:
                if name not in names:
                    raise ConfigError(f"{where}: hosts.{host}.nodes: no node {name!r}{did_you_mean(name, names)}")
        for i, node in enumerate(self.nodes):
            if node.profile and node.hardware:
                raise ConfigError(f"{where}: nodes.{i}: profile and hardware cannot be combined; remove one of them")
            if not (node.profile or node.hardware or self.profile):
                raise ConfigError(
                    f"{where}: nodes.{i}.profile: the costs of {node.name!r} are missing; give the file of a measured "
                    "profile (ruyi-flow profile FAMILY --out this.msgpack), or a hardware"
                )
            for k, span in enumerate(node.down):
                if max(span.replicas or (1,)) > node.replicas:
                    raise ConfigError(
                        f"{where}: nodes.{i}.down.{k}.replicas: there is no replica {max(span.replicas or ())} of "
                        f"{node.name!r}, which has {node.replicas} (replicas); correct one of them"
                    )
            if i and node.count > self.nodes[i - 1].count:
                raise ConfigError(
                    f"{where}: nodes.{i}.count: {node.count} of {node.name!r} are more than the "
                    f"{self.nodes[i - 1].count} of {self.nodes[i - 1].name!r} that they serve; lower it"
                )
        if self.trace is not None and self.behaviour is not None:
            raise ConfigError(f"{where}: trace and behaviour cannot be combined; remove one of them")
        early = self.all_exits[:-1]
        if self.behaviour is not None and set(self.behaviour.agreement) != set(early):
            raise ConfigError(
                f"{where}: behaviour.agreement: has exits {sorted(self.behaviour.agreement)}, but the early exits of "
                f"the nodes are {list(early)}; give one value for each of them"
            )
        for what, lengths in (("prompts", self.workload.prompts), ("answers", self.workload.answers)):
            if lengths.kind == "trace" and self.trace is None:
                raise ConfigError(f"{where}: load.{what}.kind: 'trace' requires a trace; set the key trace")
            if lengths.kind == "uniform" and lengths.low > lengths.high:
                raise ConfigError(f"{where}: load.{what}: low is above high; swap them")
        arrivals = self.workload.arrivals
        if arrivals.kind == "replay" and (arrivals.file is None or not arrivals.file.exists()):
            missing = "kind 'replay' requires it" if arrivals.file is None else f"{arrivals.file} does not exist"
            raise ConfigError(f"{where}: load.arrivals.file: {missing}; give a CSV file")


def _on_topology(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Put a scenario's keys over those of the topology file that it names, matching nodes and links by name."""
    named = data.pop("topology", None)
    if named is None:
        return data
    if not isinstance(named, str):
        raise ConfigError(f"{path}: topology: must be the path of a topology file, or the name of an example")
    file = resolve_file(named, "topology", path.parent, f"{path}: topology")
    below = read_yaml(file, "topology")
    if not isinstance(below, dict):
        raise ConfigError(f"{file}: a topology must be a mapping with the keys family, nodes, links and policy")
    if isinstance(below.get("family"), str):
        below["family"] = resolve_folder(below["family"], file.parent.resolve(), str(file))
    _make_absolute(below.get("policy"), "file", file.parent, str(file), "policy")
    for node in _rows(below, "nodes"):
        _make_absolute(node, "shard", file.parent, str(file))
    merged = {**below, **data}
    for key, names in (("nodes", ("name",)), ("links", ("from", "to"))):
        if not isinstance(data.get(key), list) or not isinstance(below.get(key), list):
            continue
        merged[key] = rows = _rows(below, key)
        for row in data[key]:
            match = [r for r in rows if isinstance(row, dict) and all(r.get(n) == row.get(n) for n in names)]
            if not match:
                raise ConfigError(f"{path}: {key}: {shown(row)} is not in {file}; use a name of that file")
            match[0].update(row)
    return merged


def _rows(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the mappings in a list of a file's data; none if it is malformed."""
    return [row for row in data[key] if isinstance(row, dict)] if isinstance(data.get(key), list) else []


def _make_absolute(mapping: Any, key: str, base: Path, where: str, kind: Kind | None = None) -> None:
    """Make a path in a mapping absolute, if it is there; with a kind it may be the name of an example."""
    if isinstance(mapping, dict) and isinstance(mapping.get(key), str):
        whole = f"{where}: {key}"
        path = resolve_file(mapping[key], kind, base, whole) if kind else resolve_path(mapping[key], base, whole)
        mapping[key] = str(path.resolve())


def replace_key(data: dict[str, Any], override: str, where: str) -> None:
    """Set a key of a scenario file's data.

    Args:
        data: the data, which is changed.
        override: key=value. In a list, a key is an index, a node's name, or a link's ends as from-to.
        where: name of the file, for error messages.

    Raises:
        ConfigError: the key does not exist, or the value is not valid YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write key=value, as in nodes.edge.count=4")
    value = parse_value(text, f"--set {key}")
    parts = key.split(".")
    here: Any = data
    for i, part in enumerate(parts):
        at: Any = part
        if isinstance(here, list):
            at = _index(here, part)
            if at is None:
                names = [name for row in here if (name := _name(row))] or [str(n) for n in range(len(here))]
                raise ConfigError(
                    f"{where}: --set {key}: no {part!r} in {'.'.join(parts[:i])}; "
                    f"it has {', '.join(names) or 'nothing'}{did_you_mean(part, names)}"
                )
        elif not isinstance(here, dict):
            raise ConfigError(f"{where}: --set {key}: {'.'.join(parts[:i])} is a single value without keys")
        elif part.isdigit() and int(part) in here:
            at = int(part)
        if i + 1 == len(parts):
            here[at] = value
        else:
            here = here.setdefault(at, {}) if isinstance(here, dict) else here[at]


def _index(rows: list[Any], part: str) -> int | None:
    if part.isdigit() and int(part) < len(rows):
        return int(part)
    return next((i for i, row in enumerate(rows) if part and part == _name(row)), None)


def _name(row: Any) -> str:
    """Return the name of a node or a link; "" if it has none."""
    if not isinstance(row, dict):
        return ""
    return str(row.get("name") or "-".join(str(row[end]) for end in ("from", "to") if end in row))
