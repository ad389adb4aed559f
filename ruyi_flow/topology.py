"""Topology files: which node holds which exits, where it listens, how nodes are linked, and the default policy.

YAML in, frozen and validated models out. A mistake is one `ConfigError` that names the file, the key's path, the value,
and what to do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import Encoding, Mode

__all__ = ["Dtype", "Limits", "Link", "Node", "Topology", "did_you_mean"]

Dtype = Literal["float32", "bfloat16", "float16"]


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ValueError("write it as host:port, for instance 127.0.0.1:7101")
    return value


Address = Annotated[str, AfterValidator(_address)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Model):
    """What a node refuses to exceed."""

    max_sessions: int = Field(default=16, ge=1)
    """Sessions at once."""
    max_positions: int = Field(default=16384, ge=64, le=2**26)
    """Positions of keys and values, over all sessions."""
    max_message_bytes: int = Field(default=4 * 1024 * 1024, ge=64 * 1024, le=2**31 - 1)
    """Of one message on the wire; a longer prompt travels in several."""
    grace_s: float = Field(default=10.0, ge=0)
    """How long running sessions may go on after SIGTERM."""


class Node(_Model):
    """A daemon that serves consecutive stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    tier: str | None = None
    """Any label: device, edge, cloud, …; the node's name when left out."""
    address: Address | None = None
    """host:port to listen on and to be reached at; a topology of one node needs none."""
    exits: tuple[int, ...] = Field(min_length=1)
    """The exits of its stages, ascending."""
    dtype: Dtype = "bfloat16"
    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the forward pass; torch's default when left out. Nodes that share cores must share them out."""
    cores: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """CPU cores that the daemon stays on (Linux): big ones of a phone, those of one memory bank, or, for nodes of one
    machine that take turns, the same one. Any, when left out."""
    shard: Path | None = None
    """Folder of this node's shard (`ruyi-flow shard`); without it the node picks its tensors out of the family."""
    limits: Limits = Limits()

    @property
    def label(self) -> str:
        """The tier, or the name where no tier is given."""
        return self.tier or self.name


