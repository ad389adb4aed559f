"""Topology files: which node runs which exits, where it listens, how nodes are linked, and the default policy.

A YAML file becomes frozen, validated models. A mistake is a `ConfigError` with the file, the key's path, the value, and
the fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from ruyi_flow.config.addresses import Dialled, Listened, as_tuple, check_addresses, check_ports
from ruyi_flow.config.examples import Kind, examples, find
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.security import Keys, NodeSecurity, Security, check_unwritable
from ruyi_flow.config.yaml_files import Model, explain, read_yaml
from ruyi_flow.errors import ConfigError, RequestError, did_you_mean, shown
from ruyi_flow.requests import check_option_names, option_names
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import MIN_UPLOAD_POSITIONS, Encoding, Upload, Weights

__all__ = [
    "Dtype",
    "Float",
    "Int",
    "Limits",
    "Link",
    "Model",
    "Node",
    "Topology",
    "resolve_file",
    "resolve_folder",
    "resolve_path",
]

Dtype = Literal["float32", "bfloat16", "float16"]


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # YAML reads yes and no as booleans, and Python takes booleans for numbers
        raise ValueError("must be a number")
    return value


_SEVERAL = "docs/guides/several-devices.md shows both"
"""Where users find how several devices share deeper nodes."""


def _one(value: object) -> object:
    if isinstance(value, list):
        raise ValueError(
            "must be one name, not a list: replicas share the name of their node; list their addresses under the "
            "node's key address"
        )
    return value


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]


class Limits(Model):
    """The limits of a node."""

    max_sessions: Int = Field(default=16, ge=1)
    """Largest number of sessions at the same time."""
    max_waiting: Int = Field(default=64, ge=0)
    """Number of sessions that may wait for capacity, in order of arrival; further ones are refused at once."""
    max_wait_s: Float = Field(default=10.0, gt=0, le=1e6)
    """Seconds that a session may wait before it is refused. It should be less than the `timeout_s` of the links to this
    node, or the callers give up first."""
    max_positions: Int = Field(default=16384, ge=64, le=2**26)
    """KV cache positions over all sessions; a request reserves its prompt and its `max_new_tokens`."""
    max_step_positions: Int = Field(default=256, ge=1, le=2**20)
    """Most positions computed in one step, over all sessions. A longer prompt takes several steps, and other sessions'
    tokens join each of them."""
    max_message_bytes: Int = Field(default=4 * 1024 * 1024, ge=64 * 1024, le=2**31 - 1)
    """Largest message in bytes that the node accepts; a longer prompt is sent in several."""
    grace_s: Float = Field(default=10.0, ge=0, le=1e6)
    """Seconds that running sessions may continue after SIGTERM."""
    park_s: Float = Field(default=600.0, ge=0, le=1e6)
    """Seconds for which the caches of an ended answer are kept for a next turn, while room allows. 0 keeps none."""
    deepest: Int | None = None
    """Deepest exit that an answer through this node may reach; tokens stopped there have the reason `limit`."""
    bytes_up_per_minute: Int | None = Field(default=None, ge=1)
    """Bytes of boundary states that the node may send per minute. Past it, this node decides, with the reason `budget`.
    Default: no limit."""


class Node(Model):
    """A node: a daemon that runs consecutive stages of the family."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the node."""
    tier: str | None = None
    """Label such as device, edge or cloud. Default: the node's name."""
    address: Dialled | None = None
    """host:port at which the node is reached, and where it listens unless `listen` is given. A list names the node's
    replicas, and so does a DNS name with several addresses. A topology of one node needs none: its clients run it."""
    listen: Listened | None = None
    """host:port to listen on if it is not the address: 0.0.0.0:7101 in a container or behind NAT. A list has one for
    each address, in the same order. Default: the address."""
    metrics: Listened | None = None
    """host:port where the node serves its metrics to Prometheus, as plain HTTP. A list has one for each address.
    Default: nowhere."""
    exits: tuple[Int, ...] = Field(min_length=1, max_length=1024)
    """Exits of the node's stages, ascending."""
    dtype: Dtype = "bfloat16"
    """Number format of the layers and of the KV cache."""
    weights: Weights | None = None
    """Number format of the weight matrices: bf16, int8 or int4. Default: that of the shard or the family."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1, mps (Apple) or xpu (Intel)."""
    compile: bool = False
    """Whether the trunk's layers run through `torch.compile`; on a CPU that is slower."""
    threads: Int | None = Field(default=None, ge=1, le=1024)
    """CPU threads of the forward pass. Default: torch's own. Nodes on one machine must divide its cores."""
    cores: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """CPU cores that the daemon is pinned to (not on macOS), for instance the big cores of a phone. Default: all."""
    shard: Path | None = None
    """Folder of the node's shard, made by `ruyi-flow shard`. Default: the node reads its tensors from the family."""
    security: NodeSecurity | None = None
    """Files of the node's certificate, where they are not those of `ruyi-flow keys init`."""
    limits: Limits = Limits()
    """The node's limits."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The address of each replica; none if the node runs in its clients."""
        return as_tuple(self.address)

    @property
    def label(self) -> str:
        """The tier, or the name of a node without one."""
        return self.tier or self.name


