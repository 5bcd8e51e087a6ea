"""Reports of runs of every kind: whole, empty, short, damaged, named by an enemy, long; alone and beside each other."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from run_logs import Log, a_run, moment

from rxt_dist.report.build import as_json, read_series, write_report
from rxt_dist.report.catalogue import NAMES
from rxt_dist.report.pictures import short_time, shown_name
from rxt_dist.report.series import smoothed, thinned

# A layout that fails, a glyph that is missing, a sum that overflows: all of them are told by warnings.
pytestmark = pytest.mark.filterwarnings("error")
NOW = moment(10**6)
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(*paths: Path, out: Path | None = None) -> tuple[Page, set[str]]:
    """The page of these runs, and the names of its pictures."""
    out = out or paths[0]
    page = Page(write_report(read_series(paths, NOW), out, NOW))
    pictures = {path.stem: path.read_bytes() for path in (out / "report").glob("*.png")}
    assert all(content.startswith(PNG) for content in pictures.values())
    assert not [path for path in (out / "report").iterdir() if path.suffix != ".png"]
    assert len(page.all("img")) == len(pictures)
    assert all(image["alt"] and str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    return page, set(pictures)


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path) -> None:
    log = a_run(tmp_path / "one")
    before = {path.name: path.read_bytes() for path in log.path.iterdir()}
    page, pictures = report(log.path)
    assert pictures == set(NAMES)
    for text in ("finished", "3 lives", "productive steps", "rank 1 was killed by signal 9", "<b>loss</b>", "mlm_loss"):
        assert text in page.text, text
    # Of the run nothing else is written.
    assert {path.name: path.read_bytes() for path in log.path.iterdir() if path.is_file()}.keys() == {
        *before,
        "report.html",
    }
    assert all((log.path / name).read_bytes() == content for name, content in before.items())


@pytest.mark.slow
def test_several_runs_beside_each_other(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / name / "run", lines=9, seed=seed).path for seed, name in enumerate("ab")]
    page, pictures = report(*paths, out=tmp_path / "both")
    assert pictures == set(NAMES)
    assert "optimizer.lr" in page.text
    assert all(str(path) in page.text for path in paths), "runs of one name are told apart by their folders"
    assert not (paths[0] / "report.html").exists()


@pytest.mark.slow
def test_runs_with_little_to_show(tmp_path: Path) -> None:
    empty = Log(tmp_path / "empty")
    page, pictures = report(empty.path)
    assert ("No figures yet" in page.text, pictures) == (True, set())
    one = Log(tmp_path / "one").line(5, 1, tokens=512, step_s=1.0, mlm_loss=3.0, lr=1e-3)
    assert report(one.path)[1] == {"goodput", "loss", "learning-rate", "throughput", "progress"}
    nothing = Log(tmp_path / "nan").line(5, 1, tokens=512, ar_loss=None, expert_load_max=[None, None])
    assert report(nothing.path)[1] <= {"goodput", "progress"}
    both, pictures = report(one.path, empty.path, nothing.path, out=tmp_path)
    assert "loss" in pictures
    assert both.text.count("no step yet") == 1


def test_pictures_of_an_earlier_report_go(tmp_path: Path) -> None:
    log = Log(tmp_path / "a").line(5, 1, tokens=512, lr=1.0, mlm_loss=1.0)
    assert "loss" in report(log.path)[1]
    (log.path / "metrics.jsonl").write_text("")
    assert report(log.path)[1] == set()


@pytest.mark.slow
def test_names_of_an_enemy_are_text(tmp_path: Path) -> None:
    bad = '<img src=x onerror=alert(1)>"&$x_{$\\'
    log = Log(tmp_path / bad)
    log.event(1, f"<script>{bad}</script>", reason=bad).event(1, "exit", reason=bad, code=1, life="</td>")
    log.line(2, 1, tokens=512, **{f"{bad}_loss": 1.0, "expert_load_max[x": 1.0, "expert_load_max": [2.0, 1.0]})
    log.line(
        2, 1, tokens=512, **{f"eval/{bad}/{bad}/ar_accuracy": 0.5, "eval/": 1.0, "eval//": 2.0, "eval/_/b_loss": 1.0}
    )
    log.line(3, 2, tokens=1024, lr=1.0)
    page, _ = report(log.path, log.path)
    assert bad in page.text
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert all(image["src"] != "x" for image in page.all("img"))


@pytest.mark.slow
def test_values_without_sense(tmp_path: Path) -> None:
    log = Log(tmp_path / "a")
    values = [1e308, -1e308, 0, None, "x", 5e-324, -1, 1e-3, float("nan"), True, [1, None], 10**400]
    names = (
        "tokens",
        "ar_loss",
        "grad_norm",
        "tokens_per_s",
        "mfu",
        "lr",
        "expert_load_max",
        "noise",
        "steps",
        "step_s",
    )
    for step in range(1, 2 * len(values)):
        figures = {name: values[(step + at) % len(values)] for at, name in enumerate(names)}
        log.line(step, step, **figures)
        log.event(step, "save", step=values[step % len(values)], seconds=values[(step + 1) % len(values)])
        log.line(step, step, **{"tokens": step, "eval/en/true/ar_accuracy": values[step % len(values)]})
    assert "loss" in report(log.path)[1]


@pytest.mark.slow
def test_a_long_run_takes_seconds(tmp_path: Path) -> None:
    log = a_run(tmp_path / "long", lines=30_000)
    began = time.monotonic()
    _, pictures = report(log.path)
    assert pictures == set(NAMES)
    assert time.monotonic() - began < 30, "3 s on a quiet machine"
    assert (log.path / "report.html").stat().st_size < 4e6


def test_a_run_that_is_written_meanwhile(tmp_path: Path) -> None:
    log = a_run(tmp_path / "a", lines=9)
    log.raw("metrics.jsonl", '{"step": 91, "tok').raw("events.jsonl", '{"time": "2026-')
    (run,) = as_json(read_series([log.path], NOW))
    assert run["last"]["step"] == 90
    assert run["goodput"]["state"] == "finished"
    assert sum(run["goodput"]["seconds"].values()) == pytest.approx(run["goodput"]["wall_s"])
    assert run["events"]["start"] == 3
    json.dumps(run, allow_nan=False)


def test_thinning_keeps_extremes_and_gaps() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[31_337], y[77_777], y[50_000:60_000] = 9.0, -9.0, np.nan
    thin_x, thin_y = thinned(x, y, buckets=300)
    assert len(thin_x) <= 602
    assert (np.nanmax(thin_y), np.nanmin(thin_y)) == (9.0, -9.0)
    assert np.isnan(thin_y[(thin_x > 50_400) & (thin_x < 59_600)]).all()
    assert (thin_x[0], thin_x[-1]) == (0, 99_999)
    assert (np.diff(thin_x) > 0).all()
    assert thinned(x[:10], y[:10])[0] is not None


def test_a_smooth_line_leaves_out_what_is_not_finite() -> None:
    y = np.array([1.0, np.nan, 3.0, 5.0, np.inf])
    assert smoothed(y, 3).tolist() == [1.0, 2.0, 4.0, 4.0, 5.0]
    assert np.isnan(smoothed(np.array([np.nan]), 3)).all()


def test_texts_of_pictures() -> None:
    assert [short_time(s) for s in (0, 8, 90, 7200, 86400 * 5)] == ["0 s", "8 s", "1.5 min", "2 h", "5 d"]
    assert shown_name("_a$b\n") == r" _a\$b?"
    assert len(shown_name("x" * 300)) == 28
    assert re.fullmatch(r"x+…x+", shown_name("x" * 300))
