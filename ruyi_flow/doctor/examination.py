"""All checks in order: this machine, the topology, its nodes, and the links."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from ruyi_flow.config.examples import shortest
from ruyi_flow.config.topology import Node, Topology
from ruyi_flow.doctor.agreement import disagreements
from ruyi_flow.doctor.checks import Check, Group, Mark, ended
from ruyi_flow.doctor.machine import machine_checks
from ruyi_flow.doctor.nodes import (
    Place,
    Visit,
    find,
    link_from_here,
    link_to_next,
    links_to_measure,
    name_exits,
    reached,
    visit,
)
from ruyi_flow.doctor.torch_report import Folder, TorchReport, ask_torch
from ruyi_flow.errors import ConfigError
from ruyi_flow.family.demo_files import DEMO

__all__ = ["examine", "examine_topology"]

_LITTLE_DISK = 1e9
"""Free disk space in bytes below which hardly a family can be added."""


async def examine(
    path: Path | None, announce: Callable[[str], None] = lambda what: None
) -> AsyncGenerator[Check, None]:
    """Make all checks, one after the other, and yield what each of them found.

    Args:
        path: the topology file. None: only this machine is checked.
        announce: called with a few words before each step that may take long.
    """
    for check in machine_checks():
        yield check
    topology, error = None, ""
    if path is not None:
        try:
            topology = Topology.load(path)
        except ConfigError as refused:
            error = str(refused)
    where = "" if path is None else shortest(path, "topology")
    announce("looking up the nodes' addresses")
    nodes = () if topology is None else topology.nodes
    keys = None if topology is None else topology.user_keys
    places = [place for found in await asyncio.gather(*(find(node, keys) for node in nodes)) for place in found]
    announce("loading torch, and looking at shards and families")
    report = await ask_torch(() if topology is None else _folders(topology, places))
    for check in _torch_checks(report):
        yield check
    if error:
        fix = "correct the file; docs/reference/topology.md describes its keys"
        yield Check(Group.TOPOLOGY, "file", Mark.FAILED, error, fix)
    if topology is not None:
        async for check in examine_topology(topology, where, places, report, announce):
            yield check


async def examine_topology(
    topology: Topology, where: str, places: Sequence[Place], report: TorchReport, announce: Callable[[str], None]
) -> AsyncGenerator[Check, None]:
    """Make the checks of a topology, its nodes and links.

    Args:
        topology: the topology.
        where: its file, for the sentences.
        places: where the addresses of its nodes lead.
        report: what torch said of this machine, and of the topology's folders.
        announce: called with a few words before each step that may take long.
    """
    announce("asking the nodes")
    visits = await asyncio.gather(*(visit(place, where) for place in places))
    for check in _topology_checks(topology, where, report, visits):
        yield check
    for check in await asyncio.to_thread(_key_checks, topology):
        yield check
    for check in _node_checks(topology, where, report, visits):
        yield check
    for one in visits:  # one after the other: two measurements at once would share a link
        if one.status is not None:
            announce(f"measuring the link from here to {one.place.name}")
            yield await link_from_here(one.place)
    for place, target in links_to_measure(topology, visits):
        announce(f"{place.name} measures its link to {target.name}")
        yield await link_to_next(place, target, topology.next_addresses(place.node.name))


def _torch_checks(report: TorchReport) -> list[Check]:
    def check(name: str, mark: Mark, text: str, fix: str = "") -> Check:
        return Check(Group.MACHINE, name, mark, text, fix)

    if not report.is_installed:
        return []  # the check of the packages has said so
    if report.error:
        text = ended(f"torch cannot be loaded: {report.error}")
        return [check("torch", Mark.FAILED, text, "install it again: pip install --force-reinstall torch")]
    onednn = " with oneDNN" if report.onednn else " without oneDNN"
    bfloat16 = "" if report.bfloat16 else ", without products in bfloat16 on this processor"
    build = "the CPU" if report.build == "CPU" else report.build
    checks = [check("torch", Mark.OK, f"torch {report.version} is built for {build}{onednn}{bfloat16}.")]
    for one in report.accelerators:
        memory = f", {one.total_bytes / 1e9:.0f} GB" if one.total_bytes else ""
        checks.append(check("gpu", Mark.OK, f"{one.device}: {one.name}{memory}."))
    if not report.accelerators and report.build != "CPU":
        fix = "check the driver (nvidia-smi, rocm-smi), or install the CPU build of torch, which is smaller"
        checks.append(check("gpu", Mark.WARNING, f"torch is built for {report.build}, but no GPU can be used.", fix))
    if report.build == "CPU" and Path("/dev/nvidia0").exists():
        text = "This machine has an NVIDIA GPU, but the installed torch is built for the CPU only."
        checks.append(check("gpu", Mark.WARNING, text, "install torch for CUDA; docs/install.md shows how"))
    families = ", ".join(report.families) or "no families yet"
    text = f"The store {report.store} has {families}; {report.free_bytes / 1e9:.0f} GB of disk are free."
    if report.free_bytes < _LITTLE_DISK:
        fix = "free some disk space, or let RUYI_FLOW_HOME name a folder on another disk"
        checks.append(check("store", Mark.WARNING, text, fix))
    else:
        checks.append(check("store", Mark.OK, text))
    return checks


def _runs_here(topology: Topology, places: Sequence[Place]) -> list[Node]:
    """Return the nodes that belong on this machine; a node without an address runs in its clients."""
    here = {place.node.name for place in places if place.is_here}
    return [node for node in topology.nodes if node.address is None or node.name in here]


def _folders(topology: Topology, places: Sequence[Place]) -> tuple[Folder, ...]:
    """Return the shards that must be on this machine or are, and the family if a node reads it here."""
    here = _runs_here(topology, places)
    shards = [
        Folder(node.name, str(node.shard))
        for node in topology.nodes
        if node.shard is not None and (node in here or (node.shard / "config.json").exists())
    ]
    reads_family = any(node.shard is None for node in here)
    return (*shards, *([Folder("", topology.family, topology.exits)] if reads_family else []))


def _topology_checks(topology: Topology, where: str, report: TorchReport, visits: Sequence[Visit]) -> list[Check]:
    """Compare a topology with what is on this machine: shards, families, devices, memory."""

    def failed(name: str, text: str, fix: str) -> Check:
        return Check(Group.TOPOLOGY, name, Mark.FAILED, text, fix)

    names = ", ".join(node.name for node in topology.nodes)
    checks = [Check(Group.TOPOLOGY, "file", Mark.OK, f"{where} describes {names} of family {topology.family}.")]
    here = _runs_here(topology, [v.place for v in visits])
    for found in report.folders:
        what = f"The shard of node {found.node!r}" if found.node else "The family"
        if not found.node and topology.family == DEMO and DEMO not in report.families:
            text = f"The demo family {DEMO} is not in the store yet."
            checks.append(Check(Group.TOPOLOGY, "family", Mark.WARNING, text, f"fetch it: ruyi-flow pull {DEMO}"))
            continue
        if found.error:
            fix = (
                "copy the shard to this machine, or correct shard in the topology (paths are relative to the file)"
                if found.node
                else _family_fix(topology.family, where)
            )
            problem = found.error.partition("; fetch it: ")[0]
            checks.append(failed(found.node or "family", ended(f"{what} cannot be read: {problem}"), fix))
            continue
        try:
            topology.check_family(found.family_exits, where=where)
        except ConfigError as error:
            checks.append(failed(found.node or "family", str(error), f"correct exits in {where}"))
            continue
        gives = topology.node(found.node).exits if found.node else found.family_exits
        if found.exits not in (found.family_exits, gives):
            text = f"{what} was cut for exits {list(found.exits)}; {where} gives the node {list(gives)}."
            fix = f"correct exits in {where}, or cut the shard again: ruyi-flow shard --topology {where}"
            checks.append(failed(found.node, text, fix))
            continue
        text = f"{what} in {found.folder} fits: {found.bytes / 1e6:.0f} MB with {name_exits(found.exits)}."
        checks.append(Check(Group.TOPOLOGY, found.node or "family", Mark.OK, text))
    prints = {found.fingerprint: found.folder for found in report.folders if found.fingerprint}
    if len(prints) > 1:
        text = (
            f"Folders on this machine are of different families: {', '.join(f'{f} ({p})' for p, f in prints.items())}."
        )
        checks.append(failed("family", text, "cut the family once with ruyi-flow shard, and copy those shards"))
    if report.version:
        usable = {
            "cpu",
            *(a.device for a in report.accelerators),
            *(a.device.split(":")[0] for a in report.accelerators),
        }
        for node in here:
            if node.device not in usable:
                text = f"Node {node.name!r} has device: {node.device}, which torch {report.version} cannot use here."
                checks.append(
                    failed(node.name, text, f"use one of {', '.join(sorted(usable))}, or install another torch")
                )
    return checks + _memory(here, report, visits)


def _family_fix(family: str, where: str) -> str:
    """Return what to do when a family cannot be read."""
    if family == DEMO:
        return f"fetch it again: ruyi-flow pull {DEMO} --force"
    fetch = "" if "/" in family else ", or fetch it: ruyi-flow pull SOURCE --name NAME"
    return f"correct family in {where}{fetch}"


def _memory(here: Sequence[Node], report: TorchReport, visits: Sequence[Visit]) -> list[Check]:
    """Compare the free memory with the weights of the nodes that belong on this machine and do not run yet."""
    stopped = [v.place for v in visits if v.is_stopped and v.place.node.device == "cpu"]
    clients = [node for node in here if node.address is None and node.device == "cpu"]
    waiting = [(node.name, node) for node in clients] + [(place.name, place.node) for place in stopped]
    sizes = {found.node: found.bytes for found in report.folders}
    needed = sum(sizes.get(node.name, 0) for _, node in waiting if node.shard is not None)
    of_family = Counter(node.name for _, node in waiting if node.shard is None)
    needed += max(of_family.values(), default=0) * sizes.get("", 0)  # each node has a part, and each replica its own
    if not needed:
        return []
    free = psutil.virtual_memory().available
    text = (
        f"The weights of {', '.join(name for name, _ in waiting)} take {needed / 1e9:.2f} GB at most, and "
        f"{free / 1e9:.1f} GB of memory are free here."
    )
    if needed < free:
        return [Check(Group.TOPOLOGY, "memory", Mark.OK, text)]
    fix = "run some of the nodes on another machine, or set weights: int8 or int4 (docs/guides/weights.md)"
    return [Check(Group.TOPOLOGY, "memory", Mark.WARNING, text, fix)]


def _key_checks(topology: Topology) -> list[Check]:
    """Return what is wrong with the keys that are on this machine; one line if nothing is."""
    if topology.security is None:
        return []
    if find_spec("cryptography") is None:
        text = "The keys cannot be checked without the package cryptography."
        return [Check(Group.TOPOLOGY, "keys", Mark.WARNING, text, 'install it: pip install "ruyi-flow[keys]"')]
    from ruyi_flow.keys import check as keys

    found = [one for one in keys.check(topology) if one.state != keys.State.ELSEWHERE]
    checks = []
    for one in found:
        if one.state != keys.State.OK:
            mark = Mark.FAILED if one.state == keys.State.WRONG else Mark.WARNING
            what, _, fix = one.text.partition("; ")
            checks.append(Check(Group.TOPOLOGY, "keys", mark, ended(f"{one.owner}: {what}"), fix))
    if checks:
        return checks
    first = min(one.ends for one in found if one.ends is not None)
    text = f"The keys on this machine, of {', '.join(one.owner for one in found)}, are right until {first:%Y-%m-%d}."
    return [Check(Group.TOPOLOGY, "keys", Mark.OK, text)]


def _node_checks(topology: Topology, where: str, report: TorchReport, visits: Sequence[Visit]) -> list[Check]:
    """Return what was found at the nodes, and what they do not agree on."""
    if visits and all(v.is_stopped for v in visits):
        text = f"No node runs yet; {', '.join(v.place.address for v in visits)} are free."
        return [Check(Group.NODES, "all", Mark.WARNING, text, f"start them: ruyi-flow up {where}")]
    prints = {found.fingerprint for found in report.folders if found.fingerprint}
    fingerprint = prints.pop() if len(prints) == 1 else ""
    found = disagreements(topology, reached(visits), where=where, fingerprint=fingerprint)
    checks = []
    for one in visits:
        checks += one.checks
        checks += [
            Check(Group.NODES, d.node, Mark.FAILED if d.is_fatal else Mark.WARNING, d.text, d.fix)
            for d in found
            if d.node == one.place.name
        ]
    return checks
