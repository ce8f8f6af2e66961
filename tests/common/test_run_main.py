"""run_main around small programs: signals, streams, and exit statuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.phases import ROOT

WAITS = """
import sys, time
from common.options import run_main

def main(arguments):
    try:
        print("began", flush=True)
        while True:
            time.sleep(0.01)  # short: Python sees a signal that comes just before a sleep only after it
    except KeyboardInterrupt:
        print("kept")
        return 130

run_main(main, [])
"""
WRITES = """
from common.options import run_main

def main(arguments):
    print("text")
    return 0

run_main(main, [])
"""


def take_signals() -> None:
    """Set default handlers, whatever this process has inherited as a background job."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(program: str, *before: str, stdout: Any = None) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", program]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=stdout, stderr=subprocess.PIPE, preexec_fn=take_signals
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_an_interrupt_with_its_own_status(number: int, status: int) -> None:
    process = start(WAITS, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (status, "kept\n", "")


def test_nohup_still_holds_off_a_hangup() -> None:
    process = start(WAITS, "sh", "-c", 'trap "" HUP; exec "$@"', "sh", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # the first one did nothing
    process.communicate(timeout=300)
    assert process.returncode == 143


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = start(WRITES, stdout=full)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("error: the output cannot be written to its end: No space left")
    assert err.count("\n") == 1  # nothing more as Python ends


def test_a_closed_stdout_ends_in_one_line() -> None:
    process = start(WRITES, "sh", "-c", 'exec "$@" >&-', "sh")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("error: stdout is closed")
    assert err.count("\n") == 1


def test_messages_stay_off_stdout_where_stderr_is_closed() -> None:
    program = WRITES.replace('print("text")', 'import sys; print("text"); print("message", file=sys.stderr)')
    process = start(program, "sh", "-c", 'exec "$@" 2>&-', "sh", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "text\n")
