"""`lab doctor`: the abilities of this machine, and what each missing component would enable.

The command neither loads a model nor changes anything; with --build it compiles the newest phase's kernels.

    lab doctor --json
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from common.device import available_devices
from common.environment import cpu_name
from common.lab.arguments import Parser
from common.phases import phases
from common.results import SCHEMA_VERSION
from common.terminal import print_document, print_table

X86 = {
    "avx2": "8 float32 at a time in the C++ kernels",
    "fma": "multiply and add in one instruction",
    "f16c": "fast conversion of fp16 weights and caches",
    "avx512f": "16 float32 at a time in the C++ kernels",
    "avx512_bf16": "bf16 dot products without conversion",
    "avx512_vnni": "int8 dot products for quantised weights",
    "amx_bf16": "bf16 matrix products in hardware: bf16 faster than float32",
}
ARM = {"neon": "4 float32 at a time in the C++ kernels"}


@dataclass(frozen=True)
class Finding:
    """One component: what was found (None: missing) and what it enables."""

    name: str
    found: str | None
    enables: str


def parse_instruction_sets(text: str) -> set[str]:
    """Return the CPU's instruction sets in lower case, from /proc/cpuinfo (x86 or ARM) or from macOS's sysctl."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    names = set((lines[0] if lines else text).lower().split())
    return names | ({"neon"} if "asimd" in names else set())  # Linux's word for 64-bit NEON


def instruction_sets() -> set[str]:
    """Return the instruction sets of this machine's CPU; empty if the system does not tell."""
    if sys.platform == "darwin":
        if platform.machine() == "arm64":
            return {"neon"}  # every Apple processor
        return parse_instruction_sets(_output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"))
    try:
        return parse_instruction_sets(Path("/proc/cpuinfo").read_text())
    except OSError:
        return set()


def _output(*command: str) -> str:
    """Return all that a command prints, or nothing if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _program(candidates: Sequence[str], version: str) -> str | None:
    """Return path and version of the first program that exists and runs; `version` is the pattern to quote."""
    for path in filter(None, map(shutil.which, candidates)):
        output = _output(path, "--version")  # empty for macOS's placeholder for a missing compiler
        if output:
            found = re.search(version, output)
            return f"{path} ({found[0]})" if found else path
    return None


def _package(name: str) -> str | None:
    """Return the version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        found.append(Finding(f"device cuda:{index}", text, "models and kernels on the GPU"))
    if not found:
        found.append(Finding("device cuda", None, "CUDA and Triton kernels, streams, CUDA graphs"))
    if sys.platform == "darwin":
        mps = "Apple graphics" if "mps" in available_devices() else None
        found.append(Finding("device mps", mps, "models on Apple graphics"))
    return found


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built without CUDA"


def _registry() -> Any | None:
    """Return the kernel registry of the newest phase that has one."""
    for phase in reversed(phases()):
        try:
            return importlib.import_module(f"{phase.package}.kernels.registry")
        except ModuleNotFoundError:
            continue
    return None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kernels() -> list[Finding]:
    """List the kernel backends: those that can compute here, and why others cannot."""
    registry = _registry()
    return [] if registry is None else [Finding(*found) for found in registry.examine(_device())]


def examine() -> list[Finding]:
    """Examine this machine; changes nothing and loads no model."""
    cores, hardware_threads = psutil.cpu_count(logical=False), psutil.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    python = f"{platform.python_version()} ({sys.executable})"
    simd, wanted = instruction_sets(), ARM if platform.machine().lower() in ("arm64", "aarch64") else X86
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    nvcc = ["nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"]
    return [
        Finding("Python", python, "everything"),
        Finding("torch", f"{torch.__version__}, {_torch_build()}", "everything"),
        Finding("device cpu", f"{cpu_name()}, {memory:.0f} GiB of memory", "all phases"),
        *_devices(),
        Finding("cores", f"{cores or '?'} ({hardware_threads} hardware threads)", "parallel kernels"),
        Finding("threads used by torch", str(torch.get_num_threads()), "parallel kernels (--threads changes it)"),
        *(Finding(name, "yes" if name in simd else None, enables) for name, enables in wanted.items()),
        Finding("C++ compiler", _program(compilers, r".*\d+\.\d+.*"), "the C++ kernels, and torch.compile on a CPU"),
        Finding("nvcc", _program(nvcc, r"release [\d.]+"), "the CUDA kernels"),
        Finding("triton", _package("triton"), "the Triton kernels, and torch.compile on a GPU"),
        Finding("llama-cpp-python", _package("llama-cpp-python"), "llama.cpp as a peer in benchmarks"),
        *_kernels(),
    ]


def run(arguments: list[str]) -> int:
    """Print a table, or with --json one JSON document. The exit status is 0 whatever is missing."""
    parser = Parser(prog="lab doctor", description="Say what this machine can do.")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--build", action="store_true", help="compile the kernels now, instead of when first needed")
    options = parser.parse_args(arguments)
    as_json, registry = options.json, _registry()
    if options.build and registry is not None:
        print(f"built: {', '.join(registry.prepare(_device())) or 'nothing can be'}", file=sys.stderr)
    findings = examine()
    if as_json:
        print_document({"schema_version": SCHEMA_VERSION, "findings": [asdict(finding) for finding in findings]})
        return 0
    rows = [[f.name, f.found or "missing", f.enables if f.found else f"would enable: {f.enables}"] for f in findings]
    print_table("What this machine can do", ["what", "here", "used for"], rows)
    return 0
