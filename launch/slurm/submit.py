"""From a run file and options to a job in the queue: what can be refused is refused before anything is made."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launch.slurm import client
from launch.slurm.container import in_container
from launch.slurm.freeze import freeze_code, require_whole
from launch.slurm.job import Description, JobFolder
from launch.slurm.ledger import Ledger
from launch.slurm.options import JobOptions, SlurmOptions
from launch.slurm.script import SUBMIT, Place, run_script
from rxt_dist.config.duration import seconds_of
from rxt_dist.config.load import resolved_yaml
from rxt_dist.config.run import RunConfig
from rxt_dist.errors import ConfigError, UnavailableError, UserError, error_class
from rxt_dist.files import access_errors, require_folder, write_atomic
from rxt_dist.finished import is_finished, newest_step
from rxt_dist.lives import file_identity
from rxt_dist.locks import Lock, held, locked
from rxt_dist.train.events import read_lines

# Nothing else may stand in a script's header and in the name of a job's output.
# (a colon parts the folders of PYTHONPATH, and a comma those of a container).
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+=@~-]+")
# Before anything is known of a run's steps and saves.
_LEAD_SECONDS, _SAFETY_SECONDS = 300, 60
_SAVES, _STEPS = 5, 50
_ADMISSION_SECONDS = 600


@dataclass(frozen=True)
class Wish:
    """What a person wants to have submitted.

    config: the run, with the cluster as the options have it. after: run directories that have to be finished first.
    from_checkpoint: where the first life begins.
    """

    config: RunConfig
    options: SlurmOptions
    after: tuple[Path, ...] = ()
    from_checkpoint: str | None = None

    @property
    def run(self) -> Path:
        """The run directory, whatever the current directory of a job is."""
        return self.config.directory.absolute()

    @property
    def name(self) -> str:
        """Of the job: that of the run, and a hash of where it lies, since another may be called the same."""
        return f"{self.config.name}-{zlib.crc32(str(self.run).encode()):08x}"[-120:]


def render(wish: Wish, warn: Callable[[str], None]) -> str:
    """The script, as a submission would write it, without writing anything.

    Args:
        warn: told that the cluster could not be asked, where it does not answer.

    Raises:
        UserError: whatever refuses the run, the options or the script.
    """
    require_folder(wish.run)
    folder = JobFolder(wish.run)
    number = folder.newest + 1
    place = _place(wish, folder, number, folder.path / "code-...")
    text = run_script(wish.name, wish.options, signal_lead(wish), place)
    gpus = gpus_asked(wish.options)
    _dependency(wish.after)
    _node_counts(wish)
    check_where_possible(text, wish.options, wish.options.nodes, gpus, warn)
    return text


def submit(wish: Wish, say: Callable[[str], None]) -> list[str]:
    """Submit a run: freeze its code and configuration, write its script, hand it to SLURM.

    Returns:
        the ids of its jobs: one, or those of a chain.

    Raises:
        UserError: whatever refuses it; then nothing is left behind.
    """
    run = wish.run
    require_slurm()
    require_folder(run)
    _require_free(run)
    gpus_asked(wish.options)
    lead, dependency, counts = signal_lead(wish), _dependency(wish.after), _node_counts(wish)
    with access_errors(run):
        return _written_and_submitted(wish, lead, counts, dependency, say)


def resubmit(run: Path) -> list[str]:
    """Submit the newest script of a run again, as it is: the code and the configuration of then.

    Raises:
        UserError: it was never submitted, has a job, or is finished.
    """
    folder = JobFolder(run)
    if folder.description() is None:
        known = "was moved or copied since it was submitted" if folder.newest else "was never submitted"
        raise ConfigError(f"{run} {known} to SLURM: begin with `rxt-dist launch slurm RUN.yaml`.")
    require_slurm()
    with locked(folder.path / ".lock", wait=True):
        description = folder.description()
        assert description is not None
        _require_free(run)
        if is_finished(run):
            raise ConfigError(f"{run} is finished, so there is nothing to resume (to go back: `launch slurm --from`).")
        require_whole(Path(description.code))
        # Its first step needs them; later ones do not, and what it began with may be gone.
        dependency = _dependency([Path(first) for first in description.after]) if newest_step(run) < 0 else []
        Ledger(folder.ledger).add("submitted", submission=description.submission, again=True)
        description = replace(description, old_stop=file_identity(run / "STOP"))
        description.write()
        return _hand_over(description, dependency)


def _written_and_submitted(
    wish: Wish, lead: int, counts: list[int], dependency: list[str], say: Callable[[str], None]
) -> list[str]:
    folder = JobFolder(wish.run)
    made = next(
        path for path in (*reversed(folder.path.parents), folder.path) if not path.exists() or path == folder.path
    )
    is_new = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path / ".lock") as lock:
        if lock is Lock.BUSY:
            raise ConfigError(f"{wish.run} is being submitted by another process at this moment.")
        # Since the first look another launch may have come and gone.
        _require_free(wish.run)
        number = folder.newest + 1
        target = folder.submission(number)
        try:
            place = _place(wish, folder, number, freeze_code(folder.path))
            text = run_script(wish.name, wish.options, lead, place)
            check_script(text, wish.options, nodes=wish.options.nodes, gpus=gpus_asked(wish.options))
            target.mkdir(exist_ok=True)
            write_atomic(target / "run.yaml", resolved_yaml(_settled(wish)))
            write_atomic(target / SUBMIT, text)
            description = _description(wish, number, lead, counts, place.code)
            description.write()
            Ledger(folder.ledger).add("submitted", submission=number)
            jobs = _hand_over(description, dependency)
        except BaseException:
            shutil.rmtree(made if is_new else target, ignore_errors=True)
            raise
    say(f"script, code and configuration: {target}")
    return jobs


def _hand_over(description: Description, dependency: list[str]) -> list[str]:
    """Submit as many jobs as a chain has; each is noted at once. Where one is refused, none stays."""
    script = description.folder.submission(description.submission) / SUBMIT
    jobs: list[str] = []
    try:
        for link in range(description.chain):
            # The first may have to wait for another run; all others wait for the one before, whatever its end.
            waits = dependency if link == 0 else []
            if description.chain > 1:
                after = (text.partition("=")[2] for text in waits[:1])
                waits = [f"--dependency={','.join(['singleton', *after])}", *waits[1:]]
            jobs.append(client.submit(str(script), *waits))
            description = replace(description, jobs=[*description.jobs, jobs[-1]])
            description.write()
            Ledger(description.folder.ledger).add("job", job=jobs[-1], submission=description.submission)
    except BaseException:
        cancel_all(jobs)
        raise
    return jobs


def cancel_all(jobs: Sequence[str]) -> None:
    """Cancel jobs whose files are taken back, as far as the queue answers."""
    for job in jobs:
        with suppress(client.SlurmError):
            client.cancel(job)


def _settled(wish: Wish) -> RunConfig:
    """The configuration of the job: its output is found from everywhere."""
    return wish.config.model_copy(update={"output": wish.run.parent})


def _place(wish: Wish, folder: JobFolder, number: int, code: Path) -> Place:
    return place_of(wish.options, folder.submission(number), code)


def place_of(options: JobOptions, folder: Path, code: Path) -> Place:
    """Where a job of these options lives.

    Raises:
        ConfigError: the path cannot stand in a job's script.
    """
    directory = Path.cwd()
    for path in (folder, directory):
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise ConfigError(
                f"{path} cannot stand in a job's script: it may consist of letters, digits and ./_+=@~- alone. Take "
                f"another folder (output=..., or another current directory)."
            )
    return Place(folder, directory, code, _python(options))


def _python(options: JobOptions) -> str:
    """The interpreter of the job: that of its environment, else the one that runs this."""
    return "python" if options.conda is not None or options.venv is not None else sys.executable


def _description(wish: Wish, number: int, lead: int, counts: list[int], code: Path) -> Description:
    options, run = wish.options, wish.run
    folder = JobFolder(run).submission(number)
    prefix, srun = in_container(options, wish.config, run, code)
    return Description(
        submission=number,
        run=str(run),
        name=wish.name,
        command=["train", str(folder / "run.yaml")],
        once=["--from", wish.from_checkpoint] if wish.from_checkpoint is not None else [],
        python="python3" if options.container is not None else _python(options),
        node_counts=counts,
        ranks_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        signal=options.signal,
        lead=lead,
        launcher=options.launcher,
        requeue=options.requeue,
        preflight=options.preflight,
        prefix=prefix,
        srun=[*([f"--cpu-bind={options.cpu_bind}"] if client.binds_cpus() else []), *srun],
        exclude=options.exclude,
        chain=options.chain,
        code=str(code),
        old_stop=file_identity(run / "STOP"),
        jobs=[],
        after=[str(first.absolute()) for first in wish.after],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def signal_lead(wish: Wish) -> int:
    """Seconds from the user signal to the end of a job's time, so that the last checkpoint is committed in it.

    Raises:
        ConfigError: less was given than the run is known to need, or as much as the whole time.
    """
    options, needed = wish.options, _needed_seconds(wish.run)
    if options.signal_lead is None:
        lead = max(needed or 0, min(_LEAD_SECONDS, max(1, options.seconds // 2)))
        if lead >= options.seconds > 1:
            raise ConfigError(
                f"--time {options.time} is no longer than the {lead} s that this run needs for a step, a checkpoint "
                f"(twice its longest) and a minute, so it would save and do nothing else: lengthen it."
            )
        return lead
    lead = seconds_of(options.signal_lead)
    if lead >= options.seconds:
        raise ConfigError(
            f"--signal-lead {options.signal_lead} is as long as the job (--time {options.time}), which would be told "
            f"to stop when it starts: shorten the first or lengthen the second."
        )
    if needed is not None and lead < needed:
        raise ConfigError(
            f"--signal-lead {options.signal_lead} is shorter than the {needed} s that this run needs for a step, a "
            f"checkpoint (twice its longest) and a minute: give at least --signal-lead {needed}s."
        )
    return lead


def _needed_seconds(run: Path) -> int | None:
    """What the end of a life takes, by what the run has measured; None where it has saved nothing yet."""
    saves = [event["seconds"] for event in read_lines(run / "events.jsonl") if event.get("kind") == "save"]
    steps = [line["step_s"] for line in read_lines(run / "metrics.jsonl") if isinstance(line.get("step_s"), float)]
    seconds = [float(value) for value in saves if isinstance(value, int | float)][-_SAVES:]
    if not seconds:
        return None
    return int(2 * max(seconds) + max(steps[-_STEPS:], default=0.0) + _SAFETY_SECONDS + 0.5)


def _node_counts(wish: Wish) -> list[int]:
    """Numbers of nodes that the run can work on, largest first.

    All that the start of the run would refuse is asked for here, by a process of its own: it loads torch.

    Raises:
        UserError: the run is refused on all of its nodes.
    """
    options = wish.options
    counts = range(options.nodes, (options.min_nodes or options.nodes) - 1, -1)
    with tempfile.TemporaryDirectory(prefix="rxt-launch-") as name:
        file = Path(name) / "run.yaml"
        file.write_text(resolved_yaml(_settled(wish)), encoding="utf-8")
        command = [sys.executable, "-m", "rxt_dist.train.admission", str(file)]
        command += [str(count * options.gpus_per_node) for count in counts]
        command += ["--start-later"] if wish.after else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ADMISSION_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"The run was not looked through within {_ADMISSION_SECONDS} s, in which torch and its data are read: "
                f"is a disk away, or this machine busy? Try again."
            ) from error
    if done.returncode:
        said = f"\n{done.stderr}".rpartition("\nerror: ")
        raise _as_error(done.returncode, said[2].strip() if said[1] else done.stderr[-2000:])
    return [size // options.gpus_per_node for size in json.loads(done.stdout.splitlines()[-1])]


def _as_error(code: int, text: str) -> UserError:
    """The error of another process, by its exit code."""
    for name in ("ConfigError", "DataError", "DiskError"):
        kind = error_class(name)
        if kind is not None and kind.exit_code == code:
            return kind(text)
    return UserError(text)


def require_slurm() -> None:
    """Refuse to submit where SLURM is not.

    Raises:
        ConfigError: as said.
    """
    if not client.there():
        raise ConfigError(
            "SLURM's commands (sbatch) are not here: log in to the cluster, or load SLURM's module. --dry-run prints "
            "the script anywhere."
        )


def check_where_possible(text: str, options: JobOptions, nodes: int, gpus: int, warn: Callable[[str], None]) -> None:
    """`check_script`, for a look at a script: where the cluster does not answer, that is said."""
    try:
        check_script(text, options, nodes, gpus)
    except client.SlurmError as error:
        warn(f"warning: not held against what the cluster has: {error}")


def check_script(text: str, options: JobOptions, nodes: int, gpus: int) -> None:
    """Refuse a script that bash cannot read, and one that this cluster, where there is one, would never start.

    Raises:
        ConfigError: with what it asks for, and what there is.
    """
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if read.returncode:
        raise ConfigError(f"bash cannot read the script, by one of the values in it: {read.stderr.strip()}")
    if not client.there():
        return
    check_partition(options, client.node_kinds(), nodes, gpus)
    with tempfile.TemporaryDirectory(prefix="rxt-launch-") as name:
        file = Path(name) / SUBMIT
        file.write_text(text, encoding="utf-8")
        client.would_start(str(file))


def check_partition(options: JobOptions, kinds: Sequence[client.NodeKind], nodes: int, gpus: int) -> None:
    """Hold what is asked for against what partitions have.

    Raises:
        ConfigError: no such partition, or none that has as much.
    """
    named = options.partition.split(",") if options.partition else [kind.partition for kind in kinds if kind.default]
    wanted = list(dict.fromkeys(named))
    known = sorted({kind.partition for kind in kinds})
    if not known:
        return
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"This cluster has no partition '{unknown[0]}'; it has {', '.join(known)}.")
    own = [kind for kind in kinds if kind.partition in wanted]
    if not own:
        return
    longest = max(kind.seconds for kind in own)
    if options.seconds > longest:
        raise ConfigError(
            f"--time {options.time} is longer than partition {', '.join(wanted)} allows, {int(longest // 60)} minutes: "
            f"shorten it; the run goes on in as many lives as it takes."
        )
    most = max(kind.gpus for kind in own)
    if gpus > most:
        raise ConfigError(
            f"{gpus} GPUs a node are asked for, and nodes of partition {', '.join(wanted)} have {most} at most: lower "
            f"--gpus-per-node, or name another --partition."
        )
    # A job runs in one of several partitions.
    fitting = max(sum(kind.nodes for kind in own if kind.gpus >= gpus and kind.partition == name) for name in wanted)
    if nodes > fitting:
        raise ConfigError(
            f"{nodes} nodes are asked for, and partition {', '.join(wanted)} has {fitting} of that kind: lower "
            f"--nodes, or name another --partition."
        )


def gpus_asked(options: SlurmOptions) -> int:
    """GPUs of a node that the job asks SLURM for.

    Raises:
        ConfigError: --gres asks for another number than there are ranks.
    """
    if options.gres is None:
        return options.gpus_per_node
    gpus = client.gpus_of(options.gres)
    if gpus not in (0, options.gpus_per_node):
        raise ConfigError(
            f"--gres {options.gres} has {gpus} GPUs a node, and --gpus-per-node {options.gpus_per_node} ranks: each "
            f"rank has one GPU, so let them agree."
        )
    return gpus


def _require_free(run: Path) -> None:
    """Refuse a run that has a job, or is being trained in another way."""
    living = living_job(run)
    if living is not None:
        job, state = living
        raise ConfigError(
            f"{run} has a job already: {job} is {state}. Look at it with `rxt-dist launch status {run}`, end it with "
            f"`rxt-dist launch stop {run}`."
        )
    if held(run / ".lock"):
        raise ConfigError(f"{run} is being trained by another process: wait until it has ended, or stop it.")


def living_job(run: Path) -> tuple[str, str] | None:
    """A job of a run that waits or has nodes, and its state."""
    states = ((job, client.active_state(job)) for job in _jobs_of(JobFolder(run)))
    return next(((job, state) for job, state in states if state is not None), None)


def _jobs_of(folder: JobFolder) -> list[str]:
    """Jobs of the newest submission, also where another version, or nobody who can be understood, has described it."""
    try:
        description = folder.description()
    except ConfigError:
        lines = Ledger(folder.ledger).read()
        return [line["job"] for line in lines if line["kind"] == "job" and line["submission"] == folder.newest]
    return description.jobs if description else []


def _dependency(after: Sequence[Path]) -> list[str]:
    """What makes a job wait for other runs to be finished."""
    jobs = [job for run in after for job in _last_job(run)]
    # Without the second a job would wait for ever for one that failed.
    return [f"--dependency=afterok:{':'.join(jobs)}", "--kill-on-invalid-dep=yes"] if jobs else []


def _last_job(run: Path) -> list[str]:
    """The job with which a run will be finished; none if it is.

    Raises:
        ConfigError: nothing of it runs or waits.
    """
    if is_finished(run):
        return []
    description = JobFolder(run).description()
    job = description.jobs[-1] if description and description.jobs else None
    if job is None or (client.there() and client.active_state(job) is None):
        ended = f", whose last job ({job}) has ended," if job is not None else " has no job on this cluster and"
        raise ConfigError(f"{run}{ended} is not finished, so nothing can wait for it: submit it first.")
    return [job]
