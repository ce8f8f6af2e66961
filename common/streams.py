"""Streams and signals of a command line: written output is not lost, and every failure is one line on stderr.

common/options.py, run_main, calls these around every program.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from common.errors import UserError

ENDING = (signal.SIGTERM, signal.SIGHUP)


def prepare_streams() -> None:
    """Make stdout accept any text, and stderr any message. UserError if stdout is closed.

    Characters that the encoding (such as ASCII or Latin-1) lacks are written as escapes (`\\u2192`), with one note.
    """
    if sys.stderr is None:  # closed; print(file=sys.stderr) would go to stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    if sys.stdout is None:
        raise UserError("stdout is closed, so nothing can be written: send it to a file, a pipe or /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        encoding = sys.stdout.encoding
        noted = list[str]()

        def escape(error: UnicodeError) -> tuple[str | bytes, int]:
            if not noted:
                noted.append(encoding)
                print(
                    f"note: stdout takes {encoding} only, and other characters are written as escapes; "
                    "PYTHONIOENCODING=utf-8 writes them as they are",
                    file=sys.stderr,
                )
            return codecs.backslashreplace_errors(error)

        codecs.register_error("escape", escape)
        sys.stdout.reconfigure(errors="escape")


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt like Ctrl-C; yields the list of received signals.

    A program ends once: after the first signal, further ones are ignored. Signals that were ignored before stay ignored
    (nohup), and outside of the main thread nothing changes.
    """
    came = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    handled = [each for each in ENDING if signal.getsignal(each) == signal.SIG_DFL]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        came.append(number)
        raise KeyboardInterrupt

    for each in handled:
        signal.signal(each, interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # replaces the handler of the imports
    try:
        yield came
    finally:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)


def say(message: str) -> None:
    """Print a line on stderr; if stderr is not writable either, only the exit status remains."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def release_stdout() -> None:
    """Flush stdout. On failure discard its buffer, because Python would retry at exit and complain."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
