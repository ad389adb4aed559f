"""An environment of its own outside of the checkout, into which wheels are installed and where they are tried."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

__all__ = ["Environment", "build_wheels", "find_pythons", "link_torch", "lowest_versions"]

ROOT = Path(__file__).parent.parent.parent


def build_wheels(folder: Path) -> list[Path]:
    """Build the package's wheel and that of the demo family's branches."""
    projects = [str(ROOT), str(ROOT / "ruyi_flow" / "family" / "demo")]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *projects]
    subprocess.run(command, check=True)
    wheels = sorted(folder.glob("*.whl"))
    assert len(wheels) == 2, wheels
    return wheels


def find_pythons() -> list[Path]:
    """Return an interpreter of each supported version that this machine has, the oldest first."""
    low, high = map(int, re.findall(r"3\.(\d+)", str(project()["requires-python"])))
    found = []
    for minor in range(low, high):
        kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python3.{minor}"))
        for one in filter(None, [shutil.which(f"python3.{minor}"), *map(str, kept)]):
            if subprocess.run([one, "-c", "import ensurepip, ssl"], capture_output=True).returncode == 0:
                found.append(Path(one))
                break
    return found


def project() -> dict[str, Any]:
    """Return the project's table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def lowest_versions(*extras: str) -> list[str]:
    """Return constraints that pin each dependency to the lowest version that pyproject.toml allows.

    Args:
        extras: extras whose dependencies to pin as well.
    """
    table = project()
    dependencies: list[str] = list(table["dependencies"])
    for extra in extras:
        dependencies += table["optional-dependencies"][extra]
    pins = []
    for requirement in map(Requirement, dependencies):
        if requirement.name != "ruyi-flow":
            [lowest] = [one.version for one in requirement.specifier if one.operator == ">="]
            pins.append(f"{requirement.name}=={lowest}")
    return pins


def link_torch(folder: Path) -> None:
    """Link the torch of this Python and the packages that it needs in a folder, and nothing else of this Python."""
    folder.mkdir()
    names, done = ["torch"], set[str]()
    while names:
        name = names.pop()
        if name in done:
            continue
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of another platform, or of an extra
            continue
        names += [
            one.name
            for one in map(Requirement, found.requires or ())
            if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(found.locate_file(top))))


class Environment:
    """A virtual environment, an empty folder to run commands in, and an empty store of families.

    Args:
        folder: where to make them.
        python: the interpreter.
        wheels: folder of the wheels to try.
    """

    def __init__(self, folder: Path, python: Path, wheels: Path) -> None:
        self.folder, self.here = folder, folder / "empty"
        self.bin = folder / "venv" / "bin"
        self.here.mkdir(parents=True)
        links = " ".join(filter(None, [str(wheels), os.environ.get("PIP_FIND_LINKS")]))
        self.variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))
        }
        self.variables |= {"RUYI_FLOW_HOME": str(folder / "home"), "PIP_FIND_LINKS": links, "HOME": str(folder)}
        self.variables |= {"PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))}
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)

    def add_folder(self, folder: Path) -> None:
        """Let the environment import what is in a folder, after its own packages."""
        (self._packages() / "linked.pth").write_text(f"{folder}\n")

    def install(self, requirement: str, pins: Sequence[str] = ()) -> float:
        """Install a requirement with pip, from wheels only; return the seconds it took."""
        constraints = self.folder / "pins.txt"
        constraints.write_text("\n".join(pins))
        began = time.monotonic()
        options = ["--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--constraint", str(constraints)]
        self.run("python", "-m", "pip", "install", *options, requirement)
        return time.monotonic() - began

    def run(self, program: str, *arguments: str, status: int = 0, timeout_s: float = 900) -> str:
        """Run a program of the environment in the empty folder; return standard output, then standard error.

        Raises:
            AssertionError: it ended with another status.
        """
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.here,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status, f"{program} {' '.join(arguments)} ended with {done.returncode}:\n{said}"
        return said

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a program of the environment in the empty folder, to read its standard error."""
        return subprocess.Popen(
            [self.bin / program, *arguments], cwd=self.here, env=self.variables, stderr=subprocess.PIPE, text=True
        )

    def seconds(self, program: str, *arguments: str, runs: int = 10) -> tuple[float, float]:
        """Return the shortest and the median time of several runs of a program."""
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            self.run(program, *arguments)
            times.append(time.perf_counter() - began)
        return min(times), statistics.median(times)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each installed distribution's files, with bytecode but without pip; the largest first."""
        found = {}
        for info in self._packages().glob("*.dist-info"):
            one = Distribution.at(info)
            if one.name not in ("pip", "setuptools"):
                files = [Path(str(file.locate())) for file in one.files or ()]
                found[one.name] = sum(file.stat().st_size for file in files if file.exists())
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _packages(self) -> Path:
        [folder] = (self.folder / "venv" / "lib").glob("python3.*/site-packages")
        return folder
