"""Run trials: real nodes answer while processes and links fail.

    make robustness FAULTS=1000 SEED=1
    python -m tests.robustness --faults 1000 --seed 1
    python -m tests.robustness --seed 1 --only 17       one trial alone, as a failure names it

The exit status is 1 if an answer was lost or changed, or if something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ruyi_flow.cli.display import counting_bar, err, out, print_json
from ruyi_flow.errors import RuyiFlowError
from tests.robustness.report import failure_text, rows_of, to_json, to_table, write_page
from tests.robustness.trial import Outcome, Trial, ready_cluster, run_trial

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
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of the table.")
    parser.add_argument("--table", action="store_true", help="Write the table into docs/robustness.md.")
    given = parser.parse_args()
    numbers = given.only or list(range(given.faults))
    outcomes: list[Outcome] = []
    try:
        asyncio.run(
            _run(
                [Trial.draw(given.seed, number, given.replicas) for number in numbers],
                outcomes,
                given.replicas,
                quiet=given.json,
            )
        )
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


async def _run(trials: list[Trial], outcomes: list[Outcome], replicas: int, *, quiet: bool) -> None:
    """Run trials; what came of each is added to `outcomes`, and failures are printed as they occur."""
    with TemporaryDirectory(prefix="ruyi-flow-robustness-") as folder, counting_bar(quiet=quiet) as report:
        report("starting the nodes", 0, 0)
        async with ready_cluster(Path(folder), replicas=replicas) as cluster:
            for done, trial in enumerate(trials):
                report("faults", done, len(trials))
                outcomes.append(outcome := await run_trial(cluster, trial))
                if not outcome.identical and not quiet:
                    err.print(failure_text(outcome), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
