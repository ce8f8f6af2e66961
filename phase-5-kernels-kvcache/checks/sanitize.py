"""Runs the kernels under the compiler's sanitizers: memory errors, undefined behaviour, data races.

A program of the kernels alone (selftest.cpp) is compiled and run with each sanitizer. Python, torch and OpenMP are
not instrumented, and would cause false reports.

    python -m checks.sanitize
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError
from common.options import run_main
from engine.kernels.build import execute
from engine.kernels.cpp.library import EXACT, OWN_FLAGS, QUIET, SOURCE, SOURCES, find_compiler

SELFTEST = Path(__file__).resolve().with_name("selftest.cpp")
SANITIZERS = ("address", "undefined", "thread")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# -O1 takes 20 times as long to compile, most of it for the tiles of the products.
FLAGS = ["-O0", "-g1", "-std=c++17", "-pthread", "-fno-omit-frame-pointer", *EXACT, *QUIET]


def run(sanitizer: str, folder: Path) -> str:
    """Compile and run the program, and return its output. UserError if the sanitizer reports an error."""
    compiler = find_compiler()
    if compiler is None:
        raise UserError("the sanitizers need a C++ compiler (g++ or clang++)")
    names = [name for name in SOURCES if name != "bindings"]
    names += ["processor", "isa_portable", *(["isa_avx2", "isa_avx512", "isa_avx512_dot"] if X86 else [])]
    sources = [SELFTEST, *(SOURCE / f"{name}.cpp" for name in names)]
    flags = [*FLAGS, f"-I{SOURCE}", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}-{sanitizer}.o"
        execute([compiler, *flags, *OWN_FLAGS.get(source.name, []), "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / f"selftest-{sanitizer}"
    execute([compiler, *flags, *objects, "-o", str(program)])
    done = subprocess.run([str(program)], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{sanitizer} sanitizer: status {done.returncode}\n{done.stderr.strip()[-4000:]}")
    return done.stdout.strip()


def main(arguments: list[str]) -> int:
    chosen = arguments or list(SANITIZERS)
    for sanitizer in chosen:
        if sanitizer not in SANITIZERS:
            raise UserError(f"unknown sanitizer {sanitizer!r}; use {', '.join(SANITIZERS)}")
        with tempfile.TemporaryDirectory() as folder:
            print(f"{sanitizer}: {run(sanitizer, Path(folder))}", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
