"""Topology files: which node holds which exits, where it listens, how nodes are linked, and the default policy.

YAML in, frozen and validated models out. A mistake is one `ConfigError` that names the file, the key's path, the value,
and what to do.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import Encoding, Mode

__all__ = ["Dtype", "Limits", "Link", "Node", "Topology", "did_you_mean", "explain", "read_yaml"]

Dtype = Literal["float32", "bfloat16", "float16"]


def _address(value: str) -> str:
    match = re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", value, re.ASCII)
    if match is None or int(match[1]) > 65535:
        raise ValueError("write it as host:port, for instance 127.0.0.1:7101 or [::1]:7101")
    return value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # YAML has yes and no for them, and Python takes both for numbers
        raise ValueError("must be a number")
    return value


Address = Annotated[str, AfterValidator(_address)]
Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Model):
    """What a node refuses to exceed."""

    max_sessions: Int = Field(default=16, ge=1)
    """Sessions at once."""
    max_positions: Int = Field(default=16384, ge=64, le=2**26)
    """Positions of keys and values, over all sessions."""
    max_message_bytes: Int = Field(default=4 * 1024 * 1024, ge=64 * 1024, le=2**31 - 1)
    """Of one message on the wire; a longer prompt travels in several."""
    grace_s: Float = Field(default=10.0, ge=0, le=1e6)
    """How long running sessions may go on after SIGTERM."""


class Node(_Model):
    """A daemon that serves consecutive stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    tier: str | None = None
    """Any label: device, edge, cloud, …; the node's name when left out."""
    address: Address | None = None
    """host:port to listen on and to be reached at; a topology of one node needs none."""
    exits: tuple[Int, ...] = Field(min_length=1)
    """The exits of its stages, ascending."""
    dtype: Dtype = "bfloat16"
    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1."""
    threads: Int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the forward pass; torch's default when left out. Nodes that share cores must share them out."""
    cores: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
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
    timeout_s: Float = Field(default=30.0, gt=0, le=1e6)
    """Deadline of one block's answer over this link, everything beyond it included."""


class PolicyDefaults(_Model):
    """The routing of a request that names none."""

    mode: Mode = Mode.EXACT
    exit: Int | None = None
    threshold: Float | None = None
    thresholds: dict[Int, Float] | None = None
    draft: Int = Field(default=4, ge=0)


class Topology(_Model):
    """Nodes from the user's device to the deepest one, in order."""

    family: str
    """A folder, or a name in the local store (`ruyi-flow pull`)."""
    exits: tuple[Int, ...] | None = None
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
        base = path.parent
        topology = cls.parse(read_yaml(path, "topology"), where=str(path))
        return topology.model_copy(
            update={
                "family": _resolve_folder(topology.family, base, str(path)),
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
            raise ConfigError(explain(error, cls, where)) from None
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


def read_yaml(path: Path, what: str) -> object:
    """A YAML file's data; `what` kind of file it is, for messages.

    Raises:
        ConfigError: it is not there, or not readable, or not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name no key twice: the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _resolve_folder(family: str, base: Path, where: str) -> str:
    """A relative folder is meant from the topology's own folder; a name stays a name."""
    try:
        folder = base / Path(family).expanduser()
        return str(folder) if "/" in family or folder.joinpath("config.json").exists() else family
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: family: {family[:80]!r} cannot be a folder or a name: {error}") from None


def explain(error: ValidationError, root: type[BaseModel], where: str) -> str:
    """What is wrong in a file, a line each, with the key's path, the value and the fix.

    Args:
        error: pydantic's.
        root: the model of the whole file.
        where: the file's name.
    """
    lines = []
    items = error.errors()
    for item in items:
        loc, kind = item["loc"], item["type"]
        if kind == "too_short" and any(other["loc"][: len(loc)] == loc for other in items if other is not item):
            continue  # its items are there, and wrong
        path = ".".join(str(part) for part in loc)
        value, context = item["input"], item.get("ctx", {})
        message = item["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = _known_keys(root, loc)
            message = f"unknown key; known here: {', '.join(known)}{did_you_mean(str(loc[-1]), known)}"
        elif kind == "missing":
            value, message = None, "this key is required; add it"
        elif kind in ("enum", "literal_error"):
            known = re.findall(r"'([^']+)'", str(context["expected"]))
            message = f"must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
        elif kind in _KINDS:
            message = _KINDS[kind].format(**context)
        shown = "" if value is None or (isinstance(value, float) and math.isnan(value)) else f" {value!r}:"
        lines.append(f"{where}: {path}:{shown if len(shown) < 120 else ''} {message}")
    return "\n".join(lines)


_KINDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_type": "must be a text; put it in quotes if it looks like a number",
    "path_type": "must be a text",
    "tuple_type": "must be a list, as in [5, 11]",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "too_short": "must name at least one",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', the first one a letter or a digit",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} at the most",
}
"""pydantic's kinds of errors, in this package's words."""


def _known_keys(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the model that an unknown key was found in."""
    model: Any = root
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
