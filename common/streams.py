"""What a command line owes to its streams and signals: nothing is lost that was written, and one line says the rest.

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
    """Make stdout take any text, and stderr any message. UserError where stdout is closed.

    What an encoding such as ASCII or Latin-1 lacks is written as an escape (`\\u2192`); a note says so, once.
    """
    if sys.stderr is None:  # closed; without this, print(file=sys.stderr) would go to stdout
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
    """Let SIGTERM and SIGHUP interrupt as Ctrl-C does, by KeyboardInterrupt; gives the signals that came.

    A program has one ending: once it has begun, further ones are ignored. Signals that were ignored before stay so
    (nohup), and outside of the main thread nothing changes.
    """
    came = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    taken = [each for each in ENDING if signal.getsignal(each) == signal.SIG_DFL]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        came.append(number)
        raise KeyboardInterrupt

    for each in taken:
        signal.signal(each, interrupt)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from the one that was there during the imports
    try:
        yield came
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def say(message: str) -> None:
    """A line on stderr; where not even that can be written, the exit status has to do."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def release_stdout() -> None:
    """Write out what stdout still holds. Where that fails, drop it: Python would try again at its end, and complain."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