class Link(Model):
    """The connection of a node to the next one."""

    source: Annotated[str, BeforeValidator(_one)] = Field(alias="from")
    """Name of the node that sends."""
    target: Annotated[str, BeforeValidator(_one)] = Field(alias="to")
    """Name of the next node."""
    encoding: Encoding = Encoding.BF16
    """Encoding of boundary states: f32, bf16, f16, or int8 with one scale per position."""
    address: Dialled | None = None
    """host:port to dial, for instance of a tunnel, or a list for the replicas. Default: the target's address."""
    upload: Upload = Upload.ON_DEMAND
    """When boundary states are sent: `on-demand` with a question, or `ahead` while the link is idle."""
    ahead_bytes: Int = Field(default=16 * 1024 * 1024, ge=1)
    """Bytes that one session may upload ahead of questions."""
    timeout_s: Float = Field(default=30.0, gt=0, le=1e6)
    """Seconds that one answer over this link may take, including the work of all deeper nodes."""
    recover_s: Float = Field(default=10.0, ge=0, le=1e6)
    """Seconds for which a lost session may be taken up again on the next node, since it could last be reached. Then the
    answer fails, or falls back."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses to dial; none stands for those of the target."""
        return as_tuple(self.address)

    def row_bytes(self, hidden_size: int) -> int:
        """Return the bytes of one position on the link: its state, its token id, and its share of the frame."""
        return self.encoding.row_bytes(hidden_size) + 16


