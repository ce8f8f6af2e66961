"""Builds the library of CUDA kernels with nvcc when it is first needed, for the GPU of this machine.

SPECDEC_CUDA_ARCH=90a selects another architecture. SPECDEC_CUDA_EMULATOR=FILE names a header, emulator.h, that replaces
CUDA's: with it g++ builds the same sources to run on the CPU, which is slow and for tests only.

    SPECDEC_CUDA_EMULATOR=checks/emulator.h python -c "from engine.kernels.cuda.library import *; print(library(CPU))"
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

from .. import build

CPU = torch.device("cpu")
FOLDER = Path(__file__).parent
SOURCES = (
    *("bindings.cpp", "norm.cu", "rope.cu", "linear_16.cu", "linear_8.cu", "linear_4.cu", "linear_rows.cu"),
    *("attention.cu", "attention_rows.cu", "prefill.cu", "prefix.cu", "verify.cu", "sample.cu", "inputs.cu"),
)
# No fast math: divisions are correctly rounded, and subnormal numbers are kept.
NVCC = ("-std=c++17", "-O3", "--extended-lambda", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-psabi")
GXX = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DEMULATED", "-U_FORTIFY_SOURCE", "-Wno-psabi")
HALF = ("-mf16c",) if platform.machine() == "x86_64" else ()  # float16 in hardware


def emulator() -> Path | None:
    """Return the header that makes the CPU emulate a GPU: the file that SPECDEC_CUDA_EMULATOR names, or None."""
    named = os.environ.get("SPECDEC_CUDA_EMULATOR", "")
    return Path(named).resolve() if named else None


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device; None if they can. Builds nothing."""
    reason = build.why_not()
    if reason is not None:
        return reason
    if not (FOLDER / SOURCES[0]).is_file():
        return "the sources in CUDA are not here"  # an exercise leaves them out
    if device.type == "cpu" and (header := emulator()) is not None:
        if header.name != "emulator.h" or not header.is_file():
            return f"SPECDEC_CUDA_EMULATOR={header} is no file of the name emulator.h"
        if not sys.platform.startswith("linux"):
            return f"CUDA threads are emulated on Linux only, and this is {sys.platform}"
        return None if shutil.which("g++") else "there is no g++ on the PATH to emulate CUDA with"
    if device.type != "cuda":
        return f"CUDA needs an NVIDIA GPU, and this is {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on the PATH; it comes with the CUDA toolkit"
    return None


def architecture(device: torch.device) -> str:
    """Return SPECDEC_CUDA_ARCH, or the GPU's architecture: `90a` for compute capability 9.0. UserError if malformed."""
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
def _build(part: str, sources: tuple[Path, ...], header: Path | None, arch: str) -> ModuleType:
    name = f"lab_{part}_emulated" if header else f"lab_{part}"
    kernels = {file.name: ["-x", "c++"] for file in sources if file.suffix == ".cu"} if header else {}
    compiler, flags, seconds = ("g++", [*GXX, *HALF], 60) if header else ("nvcc", nvcc_flags(arch), 150)
    flags = [*flags, f"-DMODULE={name}", *build.python_flags()]
    include = [FOLDER, *([header.parent] if header else [])]

    def make() -> Path:
        return build.build(
            name, sources, compiler=compiler, flags=flags, own_flags=kernels, include=include, cpu_seconds=seconds
        )

    return build.load_built(name, make)


def build_library(part: str, sources: tuple[Path, ...], device: torch.device) -> ModuleType:
    """Build sources that may include the headers of this folder, for a device on which kernels can run (see why_not).

    BuildError with the compiler's message; UserError for a CPU without an emulator.
    """
    if device.type != "cpu":
        return _build(part, sources, None, architecture(device))
    header = emulator()
    if header is None:
        raise UserError(f"CUDA needs an NVIDIA GPU, and this is {device.type}")
    return _build(part, sources, header, "")


@lru_cache
def library(device: torch.device) -> ModuleType:
    """Return the library of all ops."""
    return build_library("cuda", tuple(FOLDER / source for source in SOURCES), device)
