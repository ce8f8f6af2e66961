"""The command line of the current phase, run within this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest

from common.options import run_main
from common.phases import Phase


@pytest.fixture
def cli(phase: Phase) -> ModuleType:
    return importlib.import_module(f"{phase.package}.cli")


@pytest.fixture
def run(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("--prompt", ...)`: return (exit status, stdout, stderr).

    The first run of a version of the C++ sources says that it compiles them; that line is left out.
    """

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run_main(cli.main, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines(keepends=True) if not line.startswith("note: compiling ")]
        return int(end.value.code or 0), out, "".join(lines)

    return call
