"""A file of one kind in the place of another is one line that names both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.training.recipe import Recipe
from tests.sim.small import scenario

ROOT = Path(__file__).parents[2]
READERS: dict[str, Callable[[Path], object]] = {
    "topology": Topology.load,
    "policy": PolicyFile.load,
    "scenario": Scenario.read,
    "recipe": Recipe.load,
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A valid file of each kind."""
    topology, policy, recipe = (tmp_path / f"{kind}.yaml" for kind in ("topology", "policy", "recipe"))
    topology.write_text(yaml.safe_dump({"family": "fam", "nodes": [{"name": "whole", "exits": [2, 4]}]}))
    curve = {"temperature": 1.0, "scores": [0.1], "chances": [0.5]}
    asked = {"family": "0" * 16, "score": "margin", "thresholds": {2: 0.9}, "curves": {2: curve}}
    policy.write_text(yaml.safe_dump(asked))
    recipe.write_text(yaml.safe_dump({"family": "fam", "out": "runs", "steps": 3}))
    return {"topology": topology, "policy": policy, "scenario": scenario(tmp_path), "recipe": recipe}


@pytest.mark.parametrize("asked", READERS)
@pytest.mark.parametrize("given", READERS)
def test_a_file_of_another_kind_is_named(files: dict[str, Path], asked: str, given: str) -> None:
    if asked == given:
        READERS[asked](files[given])
        return
    with pytest.raises(ConfigError) as error:
        READERS[asked](files[given])
    assert str(error.value) == f"{files[given]}: this is a {given} file, not a {asked} file"


def test_every_file_of_configs_is_recognized() -> None:
    for file in (ROOT / "configs").rglob("*.yaml"):
        right = {"sim": "scenario", "policies": "policy"}.get(file.parent.name, "topology")
        for kind, reader in READERS.items():
            if kind != right:
                with pytest.raises(ConfigError, match=f"this is a {right} file, not a {kind} file"):
                    reader(file)
