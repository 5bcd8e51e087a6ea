"""Datasets of every kind come out as they did before, whoever shares the work, and whatever stopped it."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import golden_jobs
import pytest
from golden_jobs import DIGESTS, run

from rxt_dist.data.verify import verify_full
from rxt_dist.errors import ConfigError, DataError, DiskError

KINDS = [name for name in DIGESTS if name != "cleaned" or find_spec("rensa")]  # which near-duplicates need
JOBS = ["documents", "single", "recalls", "repacked", "imported"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    golden_jobs.write_inputs(root)
    return root


def digests(root: Path) -> tuple[str, str]:
    """Root digest, and one of all other files but those that name places."""
    manifest = json.loads((root / "dataset.json").read_bytes())
    rest = {key: value for key, value in manifest.items() if key not in ("files", "digest")}
    found = {"dataset.json": json.dumps(rest, sort_keys=True)}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        named = name not in ("dataset.json", "spare.zip", "plan.json", "origin.json") and "/." not in f"/{name}"
        if path.is_file() and named:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert verify_full(root).findings == ()
    return manifest["root_digest"][:16], hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_dataset_is_what_it_has_always_been(place: Path, tmp_path: Path, kind: str) -> None:
    result = run(kind, place, tmp_path / "out")
    assert (result.units >= 3, result.units_kept) == (True, 0)
    assert digests(tmp_path / "out") == DIGESTS[kind]
    again = run(kind, place, tmp_path / "out")
    assert (again.units_kept, again.manifest) == (result.units, result.manifest)
    if kind == "cleaned":
        dropped = json.loads((tmp_path / "out/clean.json").read_text())["dropped"]
        assert dropped.keys() == {"exact_duplicate", "near_duplicate", "too_short"}


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.slow
def test_two_workers_change_nothing(place: Path, tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    result = run(kind, place, tmp_path / "out", said.append, workers=2)
    assert any(line.endswith(f"{result.units} of {result.units} units with 2 processes") for line in said), said
    assert digests(tmp_path / "out") == DIGESTS[kind]
    assert not list((tmp_path / "out/units").glob(".*"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.slow
def test_two_tasks_in_either_order_and_the_last_finishes(
    place: Path, tmp_path: Path, kind: str, order: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    first = run(kind, place, out, task=order[0], tasks=2)
    assert first.manifest is None
    assert first.unfinished.endswith(f"units are left to other tasks ({order[1]}); the last one finishes it all.")
    assert not (out / "dataset.json").exists()
    built = len(list((out / "units").glob("*.json")))
    assert 0 < built < first.units
    last = run(kind, place, out, task=order[1], tasks=2)
    assert (last.manifest is not None, last.units_kept) == (True, built)
    assert digests(out) == DIGESTS[kind]


@pytest.mark.parametrize("kind", JOBS)
def test_all_jobs_refuse_in_the_same_words(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from data_prep.building.folder import held

    out = tmp_path / "out"
    for sharing, message in (
        ({"workers": 0}, "--workers is 0"),
        ({"task": 2, "tasks": 2}, "--task is 2; with --tasks 2 it must be from 0 to 1"),
        ({"tasks": 2}, "--task and --tasks go together"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(kind, place, out, **sharing)
    assert not out.exists()
    out.mkdir()
    for array, sharing in ((False, {"task": 0, "tasks": 2}), (True, {})):
        with (
            held(out, array, lambda line: None),
            pytest.raises(DataError, match=f"Another build is writing to {out}"),
        ):
            run(kind, place, out, **sharing)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(DiskError, match=r"needs about .* but only 10 bytes is free there"):
        run(kind, place, out)
    assert not (out / "build.json").exists()


@pytest.mark.parametrize("written", range(4))
@pytest.mark.parametrize("kind", ["documents", "repacked"])
@pytest.mark.slow
def test_a_kill_before_the_specification_is_written_is_no_obstacle(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, written: int
) -> None:
    """With none, one, ... of the small files in place that lie beside it: tokenizer, plan, origin."""
    from data_prep.building import builder

    class Killed(BaseException):
        """As a kill, no handler of the program's stops it."""

    done: list[Path] = []
    write = builder.write_atomic

    def counted(path: Path, content: bytes | str) -> None:
        if len(done) == written:
            raise Killed
        done.append(path)
        write(path, content)

    def killed(path: Path, value: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(builder, "write_atomic", counted)
        patched.setattr(builder, "write_json_atomic", killed)
        with pytest.raises(Killed):
            run(kind, place, tmp_path / "out")
    assert run(kind, place, tmp_path / "out").manifest is not None
    assert digests(tmp_path / "out") == DIGESTS[kind]