class DefaultPolicy(Model):
    """The routing of requests that set none: a policy file, and any routing option of `Client.generate`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    file: Path | None = None
    """A policy file of `ruyi-flow calibrate`, which sets the mode and its thresholds. Default: none."""

    def routing(self) -> Routing:
        """Return the routing that the options and the file describe.

        Raises:
            ConfigError: the policy file cannot be read.
            RequestError: an option is unknown, or the options contradict each other.
        """
        given = self.model_extra or {}
        check_option_names(given, (Routing.names() & option_names()) | {"file"})
        options = {name: value for name, value in given.items() if value is not None}
        if self.file is not None:
            options = PolicyFile.load(self.file).options(options)
        return Routing().updated(options)


class Topology(Model):
    """A family, the nodes that run it from shallow to deep, the links between them, and the default policy."""

    family: str
    """Folder of the family, or its name in the local store (`ruyi-flow pull`)."""
    exits: tuple[Int, ...] | None = None
    """Exits to give to an ordinary checkpoint, which has none of its own. Default: the family's own."""
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=1024)
    """The nodes, from shallow to deep."""
    links: tuple[Link, ...] = ()
    """One link from each node to the next one."""
    policy: DefaultPolicy = DefaultPolicy()
    """The routing of requests that set none."""
    security: Security | None = None
    """Keys of the deployment. Default: none; nodes then listen on loopback only."""

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """Read and check a topology file, or an example such as `local`.

        Raises:
            ConfigError: with the file, the key's path, the value and the fix.
        """
        if not isinstance(path, (str, os.PathLike)):  # what a user's program gives
            raise ConfigError(
                f"{shown(path)} is no topology; give the path of a YAML file, the name of an example "
                f"({', '.join(examples('topology'))}), or a Topology, which Topology.parse makes of a mapping"
            )
        path = find(path, "topology")
        base = path.parent
        data = read_yaml(path, "topology")
        policy = data.get("policy") if isinstance(data, dict) else None
        if isinstance(policy, dict) and isinstance(policy.get("file"), str):
            policy["file"] = str(resolve_file(policy["file"], "policy", base, f"{path}: policy.file"))
        topology = cls.parse(data, where=str(path))
        check_ports(topology.nodes, topology.links, str(path))
        nodes = []
        for i, node in enumerate(topology.nodes):
            shard = node.shard and resolve_path(node.shard, base, f"{path}: nodes.{i}.shard")
            own = _resolve_files(node.security, base, f"{path}: nodes.{i}.security")
            nodes.append(node.model_copy(update={"shard": shard, "security": own}))
        family = resolve_folder(topology.family, base, str(path))
        security = _resolve_files(topology.security, base, f"{path}: security")
        update = {"family": family, "nodes": tuple(nodes), "security": security}
        topology = topology.model_copy(update=update)
        if security is not None and topology.policy.file is not None:
            check_unwritable(topology.policy.file, "this policy")
        return topology

    @classmethod
    def parse(cls, data: object, *, where: str = "topology") -> Topology:
        """Check a topology that is already a mapping; `where` names it in error messages."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: a topology is a mapping with the keys family, nodes, links and policy")
        try:
            topology = cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None
        topology._cross_check(where)
        return topology

    def routing(self) -> Routing:
        """Return the routing of requests that set none; see `DefaultPolicy.routing`."""
        return self.policy.routing()

    def ahead_of(self, name: str, row_bytes: int) -> int:
        """Return the number of positions that one session on a node may upload ahead of questions."""
        hop = self.next_of(name)
        if hop is None or hop[1].upload is Upload.ON_DEMAND:
            return 0
        return hop[1].ahead_bytes // row_bytes

    @property
    def entry(self) -> Node:
        """The entry node, which clients talk to: the shallowest one."""
        return self.nodes[0]

    @property
    def all_exits(self) -> tuple[int, ...]:
        """Every exit, in the order of the nodes."""
        return tuple(p for node in self.nodes for p in node.exits)

    def node(self, name: str) -> Node:
        """Return the node of a name.

        Raises:
            ConfigError: there is no such node.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        raise ConfigError(f"no node {name!r} in this topology; it has {names}{did_you_mean(name, names)}")

    def keys_of(self, name: str) -> Keys | None:
        """Return the files by which a node proves who it is; None without the section `security`."""
        return None if self.security is None else self.security.of_node(name, self.node(name).security)

    @property
    def user_keys(self) -> Keys | None:
        """The files by which clients prove who they are; None without the section `security`."""
        return None if self.security is None else self.security.of_user()

    def label_of(self, name: str) -> str:
        """Return a node's tier or name. A name that this file does not have stays: the running nodes may differ."""
        return next((node.label for node in self.nodes if node.name == name), name)

    def next_of(self, name: str) -> tuple[Node, Link] | None:
        """Return the next deeper node and the link to it, or None for the deepest node."""
        index = self.nodes.index(self.node(name))
        if index + 1 == len(self.nodes):
            return None
        target = self.nodes[index + 1]
        for link in self.links:
            if link.source == name and link.target == target.name:
                return target, link
        raise AssertionError("checked by _cross_check")

    def next_addresses(self, name: str) -> tuple[str, ...]:
        """Return the addresses that a node dials for the next deeper one; none for the deepest node."""
        hop = self.next_of(name)
        return () if hop is None else hop[1].addresses or hop[0].addresses

    def check_family(self, exits: Sequence[int], *, where: str = "topology") -> None:
        """Check the nodes' exits against those of the family.

        Raises:
            ConfigError: the family does not have an exit, or no node has an exit of the family.
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
                f"{where}: nodes: no node has exit {missing[0]} of family {self.family!r} ({list(exits)}); "
                "every stage of the trunk needs a node: add it to a node's exits"
            )

    def check_bytes(self, hidden_size: int, *, where: str = "topology") -> None:
        """Check the byte limits of nodes and links against the size of the family's boundary states.

        Raises:
            ConfigError: a limit is so low that nothing would ever be sent.
        """
        for i, link in enumerate(self.links):
            row, node = link.row_bytes(hidden_size), self.node(link.source)
            if link.upload is Upload.AHEAD and link.ahead_bytes < MIN_UPLOAD_POSITIONS * row:
                raise ConfigError(
                    f"{where}: links.{i}.ahead_bytes: {link.ahead_bytes} is less than {MIN_UPLOAD_POSITIONS} positions "
                    f"({MIN_UPLOAD_POSITIONS * row} bytes), the smallest upload; raise it, or remove upload"
                )
            allowed = node.limits.bytes_up_per_minute
            if allowed is not None and allowed < row:
                raise ConfigError(
                    f"{where}: nodes.{self.nodes.index(node)}.limits.bytes_up_per_minute: {allowed} is less than "
                    f"one position ({row} bytes), so nothing would ever be sent; raise it, or set limits.deepest: "
                    f"{node.exits[-1]}"
                )

    def _cross_check(self, where: str) -> None:
        def fail(key: str, message: str) -> None:
            raise ConfigError(f"{where}: {key}: {message}")

        names = [node.name for node in self.nodes]
        for i, node in enumerate(self.nodes):
            for other in self.nodes[:i]:
                if other.exits[0] == node.exits[0]:
                    fail(f"nodes.{i}.exits", self._about_same_exits(other, node))
        for i, name in enumerate(names):
            if name in names[:i]:
                fail(f"nodes.{i}.name", f"{name!r} is already the name of nodes.{names.index(name)}; rename one")
        last = 0
        for i, node in enumerate(self.nodes):
            for p in node.exits:
                if p <= last:
                    fail(
                        f"nodes.{i}.exits",
                        f"{list(node.exits)} does not continue after exit {last}; "
                        "list nodes and exits from shallow to deep, each exit once",
                    )
                last = p
        self._check_addresses(where)
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
                fail(f"links.{i}", f"{link.source} → {link.target} is listed twice; remove one")
            if link.upload is not Upload.AHEAD and link.ahead_bytes != Link.model_fields["ahead_bytes"].default:
                fail(f"links.{i}.ahead_bytes", "requires upload: ahead; add that, or remove the key")
        for i, node in enumerate(self.nodes):
            deepest = node.limits.deepest
            if deepest is not None and (deepest not in self.all_exits or deepest < node.exits[0]):
                choices = [p for p in self.all_exits if p >= node.exits[0]]
                fail(f"nodes.{i}.limits.deepest", f"{deepest} must be an exit of this node or a deeper one: {choices}")
            if node.limits.bytes_up_per_minute is not None and i + 1 == len(self.nodes):
                fail(
                    f"nodes.{i}.limits.bytes_up_per_minute",
                    "the deepest node sends nothing; remove the key",
                )
            if node.security is not None and self.security is None:
                fail(f"nodes.{i}.security", "requires the section security of the whole file; see ruyi-flow keys init")
        for i, node in enumerate(self.nodes):
            if node.weights is Weights.BF16 and node.dtype != "bfloat16":
                fail(f"nodes.{i}.weights", f"bf16 requires dtype: bfloat16, not {node.dtype}; remove weights")
        linked = {(link.source, link.target) for link in self.links}
        for a, b in zip(names, names[1:], strict=False):
            if (a, b) not in linked:
                fail("links", f"{b!r} cannot be reached from {a!r}; add {{from: {a}, to: {b}}}")
        try:
            routing = self.policy.routing()
            self._check_exits_of(routing, fail)
            Policy.resolve(routing, self.all_exits)
        except RequestError as error:
            fail("policy", str(error))

    def _check_exits_of(self, routing: Routing, fail: Callable[[str, str], None]) -> None:
        """Check the exits that the policy names: either the policy or the exits of a node may be wrong."""
        key = "policy" if self.policy.file is None else "policy.file"
        have = ", ".join(f"nodes.{i} ({node.name}) has {list(node.exits)}" for i, node in enumerate(self.nodes))
        correct = f"{have}; correct the exits of a node, or the policy"
        for p in routing.exits:
            if p not in self.all_exits:
                fail(key, f"the policy names exit {p}, which no node has: {correct}")
        if routing.exits[-1:] == self.all_exits[-1:] and self.policy.file is not None:
            fail(key, f"the policy takes exit {self.all_exits[-1]} for an early one, and it is the last: {correct}")

    def _about_same_exits(self, first: Node, second: Node) -> str:
        """Say what to write instead of two nodes that begin with the same exit."""
        same = f"{list(second.exits)} begins with the same exit as node {first.name!r}"
        if first.address is None or second.address is None:
            lists = "one node whose key address is a list"
        else:
            lists = f"one node with address: [{', '.join(first.addresses + second.addresses)}]"
        if first is self.entry:
            return (
                f"{same}, but a topology is one chain of nodes from one device on; for devices that differ, write one "
                f"file per device, each with the same deeper nodes; for devices that are alike, write {lists}; "
                f"{_SEVERAL}"
            )
        return f"{same}; for replicas, write {lists}; otherwise remove one of the two; {_SEVERAL}"

    def _check_addresses(self, where: str) -> None:
        check_addresses(self.nodes, self.links, where)


def resolve_path(path: str | Path, base: Path, where: str) -> Path:
    """Return a path that a file names: relative to the file's own folder, or to the home folder if it begins with ~.

    Args:
        path: the path as it is written.
        base: the folder of the file that names it.
        where: the file and the key, for error messages.

    Raises:
        ConfigError: it cannot be a path.
    """
    try:
        whole = base / Path(path).expanduser()
        whole.exists()
    except (OSError, RuntimeError, ValueError) as error:  # ~user without such a user, a name that is too long, a NUL
        raise ConfigError(f"{where}: {str(path)[:80]!r} cannot be a path: {error}") from None
    return whole


_Files = TypeVar("_Files", Security, NodeSecurity)


def _resolve_files(section: _Files | None, base: Path, where: str) -> _Files | None:
    """Return a section `security` with whole paths.

    Raises:
        ConfigError: one cannot be a path.
    """
    if section is None:
        return None
    paths = {name: value for name, value in section if isinstance(value, Path)}
    update = {name: resolve_path(path, base, f"{where}.{name}") for name, path in paths.items()}
    return section.model_copy(update=update)


def resolve_file(named: str, kind: Kind, base: Path, where: str) -> Path:
    """Return the file that a path in a file names, as `resolve_path` does, or the example of that name."""
    path = resolve_path(named, base, where)
    return path if path.exists() else examples(kind).get(named, path)


def resolve_folder(family: str, base: Path, where: str) -> str:
    """Return a folder relative to the topology's own folder; a name of the store stays a name."""
    folder = resolve_path(family, base, f"{where}: family")
    return str(folder) if "/" in family or (folder / "config.json").exists() else family
