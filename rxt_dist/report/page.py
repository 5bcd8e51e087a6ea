"""A report as one page that needs nothing else: no network, no scripts, pictures inside it, any text escaped."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from rxt_dist.report.catalogue import Picture
from rxt_dist.report.goodput import PARTS
from rxt_dist.report.pictures import short_time
from rxt_dist.report.series import RunSeries

_LONGEST_TEXT = 160
_MOST_LIVES, _MOST_DIFFERENCES = 30, 100
# Nothing is loaded from anywhere, whatever a name or an event may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --ground: #f6f8fa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --ground: #121314; --card: #1c1c1c; }
  figure img { filter: invert(0.89) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
p { margin: .2rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.pictures { columns: 2 30rem; column-gap: 1rem; }
.pictures > figure { break-inside: avoid; margin-bottom: 1rem; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.card, figure { margin: 0; padding: .9rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; min-width: 0; }
.wide { column-span: all; }
.big { font-size: 1.7rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 26rem; height: auto; }
.wide img { min-width: 36rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, .text td, .text th { text-align: left; }
.text td:last-child { overflow-wrap: anywhere; min-width: 12rem; }
thead th { color: var(--soft); font-weight: 600; }
details { margin-top: .5rem; } summary { cursor: pointer; color: var(--soft); font-size: .875rem; }
progress { width: 100%; height: .6rem; }
"""


