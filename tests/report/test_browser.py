"""The page as a browser shows it: no errors, every picture decoded, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from run_logs import a_run, moment

from rxt_dist.report.build import read_series, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
# The page forbids scripts; the copy that is looked at has one, which says what the browser made of it.
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => image.naturalWidth);
  const found = {images, page: document.documentElement.scrollWidth, window: innerWidth};
  document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
});</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH ({', '.join(NAMES)}): apt-get install chromium"),
]


def dump(page: Path, width: int, tmp_path: Path) -> tuple[str, str]:
    """The document after loading, and what the browser wrote of its console."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def found_in(document: str) -> dict[str, Any]:
    """What the script of the copy said: the last text of this form, since the first stands in the script."""
    found: dict[str, Any] = json.loads(unescape(re.findall(r'<pre id="found">(.*?)</pre>', document)[-1]))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    paths = [a_run(folder / name, seed=seed).path for seed, name in enumerate(("one", "two"))]
    now = moment(10**6)
    return write_report(read_series(paths, now), folder, now)


def test_no_errors(page: Path, tmp_path: Path) -> None:
    document, console = dump(page, 1200, tmp_path)
    assert console == ""
    assert "Goodput" in document


@pytest.mark.parametrize("width", [1200, 500])
def test_pictures_are_there_and_nothing_is_wider_than_the_window(page: Path, width: int, tmp_path: Path) -> None:
    content = page.read_text(encoding="utf-8")
    content = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", content).replace("</body>", LOOK)
    copy = tmp_path / "copy.html"
    copy.write_text(content, encoding="utf-8")
    document, console = dump(copy, width, tmp_path)
    assert console == ""
    found = found_in(document)
    assert len(found["images"]) == 11
    assert min(found["images"]) > 600
    assert found["page"] <= found["window"]


def test_the_look_finds_what_is_wrong(tmp_path: Path) -> None:
    """A picture that does not decode, an error of the console, a page that is too wide."""
    bad = tmp_path / "bad.html"
    wide = '<div style="width:3000px">x</div><img src="data:image/png;base64,AAAA"><script>nothing()</script>'
    bad.write_text(f"<!doctype html><body>{wide}{LOOK}")
    document, console = dump(bad, 1200, tmp_path)
    found = found_in(document)
    assert found["images"] == [0]
    assert found["page"] > found["window"]
    assert "nothing is not defined" in console
