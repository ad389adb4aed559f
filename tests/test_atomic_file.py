"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from ruyi_flow.atomic_file import atomic_file


def test_a_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    with atomic_file(path) as new:
        assert new.suffix == ".png" and new.parent == path.parent
        new.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_the_old_file_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "table.md"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as new:
        new.write_text("half")
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
