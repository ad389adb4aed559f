"""Deployments for budgets: cuts and bytes come from the topology, times from its running nodes."""

from pathlib import Path

import pytest

from ruyi_flow.errors import NodeUnavailable
from ruyi_flow.evaluation.deployment import deployment_of, measure_deployment
from ruyi_flow.testing import cluster, cut_topology


async def test_running_nodes_are_measured(spoken: Path) -> None:
    topology = cut_topology(spoken, [[2], [4], [6]], encoding="int8")
    plain = deployment_of(topology, 32)
    assert plain.last_exits == (2, 4, 6) and plain.position_bytes == (32 + 4 + 16,) * 2 and plain.step_s == ()
    async with cluster(topology) as nodes:
        found = await measure_deployment(nodes.topology, 32, rounds=2)
        assert found.last_exits == plain.last_exits and found.position_bytes == plain.position_bytes
        assert len(found.step_s) == 3 and len(found.hop_s) == 2
        assert all(seconds > 0 for seconds in (*found.step_s, *found.hop_s))
        await nodes.settle()
    with pytest.raises(NodeUnavailable):
        await measure_deployment(nodes.topology, 32, rounds=1)
