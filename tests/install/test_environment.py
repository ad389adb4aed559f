"""What the trials of an install rest on."""

import tomllib

from packaging.requirements import Requirement

from tests.install.environment import ROOT, find_pythons, lowest_versions


def test_every_dependency_has_a_lowest_version_that_is_allowed() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(pin.split("==") for pin in lowest_versions("node"))
    wanted = [Requirement(one) for one in (*table["dependencies"], *table["optional-dependencies"]["node"])]
    assert list(pins) == [one.name for one in wanted]
    assert all(one.specifier.contains(pins[one.name]) for one in wanted)


def test_this_python_is_found() -> None:
    assert find_pythons()
