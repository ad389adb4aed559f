"""All checks of a topology, its nodes and links."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.doctor.checks import Check
from ruyi_flow.doctor.examination import examine_topology
from ruyi_flow.doctor.nodes import find
from ruyi_flow.doctor.torch_report import TorchReport

Examined = Callable[[Topology], Awaitable[dict[str, list[Check]]]]


@pytest.fixture
def examined() -> Examined:
    """Examine a topology as a machine does that has no torch, and give what was found about each node and link."""

    async def call(topology: Topology) -> dict[str, list[Check]]:
        found: dict[str, list[Check]] = {}
        found_places = await asyncio.gather(*(find(node) for node in topology.nodes))
        places = [place for several in found_places for place in several]
        report = TorchReport(is_installed=False)
        async for check in examine_topology(topology, "three.yaml", places, report, lambda step: None):
            found.setdefault(check.name, []).append(check)
        return found

    return call
