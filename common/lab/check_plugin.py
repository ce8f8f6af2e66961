"""The process in which `lab check` runs the tests: here `import phase2` means only the learner's folder.

It reads a request (JSON) from stdin, runs pytest, and writes one JSON line for each test as it ends. The package is
imported from the folder, which has every module of the shipped phase (check.py refuses one that lacks any). `phases()`,
and the processes that a test starts, see the folder in the shipped phase's place. At the end, loaded modules from other
folders are reported.

    echo '{"phase": 2, "folder": "my-phase-2", "order": [], "limit": 60, "pytest": ["tests/phase2"]}' \\
        | python -B -m common.lab.check_plugin
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TextIO
from unittest import mock

import hypothesis
import pytest
import torch

from common.lab.stubs import NOT_WRITTEN
from common.phases import ROOT, Phase, phases

LONGEST = 400  # characters of a shown value


class FolderFinder(MetaPathFinder):
    """Finds one package and its submodules in one folder."""

    def __init__(self, package: str, folder: Path) -> None:
        self.package, self.folder = package, folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == self.package:
            file = self.folder / "__init__.py"
            return spec_from_file_location(name, file, submodule_search_locations=[str(self.folder)])
        if name.startswith(f"{self.package}."):
            return PathFinder.find_spec(name, path)
        return None


class TookTooLongError(BaseException):
    """A test took too long. Not an Exception, so that neither the tested code nor hypothesis catches it."""


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raise after so many seconds of this process's CPU time, or five times as many on the clock.

    The clock runs while other programs have the CPU, and while a test waits for processes that it has started.
    """

    def stop(*_: object) -> None:
        raise TookTooLongError(f"stopped after {seconds:g} s: is it endless?")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 5 * seconds)}
    previous = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


