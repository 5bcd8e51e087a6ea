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
from rxt_dist.locks import Lock, locked

_NUMBER = re.compile(r"\d{4,}")
# In the folder of a try: the ids of its jobs.
_JOBS = "jobs"


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
    scripts = _planned_scripts(wish)
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
    for text in _planned_scripts(wish):
        check_script(text, wish.options, nodes=1, gpus=0)
    with access_errors(wish.folder):
        wish.folder.mkdir(parents=True, exist_ok=True)
        with locked(wish.folder / ".lock") as lock:
            if lock is Lock.BUSY:
                raise ConfigError(f"{wish.config.path} is being submitted by another process at this moment.")
            _require_free(wish)
            target = _next_try(wish)
            jobs = _written_and_submitted(wish, target)
    yield f"array {jobs[0]} of {wish.options.tasks} jobs"
    for job in jobs[1:-1]:
        yield f"array {job}, which builds when all units are surveyed for duplicates"
    yield f"job {jobs[-1]}, which completes and verifies {wish.config.path}"
    yield f"  output: {target}/slurm-*.out"


def _written_and_submitted(wish: ArrayWish, target: Path) -> list[str]:
    array, closing = _scripts(wish, target, freeze_code(wish.folder))
    target.mkdir()
    try:
        write_atomic(target / "data.yaml", resolved_yaml(wish.config))
        write_atomic(target / SUBMIT, array)
        write_atomic(target / CLOSE, closing)
        return _hand_over(target, _finds_duplicates(wish.config))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _hand_over(target: Path, with_survey: bool) -> list[str]:
    """The ids of the array, of the one after it where all units are surveyed first, and of the job that closes them;
    each is noted at once. Where one is refused, none stays."""
    jobs: list[str] = []
    try:
        for script in [SUBMIT, *([SUBMIT] if with_survey else []), CLOSE]:
            # After any end of theirs: what a killed one has left, the next completes.
            waits = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            jobs.append(client.submit(str(target / script), *waits))
            write_atomic(target / _JOBS, "\n".join(jobs) + "\n")
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


def _planned_scripts(wish: ArrayWish) -> tuple[str, str]:
    """Both scripts before any code is frozen."""
    return _scripts(wish, _next_try(wish), wish.folder / "code-...")


def _scripts(wish: ArrayWish, target: Path, code: Path) -> tuple[str, str]:
    options = wish.options
    place = place_of(options, target, code)
    common = [str(target), str(options.cpus_per_task)]
    array = array_script(wish.name, options, place, ["build", *common, str(options.tasks)])
    return array, closing_script(wish.name, options, place, ["close", *common, str(wish.config.path)])


def _next_try(wish: ArrayWish) -> Path:
    return wish.folder / f"{_newest(wish) + 1:04d}"


def _newest(wish: ArrayWish) -> int:
    """Number of the newest try; 0: there is none."""
    try:
        names = [path.name for path in wish.folder.iterdir()]
    except OSError:
        return 0
    return max((int(name) for name in names if _NUMBER.fullmatch(name)), default=0)


def _require_free(wish: ArrayWish) -> None:
    """Refuse a dataset that jobs are building.

    Raises:
        ConfigError: with their ids, and how to end them.
    """
    noted = wish.folder / f"{_newest(wish):04d}" / _JOBS
    jobs = noted.read_text(encoding="utf-8").split() if noted.exists() else []
    states = {job: state for job in jobs if (state := client.active_state(job)) is not None}
    if states:
        job, state = next(iter(states.items()))
        raise ConfigError(
            f"{wish.config.path} is being built already: job {job} is {state}. Wait until `squeue -j "
            f"{','.join(states)}` shows nothing, or end them with `scancel {' '.join(states)}`: finished units stay."
        )


def _finds_duplicates(config: DataConfig) -> bool:
    clean = config.build.clean if config.build else None
    return bool(clean and (clean.exact_duplicates or clean.near_duplicates))
