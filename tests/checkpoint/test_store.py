"""The commit protocol, one disk fault or interruption at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rxt_dist.checkpoint import store as module
from rxt_dist.checkpoint.store import LATEST, MANIFEST, CheckpointStore, FileRecord
from rxt_dist.errors import CheckpointError, DiskError, SupersededError


def content(step: int, name: str) -> bytes:
    return f"{name} of step {step} ".encode() * 50


def write(store: CheckpointStore, step: int) -> list[FileRecord]:
    """Everything before the commit: two files at the top and one in a folder of its own."""
    folder = store.begin(step)
    records = []
    for name in ("model.safetensors", "optimizer.safetensors", "ranks/0.safetensors"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(step, name))
        records.append(store.record(path))
    return records


def save(store: CheckpointStore, step: int) -> Path:
    return store.commit(step, write(store, step), {"tokens": step * 1000, "topology": {"ranks": 2}})


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.list() if info.committed]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    said: list[str] = []
    checkpoint = store.latest_valid(said.append)
    return (checkpoint.step if checkpoint else None), said


def test_a_commit_is_what_a_load_finds(store: CheckpointStore) -> None:
    path = save(store, 120)
    checkpoint = store.latest_valid(pytest.fail)
    assert checkpoint is not None
    assert checkpoint.path == path == store.directory / "step-00000120"
    assert checkpoint.meta == {"tokens": 120_000, "topology": {"ranks": 2}}
    assert [file.name for file in checkpoint.files] == [
        "model.safetensors",
        "optimizer.safetensors",
        "ranks/0.safetensors",
    ]
    assert (store.directory / LATEST).read_text() == "step-00000120\n"
    assert store.verify(120) == store.verify(path) == []


def test_an_empty_or_absent_folder_has_no_checkpoint(store: CheckpointStore) -> None:
    assert newest(store) == (None, [])
    store.directory.mkdir()
    assert newest(store) == (None, [])
    assert store.list() == []
    assert "no such checkpoint" in store.verify(7)[0]


def test_the_newest_by_number_is_taken_not_by_name(store: CheckpointStore) -> None:
    save(store, 99_999_999)
    save(store, 100_000_000)
    assert newest(store) == (100_000_000, [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda folder: os.truncate(folder / "ranks/0.safetensors", 9), "ranks/0.safetensors: 9 bytes instead of"),
        (lambda folder: flip_bit(folder / "model.safetensors"), "model.safetensors: damaged (its hash is"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: No such file"),
        (lambda folder: os.truncate(folder / MANIFEST, 0), "manifest.json: empty"),
        (lambda folder: os.truncate(folder / MANIFEST, 80), "manifest.json: truncated"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest.json: truncated"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe{"), "manifest.json: truncated"),
        (lambda folder: shutil.copy(folder.parent / "step-00000001" / MANIFEST, folder), "describes step 1"),
        (lambda folder: edit(folder, "120000", "121000"), "manifest.json: altered since it was written"),
        (lambda folder: edit(folder, '"format": 3', '"format": 4'), "format 4, but this version reads formats up to 3"),
    ],
)
def test_a_damaged_checkpoint_is_rejected_and_the_one_before_taken(store: CheckpointStore, damage, said: str) -> None:
    save(store, 1)
    damage(save(store, 120))
    assert any(said in problem for problem in store.verify(120))
    step, reports = newest(store)
    assert step == 1
    assert len(reports) == 1
    assert "step-00000120" in reports[0]
    assert said in reports[0]


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new))


def test_every_damaged_checkpoint_is_reported(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        flip_bit(save(store, step) / "model.safetensors")
    step, reports = newest(store)
    assert step is None
    assert [report.split()[1][-1] for report in reports] == ["3", "2", "1"]


def test_extra_files_do_no_harm(store: CheckpointStore) -> None:
    (save(store, 1) / "notes.txt").write_text("a person's remark")
    assert store.verify(1) == []


def test_latest_pointing_to_nothing_is_said_and_survived(store: CheckpointStore) -> None:
    save(store, 1)
    (store.directory / LATEST).write_text("step-00000009\n")
    step, reports = newest(store)
    assert step == 1
    assert "step-00000009" in reports[0]


def test_a_folder_in_the_place_of_latest_is_said_and_survived(store: CheckpointStore) -> None:
    save(store, 5)
    (store.directory / LATEST).unlink()
    (store.directory / LATEST).mkdir()
    save(store, 6)
    said: list[str] = []
    checkpoint = store.latest_valid(said.append)
    assert checkpoint is not None
    assert checkpoint.step == 6
    assert "latest cannot be read (Is a directory)" in said[0]


def test_what_may_not_publish_commits_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise CheckpointError("another life")

    guarded = CheckpointStore(tmp_path, 2, guard=refuse)
    with pytest.raises(CheckpointError, match="another life"):
        save(guarded, 5)
    assert not guarded.steps()
    assert not (tmp_path / LATEST).exists()


def test_an_empty_latest_is_said_and_survived(store: CheckpointStore) -> None:
    save(store, 1)
    (store.directory / LATEST).write_bytes(b"")
    # An empty name must not be taken for the folder itself.
    assert newest(store)[0] == 1
    assert len(newest(store)[1]) == 1


class Killed(BaseException):
    """Stands for a kill: nothing in the store may catch it."""


@pytest.mark.parametrize("at", ["write_json_atomic", "os.rename", "fsync_dir", "write_atomic"])
def test_a_kill_at_any_operation_keeps_what_was_committed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    save(store, 1)
    save(store, 2)
    records = write(store, 3)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"rxt_dist.checkpoint.store.{at}", kill)
        with pytest.raises(Killed):
            store.commit(3, records, {})
    # `write_atomic` writes `latest`, after the rename that commits.
    committed = 3 if at == "write_atomic" else 2
    life = CheckpointStore(store.directory, keep=3)
    assert newest(life) == (committed, [])
    save(life, 3)
    assert newest(life) == (3, [])
    assert [info.step for info in life.list()] == [1, 2, 3]


def test_everything_is_durable_before_the_name_that_promises_it(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kill can show a missing fsync, only a power cut; so the order of the system calls is looked at."""
    order: list[str] = []

    def log(name: str, call):
        def logged(*arguments):
            target = arguments[-1]
            path = Path(f"/proc/self/fd/{target}").resolve() if isinstance(target, int) else Path(target)
            order.append(f"{name} {path.name.removeprefix('.').split('.tmp.')[0]}")
            return call(*arguments)

        return logged

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, log(name, getattr(os, name)))
    save(store, 1)
    assert order[:3] == ["fsync model.safetensors", "fsync optimizer.safetensors", "fsync 0.safetensors"]
    assert sorted(order[3:5]) == ["fsync ranks", "fsync step-00000001.tmp"]
    assert order[5:] == [
        "fsync manifest.json",
        "replace manifest.json",
        "fsync step-00000001.tmp",
        "rename step-00000001",
        "fsync checkpoints",
        "fsync latest",
        "replace latest",
        "fsync checkpoints",
    ]


