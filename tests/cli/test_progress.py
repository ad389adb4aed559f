"""Progress: what bars are given and show, plain lines in a pipe, and silence where it is asked for."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruyi_flow.calibration.trace import Trace
from ruyi_flow.cli import display
from ruyi_flow.evaluation.quality import measure_quality
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.sim.run import Simulation
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.types import Weights
from tests.conftest import Command
from tests.sim.small import scenario

Reports = list[tuple[str, int, int]]


class Stream(io.StringIO):
    """A standard error that is a terminal, or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def terminal(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool = True) -> io.StringIO:
    """Let standard error be a terminal, or a pipe, and return what is written to it."""
    written = Stream(is_terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(display.err, "is_interactive", is_terminal)
    monkeypatch.setattr(display.err, "_file", written)
    return written


def check(reports: Reports) -> None:
    """Check that each part's done never falls nor passes its total, and that a known total is reached."""
    assert reports
    for part in {what for what, _, _ in reports}:
        counts = [done for what, done, _ in reports if what == part]
        [total] = {total for what, _, total in reports if what == part}
        assert counts == sorted(counts) and 0 <= counts[0] and counts[-1] == total


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2000), st.integers(0, 900)), max_size=12))
def test_no_bar_passes_its_total_or_has_a_total_of_zero(reports: Reports) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written = terminal(patch)
        with display.counting_bar() as report:
            for what, done, total in reports:
                report(what, done, total)
    shown = re.findall(r"(-?\d[\d,]*)/(-?\d[\d,]*)", written.getvalue())
    last = {what: total for what, _, total in reports}
    assert shown or not any(last.values())
    assert not shown or any(total for _, _, total in reports)  # it may be drawn at any time
    for done, total in shown:
        assert 0 <= int(done.replace(",", "")) <= int(total.replace(",", "")) and total != "0"


@pytest.mark.parametrize(
    ("load", "total"),
    [
        ({"arrivals": {"rate": 1.0}, "duration_s": 90.5}, 91),
        ({"arrivals": {"rate": 1.0}, "duration_s": 60, "turns": {"mean": 3, "think_s": 2}}, 60),
        ({"arrivals": {"kind": "closed", "users": 3}, "duration_s": 60}, 60),
        ({"arrivals": {"rate": 1.0}, "requests": 20, "before": 2, "turns": {"mean": 3, "think_s": 2}}, 22),
        ({"arrivals": {"kind": "replay", "file": "arrivals.csv"}}, 3),
    ],
)
def test_a_simulation_reports_a_share_of_its_requests_or_of_its_time(
    tmp_path: Path, load: dict[str, Any], total: int
) -> None:
    (tmp_path / "arrivals.csv").write_text("at_s,prompt_tokens,answer_tokens\n0,5,9\n3,5,9\n7,5,9\n")
    asked = Scenario.read(scenario(tmp_path, load=load))
    reports: Reports = []
    Simulation(asked).run(lambda done, total: reports.append(("", done, total)))
    check(reports)
    assert reports[-1][2] == total


def test_simulate_names_what_it_counts(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = terminal(monkeypatch)
    load = {"arrivals": {"rate": 1.0}, "duration_s": 60}
    code, _, _ = run("simulate", str(scenario(tmp_path, load=load)), "--out", str(tmp_path / "out"))
    assert code == 0 and "seconds of simulated time" in written.getvalue() and "60/60" in written.getvalue()


def test_measuring_quality_reports_every_part(even: Path) -> None:
    reports: Reports = []
    measure_quality(Checkpoint(even), (Weights.INT8,), report=lambda *report: reports.append(report))
    assert reports[0] == ("loading the family", 0, 0)
    check(reports)


def test_a_pipe_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.01)
    written = terminal(monkeypatch, is_terminal=False)
    with display.counting_bar() as report:
        report("answered prompts", 30, 2000)
        while "\n" not in written.getvalue():
            time.sleep(0.01)
    line = written.getvalue().splitlines()[0]
    assert re.fullmatch(r"answered prompts: 30/2,000 \(\d+ s\)", line)
    with display.progress_bar("loading the family"):
        while "loading the family (" not in written.getvalue():
            time.sleep(0.01)


def test_a_short_command_prints_no_line_in_a_pipe(run: Command, tmp_path: Path) -> None:
    code, _, err = run("simulate", str(scenario(tmp_path)), "--out", str(tmp_path / "out"))
    assert code == 0 and err.count("\n") == 1 and "report.html" in err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.001)
    written = terminal(monkeypatch, is_terminal=is_terminal)
    with display.counting_bar(quiet=True) as report, display.training_bar("training", quiet=True) as trained:
        report("a part", 1, 2)
        trained(1, 2, 3.0)
        time.sleep(0.02)
    assert written.getvalue() == ""


def test_json_shows_no_progress(run: Command, spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, prompts, trace = terminal(monkeypatch), tmp_path / "p.jsonl", tmp_path / "t.msgpack"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(4)))
    call = ("trace", str(prompts), "--family", str(spoken), "--max-new-tokens", "4", "--out", str(trace))
    assert run(*call, "--json")[0] == 0 and written.getvalue() == ""
    trace.unlink()
    assert run(*call)[0] == 0 and "answered prompts" in written.getvalue() and "4/4" in written.getvalue()
    assert len(Trace.load(trace).records) == 4