class Reporter:
    """The pytest plugin: selects and orders the tests, and reports the result of each."""

    def __init__(self, phase: Phase, order: list[str], limit: float, out: TextIO) -> None:
        self.phase, self.order, self.limit, self.out = phase, order, limit, out
        self.compared: tuple[str, str] | None = None
        self.reported: set[str] = set()

    def write(self, **line: object) -> None:
        print(json.dumps(line), file=self.out, flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = sorted(kept, key=self._rank)
        self.write(total=len(items))

    def _wanted(self, item: pytest.Item) -> bool:
        """Return whether it is a test of this phase, or one of every phase run with this one."""
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        phase = parameters.get("phase")
        return phase.number == self.phase.number if phase else item.path.parent.name == self.phase.package

    def _rank(self, item: pytest.Item) -> tuple[bool, int]:
        """Order tests about one function first, in the order in which the functions are to be written."""
        own = item.path.parent.name == self.phase.package
        about = _about(item)
        return not own, self.order.index(about) if about in self.order else len(self.order)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        self.compared = None
        with time_limit(self.limit):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        with time_limit(self.limit):
            yield

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Remember the last failed comparison; the tests of this repository put the actual value on the left."""
        self.compared = (_shown(right) if op == "==" else f"{op} {_shown(right)}", _shown(left))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._report(item, **self._outcome(report, call))
            if call.excinfo and call.excinfo.errisinstance(TookTooLongError):
                item.session.shouldstop = (
                    "a test that does not end"  # other tests of the same function would not end either
                )
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for item in session.items:
            if item.nodeid not in self.reported:
                self._report(item, outcome="not run")

    def _report(self, item: pytest.Item, **outcome: object) -> None:
        self.reported.add(item.nodeid)
        title = item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
        group = _about(item) or _first_line(getattr(item, "module", None))
        line = {"test": item.nodeid, "own": item.path.parent.name == self.phase.package, "title": title, "group": group}
        self.write(**line, words=_first_line(getattr(item, "function", None)), about=_about(item), **outcome)

    def _outcome(self, report: pytest.TestReport, call: pytest.CallInfo[None]) -> dict[str, object]:
        if not report.failed:
            return {"outcome": "passes" if report.passed else "skipped"}
        assert call.excinfo is not None
        error = call.excinfo.value
        text = str(error)
        outcome: dict[str, object] = {"outcome": "fails", "message": text, "where": self._where(error.__traceback__)}
        if isinstance(error, NotImplementedError) and NOT_WRITTEN.match(text):
            outcome["outcome"] = "not written yet"
        elif isinstance(error, AssertionError):
            message = text.partition("\nassert ")[0] if not text.startswith("assert ") else ""
            expected, got = self.compared or (None, None)
            outcome |= {"message": message if self.compared else text, "expected": expected, "got": got}
        elif not isinstance(error, TookTooLongError):
            outcome["message"] = f"{type(error).__name__}: {text}"
        return outcome

    def _where(self, trace: TracebackType | None) -> list[str]:
        """List the engine's running functions, the innermost last, as `engine/verify.py, verify`."""
        frames = []
        for frame, line in traceback.walk_tb(trace):
            file = Path(frame.f_code.co_filename).resolve()
            if file.is_relative_to(self.phase.folder):
                name = frame.f_code.co_qualname.partition(".<locals>")[0]
                frames.append(f"{file.relative_to(self.phase.folder).as_posix()}, {name}, line {line}")
        return frames

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(broken=report.nodeid, message=str(report.longrepr).strip().splitlines()[-1].removeprefix("E   "))


def _about(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("about")
    return str(marker.args[0]) if marker else None


def _first_line(documented: object) -> str:
    return (inspect.getdoc(documented) or "").split("\n")[0]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def import_all(package: str, folder: Path) -> str | None:
    """Import every module of the package in a folder; return the first error in words, or None."""
    try:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            importlib.import_module(found.name)
    except BaseException as error:  # any error of the learner's code
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
        where = f"{Path(frames[-1].filename).relative_to(folder.parent)}, line {frames[-1].lineno}: " if frames else ""
        return where + " ".join(f"{type(error).__name__}: {error}".split())
    return None


def outside(package: str, folder: Path) -> list[str]:
    """List modules of the package that were loaded from another folder."""
    modules = [(name, m) for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    files = [(name, getattr(m, "__file__", None) or next(iter(m.__path__))) for name, m in modules]
    return [f"{name} ({file})" for name, file in files if not Path(file).resolve().is_relative_to(folder)]


def main(request: dict[str, Any]) -> int:
    out = os.fdopen(os.dup(1), "w")  # output of pytest and the tests is discarded
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # decided as the engine is imported, before any conftest.py
    here, folder = Path.cwd(), Path(request["folder"])
    shipped = phases(here)
    found = [dataclasses.replace(p, folder=folder) if p.number == request["phase"] else p for p in shipped]

    def with_folder(root: Path = ROOT) -> list[Phase]:
        """As common.phases.phases, with the checked folder in place of the shipped one."""
        return found if root in (ROOT, here) else phases(root)

    phase = next(p for p in found if p.number == request["phase"])
    engine = folder / "engine"
    reporter = Reporter(phase, request["order"], request["limit"], out)
    phases_of_search = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # no shrinking, which takes minutes
    hypothesis.settings.register_profile("lab check", deadline=None, database=None, phases=phases_of_search)
    status = 0
    sys.meta_path.insert(0, FolderFinder(phase.package, engine))
    with tempfile.TemporaryDirectory() as scratch, mock.patch("common.phases.phases", with_folder):
        Path(scratch, phase.package).symlink_to(engine)  # for the processes that tests start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [scratch, os.environ.get("PYTHONPATH")]))
        if error := import_all(phase.package, engine):
            reporter.write(broken="engine", message=error)
        else:
            settings = ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile=lab check", "--hypothesis-seed=0"]
            status = pytest.main([*request["pytest"], *settings], plugins=[reporter])
    reporter.write(outside=outside(phase.package, engine))
    return status if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR) else 0


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
