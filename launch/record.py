"""What a launcher leaves in a run directory: logs/launcher.log, and the end of each life as an event.

A launch that is refused leaves nothing. So lines are held back until the run says that this launcher's life has begun.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from rxt_dist.errors import UserError
from rxt_dist.finished import COMMITTED
from rxt_dist.train.events import EventLog, now, parse_line, read_lines


class Record:
    """The launcher's part of a run directory; None: there is none. Whatever fails here is no reason to end a run."""

    def __init__(self, run: Path | None) -> None:
        self.run = run
        self._held: list[str] = []
        self._life = ""
        # Whether the present life has taken the run, and whether any has.
        self.begun = self.has_begun = False
        # Whether a life has taken the run and done what comes before all training.
        self.has_started = False

    @property
    def logs(self) -> Path | None:
        """Where ranks have their log files, once this launcher's life has begun."""
        return self.run / "logs" if self.run and self.begun else None

    def new_life(self, token: str) -> None:
        """From here on this launcher's life is `token`."""
        self._life, self.begun = token, False

    def line(self, text: str) -> None:
        """A line of logs/launcher.log."""
        self._held.append(f"{now()} {text}\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines, if the run is in this launcher's life or was in an earlier one of it."""
        if self.run is None:
            return
        with suppress(OSError):
            if not self.begun:
                described = parse_line((self.run / "life.json").read_bytes()) or {}
                self.begun = described.get("life") == self._life
                self.has_begun |= self.begun
            if self.has_begun and self._held:
                with open(self.run / "logs/launcher.log", "a", encoding="utf-8") as file:
                    file.write("".join(self._held))
                self._held.clear()

    def ended(self, code: int, reason: str) -> str:
        """The end of a life: a line, and an event unless the run has written it itself. Returns the reason that the
        run gave, else `reason`."""
        self.flush()
        told = self._told() if self.begun else None
        self.has_started |= self.run is None or bool(self._events("start"))
        reason = told or reason
        self.line(f"life {self._life} ended with exit code {code}: {reason}")
        if self.begun and self.run is not None and told is None:
            with suppress(OSError, UserError):
                steps = [line["step"] for line in read_lines(self.run / "metrics.jsonl") if "step" in line]
                step = steps[-1] if steps else 0
                EventLog(self.run / "events.jsonl").append("exit", code=code, reason=reason, step=step, life=self._life)
        return reason

    def _told(self) -> str | None:
        """Why this life ended, if the run has said so."""
        exits = self._events("exit")
        return str(exits[-1].get("reason")) if exits else None

    def _events(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind of this life; none where they cannot be read."""
        with suppress(OSError):
            events = EventLog(self.run / "events.jsonl").read() if self.run else []
            return [event for event in events if event["kind"] == kind and event.get("life") == self._life]
        return []

    def gave_up(self, reasons: list[str]) -> None:
        """The event of a crash loop."""
        if self.run is not None and self.begun:
            with suppress(OSError, UserError):
                EventLog(self.run / "events.jsonl").append("crash_loop", lives=reasons)

    def committed(self) -> frozenset[tuple[str, int]]:
        """The committed checkpoints, each as name and inode: one of a step that was gone back from is another one."""
        try:
            paths = list((self.run / "checkpoints").iterdir()) if self.run else []
            return frozenset((path.name, path.stat().st_ino) for path in paths if COMMITTED.fullmatch(path.name))
        except OSError:
            return frozenset()
