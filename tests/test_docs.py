"""What the docs show can be used as it stands."""

import re
from pathlib import Path

from ruyi_flow.config.topology import Topology
from ruyi_flow.training.recipe import Recipe

GUIDE = Path(__file__).parent.parent / "docs/training.md"


def test_the_guides_recipe_and_topology_can_be_read(tmp_path: Path) -> None:
    for text in re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        (tmp_path / text.split()[1]).write_text(text)  # each begins with its name, as a comment
    recipe, topology = Recipe.load(tmp_path / "recipe.yaml"), Topology.load(tmp_path / "topology.yaml")
    exits = [p for node in topology.nodes for p in node.exits]
    assert set(recipe.branch_layers) < set(exits) and recipe.self_distill is not None