def test_a_kill_between_manifest_and_rename_leaves_an_ignored_folder(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2).rename(store.unfinished_folder(2))
    life = CheckpointStore(store.directory, keep=3)
    # `latest` still names the folder of step 2, which is said.
    assert newest(life)[0] == 1
    assert [(info.step, info.committed) for info in life.list()] == [(1, True), (2, False)]


def test_begin_removes_leftovers(store: CheckpointStore) -> None:
    for step in (5, 9):
        store.unfinished_folder(step).mkdir(parents=True)
        store.unfinished_folder(step).joinpath("half").write_text("x")
    assert list(store.begin(7).iterdir()) == []
    assert [(info.step, info.committed) for info in store.list()] == [(7, False)]


def test_what_a_failed_save_wrote_is_freed(store: CheckpointStore) -> None:
    save(store, 1)
    write(store, 2)
    store.discard(2)
    store.discard(2)
    assert [info.step for info in store.list()] == [1]


def test_a_process_that_may_not_publish_commits_nothing(tmp_path: Path) -> None:
    """Nor does it touch what the other life has committed, or is writing."""
    superseded: list[str] = []

    def refuse() -> None:
        if superseded:
            raise SupersededError("another life")

    store = CheckpointStore(tmp_path, 2, guard=refuse)
    save(store, 1)
    records = write(store, 2)
    superseded.append("now")
    for action in (lambda: store.commit(2, records, {}), lambda: store.begin(3), lambda: store.set_aside(0)):
        with pytest.raises(SupersededError, match="another life"):
            action()
    store.discard(2)
    assert [(info.step, info.committed) for info in store.list()] == [(1, True), (2, False)]
    assert not store.aside()


