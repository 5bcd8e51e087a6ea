"""How a process ends in which threads of native libraries run until its last moment."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress

_threads_remain = False


def native_threads_remain() -> None:
    """Say that this process has threads, not of Python's, that end only with it: those of gloo's groups, of the store.

    While Python takes its modules down, a second in which torch's are the most, such a thread that wants the
    interpreter, or meets an object that is gone, ends the process by SIGABRT (pytorch/pytorch#38228, #179291): a run
    that had finished would be one that crashed.
    """
    global _threads_remain
    _threads_remain = True


def run_program(main: Callable[[], None]) -> None:
    """Call the `main` of a program, which ends by `sys.exit`.

    Where native threads remain, the process then ends without taking Python down: after all other exit handlers, with
    its output written, and with its own exit code.
    """
    code: int | None = None

    def cut_short() -> None:
        if _threads_remain and code is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # Closed, or nobody reads it.
                    stream.flush()
            os._exit(code)

    # Handlers are called last first, so those that come later are called before it.
    atexit.register(cut_short)
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except Exception:
        code = 1
        raise
