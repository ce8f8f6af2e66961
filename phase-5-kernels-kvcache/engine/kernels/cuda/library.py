"""The library of CUDA kernels: built by nvcc when it is first needed, for the card that is there.

SPECDEC_CUDA_ARCH=90a names another architecture. SPECDEC_CUDA_EMULATE=1 builds the same sources with g++, to run on the
CPU with a fiber for every CUDA thread (emulator.h): slow, and meant for tests.

    SPECDEC_CUDA_EMULATE=1 python -c "from engine.kernels.cuda import library as l; print(l.library(l.CPU))"
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from common.errors import UserError
from common.flags import flag

from .. import build

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent
SOURCES = (
    "bindings.cpp",
    "norm.cu",
    "rope.cu",
    "linear_16.cu",
    "linear_8.cu",
    "linear_4.cu",
    "linear_rows.cu",
    "attention.cu",
    "attention_rows.cu",
    "prefill.cu",
    "prefix.cu",
    "verify.cu",
    "sample.cu",
)
# What can be exact is: a division is rounded, and numbers too small to be normal are kept.
NVCC = ("-std=c++17", "-O3", "--extended-lambda", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-psabi")
GXX = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DEMULATED", "-U_FORTIFY_SOURCE", "-Wno-psabi")
HALF = ("-mf16c",) if platform.machine() == "x86_64" else ()  # float16 in hardware


def emulated() -> bool:
    """Whether the CPU stands in for a card."""
    return flag("SPECDEC_CUDA_EMULATE")


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can. Builds nothing."""
    reason = build.why_not()
    if reason is not None:
        return reason
    if not (FOLDER / SOURCES[0]).is_file():
        return "the sources in CUDA are not here"  # as in the folder of an exercise
    if device.type == "cpu" and emulated():
        if not sys.platform.startswith("linux"):
            return f"threads of CUDA are emulated on Linux alone, and this is {sys.platform}"
        return None if shutil.which("g++") else "there is no g++ on the PATH to emulate CUDA with"
    if device.type != "cuda":
        return f"CUDA needs a card of NVIDIA, and this is {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no card of NVIDIA"
    if torch.version.hip is not None:
        return "this torch is built for cards of AMD"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH; it comes with the CUDA toolkit"
    return None


def architecture(device: torch.device) -> str:
    """`90a` for compute capability 9.0, and so on: SPECDEC_CUDA_ARCH, or what the card has."""
    asked = os.environ.get("SPECDEC_CUDA_ARCH", "")
    if asked:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", asked):
            raise UserError(f"SPECDEC_CUDA_ARCH={asked!r} names no architecture; use one like 80, 90a or 100")
        return asked
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}" + ("a" if major == 9 else "")


def nvcc_flags(arch: str) -> list[str]:
    return [*NVCC, "-gencode", f"arch=compute_{arch},code=sm_{arch}"]


@lru_cache
def _build(part: str, sources: tuple[str, ...], emulate: bool, arch: str) -> ModuleType:
    name = f"lab_{part}_emulated" if emulate else f"lab_{part}"
    files = [FOLDER / source for source in sources]
    kernels = {file.name: ["-x", "c++"] for file in files if file.suffix == ".cu"} if emulate else {}
    compiler, flags, seconds = ("g++", [*GXX, *HALF], 60) if emulate else ("nvcc", nvcc_flags(arch), 150)
    flags = [*flags, f"-DMODULE={name}", *build.python_flags()]

    def make() -> Path:
        return build.build(name, files, compiler=compiler, flags=flags, own_flags=kernels, cpu_seconds=seconds)

    return build.load_built(name, make)


def build_library(part: str, sources: tuple[str, ...], device: torch.device) -> ModuleType:
    """For a device on which the kernels can run (see why_not). BuildError with the compiler's message."""
    if device.type == "cpu":
        return _build(part, sources, True, "")
    return _build(part, sources, False, architecture(device))


@lru_cache
def library(device: torch.device) -> ModuleType:
    """That of all ops."""
    return build_library("cuda", SOURCES, device)
