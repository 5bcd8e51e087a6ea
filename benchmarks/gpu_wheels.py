"""Collect what a machine without a network needs beside torch, as wheels for Python 3.12 on x86-64 Linux.

    python benchmarks/gpu_wheels.py collect FOLDER [--reference]     # here, with a package index at hand
    python benchmarks/gpu_wheels.py install FOLDER --into SITE     # there: what is missing, and nothing else

Versions are those of the environment that collects, with which the tests pass. `install` needs no pip: a wheel is an
archive of importable files. What that machine has already (in a version that this project accepts) stays as it is.
`collect` says how large the folder is; it must stay below 60 MB, and wheels are never committed. `--reference` adds the
public reference package, whose licence is non-commercial, with the versions that it wants: into a folder of its own,
which nothing but its own benchmark sees (SITE-reference).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

LIMIT_MB = 60.0
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
# Why each is carried. Not carried: torch itself; pyarrow (45 MB, see HEAVY); wandb (runs here log with
# log.wandb=disabled); datasets with pandas, which only corpora of the hub need.
CARRIED = {
    "numpy": "everything",
    "deepspeed": "engine",
    "hjson": "deepspeed's configuration",
    "einops": "deepspeed",
    "msgpack": "deepspeed",
    "ninja": "deepspeed",
    "py-cpuinfo": "deepspeed",
    "tqdm": "deepspeed",
    "megatron-core": "batch ramp, doctor",
    "pydantic": "configuration",
    "pydantic_core": "configuration",
    "annotated-types": "configuration",
    "annotated-doc": "typer",
    "typing-inspection": "configuration",
    "typing_extensions": "configuration",
    "PyYAML": "configuration",
    "typer": "command line",
    "rich": "command line",
    "click": "command line",
    "shellingham": "command line",
    "markdown-it-py": "rich",
    "mdurl": "rich",
    "Pygments": "rich, pytest",
    "xxhash": "shards",
    "blake3": "shards",
    "safetensors": "checkpoints",
    "tokenizers": "shards",
    "psutil": "deepspeed, data",
    "packaging": "doctor",
    "pytest": "tests/cuda",
    "pytest-timeout": "tests/cuda",
    "iniconfig": "pytest",
    "pluggy": "pytest",
}
# They fit one another only in versions of the same time: where pydantic is missing, all of them are replaced.
PYDANTIC = ("pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
# Not carried, and what is left out without them.
HEAVY = {
    "pyarrow": "shards: the test of a whole run is skipped",
    "matplotlib": "plots of datasets: the test of a whole run is skipped",
}
# The reference's step and what it imports, beside torch, numpy and what is carried anyway.
REFERENCE = (
    "rxlm==0.3.80",
    "transformers==4.51.3",
    "huggingface-hub==0.36.0",
    "tokenizers==0.21.4",
    "regex",
    "requests",
    "filelock",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
)
PLATFORMS = ("2_34", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
_PIP = (sys.executable, "-m", "pip")
_NAMED = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def collect(folder: Path, reference: bool) -> int:
    """Fill the folder; the exit code is 1 if it grows too large."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".gitignore").write_text("*\n")
    there = [f"{name}=={metadata.version(name)}" for name in CARRIED]
    built = [one for one in there if one.startswith("deepspeed==")]
    _download(folder, [one for one in there if one not in built])
    # DeepSpeed has no wheel in the index; built without its C++ operators it is plain Python.
    isolated = ["--no-deps", "--no-build-isolation", "--no-binary=deepspeed"]
    subprocess.run([*_PIP, "wheel", "-q", *isolated, "-w", str(folder), *built], check=True)
    if reference:
        _download(folder / "reference", REFERENCE)
    size = 0.0
    for wheel in sorted(folder.rglob("*.whl")):
        size += wheel.stat().st_size / 1e6
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.relative_to(folder)}")
    print(f"{size:7.2f} MB  in all, of {LIMIT_MB:.0f}; not carried: {', '.join(HEAVY)}")
    return int(size > LIMIT_MB)


def _download(folder: Path, packages: Sequence[str]) -> None:
    platforms = [f"--platform={name}" for name in (*(f"manylinux_{one}_x86_64" for one in PLATFORMS), *_NAMED)]
    tags = ["--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none"]
    only = ["--no-deps", "--only-binary=:all:", *tags, *platforms]
    subprocess.run([*_PIP, "download", "-q", *only, "-d", str(folder), *packages], check=True)


def install(folder: Path, site: Path) -> int:
    """Unpack into `site` the wheels whose packages are missing here, or not as this project wants them."""
    wanted = requirements()
    without_pydantic = not installed("pydantic")
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        found = installed(name)
        outdated = without_pydantic and plain(name) in PYDANTIC
        if found and accepts(wanted.get(plain(name), ""), found) and not outdated:
            print(f"here already: {name} {found}")
            continue
        unpack(wheel, site)
        print(f"unpacked: {name} {version}" + (f" (here was {found})" if found else ""))
    for wheel in sorted((folder / "reference").glob("*.whl")):
        unpack(wheel, reference_site(site))
        print(f"unpacked for the reference: {wheel.name}")
    for name, without in HEAVY.items():
        if not installed(name):
            print(f"MISSING: {name}, needed for {without}")
    return 0


def reference_site(site: Path) -> Path:
    """Where the reference's own packages lie."""
    return site.with_name(f"{site.name}-reference")


def unpack(wheel: Path, site: Path) -> None:
    """A wheel's importable files; `*.data/purelib` and `platlib` belong beside them, scripts are left out."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            parts = Path(member).parts
            if parts[0].endswith(".data"):
                if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            if member.endswith("/") or ".." in parts:
                continue
            target = site.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))


def installed(name: str) -> str:
    """The version of a package that this interpreter sees; empty if none."""
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return ""


def requirements() -> dict[str, str]:
    """What the project asks of a version, by plain name."""
    lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {}
    for line in lines:
        name = line
        for sign in "<>=!~ ":
            name = name.partition(sign)[0]
        found[plain(name)] = line[len(name) :]
    return found


def plain(name: str) -> str:
    """A package's name as all spellings of it have in common."""
    return name.lower().replace("_", "-").replace(".", "-")


def accepts(wanted: str, found: str) -> bool:
    """Whether a version will do. Without `packaging` only pins are looked at."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return not wanted.startswith("==") or wanted == f"=={found}"
    return SpecifierSet(wanted).contains(found, prereleases=True)


def main() -> int:
    """Parse the arguments and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("collect", "install"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", action="store_true", help="carry the reference package too")
    parser.add_argument("--into", type=Path, help="folder that PYTHONPATH will name")
    arguments = parser.parse_args()
    if arguments.verb == "collect":
        return collect(arguments.folder, arguments.reference)
    if arguments.into is None:
        parser.error("install needs --into SITE")
    return install(arguments.folder, arguments.into)


if __name__ == "__main__":
    sys.exit(main())