def test_what_cannot_be_read_for_now_is_not_removed(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment must not cost a milestone; one that is really damaged goes."""
    for step in (1, 2, 3, 4):
        save(CheckpointStore(store.directory, 9), step)
    (store.folder(2) / MANIFEST).write_text("{")
    unreadable = store.folder(1) / MANIFEST
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    fresh = CheckpointStore(store.directory, 2)
    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", fail)
        assert fresh.prune() == [store.folder(2)]
    assert steps(store) == [1, 3, 4]
    assert fresh.prune() == [store.folder(1)]


def test_a_prune_that_fails_leaves_a_commit(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store, "prune", fail)
    save(store, 1)
    assert steps(store) == [1]
    assert "cannot be removed" in caplog.text


def test_a_checkpoint_of_suspect_losses_is_taken_with_a_word(store: CheckpointStore) -> None:
    store.commit(1, write(store, 1), {"suspect": True})
    found, said = newest(store)
    assert found == 1
    assert said == [f"Checkpoint {store.folder(1)} was made while losses were suspect."]


def test_an_existing_valid_checkpoint_of_the_step_stays(store: CheckpointStore) -> None:
    path = save(store, 1)
    before = (path / MANIFEST).read_bytes()
    assert store.commit(1, write(store, 1), {"tokens": 5}) == path
    assert (path / MANIFEST).read_bytes() == before
    assert len(store.list()) == 1


def test_an_existing_damaged_checkpoint_of_the_step_is_replaced(store: CheckpointStore) -> None:
    flip_bit(save(store, 1) / "model.safetensors")
    save(store, 1)
    assert newest(store) == (1, [])


def test_a_commit_refuses_what_is_not_complete(store: CheckpointStore) -> None:
    save(store, 1)
    records = write(store, 2)
    folder = store.unfinished_folder(2)
    with pytest.raises(CheckpointError, match=r"ranks/0.safetensors: written but not recorded"):
        store.commit(2, records[:2], {})
    with pytest.raises(CheckpointError, match="two ranks recorded"):
        store.commit(2, [*records, records[0]], {})
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"model.safetensors: \d+ bytes instead of \d+"):
        store.commit(2, records, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        store.commit(2, records, {})
    with pytest.raises(CheckpointError, match="no files"):
        store.commit(3, [], {})
    assert newest(store) == (1, [])


def test_meta_that_is_not_json_is_refused_before_anything_is_written(store: CheckpointStore) -> None:
    records = write(store, 1)
    with pytest.raises(ValueError, match="JSON"):
        store.commit(1, records, {"loss": float("nan")})
    assert steps(store) == []


def test_meta_reads_back_as_json_does(store: CheckpointStore) -> None:
    store.commit(1, write(store, 1), {"shape": (1, 2), "by rank": {10: "a", 9: "b"}, "lr": 0.1})
    assert store.verify(1) == []
    (info,) = store.list()
    assert info.meta == {"lr": 0.1}
    assert info.bytes == sum(path.stat().st_size for path in info.path.rglob("*") if path.is_file())


def test_pruning_keeps_the_newest(store: CheckpointStore) -> None:
    for step in range(1, 7):
        save(store, step)
    assert steps(store) == [4, 5, 6]


@pytest.mark.parametrize("fresh", [False, True])
def test_pruning_never_goes_below_two_valid_ones(tmp_path: Path, fresh: bool) -> None:
    """Those that a life has written or looked at when it began; its first save does not read older ones again."""
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    flip_bit(save(store, 2) / "model.safetensors")
    flip_bit(save(store, 3) / "model.safetensors")
    if fresh:
        store = CheckpointStore(tmp_path, keep=2)
        store.latest_valid(lambda _: None)
    save(store, 4)
    assert [step for step in steps(store) if not store.verify(step)] == [1, 4]
    save(store, 5)
    assert [step for step in steps(store) if not store.verify(step)] == [4, 5]
    assert steps(store) == [4, 5]


def test_nothing_is_pruned_before_latest_has_moved(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(store, step)

    def kill(*_: object) -> None:
        raise Killed

    records = write(store, 4)
    monkeypatch.setattr("rxt_dist.checkpoint.store.write_atomic", kill)
    with pytest.raises(Killed):
        store.commit(4, records, {})
    assert steps(store) == [1, 2, 3, 4]


def test_a_kill_while_pruning_leaves_nothing_that_looks_whole(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(store, step)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        records = write(store, 4)
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(Killed):
            store.commit(4, records, {})
    assert "manifest.json" in store.verify(1)[0]
    save(store, 5)
    assert steps(store) == [3, 4, 5]


@pytest.mark.parametrize("fresh", [False, True])
def test_pruning_reads_nothing_that_is_kept(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.parent.name)
        return real(path)

    from rxt_dist.files import blake3_file as real

    for step in (1, 2):
        save(store, step)
    monkeypatch.setattr("rxt_dist.checkpoint.store.blake3_file", count)
    store = CheckpointStore(store.directory, keep=3) if fresh else store
    save(store, 3)
    save(store, 4)
    assert steps(store) == [2, 3, 4]
    assert not any("step-00000001" in name or "step-00000002" in name for name in hashed)


def test_two_checkpoints_is_the_least_that_can_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 1"):
        CheckpointStore(tmp_path, keep=1)


def test_a_full_disk_is_refused_with_both_figures(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 3 * 10**9))
    store.require_space(2 * 10**9)
    with pytest.raises(DiskError, match=r"5\.0 GB.*3\.0 GB"):
        store.require_space(5 * 10**9)


def test_a_manifest_is_plain_json_with_every_file(store: CheckpointStore) -> None:
    manifest = json.loads((save(store, 4) / MANIFEST).read_text())
    assert set(manifest) == {"format", "step", "meta", "files", "digest"}
    assert all(set(file) == {"name", "bytes", "blake3"} for file in manifest["files"])


def test_a_manifest_is_read_without_its_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    written = store.begin(1) / "weights"
    written.write_bytes(b"x")
    store.commit(1, [store.record(written)], {"tokens": {"of": 3}})
    (store.folder(1) / "weights").unlink()
    assert store.read(1).meta == {"tokens": {"of": 3}}
    with pytest.raises(CheckpointError, match="step-00000002 cannot be read"):
        store.read(2)


def test_steps_are_those_of_committed_folders(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    assert list(store.steps()) == []
    for name in ("step-00000020", "step-00000003", "step-00000004.tmp", "other"):
        (store.directory / name).mkdir(parents=True)
    assert list(store.steps()) == [3, 20]


def test_a_checkpoint_that_cannot_be_removed_does_not_keep_all_others(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Path, **options: object) -> None:
        if path.name == "step-00000001":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in range(1, 7):
        save(store, step)
    assert steps(store) == [1, 4, 5, 6]


def test_a_checkpoint_that_was_moved_to_another_disk_stays_there(store: CheckpointStore, tmp_path: Path) -> None:
    moved = tmp_path / "archive"
    shutil.move(save(store, 1), moved)
    store.folder(1).symlink_to(moved)
    for step in range(2, 7):
        save(store, step)
    assert steps(store) == [4, 5, 6]
    assert not store.folder(1).is_symlink()
    assert store.verify(moved) == []


def test_leftovers_that_somebody_still_has_open_do_not_stop_a_save(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS keeps them: under dotted names, until they are closed."""
    for folder in (store.unfinished_folder(1), store.unfinished_folder(2)):
        folder.mkdir(parents=True)
        (folder / ".nfs0001").write_bytes(b"x")
    remove = os.unlink

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if os.path.basename(path) == ".nfs0001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        remove(path, dir_fd=dir_fd)

    with monkeypatch.context() as busy:
        busy.setattr(os, "unlink", refuse)
        save(store, 2)
        (store.unfinished_folder(3)).mkdir()
        (store.unfinished_folder(3) / "model.safetensors").write_bytes(b"old")
        busy.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(CheckpointError, match=r"step-00000003.tmp cannot be cleared .*: model.safetensors"):
            store.begin(3)
    assert newest(store) == (2, [])


def test_a_run_that_was_moved_away_does_not_begin_anew_where_it_was(store: CheckpointStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", keep=2)
    save(store, 1)
    run.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        save(store, 2)
    assert not run.exists()


def test_what_another_process_removes_meanwhile_is_not_listed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(store, 1)
    stat = Path.stat

    def gone(path: Path, **options: bool) -> os.stat_result:
        if path.name == "optimizer.safetensors" and sys._getframe(1).f_code.co_name != "is_file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return stat(path, **options)

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    monkeypatch.setattr(Path, "stat", gone)
    (info,) = store.list()
    assert 0 < info.bytes < size


@pytest.mark.parametrize(("times", "found"), [(2, 2), (3, 1)])
def test_a_disk_that_fails_for_seconds_costs_no_interval(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, times: int, found: int
) -> None:
    save(store, 1)
    bad = save(store, 2) / "model.safetensors"
    waited, read = [], module.blake3_file

    def fail(path: Path) -> str:
        if path == bad and len(waited) < times:
            if len(waited) == 2:
                waited.append(0.0)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(path)

    monkeypatch.setattr(module, "blake3_file", fail)
    monkeypatch.setattr("rxt_dist.files.time.sleep", waited.append)
    assert newest(store)[0] == found
    assert waited[:2] == [1.0, 5.0]
