"""The path of a step: how many calls lead from generate.py to the C++ engine, and how much code a step touches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import phase5
from phase5.cli import main

ENGINE = Path(phase5.__file__).resolve().parent
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # parts of the function around them
INTO_CPP = ("CppModel.step", "CppModel.decode")  # each calls the engine in C++


class Watch:
    """A profile function that collects the engine's functions, and the engine's frames above each call into C++."""

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.paths: list[list[str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not ours(frame) or code.co_name in COMPREHENSIONS:
            return
        self.functions.add((code.co_filename, code.co_qualname))
        if code.co_qualname in INTO_CPP:
            self.paths.append([*names(frame)][::-1])

    @property
    def files(self) -> set[str]:
        return {Path(file).name for file, _ in self.functions}


def ours(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).resolve().is_relative_to(ENGINE)


def names(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        if ours(frame):
            yield frame.f_code.co_qualname
        frame = frame.f_back


def test_hops_from_generate_to_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    """generate.py calls main, and the last frame calls the engine: one hop more than the path has frames."""
    watch = Watch()
    sys.setprofile(watch)
    try:
        main(["--prompt", "from pathlib import", "--max-tokens", "24", "--kernels", "cpp"])
    finally:
        sys.setprofile(None)
    hops = {" > ".join(path): len(path) + 1 for path in watch.paths}
    assert hops, "nothing ran in C++"
    assert max(hops.values()) <= 9, hops


@pytest.mark.parametrize("options", [{}, {"draft": "none"}, {"temperature": 1.0}], ids=str)
def test_code_that_a_step_touches(options: dict[str, Any]) -> None:
    """Steps from the 7th on, until the next call into C++: a fast machine makes more than twelve steps in one."""
    llm = phase5.LLM(phase5.Options(max_tokens=512, kernels="cpp", **options))
    loop = llm.run(llm.sequences(["from pathlib import"]))
    for _ in range(6):
        next(loop)
    watch = Watch()
    sys.setprofile(watch)
    try:
        for number, _ in enumerate(loop):
            if number >= 12 and watch.paths:
                break
    finally:
        sys.setprofile(None)
    assert watch.paths, "no call into C++ among these steps"
    assert len(watch.files) <= 14, sorted(watch.files)
    assert len(watch.functions) <= 40, sorted(name for _, name in watch.functions)
