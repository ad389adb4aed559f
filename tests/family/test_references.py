"""`fixed` exit p is what the original code gives at p: on the checkpoints and outputs that it made itself."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ruyi_flow.local import load_family

FOLDERS = sorted(path for path in (Path(__file__).parent.parent / "data" / "references").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_exit_is_the_original_codes(folder: Path) -> None:
    family = load_family(folder, dtype="float32")
    reference = load_file(folder / "reference.safetensors")
    ids = reference["input_ids"]
    assert {int(name.split(".")[1]) for name in reference if name.startswith("logits")} == set(family.exits)
    for exit in family.exits:
        assert (family.logits(ids, exit) - reference[f"logits.{exit}"]).abs().max() < 1e-4
        greedy = family.generate(ids[:1], exit=exit, max_new_tokens=24, min_new_tokens=24)
        assert greedy.tolist() == reference[f"greedy.{exit}"].tolist()
        drafted = family.generate(ids[:1], exit=exit, max_new_tokens=24, min_new_tokens=24, draft=3)
        assert drafted.tolist() == greedy.tolist()


def test_there_are_four_folders() -> None:
    assert len(FOLDERS) == 4
