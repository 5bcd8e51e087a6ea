"""`rxt-dist data recall` as a person calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_verbs import as_json, run

from rxt_dist.errors import ConfigError, DataError

SMALL = ("--languages", "en", "--distances", "1, 2", "--held-out-distances", "", "--count", 12, "--held-out-count", 3)


def test_it_tells_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    text = " ".join(run("recall", tmp_path / "talks", *SMALL).stdout.split())
    assert "Wrote 30 dialogues of up to 8 turns, in 4 files, to" in text
    assert "Sources to train on: recall-d1-en, recall-d2-en." in text
    assert "Next: rxt-dist data interactions" in text
    value = as_json("recall", tmp_path / "talks", *SMALL)
    assert value["turns"] == 8
    assert value["files"]["held-out/en-d2-values.jsonl"] == {
        "source": "recall-d2-values-en", "dialogues": 3, "held_out": True,
    }  # fmt: skip
    for name, file in value["files"].items():
        assert len((tmp_path / "talks" / name).read_text().splitlines()) == file["dialogues"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (("--distances", "1,two"), ConfigError, "--distances is '1,two'; it is whole numbers with commas between them"),
        (("--held-out-distances", "2"), ConfigError, "a distance is trained or held out"),
        (("--seed", 5), DataError, "of another request (other seed)"),
    ],
)
def test_what_it_refuses(tmp_path: Path, options: tuple[object, ...], kind: type[Exception], message: str) -> None:
    run("recall", tmp_path / "talks", *SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "talks").rglob("*.*")}
    error = run("recall", tmp_path / "talks", *SMALL, *options).exception
    assert isinstance(error, kind)
    assert message in str(error)
    assert {path: path.read_bytes() for path in (tmp_path / "talks").rglob("*.*")} == before


def test_documents_of_the_same_files_never_hold_what_is_held_out(tmp_path: Path) -> None:
    import golden_inputs

    (tmp_path / "tok.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    as_json("recall", tmp_path / "talks", *SMALL)
    as_json("build", tmp_path / "talks", "--out", tmp_path / "texts", "--tokenizer", tmp_path / "tok.json",
            "--seq-len", 256, "--workers", 1, "--eval-fraction", 0)  # fmt: skip
    assert as_json("stats", tmp_path / "texts")["totals"]["documents"] == 24
    assert "User: " in as_json("show", tmp_path / "texts", "--position", 0)["documents"][0]["text"]


@pytest.mark.parametrize("written", range(3))
def test_a_kill_between_two_files_is_mended_by_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    from data_prep.recall import make

    class Killed(BaseException):
        """As a kill, no handler of the program's stops it."""

    write, done = make.write_atomic, []

    def counted(path: Path, content: str) -> None:
        if len(done) == written:
            raise Killed
        done.append(path)
        write(path, content)

    request = make.RecallRequest(("en",), (1, 2), (), count=12, held_out_count=3)
    make.write_recall(tmp_path / "whole", request)
    with monkeypatch.context() as patched:
        patched.setattr(make, "write_atomic", counted)
        with pytest.raises(Killed):
            make.write_recall(tmp_path / "out", request)
    assert len(list((tmp_path / "out").rglob("*.jsonl"))) == written
    make.write_recall(tmp_path / "out", request)
    contents = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}
                for root in (tmp_path / "whole", tmp_path / "out")]  # fmt: skip
    assert contents[0] == contents[1]
