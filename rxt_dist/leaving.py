"""How a process ends in which threads of native libraries run until its last moment."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

_threads_remain = False


def native_threads_remain() -> None:
    """Say that libraries have threads in this process which may outlast its program.

    Those of autograd do, and those of gloo's groups and of the store as long as an engine refers to them. Python needs
    up to a second to take torch's modules down; such a thread that wants the interpreter meanwhile ends the process by
    SIGABRT (pytorch/pytorch#190489), and a run that had finished would be one that crashed.
    """
    global _threads_remain
    _threads_remain = True


def run_program(main: Callable[[], None]) -> None:
    """Call the `main` of a program, which ends by `sys.exit`.

    Where native threads remain, the process then ends without taking Python down: with its own exit code, after the
    exit handlers that were registered in `main`, and with its output written.
    """
    code: int | None = None

    def cut_short() -> None:
        if _threads_remain and code is not None:
            _flush()
            os._exit(code & 0xFF)

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


def _flush() -> None:
    """Write what Python and C libraries hold back; whatever is wrong with that is not what ends this process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # Closed before the process began.
                stream.flush()
        except BrokenPipeError:  # Nobody reads it any more.
            pass
        except Exception as error:
            # Not by its number, which may be a file's by now where the terminal is closed.
            with suppress(Exception):
                print(f"warning: the last lines of the output are lost: {error}", file=sys.stderr, flush=True)
    ctypes.CDLL(None).fflush(None)
