"""Checks of each node of a topology from outside, and of the links: names, ports, health, round trips, bandwidth."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from ruyi_flow.config.replicas import replica_name
from ruyi_flow.config.security import Keys
from ruyi_flow.config.topology import Node, Topology
from ruyi_flow.doctor.checks import Check, Group, Mark, ended, on_thread
from ruyi_flow.errors import DeadlineExceeded, NodeError
from ruyi_flow.serving.placement import each_host, is_here
from ruyi_flow.transport.addresses import listen_problem, split_address
from ruyi_flow.transport.link import FRAME_BYTES, measure_link
from ruyi_flow.transport.peer import Peer
from ruyi_flow.types import LinkMeasurement, NodeStatus

__all__ = [
    "Place",
    "Visit",
    "find",
    "link_from_here",
    "link_to_next",
    "links_to_measure",
    "name_exits",
    "reached",
    "visit",
]

_LIMIT_S = 5.0
"""Seconds that one question to the network or to a node may take."""

_LINK_S = 8.0
"""Seconds that one measurement of a link may take."""

_PAYLOAD = 500_000
"""Largest payload of a measurement from here, in bytes."""


_MOST_MBIT = 1000
"""Bandwidth in Mbit/s above which messages of this size pass too fast to be measured."""


@dataclass(frozen=True, slots=True)
class Place:
    """The machine that an address of a node leads to."""

    node: Node
    """The node."""
    name: str
    """The name of the node, or of the replica that has the address: `cloud/2`."""
    address: str
    """host:port."""
    found: Sequence[Any] = ()
    """Its socket addresses, as `socket.getaddrinfo` gives them."""
    is_here: bool = False
    """Whether they are addresses of this machine."""
    keys: Keys | None = None
    """The keys of whoever examines it."""
    error: str = ""
    """Why the name could not be resolved; empty if it could."""

    @property
    def port(self) -> int:
        """The port of the address."""
        return split_address(self.address)[1]

    def start(self, where: str) -> str:
        """Return the command that starts this replica on its machine, with the topology in the file `where`."""
        number = self.name.partition("/")[2] if len(self.node.addresses) > 1 else ""
        return f"ruyi-flow node {self.node.name}{number and f' --replica {number}'} --topology {where}"


@dataclass(frozen=True, slots=True)
class Visit:
    """What a node said when it was asked."""

    place: Place
    """The place that was asked."""
    checks: list[Check] = field(default_factory=list)
    """What was found."""
    status: NodeStatus | None = None
    """Its status, if it answered."""
    is_stopped: bool = False
    """Whether it simply does not run: it belongs on this machine, and its port is free."""


async def find(node: Node, keys: Keys | None = None) -> list[Place]:
    """Look up a node's addresses, one place for each replica. It never takes longer than a few seconds.

    Args:
        node: the node.
        keys: the keys of whoever examines it. Default: none, for a topology without keys.
    """
    looked_up = await asyncio.gather(*(_find(node, address) for address in node.addresses))
    places = [place for several in looked_up for place in several]
    return [
        replace(p, name=replica_name(node.name, number, len(places)), keys=keys) for number, p in enumerate(places, 1)
    ]


async def _find(node: Node, address: str) -> list[Place]:
    """Look up one address, which may stand for several."""
    host, port = split_address(address)
    try:
        found = await on_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), limit_s=_LIMIT_S)
    except TimeoutError:
        return [Place(node, "", address, error=f"the name server did not answer within {_LIMIT_S:g} s")]
    except OSError as error:
        return [Place(node, "", address, error=str(error.strerror or error))]
    several = each_host(address, found)
    of = {one: [f for f in found if len(several) == 1 or f[4][0] == split_address(one)[0]] for one in several}
    return [Place(node, "", one, sockets, is_here(sockets)) for one, sockets in of.items()]


async def visit(place: Place, where: str) -> Visit:
    """Ask a node whether it serves, in small steps, so that the first one that fails tells what is wrong.

    Args:
        place: where it is.
        where: the topology's file, for the sentences.
    """
    name, address, start = place.name, place.address, place.start(where)

    def failed(text: str, fix: str) -> Visit:
        return Visit(place, [Check(Group.NODES, name, Mark.FAILED, text, fix)])

    if place.error:
        host = split_address(address)[0]
        return failed(
            ended(f"The name {host!r} of node {name!r} cannot be resolved: {place.error}"),
            f"correct the node's address in {where}, or add the name to DNS or to /etc/hosts",
        )
    refused = await _connect(place)
    if refused is not None:
        if place.is_here and refused.errno == errno.ECONNREFUSED:
            if listen_problem(place.found) is not None:
                return failed(f"Node {name!r} cannot listen on {address}.", f"see why: {start}")
            text = f"Node {name!r} does not run; its port {place.port} is free."
            fix = f"start it: {start}"
            if all(ipaddress.ip_address(str(a[4][0])).is_loopback for a in place.found):
                fix += "; or start the tunnel, if the address leads into one"
            return Visit(place, [Check(Group.NODES, name, Mark.FAILED, text, fix)], is_stopped=True)
        if refused.errno == errno.ECONNREFUSED:
            return failed(
                f"Node {name!r} at {address} cannot be reached: connection refused.",
                f"start it on its machine: {start}; if it runs, compare the address in its log with {where}",
            )
        if refused.errno == errno.ETIMEDOUT:
            return failed(
                f"Node {name!r} at {address} cannot be reached: no answer within {_LIMIT_S:g} s.",
                f"open TCP port {place.port} in the firewall of its machine, and check that the machine is on",
            )
        return failed(
            f"Node {name!r} at {address} cannot be reached: {refused.strerror or refused}.",
            f"check the network between the machines, and the node's address in {where}",
        )
    peer = Peer(name, address, max_message_bytes=place.node.limits.max_message_bytes, keys=place.keys)
    try:
        serves = await peer.is_serving(timeout_s=_LIMIT_S)
        status = await peer.status(timeout_s=_LIMIT_S)
    except DeadlineExceeded:
        owner = await _owner(place)
        return failed(
            f"Node {name!r} at {address} accepts connections{owner} and does not answer within "
            f"{_LIMIT_S:g} s: it hangs, or another program listens there.",
            f"look at its log, end that process, and start the node again: {start}",
        )
    except NodeError as error:
        owner = await _owner(place)
        return failed(
            ended(f"What listens at {address}{owner} is not node {name!r}: {error}"),
            "end that program, or give the node another address",
        )
    finally:
        await peer.close()
    text = f"Node {name!r} at {address} serves {name_exits(status.exits)}"
    text += f" with ruyi-flow {status.version}." if status.version else "; its version of ruyi-flow is unknown."
    if serves and status.state == "serving":
        return Visit(place, [Check(Group.NODES, name, Mark.OK, text)], status)
    text = f"Node {name!r} at {address} is draining and takes no new sessions."
    return Visit(place, [Check(Group.NODES, name, Mark.WARNING, text, f"start it again: {start}")], status)


async def _connect(place: Place) -> OSError | None:
    """Open a TCP connection, and return the error if there is none."""

    def connect() -> OSError | None:
        error: OSError | None = None
        for family, kind, _, _, address in place.found:
            try:
                with socket.socket(family, kind) as probe:
                    probe.settimeout(_LIMIT_S)
                    probe.connect(address)
                    return None
            except OSError as refused:
                error = refused
        return error

    silent = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    try:
        error = await on_thread(connect, limit_s=_LIMIT_S)
    except TimeoutError:
        return silent
    return silent if isinstance(error, TimeoutError) else error


async def _owner(place: Place) -> str:
    """Name the process that listens on a port of this machine, where this user may know it."""
    if not place.is_here:
        return ""

    def look() -> str:
        port = place.found[0][4][1]
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f" (process {one.pid}, {psutil.Process(one.pid).name()})"
        return ""

    with suppress(psutil.Error, OSError, TimeoutError):
        return await on_thread(look, limit_s=_LIMIT_S)
    return ""


async def link_from_here(place: Place) -> Check:
    """Measure the link from this machine to a node."""
    name, most = f"here → {place.name}", place.node.limits.max_message_bytes - FRAME_BYTES
    try:
        async with asyncio.timeout(_LINK_S + 1):
            found = await measure_link(
                place.address,
                rounds=10,
                payload=min(_PAYLOAD, most),
                repeats=2,
                limit_s=_LINK_S,
                node=place.name,
                keys=place.keys,
            )
    except (NodeError, TimeoutError) as error:
        fix = f"check the network from here to the machine of node {place.name!r}: firewall, tunnel, MTU"
        return Check(Group.LINKS, name, Mark.FAILED, ended(_sentence(error)), fix)
    return Check(Group.LINKS, name, Mark.OK, f"From here to {_describe(place.name, found)}")


async def link_to_next(place: Place, target: Node, addresses: Sequence[str]) -> Check:
    """Ask a node to measure its link to the next one.

    Args:
        place: where the node is.
        target: the next node.
        addresses: what the node dials for it.
    """
    source = place.name
    name = f"{source} → {target.name}"
    peer = Peer(source, place.address, max_message_bytes=place.node.limits.max_message_bytes, keys=place.keys)
    try:
        status = await peer.status(timeout_s=_LINK_S, measure_link=True)
    except NodeError as error:
        return Check(Group.LINKS, name, Mark.FAILED, ended(_sentence(error)), f"look at the log of node {source!r}")
    finally:
        await peer.close()
    if status.link is not None:
        return Check(Group.LINKS, name, Mark.OK, f"From {source} to {_describe(target.name, status.link)}")
    if status.link_error:
        tries = " and ".join(f"nc -vz {' '.join(map(str, split_address(address)))}" for address in addresses)
        return Check(
            Group.LINKS,
            name,
            Mark.FAILED,
            ended(f"Node {source!r} does not reach node {target.name!r}: {status.link_error}"),
            f"on the machine of node {source!r}, try {tries}; "
            f"check that node {target.name!r} runs, the firewall between them, and the address in the topology there",
        )
    text = f"The link from {source} to {target.name} is unknown: the version of ruyi-flow there measures no links."
    return Check(Group.LINKS, name, Mark.WARNING, text, f"install this version on the machine of node {source!r}")


def _describe(target: str, link: LinkMeasurement) -> str:
    most = (
        f"over {_MOST_MBIT:,}" if link.up_mbit > _MOST_MBIT else f"{link.up_mbit:,.{0 if link.up_mbit >= 10 else 1}f}"
    )
    trip = f"{link.round_trip_ms:.{0 if link.round_trip_ms >= 10 else 1}f}"
    return f"{target}: a round trip takes {trip} ms, and {most} Mbit/s go to {target}."


def _sentence(error: BaseException) -> str:
    return str(error) or "the measurement took too long"


def name_exits(exits: Sequence[int]) -> str:
    """Return exits in words: exit 29; exits 5, 11."""
    return f"exit{'s' if len(exits) > 1 else ''} {', '.join(map(str, exits))}"


def reached(visits: Sequence[Visit]) -> Mapping[str, NodeStatus]:
    """Return the statuses of the nodes and replicas that answered, by their names."""
    return {v.place.name: v.status for v in visits if v.status is not None}


def links_to_measure(topology: Topology, visits: Sequence[Visit]) -> list[tuple[Place, Node]]:
    """Return each replica that answered and sends to the next node of the topology, and that node."""
    found = []
    for visit in visits:
        hop = topology.next_of(visit.place.node.name)
        if hop is not None and visit.status is not None and visit.status.next_node == hop[0].name:
            found.append((visit.place, hop[0]))
    return found
