"""Run trials: real nodes answer while processes and links fail.

    make robustness FAULTS=1000 SEED=1 JOBS=2
    python -m tests.robustness --faults 1000 --seed 1
    python -m tests.robustness --seed 1 --only 17       one trial alone, as a failure names it

The exit status is 1 if an answer was lost or changed, or if something was left behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from ruyi_flow.cli.display import counting_bar, err, out, print_json
from ruyi_flow.errors import RuyiFlowError
from tests.robustness.report import failure_text, rows_of, to_json, to_table, write_page
from tests.robustness.traffic import DEMO, TINY
from tests.robustness.trial import Outcome, Trial, ignore_ctrl_c, run_trials

_PART = 25
"""Trials that run on the same nodes."""

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=_count, default=100, help="Number of trials, each with a fault. Default: 100.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the traffic and of the faults. Default: 1.")
    parser.add_argument("--only", type=int, action="append", metavar="N", help="Run only the trial of this number.")
    parser.add_argument("--replicas", type=int, choices=(1, 2), default=1, help="Replicas of each node. Default: 1.")
    parser.add_argument("--demo", action="store_true", help="Use the demo family. Default: a tiny one.")
    parser.add_argument("--keys", action="store_true", help="Encrypt every connection. Default: none.")
    parser.add_argument(
        "--jobs", type=_count, default=1, help="Trials at the same time, each on nodes of its own. Default: 1."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of the table.")
    parser.add_argument("--table", action="store_true", help="Write the table into docs/robustness.md.")
    given = parser.parse_args()
    numbers = given.only or list(range(given.faults))
    outcomes: list[Outcome] = []
    try:
        family = DEMO if given.demo else TINY
        trials = [Trial.draw(given.seed, number, given.replicas, family, keys=given.keys) for number in numbers]
        for outcome in _run_all(trials, given.jobs, quiet=given.json):
            outcomes.append(outcome)
            if not outcome.identical and not given.json:
                err.print(failure_text(outcome), markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        err.print("interrupted")
        return 130
    except RuyiFlowError as error:
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    rows = rows_of(outcomes)
    if given.json:
        print_json(to_json(outcomes, given.seed))
    else:
        out.print(to_table(rows))
    if given.table:
        write_page(PAGE, rows, given.seed)
    return int(not all(outcome.identical for outcome in outcomes))


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    return count


def _run_all(trials: Sequence[Trial], jobs: int, *, quiet: bool) -> Iterator[Outcome]:
    """Run trials in several processes, and yield what came of each."""
    parts = [trials[i : i + _PART] for i in range(0, len(trials), _PART)]
    with (
        counting_bar(quiet=quiet) as report,
        ProcessPoolExecutor(jobs, get_context("spawn"), initializer=ignore_ctrl_c) as pool,
    ):
        done = 0
        report("faults", done, len(trials))
        try:
            for outcomes in pool.map(run_trials, parts):
                done += len(outcomes)
                report("faults", done, len(trials))
                yield from outcomes
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


if __name__ == "__main__":
    sys.exit(main())
