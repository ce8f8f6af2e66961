"""The compiled library: one object per instruction set, of which the processor's best is chosen when a model is made.

SPECDEC_CPU_ISA=avx2 python generate.py --kernels cpp --prompt "import "
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from common.errors import UserError

from .. import build

SOURCE = Path(__file__).resolve().parent / "src"
ISAS = ("avx512", "avx2", "portable")
UNUSUAL = ("avx512-plain",)  # AVX-512 without the bf16 and VNNI instructions: for tests on processors that have them
SOURCES = ("bindings", "engine", "speculate", "sampling", "pack", "threads", "isa")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
EXACT = ["-ffp-contract=off"]  # a sum's bits must not depend on which loop the compiler fused
QUIET = ["-w"]
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
OWN_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": WIDE,
    "isa_avx512_dot.cpp": [*WIDE, "-mavx512vnni", "-mavx512bf16"],
}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def find_compiler() -> str | None:
    """The C++ compiler to use: CXX, or the first of g++, clang++, c++ that is there."""
    asked = os.environ.get("CXX")
    return next((name for name in ([asked] if asked else ["g++", "clang++", "c++"]) if shutil.which(name)), None)


def why_not() -> str | None:
    """Why the C++ backend cannot be had on this machine, or None. Nothing is compiled to find out."""
    if (reason := build.why_not()) is not None:
        return reason
    if not SOURCE.is_dir():
        return "the sources in C++ are not here"  # as in the folder of an exercise
    if sys.platform not in ("linux", "darwin"):
        return f"the C++ kernels are written for Linux and macOS, and this is {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler (g++ or clang++) on the PATH"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    return None


@lru_cache
def library() -> Any:
    """The module. BuildError with the compiler's message, UserError where nothing may or can be compiled."""
    if (reason := why_not()) is not None:
        raise UserError(f"--kernels cpp cannot run: {reason}")
    compiler = find_compiler()
    assert compiler is not None
    names = [*SOURCES, "isa_portable", *(["isa_avx2", "isa_avx512", "isa_avx512_dot"] if is_x86() else [])]
    extra = os.environ.get("SPECDEC_CXXFLAGS", "").split()  # sanitizers, for instance
    name = build.extension_name("cpp")
    return build.build_and_load(
        name,
        [SOURCE / f"{file}.cpp" for file in sorted(names, key=lambda file: not file.startswith("isa_"))],
        compiler=compiler,
        flags=[*FLAGS, *EXACT, *QUIET, *build.python_flags(), f"-DEXTENSION_NAME={name}", *extra],
        own_flags=OWN_FLAGS if is_x86() else {},
        link_flags=["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [],
    )


def chosen_isa() -> str:
    """The instruction set: SPECDEC_CPU_ISA, or the best that the processor has. UserError for one that it lacks."""
    asked = os.environ.get("SPECDEC_CPU_ISA", "").lower()
    if not asked:
        return str(library().best_isa())
    if asked not in (*ISAS, *UNUSUAL):
        raise UserError(f"SPECDEC_CPU_ISA={asked} is unknown; use {', '.join(ISAS)}")
    if not library().has_isa(asked):
        raise UserError(f"SPECDEC_CPU_ISA={asked}: this processor lacks it; its best is {library().best_isa()}")
    return asked


def default_threads() -> int:
    """Physical cores that this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def checked_threads(threads: int | None) -> int:
    """None: the default. UserError below 1; more than there are processors is noted, because it is slower."""
    if threads is None:
        return default_threads()
    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    there = os.cpu_count() or 1
    if threads > there:
        print(f"note: {threads} threads on {there} processors: they will wait for one another", file=sys.stderr)
    return threads
