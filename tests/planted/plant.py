"""Plants small faults in copies of this tree, one at a time, and lists those that no test finds.

    python tests/planted/plant.py                      # all faults
    python tests/planted/plant.py --only memory        # those with this word in their name or file
    python tests/planted/plant.py --list

A fault is an entry of tests/planted/faults/*.yaml: a file, a text that stands in it exactly once, what is written in
its place, and the tests that should notice. A fault that those do not find is tried against the whole suite, without
ranks and kills, before it counts as a survivor. The exit code is 1 when any survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"
# The catalogue itself would notice every fault, as it looks for the code that the fault replaces.
EVERYTHING = ("tests", "--ignore=tests/test_planted_faults.py", "-m", "not distributed and not faults")
PASSED, FAILED, ENDLESS = 0, 1, -1
NO_TEST = "no test"
_SECONDS = 1800


@dataclass(frozen=True)
class Fault:
    """One change of one file; `tests` are pytest's arguments."""

    name: str
    file: str
    find: str
    plant: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The text with the fault in it.

        Raises:
            ValueError: what it replaces does not stand there exactly once.
        """
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"'{self.name}': what it replaces stands {count} times in {self.file}")
        return text.replace(self.find, self.plant)


@dataclass(frozen=True)
class Verdict:
    """Whether a fault was found, and by which test or why not."""

    fault: Fault
    found: bool
    by: str
    seconds: float


def read_faults(folder: Path = FAULTS) -> list[Fault]:
    """All faults, in the order of the files and within them.

    Raises:
        ValueError: two of one name.
    """
    faults = [
        Fault(entry["name"], entry["file"], entry["find"], entry["plant"], tuple(entry.get("tests", part["tests"])))
        for path in sorted(folder.glob("*.yaml"))
        for part in [yaml.safe_load(path.read_text(encoding="utf-8"))]
        for entry in part["faults"]
    ]
    names = [fault.name for fault in faults]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two faults are called '{twice[0]}'")
    return faults


def copy_tree(target: Path) -> None:
    """What git tracks, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """pytest's exit code, and the last line that says what failed."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return ENDLESS, f"no end within {_SECONDS} s"
    failed = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ended.returncode, failed[-1] if failed else ended.stdout.strip()[-200:]


def try_fault(tree: Path, fault: Fault) -> Verdict:
    """Plant, test, and put back."""
    started = time.monotonic()
    path = tree / fault.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(fault.planted(sound), encoding="utf-8")
    try:
        code, said = run_tests(tree, fault.tests)
        if code == ENDLESS:  # without the fault they ended
            code = FAILED
        if code == PASSED:
            code, said = run_tests(tree, EVERYTHING)
    finally:
        path.write_text(sound, encoding="utf-8")
    if code not in (PASSED, FAILED):
        said = f"pytest ended with {code}, which proves nothing: {said}"
    return Verdict(fault, code == FAILED, NO_TEST if code == PASSED else said, time.monotonic() - started)


def try_all(faults: list[Fault], jobs: int) -> list[Verdict]:
    """All verdicts; each of `jobs` copies of the tree has one fault at a time."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            copy_tree(Path(folder, str(job)))
            trees.put(Path(folder, str(job)))

        def attempt(fault: Fault) -> Verdict:
            tree = trees.get()
            try:
                verdict = try_fault(tree, fault)
            finally:
                trees.put(tree)
            word = "found" if verdict.found else "SURVIVED" if verdict.by == NO_TEST else "UNPROVEN"
            print(f"{word:8} {verdict.seconds:5.0f} s  {fault.file}: {fault.name}: {verdict.by}", flush=True)
            return verdict

        return list(pool.map(attempt, faults))


def require_soundness(faults: list[Fault]) -> None:
    """A test that fails without any fault would find them all."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy_tree(Path(folder))
        for tests in sorted({fault.tests for fault in faults}):
            code, said = run_tests(Path(folder), tests)
            if code != PASSED:
                sys.exit(f"Without any fault pytest {' '.join(tests)} ends with {code}: {said}")


def main() -> None:
    """Read the arguments and try the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only faults with this word in their name or file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults tried at once (default: cores)")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    given = parser.parse_args()
    faults = [fault for fault in read_faults() if given.only in f"{fault.file} {fault.name}"]
    if given.list:
        for fault in faults:
            print(f"{fault.file}: {fault.name}")
        return
    require_soundness(faults)
    survivors = [verdict for verdict in try_all(faults, given.jobs) if not verdict.found]
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults were found")
    for verdict in survivors:
        print(f"NOT FOUND {verdict.fault.file}: {verdict.fault.name}: {verdict.by}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
