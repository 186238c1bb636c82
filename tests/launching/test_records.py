"""What a supervisor asks of a run_dir before anything is started."""

import pytest

from ardiff.errors import UserError
from ardiff.launching.records import require_place


def test_a_place_for_a_run_is_tried_and_left_as_it_was(tmp_path):
    require_place(tmp_path / "runs" / "sky")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    require_place(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


def test_a_run_dir_that_cannot_be_is_a_mistake(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for run_dir in (file / "run", file, tmp_path / "a" / ("n" * 300)):
        with pytest.raises(UserError, match=r"--run_dir .*: cannot be written to \(.+\); choose another place"):
            require_place(run_dir)
        assert list(tmp_path.iterdir()) == [file]
