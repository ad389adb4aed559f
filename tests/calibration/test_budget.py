"""Costs of thresholds in a deployment: escalated share, bytes for each position once, times of the nodes."""

from dataclasses import replace

import numpy as np
import pytest

from ruyi_flow.calibration.budget import Budget, Deployment, DeploymentCost, deployment_cost
from ruyi_flow.calibration.trace import Record, Trace
from ruyi_flow.errors import ConfigError
from tests.calibration.test_thresholds import made


def test_links_carry_each_position_once_up_to_the_last_question() -> None:
    trace = made(3, 1)
    records: list[Record] = []
    for record, n in zip(trace.records, (3, 2, 2), strict=True):
        exits = {p: replace(e, tokens=e.tokens[:n], scores=e.scores[:n]) for p, e in record.exits.items()}
        records.append(replace(record, answer=record.answer[:n], exits=exits))
    trace = Trace.from_records(trace.header, records)
    at = np.array([2, 4, 2, 6, 2, 2, 2])
    found = deployment_cost(at, trace, Deployment((2, 4, 6), (10, 20), (0.01, 0.02, 0.04), (0.1, 0.2)))
    assert found.escalation == pytest.approx(2 / 7)
    # A token's question carries the position before it: the first answer sends its prompt's five and one of its own up
    # the first link, the second answer its prompt's five up both links.
    assert found.bytes_per_token == pytest.approx((10 * (5 + 1) + 10 * 5 + 20 * 5) / 7)
    assert found.latency_s == pytest.approx(0.01 + 2 / 7 * (0.1 + 0.02) + 1 / 7 * (0.2 + 0.04))
    assert deployment_cost(at, trace, Deployment((2, 6), (10,))).latency_s is None


def test_a_budget_allows_only_what_is_known_to_be_within_it() -> None:
    assert Budget(escalation=0.5).allows(DeploymentCost(0.5, 9e9, None))
    assert not Budget(escalation=0.5).allows(DeploymentCost(0.51, 0, None))
    assert not Budget(latency_s=1.0).allows(DeploymentCost(0.0, 0.0, None))
    with pytest.raises(ConfigError, match="must be above 0"):
        Budget(latency_s=-1.0)