class Link(_Model):
    """How a node reaches the next one."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    encoding: Encoding = Encoding.BF16
    """How boundary states are written on it."""
    address: Address | None = None
    """Dial this instead of the target's own address: a proxy, a tunnel, a relay."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one block's answer over this link, everything beyond it included."""


class PolicyDefaults(_Model):
    """The routing of a request that names none."""

    mode: Mode = Mode.EXACT
    exit: int | None = None
    threshold: float | None = None
    thresholds: dict[int, float] | None = None
    draft: int = Field(default=4, ge=0)


class Topology(_Model):
    """Nodes from the user's device to the deepest one, in order."""

    family: str
    """A folder, or a name in the local store (`ruyi-flow pull`)."""
    exits: tuple[int, ...] | None = None
    """The exits to give to an ordinary checkpoint, which has none of its own."""
    nodes: tuple[Node, ...] = Field(min_length=1)
    links: tuple[Link, ...] = ()
    policy: PolicyDefaults = PolicyDefaults()

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read and check a topology file.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such topology file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        base = path.parent
        topology = cls.parse(data, where=str(path))
        return topology.model_copy(
            update={
                "family": _resolve_folder(topology.family, base),
                "nodes": tuple(n.model_copy(update={"shard": n.shard and (base / n.shard)}) for n in topology.nodes),
            }
        )

    @classmethod
    def parse(cls, data: object, *, where: str = "topology") -> Topology:
        """Check a topology that is already a mapping; `where` names it in messages."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a topology is a mapping with the keys family, nodes, links and policy")
        try:
            topology = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from None
        topology._cross_check(where)
        return topology

    @property
    def entry(self) -> Node:
        """The node that a client talks to: the shallowest."""
        return self.nodes[0]

    @property
    def all_exits(self) -> tuple[int, ...]:
        """Every exit, in the order of the nodes."""
        return tuple(p for node in self.nodes for p in node.exits)

    def node(self, name: str) -> Node:
        """The node of that name.

        Raises:
            ConfigError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        raise ConfigError(f"no node {name!r} in this topology; it has {names}{did_you_mean(name, names)}")

    def next_of(self, name: str) -> tuple[Node, Link] | None:
        """The next deeper node and the link to it, or None for the deepest node."""
        index = self.nodes.index(self.node(name))
        if index + 1 == len(self.nodes):
            return None
        target = self.nodes[index + 1]
        for link in self.links:
            if link.source == name and link.target == target.name:
                return target, link
        raise AssertionError("checked by _cross_check")

    def node_of(self, exit: int) -> Node:
        """The node that holds an exit."""
        return next(node for node in self.nodes if exit in node.exits)

    def check_family(self, exits: Sequence[int], *, where: str = "topology") -> None:
        """Check the nodes' exits against the exits that the family has.

        Raises:
            ConfigError: an exit the family lacks, or exits of the family that no node holds.
        """
        for i, node in enumerate(self.nodes):
            for p in node.exits:
                if p not in exits:
                    raise ConfigError(
                        f"{where}: nodes.{i}.exits: {p} is not an exit of family {self.family!r}, "
                        f"which has {list(exits)}; name only those"
                    )
        missing = [p for p in exits if p not in self.all_exits]
        if missing:
            raise ConfigError(
                f"{where}: nodes: no node holds exit {missing[0]} of family {self.family!r} ({list(exits)}); "
                "every stage of the trunk needs a node: add it to a node's exits"
            )

    def _cross_check(self, where: str) -> None:
        def fail(key: str, message: str) -> None:
            raise ConfigError(f"{where}: {key}: {message}")

        names = [node.name for node in self.nodes]
        for i, name in enumerate(names):
            if name in names[:i]:
                fail(f"nodes.{i}.name", f"{name!r} is the name of nodes.{names.index(name)} already; rename one")
        last = 0
        for i, node in enumerate(self.nodes):
            for p in node.exits:
                if p <= last:
                    fail(
                        f"nodes.{i}.exits",
                        f"{list(node.exits)} does not go on from exit {last}; "
                        "list nodes and exits from shallow to deep, each exit once",
                    )
                last = p
        if len(self.nodes) > 1:
            seen: dict[str, int] = {}
            for i, node in enumerate(self.nodes):
                if node.address is None:
                    fail(f"nodes.{i}.address", f"node {node.name!r} has none; with several nodes each needs host:port")
                elif node.address in seen and not node.address.endswith(":0"):
                    fail(
                        f"nodes.{i}.address",
                        f"{node.address} is taken by nodes.{seen[node.address]}; pick another port",
                    )
                else:
                    seen[str(node.address)] = i
        for i, link in enumerate(self.links):
            for key, name in (("from", link.source), ("to", link.target)):
                if name not in names:
                    fail(f"links.{i}.{key}", f"no node {name!r}; the nodes are {names}{did_you_mean(name, names)}")
            if names.index(link.target) != names.index(link.source) + 1:
                fail(
                    f"links.{i}",
                    f"{link.source} → {link.target} skips or goes back; "
                    "a link leads from a node to the next deeper one",
                )
            if any((link.source, link.target) == (other.source, other.target) for other in self.links[:i]):
                fail(f"links.{i}", f"{link.source} → {link.target} is there twice; keep one")
        linked = {(link.source, link.target) for link in self.links}
        for a, b in zip(names, names[1:], strict=False):
            if (a, b) not in linked:
                fail("links", f"{b!r} cannot be reached from {a!r}; add {{from: {a}, to: {b}}}")
        try:
            Policy.resolve(Routing(**dict(self.policy)), self.all_exits)
        except RequestError as error:
            fail("policy", str(error))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` when a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _resolve_folder(family: str, base: Path) -> str:
    """A relative folder is meant from the topology's own folder; a name stays a name."""
    folder = base / Path(family).expanduser()
    return str(folder) if "/" in family or folder.joinpath("config.json").exists() else family


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        value, message = item["input"], item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"])
            key = str(item["loc"][-1])
            message = f"unknown key; known here: {', '.join(known)}{did_you_mean(key, known)}"
        elif item["type"] == "missing":
            value, message = None, "this key is required; add it"
        shown = "" if value is None or (isinstance(value, float) and math.isnan(value)) else f" {value!r}:"
        lines.append(f"{where}: {path}:{shown if len(shown) < 120 else ''} {message}")
    return "\n".join(lines)


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the model that an unknown key was found in."""
    model: Any = Topology
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        inner = fields[part].annotation
        model = next(
            (m for m in (inner, *getattr(inner, "__args__", ())) if isinstance(m, type) and issubclass(m, BaseModel)),
            model,
        )
    return [f.alias or name for name, f in model.model_fields.items()]
