"""Start Python programs without importing torch again: they are forked from a process that has imported it.

That process is multiprocessing's fork server. It has imported installed packages, none of the repository's modules, and
has no threads, so that no lock is held when it forks; the test's own process may have threads. Where a test is about
what is imported, about the memory of a process or about its first second, `subprocess` starts the program instead.

    done = run([sys.executable, "-c", "import phase2; print(phase2)"], cwd=ROOT)
    done.returncode, done.stdout, done.stderr
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

OWN = re.compile(r"(tests|common|phase\d+|engine|benchmarks|checks|instruments|ladder|training)(\.|$)")
# As a Python program starts, but that Ctrl-C ends it.
SIGNALS: dict[int, signal.Handlers] = {
    signal.SIGINT: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGPIPE: signal.SIG_IGN,
    signal.SIGALRM: signal.SIG_DFL,
}
IMPORTED = [
    "torch",
    "numpy",
    "pydantic",
    "pydantic_settings",
    "rich.console",
    "tokenizers",
    "safetensors.torch",
    "scipy.stats",
    "pandas",
    "matplotlib.pyplot",
    "pytest",
    "hypothesis",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


class File:
    """A file descriptor that is passed to a forked program."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.number)

    def __setstate__(self, passed: Any) -> None:
        self.number = passed.detach()


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
        reading, writing = os.pipe() if stdout == subprocess.PIPE else (None, None)
        nothing = os.open(os.devnull, os.O_RDWR)
        given = (stdin, stdout if writing is None else writing, stderr)
        numbers = [
            number if each is None else nothing if each == subprocess.DEVNULL else each
            for number, each in enumerate(given)
        ]
        files = [File(each if isinstance(each, int) else each.fileno()) for each in numbers]
        folder, variables = str(Path(cwd or ".").resolve()), dict(os.environ if env is None else env)
        self.process = SERVER.Process(target=_become, args=(self.args[1:], folder, variables, files))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        for number in (nothing, writing):
            if number is not None:
                os.close(number)
        self.stdout = None if reading is None else os.fdopen(reading, encoding="utf-8")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout:
            self.stdout.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


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


def _become(arguments: list[str], cwd: str, env: dict[str, str], files: list[File]) -> None:
    """Run the program in this process, and end it."""
    status = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file.number, number)
        for number, handler in SIGNALS.items():
            signal.signal(number, handler)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(open(number, mode, buffering=0, closefd=False), "utf-8", write_through=number == 2)  # noqa: SIM115
            for number, mode in enumerate(("rb", "wb", "wb"))
        )
        for name in [name for name in sys.modules if OWN.match(name)]:
            del sys.modules[name]
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
        added = env.get("PYTHONPATH", "").split(os.pathsep)
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
