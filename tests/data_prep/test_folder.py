"""A folder that is filled unit by unit belongs to one specification from its first moment on."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.building import folder
from data_prep.building.folder import opened
from rxt_dist.errors import DataError

SPEC = {"kind": "single", "seq_len": 64}


class Killed(BaseException):
    """As a kill, no handler of the program's stops it."""


@pytest.mark.parametrize("after", range(4))
def test_a_kill_at_any_moment_of_the_setting_up_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed before the first, second, ... thing that is written."""
    root, done = tmp_path / "out", 0

    def counted(step):
        def run(*arguments, **options):
            nonlocal done
            if done == after:
                raise Killed
            done += 1
            return step(*arguments, **options)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_atomic", counted(folder.write_atomic))
        patched.setattr(folder, "write_json_atomic", counted(folder.write_json_atomic))
        patched.setattr(Path, "mkdir", counted(Path.mkdir))
        with pytest.raises(Killed), opened(root, SPEC, "{}"):
            pytest.fail("nothing was killed")
    with opened(root, SPEC, "{}") as held:
        assert held.finished("u0") is None
    assert (root / "units").is_dir()


def test_somebody_else_s_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    with pytest.raises(DataError, match=r"is not a dataset \(it holds \['units'\]\)"), opened(tmp_path, SPEC, "{}"):
        pass
    with opened(tmp_path / "new", SPEC, "{}"):
        pass
    with (
        pytest.raises(DataError, match="seq_len was 64 and is now 32"),
        opened(tmp_path / "new", SPEC | {"seq_len": 32}, "{}"),
    ):
        pass
