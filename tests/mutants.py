"""Mutation testing: change the pure core in every small way, one change at a time, and count what the tests notice.

`make mutants` runs all of it. `.venv/bin/mutmut show NAME` shows a change that no test noticed.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

MUTMUT = Path(sys.executable).parent / "mutmut"
GOAL = 0.9
"""The share of changes that the tests must notice."""
NOTICED = {"killed", "timeout"}


def main() -> int:
    subprocess.run([MUTMUT, "run", *sys.argv[1:]], check=True)
    done = subprocess.run([MUTMUT, "results", "--all", "true"], check=True, capture_output=True, text=True)
    found = [line.strip().rpartition(": ")[::2] for line in done.stdout.splitlines()]
    all_of, noticed = Counter[str](), Counter[str]()
    console = Console()
    for name, status in found:
        module = name.rpartition(".")[0]
        all_of[module] += 1
        noticed[module] += status in NOTICED
        if status not in NOTICED:
            console.print(f"{status}: {name}", highlight=False)
    table = Table("module", "changes", "noticed", "share")
    for module in sorted(all_of):
        table.add_row(module, str(all_of[module]), str(noticed[module]), f"{noticed[module] / all_of[module]:.1%}")
    share = noticed.total() / all_of.total()
    table.add_section()
    table.add_row("all", str(all_of.total()), str(noticed.total()), f"{share:.1%}")
    console.print(table)
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
