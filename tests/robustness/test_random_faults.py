"""A hundred random faults, as `make robustness` draws them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.robustness.report import failure_text
from tests.robustness.traffic import EXITS
from tests.robustness.trial import Trial, ready_cluster, run_trial

FAULTS = int(os.environ.get("RUYI_FLOW_FAULTS", "100"))
"""Number of trials."""


@pytest.mark.robustness
@pytest.mark.timeout(600 + 10 * FAULTS)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
async def test_no_fault_changes_or_loses_an_answer_or_leaves_anything_behind(tmp_path: Path) -> None:
    failures: list[str] = []
    exits, met = Counter[int](), 0
    async with ready_cluster(tmp_path) as cluster:
        for number in range(FAULTS):
            outcome = await run_trial(cluster, Trial.draw(1, number))
            met += bool(outcome.recoveries)
            exits += outcome.exits
            if not outcome.identical:
                failures.append(failure_text(outcome))
    assert not failures, "\n".join(failures)
    assert met > FAULTS // 4, "too few faults met an answer"
    assert set(exits) == set(EXITS)