def page(runs: Sequence[RunSeries], pictures: Sequence[Picture], now: float) -> str:
    """The page of one run or several, as HTML."""
    names = ", ".join(run.name for run in runs)
    when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    body = [
        f"<h1>{_text(names, 400)}</h1>",
        f'<p class="soft">As of {when}. Pictures have the tokens trained as their axis.</p>',
        f'<div class="tiles" style="margin-top:1rem">{"".join(_tile(run) for run in runs)}</div>',
        "<h2>Pictures</h2>" if pictures else "<h2>No figures yet</h2>",
        f'<div class="pictures">{"".join(_figure(picture, runs) for picture in pictures)}</div>',
        "<h2>Where the wall time went</h2>",
        _goodput_table(runs),
        "<h2>Lives</h2>",
        "".join(_lives(run, len(runs) > 1) for run in runs),
        "<h2>Events</h2>",
        "".join(_events(run, len(runs) > 1) for run in runs),
    ]
    if len(runs) > 1:
        body += ["<h2>Differences of configuration</h2>", _differences(runs)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<title>{_text(names, 80)}: report</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def tokens_text(tokens: float) -> str:
    """1.23 B tokens and the like, without the word."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def time_left(run: RunSeries) -> float:
    """Seconds to the end of the budget at the pace of the wall time so far; nan where that is not known."""
    wall, done, total = run.goodput.wall_s, run.last_tokens, run.total_tokens
    return wall * (total - done) / done if wall and done and total >= done else math.nan


def fields_of(event: Mapping[str, Any]) -> str:
    """What an event says besides its kind and time."""
    told = {name: value for name, value in event.items() if name not in ("time", "kind")}
    return ", ".join(f"{name} {f'{value:.6g}' if isinstance(value, float) else value}" for name, value in told.items())


def when_of(event: Mapping[str, Any]) -> str:
    """The second of an event, UTC."""
    return str(event.get("time", ""))[:19].replace("T", " ")


def _tile(run: RunSeries) -> str:
    good = run.goodput
    step = run.files.training.last("step")
    facts = [f"step {step:,.0f}" if math.isfinite(step) else "no step yet"]
    bar = ""
    if run.total_tokens > 0:
        share = min(1.0, run.last_tokens / run.total_tokens)
        facts.append(f"{tokens_text(run.last_tokens)} of {tokens_text(run.total_tokens)} tokens")
        bar = f'<progress max="1" value="{share:.4f}" aria-label="tokens trained">{100 * share:.1f} %</progress>'
    left = time_left(run)
    if good.state == "running" and math.isfinite(left):
        facts.append(f"about {short_time(left)} left at this pace")
    lives = f"{len(good.lives)} {'life' if len(good.lives) == 1 else 'lives'} in {short_time(good.wall_s)}"
    return (
        f'<section class="card"><h3>{_text(run.name)}</h3><p class="soft">{_text(good.state)}</p>'
        f'<p class="big">{100 * good.share["productive"]:.1f} %</p><p class="soft">of the wall time in productive '
        f"steps; {lives}</p>{bar}<p>{'; '.join(facts)}</p></section>"
    )


def _figure(picture: Picture, runs: Sequence[RunSeries]) -> str:
    data = base64.b64encode(picture.png).decode()
    rows = [(column, run) for column in picture.columns for run in runs if run.has(column)]
    last = [f"{column} {_number(_last(run, column))}" for column, run in rows[:4]]
    alt = " ".join([picture.text, f"Last values: {', '.join(last)}." if last else ""]).strip()
    return (
        f"<figure{' class=' + chr(34) + 'wide' + chr(34) if picture.wide else ''}><h3>{escape(picture.title)}</h3>"
        f'<div class="scroll"><img alt="{_text(alt, 400)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(picture.text)}</figcaption>{_values(rows, len(runs) > 1)}</figure>"
    )


def _values(rows: Sequence[tuple[str, RunSeries]], several: bool) -> str:
    """A table of what a picture shows, closed until somebody wants it."""
    if not rows:
        return ""
    lines = []
    for column, run in rows:
        y = run.figure(column)[1]
        finite = y[np.isfinite(y)]
        name = f"{column} of {run.name}" if several else column
        lines.append((name, *map(_number, (_last(run, column), finite.min(), finite.max()))))
    table = _table(("figure", "last", "least", "greatest"), lines)
    return f"<details><summary>Last values</summary>{table}</details>"


def _last(run: RunSeries, column: str) -> float:
    y = run.figure(column)[1]
    finite = y[np.isfinite(y)]
    return float(finite[-1]) if len(finite) else math.nan


def _goodput_table(runs: Sequence[RunSeries]) -> str:
    cells = [
        (title, *(f"{100 * run.goodput.share[part]:.2f} % ({short_time(run.goodput.seconds[part])})" for run in runs))
        for part, title in PARTS.items()
    ]
    cells.append(("wall time", *(short_time(run.goodput.wall_s) for run in runs)))
    return _card(_table(("part", *(run.name for run in runs)), cells))


def _lives(run: RunSeries, several: bool) -> str:
    lives = list(enumerate(run.goodput.lives, 1))
    rows = []
    for index, life in lives[-_MOST_LIVES:]:
        began = datetime.fromtimestamp(life.launched / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        spent = [life.end - life.launched, life.parts["startup"], life.parts["recomputed"]]
        ended = life.ended or "no word of its end"
        rows.append((str(index), began, ended, f"{life.steps:,}", *(short_time(ms / 1000) for ms in spent)))
    head = ("life", "launched (UTC)", "how it ended", "steps kept", "lasted", "start-up", "recomputed")
    more = len(lives) - len(rows)
    note = f'<p class="soft">The last {len(rows)}; {more} came before.</p>' if more else ""
    return _card((f"<h3>{_text(run.name)}</h3>" if several else "") + note + _table(head, rows, text=True))


def _events(run: RunSeries, several: bool) -> str:
    counts = Counter(str(event["kind"]) for event in run.files.events)
    last = {str(event["kind"]): event for event in run.files.events}
    rows = [(kind, f"{count:,}", when_of(last[kind]), fields_of(last[kind])) for kind, count in counts.items()]
    head = ("kind", "number", "last at (UTC)", "the last one")
    return _card((f"<h3>{_text(run.name)}</h3>" if several else "") + _table(head, rows, text=True))


def _differences(runs: Sequence[RunSeries]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.files.settings)
    rows = []
    for key in keys:
        values = [str(run.files.settings.get(key, "absent")) for run in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    if not rows:
        return _card("<p>None.</p>")
    more = len(rows) - _MOST_DIFFERENCES
    note = f'<p class="soft">{more} more are not shown; rxt-dist diff has all.</p>' if more > 0 else ""
    return _card(_table(("key", *(run.name for run in runs)), rows[:_MOST_DIFFERENCES], text=True) + note)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: bool = False) -> str:
    heading = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    kind = ' class="text"' if text else ""
    body = f"<thead><tr>{heading}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def _card(content: str) -> str:
    return f'<div class="card" style="margin-bottom:1rem">{content}</div>'


def _text(value: str, longest: int = _LONGEST_TEXT) -> str:
    """Text as HTML: escaped, cut where it is too long, without what is no character."""
    shown = value if len(value) <= longest else value[: longest - 1] + "…"
    return escape("".join(character if character.isprintable() else " " for character in shown))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
