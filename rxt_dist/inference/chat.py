"""A conversation in a terminal: lines come in, answers stream out, lines that begin with / are commands."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import cast

from rxt_dist.errors import ConfigError, UserError, nearest
from rxt_dist.inference.assistant import Assistant
from rxt_dist.inference.events import Event, Token
from rxt_dist.inference.prompts import MODES, Mode, Prompt
from rxt_dist.inference.sampling import Sampling

HELP = """/save FILE    write this conversation into a file
/load FILE    go on with one that was saved
/reset        begin again, with the first memory
/memory       how far the last turn moved each layer's memory
/mode M       answer, think or auto
/tool RESULT  answer the model's call of a tool
/quit         end; so does the end of the input"""
_LABELS = {"think": "[thinking] ", "answer": "", "call": "[call] "}
_BAR = 30


class Chat:
    """One conversation at a time with one assistant.

    Args:
        read: gives the next line, None at the end; a KeyboardInterrupt ends the chat.
        write: takes text as it comes.
        system: instructions for the first memory of every new conversation.
    """

    def __init__(
        self,
        assistant: Assistant,
        sampling: Sampling,
        read: Callable[[], str | None],
        write: Callable[[str], None],
        *,
        seed: int = 0,
        mode: Mode = "answer",
        system: str | None = None,
    ) -> None:
        self._assistant, self._sampling, self._seed, self._system = assistant, sampling, seed, system
        self._read, self._write = read, write
        self._mode: Mode = mode
        self.session = assistant.session(seed, system)
        self._commands: dict[str, Callable[[str], bool]] = {
            "save": self._save,
            "load": self._load,
            "reset": self._reset,
            "memory": self._memory,
            "mode": self._set_mode,
            "tool": self._tool,
            "help": self._help,
            "quit": lambda _: False,
        }

    def run(self) -> None:
        """Until the input ends. What a person can mend is told, and the conversation goes on."""
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                line = None
            if line is None:
                return
            try:
                if not self._turn(line.strip()):
                    return
            except UserError as error:
                self._write(f"error: {error}\n")

    def _turn(self, line: str) -> bool:
        """Answer a line, or obey it; False at the end."""
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(Prompt(line, mode=self._mode))
            return True
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise ConfigError(f"There is no command /{name}.{nearest(name, self._commands)} /help lists them.")
        return self._commands[name](rest.strip())

    def _answer(self, prompt: Prompt) -> None:
        stream = cast("Generator[Event]", self._assistant.interact(self.session, prompt, self._sampling))
        part = None
        try:
            for event in stream:
                if not isinstance(event, Token):
                    # The write goes on in the background; the next line waits for it.
                    break
                if event.text and event.part != part:
                    self._write(("\n" if part else "") + _LABELS[event.part])
                    part = event.part
                self._write(event.text)
            self._write("\n")
        except KeyboardInterrupt:
            self._write(" [interrupted]\n")
        finally:
            stream.close()

    def _save(self, name: str) -> bool:
        self.session.save(_path(name, "/save"))
        self._write(f"saved after {self.session.turn} turns: {name}\n")
        return True

    def _load(self, name: str) -> bool:
        self.session = self._assistant.load_session(_path(name, "/load"))
        self._write(f"goes on after {self.session.turn} turns\n")
        return True

    def _reset(self, _: str) -> bool:
        self.session = self._assistant.session(self._seed, self._system)
        self._write("a new conversation\n")
        return True

    def _memory(self, _: str) -> bool:
        moved = self.session.moved
        longest = max(moved) or 1.0
        self._write(f"turn {self.session.turn}: |new - old| / |old| of each layer's memory\n")
        for layer, distance in enumerate(moved):
            self._write(f"{layer:>4}  {distance:8.4f}  {'#' * round(_BAR * distance / longest)}\n")
        return True

    def _set_mode(self, name: str) -> bool:
        if name not in MODES:
            raise ConfigError(f"/mode is '{name}', but it is one of {', '.join(MODES)}.")
        self._mode = name
        return True

    def _tool(self, result: str) -> bool:
        self._answer(Prompt(tool_result=result, mode=self._mode))
        return True

    def _help(self, _: str) -> bool:
        self._write(HELP + "\n")
        return True


def _path(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs the name of a file, for example {command} mine.session")
    return Path(name)
