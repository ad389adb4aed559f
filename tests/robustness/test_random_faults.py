"""Random faults, as `make robustness` draws them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.robustness.report import failure_text
from tests.robustness.traffic import TINY
from tests.robustness.trial import Trial, ready_cluster, run_trial

FAULTS = int(os.environ.get("RUYI_FLOW_FAULTS", "60"))
"""Number of trials, of which a quarter have replicas of each node, and keys."""


@pytest.mark.robustness
@pytest.mark.parametrize(("replicas", "keys", "share"), [(1, False, 0.75), (2, True, 0.25)])
@pytest.mark.timeout(600 + 10 * FAULTS)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
async def test_no_fault_changes_or_loses_an_answer_or_leaves_anything_behind(
    tmp_path: Path, replicas: int, keys: bool, share: float
) -> None:
    failures: list[str] = []
    exits, met = Counter[int](), 0
    async with ready_cluster(tmp_path, replicas=replicas, keys=keys) as cluster:
        for number in range(int(share * FAULTS)):
            outcome = await run_trial(cluster, Trial.draw(replicas, number, replicas, keys=keys))
            met += bool(outcome.recoveries)
            exits += outcome.exits
            if not outcome.identical:
                failures.append(failure_text(outcome))
    assert not failures, "\n".join(failures)
    assert met > share * FAULTS / 5, "too few faults met an answer"
    assert set(exits) == set(TINY.exits)
