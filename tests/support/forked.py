"""Start Python programs without importing torch again: a new process is forked from the test's.

It has the installed packages that the test's process has imported, and of the repository nothing: modules of `common`,
of the phases and of the tests are imported again. Where a test is about what is imported, about the memory of a process
or about its first second, `subprocess` starts the program instead.

    done = run([sys.executable, "-c", "import phase2; print(phase2)"], cwd=ROOT)
    done.returncode, done.stdout, done.stderr
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

OWN = re.compile(r"(tests|common|phase\d+|engine|benchmarks|checks|ladder|training)(\.|$)")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGALRM)


class Process:
    """A forked program, with the part of `subprocess.Popen` that its users need. Use `start`."""

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: IO[Any] | int | None = subprocess.DEVNULL,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        text: bool = True,
    ) -> None:
        assert str(command[0]) == sys.executable, "only Python programs"
        assert text
        self.args = [str(each) for each in command]
        self.returncode: int | None = None
        reading, writing = os.pipe() if stdout == subprocess.PIPE else (None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number, given in enumerate((stdin, writing if writing is not None else stdout, stderr)):
                _redirect(number, given)
            _become(self.args[1:], cwd, env)
        if writing is not None:
            os.close(writing)
        self.stdout = None if reading is None else os.fdopen(reading, encoding="utf-8")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout:
            self.stdout.close()
        self.wait()

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        status = self._ended(0)
        assert status is not None
        return status

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


# Other systems' libraries do not work after a fork.
start = Process if sys.platform == "linux" else subprocess.Popen


def run(
    command: Sequence[str | Path],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, like `subprocess.run(..., capture_output=True, text=True)`."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        status = start(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True).wait()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess([str(each) for each in command], status, out.read(), err.read())
    if check:
        done.check_returncode()
    return done


def _redirect(number: int, given: IO[Any] | int | None) -> None:
    if given is not None:
        source = os.open(os.devnull, os.O_RDWR) if given == subprocess.DEVNULL else given
        os.dup2(source if isinstance(source, int) else source.fileno(), number)


def _become(arguments: list[str], cwd: str | Path | None, env: Mapping[str, str] | None) -> None:
    """Run the program in this process, and end it."""
    status = 1
    faulthandler.disable()  # pytest's would write into pytest's output
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(open(number, mode, buffering=0, closefd=False), "utf-8", write_through=number == 2)  # noqa: SIM115
            for number, mode in enumerate(("rb", "wb", "wb"))
        )
        for name in [name for name in sys.modules if OWN.match(name)]:
            del sys.modules[name]
        sys.meta_path[:] = [each for each in sys.meta_path if not OWN.match(type(each).__module__)]
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            added = env.get("PYTHONPATH", "").split(os.pathsep)
            os.environ.clear()
            os.environ.update(env)
            sys.path[:0] = [folder for folder in added if folder and folder not in sys.path]
        status = _run(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(arguments: list[str]) -> int:
    """Return the exit status of `python *arguments`."""
    first, rest = arguments[0], arguments[1:]
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, "")
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = rest
            sys.path.insert(0, os.getcwd())
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0
