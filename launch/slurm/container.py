"""Ranks in an image: what stands before their python, and what srun is told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.slurm.options import SlurmOptions
from rxt_dist.config.run import RunConfig

# What the code of the job needs, whatever the image says of it.
_KEPT = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED")
_IMAGE_FILES = (".sif", ".sqsh", ".squashfs", ".sqfs")


def in_container(options: SlurmOptions, config: RunConfig, run: Path, code: Path) -> tuple[list[str], list[str]]:
    """A command that stands before the python of ranks, and arguments of srun; both empty without a container.

    Args:
        run: the run directory. code: the frozen code.
    """
    if options.container is None:
        return [], []
    image, places = _image(options.container), _places(config, run, options.mounts)
    if options.container_runtime == "apptainer":
        # Else an image that has a PYTHONPATH of its own would run its own copy of the code, or none.
        kept = [f"--env=PYTHONPATH={code}"]
        return ["apptainer", "exec", "--nv", *kept, *(f"--bind={place}" for place in places), image], []
    mounts = ",".join(place if ":" in place else f"{place}:{place}" for place in places)
    # Of a variable that both have, pyxis takes the image's unless it is named.
    names = ",".join(dict.fromkeys([*_KEPT, *options.env]))
    return [], [
        f"--container-image={image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={Path.cwd()}",
        f"--container-env={names}",
    ]


def _image(name: str) -> str:
    """A file by its whole path: pyxis takes what begins with neither `.` nor `/` for an image of a registry."""
    is_file = Path(name).exists() or name.endswith(_IMAGE_FILES)
    return str(Path(name).absolute()) if is_file else name


def _places(config: RunConfig, run: Path, mounts: Sequence[str]) -> list[str]:
    """The run, the current folder, what the person names, and what the run reads that lies in none of them."""
    seen = [run, Path.cwd()]
    named = []
    for mount in mounts:
        outside, colon, inside = mount.partition(":")
        named.append(f"{Path(outside).absolute()}{colon}{inside}")
        seen += [] if colon else [Path(outside).absolute()]
    for path in _read_by(config):
        for place in (path.absolute(), path.resolve()):
            if not any(place.is_relative_to(other) for other in seen):
                seen.append(place)
                named.append(str(place))
    return list(dict.fromkeys([str(run), str(Path.cwd()), *named]))


def _read_by(config: RunConfig) -> Iterator[Path]:
    paths = [config.data.path, *(phase.path for phase in config.data.mixture), config.data.tokenizer]
    for origin in config.start.origins if config.start is not None else ():
        paths += [origin.run, origin.export]
    yield from (path for path in paths if path is not None)
