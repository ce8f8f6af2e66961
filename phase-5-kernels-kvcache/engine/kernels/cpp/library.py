"""The compiled code: one library that all instruction sets share, and one per instruction set, built when needed.

SPECDEC_CPU_ISA=avx2 python generate.py --kernels cpp --prompt "from pathlib import"
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from common.errors import UserError

from .. import build

SOURCE = Path(__file__).resolve().parent / "src"
ISAS = ("avx512", "avx2", "portable")
# Best first. avx512-plain is AVX-512 without the bf16 and VNNI instructions.
OBJECTS = {"avx512": "isa_avx512_dot", "avx512-plain": "isa_avx512", "avx2": "isa_avx2", "portable": "isa_portable"}
SOURCES = ("bindings", "engine_setup", "engine", "draft", "drafters", "decode", "sampling", "pack", "threads", "isa")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-fno-trapping-math"]
EXACT = ["-ffp-contract=off"]  # a sum's bits must not depend on which loop the compiler fused
QUIET = ["-w"]
WIDE = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
OWN_FLAGS = {
    "bindings.cpp": ["-O1"],  # no arithmetic
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": WIDE,
    "isa_avx512_dot.cpp": [*WIDE, "-mavx512vnni", "-mavx512bf16"],
}
CPU_SECONDS = 52  # to compile one instruction set and the shared library


def find_compiler() -> str | None:
    """Return the C++ compiler: CXX, or the first of g++, clang++, c++ on the PATH; None without one."""
    asked = os.environ.get("CXX")
    return next((name for name in ([asked] if asked else ["g++", "clang++", "c++"]) if shutil.which(name)), None)


def why_not() -> str | None:
    """Return why the C++ backend cannot be built on this machine, or None. Compiles nothing."""
    if (reason := build.why_not()) is not None:
        return reason
    if not SOURCE.is_dir():
        return "the sources in C++ are not here"  # an exercise leaves them out
    if sys.platform not in ("linux", "darwin"):
        return f"the C++ kernels are written for Linux and macOS, and this is {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler (g++ or clang++) on the PATH"
    return None if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def make(name: str, sources: Sequence[str], cpu_seconds: float = 0) -> Path:
    """Build a library of these sources. BuildError with the compiler's message; UserError if nothing can be built."""
    if (reason := why_not()) is not None:
        raise UserError(f"--kernels cpp cannot run: {reason}")
    compiler = find_compiler()
    assert compiler is not None
    extra = os.environ.get("SPECDEC_CXXFLAGS", "").split()  # sanitizers, for instance
    return build.build(
        name,
        [SOURCE / f"{file}.cpp" for file in sources],
        compiler=compiler,
        flags=[*FLAGS, *EXACT, *QUIET, *build.python_flags(), *extra],
        own_flags=OWN_FLAGS,
        link_flags=["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ldl"],
        cpu_seconds=cpu_seconds,
    )


@lru_cache
def library() -> Any:
    """Return the module, with the best instruction set of this CPU loaded. Errors: see `make`.

    Both libraries are compiled in parallel. `load_isa` compiles other instruction sets.
    """
    best = best_isa()
    with ThreadPoolExecutor(1) as pool:
        isa = pool.submit(make, OBJECTS[best], [OBJECTS[best]], CPU_SECONDS)
        module = build.load_built("lab_cpp", lambda: make("lab_cpp", SOURCES))
        module.load_isa(str(isa.result()), f"lab_{OBJECTS[best]}")
    return module


@lru_cache
def has_isa(name: str) -> bool:
    """Return True if this CPU has the instruction set."""
    return bool(ctypes.CDLL(str(make("processor", ["processor"]))).processor_has(name.encode()))


def best_isa() -> str:
    """Return the best instruction set of this CPU: a key of OBJECTS."""
    return next(name for name in OBJECTS if has_isa(name))


@lru_cache
def load_isa(name: str) -> str:
    """Load an instruction set (a key of OBJECTS), compiled if necessary, and return its name."""
    if name != best_isa():
        library().load_isa(str(make(OBJECTS[name], [OBJECTS[name]], CPU_SECONDS)), f"lab_{OBJECTS[name]}")
    return name


def chosen_isa() -> str:
    """Return the instruction set: SPECDEC_CPU_ISA, or the CPU's best. UserError for one that the CPU lacks."""
    asked = os.environ.get("SPECDEC_CPU_ISA", "").lower()
    if asked not in ("", *ISAS, *OBJECTS):
        raise UserError(f"SPECDEC_CPU_ISA={asked} is unknown; use {', '.join(ISAS)}")
    if asked == "avx512" and not has_isa(asked):
        asked = "avx512-plain"
    if asked and not has_isa(asked):
        raise UserError(f"SPECDEC_CPU_ISA={asked}: this processor lacks it; its best is {best_isa()}")
    return load_isa(asked or best_isa())


def default_threads() -> int:
    """Return the number of physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def checked_threads(threads: int | None) -> int:
    """Return the thread count; None: the default. UserError below 1; a note for more threads than processors."""
    if threads is None:
        return default_threads()
    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    there = os.cpu_count() or 1
    if threads > there:
        print(f"note: {threads} threads on {there} processors: they will wait for one another", file=sys.stderr)
    return threads
