"""A folder that is filled unit by unit belongs to one specification from its first moment on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import golden_inputs
import pytest

from data_prep.building import builder
from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.interactions import build as interactions
from data_prep.interactions import hashes
from data_prep.interactions.build import InteractionRequest, build_interactions
from rxt_dist.data.sealing import hash_bytes
from rxt_dist.errors import DataError


class Killed(BaseException):
    """As a kill, no handler of the program's stops it."""


@pytest.fixture
def request_of(tmp_path: Path) -> InteractionRequest:
    (tmp_path / "tokenizer.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    (tmp_path / "x.en.jsonl").write_bytes(
        golden_inputs.lines([{"query": f"{n}?", "answer": "yes", "text": "x"} for n in range(9)])
    )
    return InteractionRequest((tmp_path / "x.en.jsonl",), tmp_path / "out", tmp_path / "tokenizer.json", 64, workers=1)


@pytest.mark.parametrize("after", range(4))
def test_a_kill_at_any_moment_of_the_setting_up_is_no_obstacle(
    request_of: InteractionRequest, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed before the first, second, ... thing that is written."""
    done = 0

    def counted(step):
        def run(*arguments, **options):
            nonlocal done
            if done == after:
                raise Killed
            done += 1
            return step(*arguments, **options)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(builder, "write_atomic", counted(builder.write_atomic))
        patched.setattr(builder, "write_json_atomic", counted(builder.write_json_atomic))
        patched.setattr(Path, "mkdir", counted(Path.mkdir))
        with pytest.raises(Killed):
            build_interactions(request_of)
    assert build_interactions(request_of).manifest is not None


def test_inputs_are_hashed_once_with_progress_and_again_where_they_changed(
    request_of: InteractionRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    blocks = hashes._blocks
    monkeypatch.setattr(hashes, "_blocks", lambda item: hashed.append(Path(item.path).name) or blocks(item))
    other = request_of.inputs[0].with_name("y.en.jsonl")
    other.write_bytes(request_of.inputs[0].read_bytes())
    monkeypatch.setattr(interactions, "_UNIT_BYTES", 1)
    shown: list[tuple[str, int]] = []
    tasks = [replace(request_of, inputs=(*request_of.inputs, other), task=task, tasks=8) for task in range(8)]
    first = build_interactions(tasks[0], show=lambda progress: shown.append((progress.what, progress.bytes)))
    assert first.manifest is None
    assert sorted(hashed) == ["x.en.jsonl", "y.en.jsonl"]
    assert ("Hashing", 2 * other.stat().st_size) in shown
    content = other.read_bytes()
    other.write_bytes(content + b"\n")
    with pytest.raises(DataError, match=r"the input files differ: .*y\.en\.jsonl \(other content\)"):
        build_interactions(tasks[1])
    assert [Path(name).name for name in hashed[2:]] == ["y.en.jsonl"]
    other.write_bytes(content)
    results = [build_interactions(task) for task in tasks[1:]]
    assert len(hashed) == 4
    (finished,) = [result.manifest for result in results if result.manifest]
    assert {item.blake3 for item in finished.inputs} == {hash_bytes(other.read_bytes())}
    assert not list(request_of.out.glob(".hashes*"))
    other.write_bytes(other.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"the input files differ: .*y\.en\.jsonl \(other content\)"):
        build_interactions(tasks[0])
    assert hashed[4:] == ["x.en.jsonl", "y.en.jsonl"]


def test_somebody_else_s_folder_is_left_alone(request_of: InteractionRequest) -> None:
    (request_of.out / "units").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is not a dataset \(it holds \['units'\]\)"):
        build_interactions(request_of)
    new = replace(request_of, out=request_of.out.with_name("new"))
    build_interactions(new)
    with pytest.raises(DataError, match="seq_len was 64 and is now 32"):
        build_interactions(replace(new, seq_len=32))
    # All inputs of another kind of dataset would hide what is wrong.
    with pytest.raises(DataError, match=r"inputs was \[\{.{58}\.\.\. and is now None; kind was single and is now None"):
        build_dataset(BuildRequest(request_of.inputs, new.out, request_of.tokenizer, 64, workers=1))


@pytest.mark.parametrize("damage", ["another specification", "a shard cut off"])
def test_a_unit_that_is_not_whole_is_built_again(request_of: InteractionRequest, damage: str) -> None:
    first = build_interactions(request_of)
    (path,) = (request_of.out / "units").glob("*.json")
    if damage == "a shard cut off":
        shard = next(request_of.out.glob("en/train/*.arrow"))
        shard.write_bytes(shard.read_bytes()[:-8])
    else:
        path.write_text(path.read_text().replace('"spec_hash": "', '"spec_hash": "0'))
    again = build_interactions(request_of)
    assert (first.units_kept, again.units_kept, again.manifest) == (0, 0, first.manifest)


def test_progress_within_a_large_file_is_told(request_of: InteractionRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactions, "_GROUP_RECORDS", 50)
    (path,) = request_of.inputs
    path.write_bytes(golden_inputs.lines([{"query": f"q{n} {n * n}?", "answer": "yes it is"} for n in range(400)]))
    told: list[int] = []
    build_interactions(request_of, show=lambda now: told.append(now.bytes) if now.what == "Building" else None)
    assert told == sorted(told)
    assert len(set(told)) > 4
    assert told[0] < told[-1] / 4
    assert told[-1] == path.stat().st_size
