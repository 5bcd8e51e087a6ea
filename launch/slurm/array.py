"""A dataset by an array of jobs, and one job after it that completes and verifies it.

Files stand beside the dataset, in PATH.job/: the code of then, and for each try data.yaml (resolved), the scripts, what
the jobs have printed.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import client
from launch.slurm.freeze import freeze_code
from launch.slurm.options import ArrayOptions
from launch.slurm.script import CLOSE, SUBMIT, array_script, closing_script
from launch.slurm.submit import cancel_all, check_script, check_where_possible, place_of, require_slurm
from rxt_dist.config.load import resolved_yaml
from rxt_dist.config.run import DataConfig
from rxt_dist.errors import ConfigError
from rxt_dist.files import access_errors, require_folder, write_atomic

_NUMBER = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class ArrayWish:
    """What a person wants to have built. file: the data file; config: what it holds, with overrides applied."""

    file: Path
    config: DataConfig
    options: ArrayOptions

    @property
    def folder(self) -> Path:
        """Where its jobs' files stand."""
        path = self.config.path.absolute()
        return path.with_name(f"{path.name}.job")

    @property
    def name(self) -> str:
        """Of the jobs."""
        path = self.config.path.absolute()
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", path.name)
        return f"data-{plain}-{zlib.crc32(str(path).encode()):08x}"[-120:]


def render_array(wish: ArrayWish, warn: Callable[[str], None]) -> str:
    """Both scripts, as a submission would write them; nothing is written.

    Args:
        warn: told that the cluster could not be asked, where it does not answer.

    Raises:
        UserError: whatever refuses them.
    """
    _require_build(wish)
    scripts = _scripts(wish, wish.folder / f"{_number(wish):04d}", wish.folder / "code-...")
    for text in scripts:
        check_where_possible(text, wish.options, 1, 0, warn)
    return "\n".join(scripts)


def submit_array(wish: ArrayWish) -> Iterator[str]:
    """Submit the array and the job that closes it; sentences about what was submitted.

    With duplicates to be found, every unit is surveyed before any is built: then there are two arrays.

    Raises:
        UserError: whatever refuses it.
    """
    _require_build(wish)
    require_slurm()
    require_folder(wish.folder)
    wish.folder.mkdir(parents=True, exist_ok=True)
    target = wish.folder / f"{_number(wish):04d}"
    with access_errors(wish.folder):
        array, closing = _scripts(wish, target, freeze_code(wish.folder))
        for text in (array, closing):
            check_script(text, wish.options, nodes=1, gpus=0)
        target.mkdir()
        try:
            write_atomic(target / "data.yaml", resolved_yaml(wish.config))
            write_atomic(target / SUBMIT, array)
            write_atomic(target / CLOSE, closing)
            jobs = _hand_over(target, _finds_duplicates(wish.config))
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    yield f"array {jobs[0]} of {wish.options.tasks} jobs"
    for job in jobs[1:-1]:
        yield f"array {job}, which builds when all units are surveyed for duplicates"
    yield f"job {jobs[-1]}, which completes and verifies {wish.config.path}"
    yield f"  output: {target}/slurm-*.out"


def _hand_over(target: Path, with_survey: bool) -> list[str]:
    """The ids of the array, of the one after it where all units are surveyed first, and of the job that closes them.
    Where one is refused, none stays."""
    jobs = [client.submit(str(target / SUBMIT))]
    try:
        # After any end of theirs: what a killed one has left, the next completes.
        for script in [*([SUBMIT] if with_survey else []), CLOSE]:
            jobs.append(client.submit(str(target / script), f"--dependency=afterany:{jobs[-1]}"))
        write_atomic(target / "jobs", "\n".join(jobs) + "\n")
    except BaseException:
        cancel_all(jobs)
        raise
    return jobs


def _require_build(wish: ArrayWish) -> None:
    missing = "build" if wish.config.build is None else "seq_len" if wish.config.seq_len is None else None
    if missing is not None:
        raise ConfigError(
            f"{wish.file} does not say how {wish.config.path} is built: it has no `{missing}`. "
            f"configs/data/beta-400b.yaml shows a data file that does."
        )


def _scripts(wish: ArrayWish, target: Path, code: Path) -> tuple[str, str]:
    options = wish.options
    place = place_of(options, target, code)
    common = [str(target), str(options.cpus_per_task)]
    array = array_script(wish.name, options, place, ["build", *common, str(options.tasks)])
    return array, closing_script(wish.name, options, place, ["close", *common, str(wish.config.path)])


def _number(wish: ArrayWish) -> int:
    """Of the next try."""
    try:
        names = [path.name for path in wish.folder.iterdir()]
    except OSError:
        return 1
    return max((int(name) for name in names if _NUMBER.fullmatch(name)), default=0) + 1


def _finds_duplicates(config: DataConfig) -> bool:
    clean = config.build.clean if config.build else None
    return bool(clean and (clean.exact_duplicates or clean.near_duplicates))
