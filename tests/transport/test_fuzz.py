"""Hostile callers beside honest ones: no crash, no leak, no trace in a log, and the honest ones get their answers."""

from pathlib import Path

import pytest

from tests.transport.fuzz import fuzz


@pytest.mark.timeout(300)
async def test_thousands_of_mutated_messages_harm_nobody(tiny: Path) -> None:
    report = await fuzz(tiny, seed=20, messages=2000)
    assert not report.faults, "\n".join(report.faults)
    assert report.honest > 20 and report.outcomes["verdict"] > 40
