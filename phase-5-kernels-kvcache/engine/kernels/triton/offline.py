"""Compile the kernels for a graphics card that is not there, and say what each takes of it.

The checks of ../check.py are run with a recorder in the place of the card: every kernel that they would start is
compiled instead, to the card's own instructions. So a kernel that no card can take is found on any machine. Registers
and spills are what NVIDIA's assembler, which comes with Triton, reports.

    python -m engine.kernels.triton.offline 90
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.errors import UserError
from common.options import run_main
from common.terminal import print_table

from .. import check
from . import OPS
from .support import INTERPRETED, RECORDER

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SM_SUFFIX = {90: "a", 100: "a"}  # architectures whose own instructions Triton uses


class Launch(NamedTuple):
    """A kernel with the kinds of its arguments: what decides which program is compiled."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    def __str__(self) -> str:
        of = ", ".join(f"{name} {value}" for name, value in self.constants.items())
        return f"{self.name} ({self.signature[self.kernel.arg_names[0]]}; {of})"


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


@contextmanager
def recording() -> Iterator[dict[str, Launch]]:
    """What kernels would be started within, each once; none is."""
    found: dict[str, Launch] = {}

    def note(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        signature = dict(zip(kernel.arg_names, map(kind_of, arguments), strict=False))
        signature |= dict.fromkeys(constants, "constexpr")
        launch = Launch(kernel, signature, {**constants, "WIDE": False} if "WIDE" in constants else constants)
        found.setdefault(f"{launch} {sorted(signature.items())}", launch)

    token = RECORDER.set(note)
    try:
        yield found
    finally:
        RECORDER.reset(token)


def kind_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return NAMES[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def launches(dtypes: tuple[torch.dtype, ...] = check.DTYPES, ops: tuple[str, ...] = ()) -> list[Launch]:
    """Those of the checks of all ops, or of some."""
    with recording() as found, torch.inference_mode():
        for op, function in OPS.items():
            if not ops or op in ops:
                for case in check.cases(op, check.CPU, full=False, dtypes=dtypes):
                    if not case.invariance:
                        case.run(function)
    return list(found.values())


def compiled(launch: Launch, arch: int, warps: int = 4) -> Compiled:
    """UserError, with the compiler's message, where it cannot be compiled for an architecture such as 90."""
    target = GPUTarget("cuda", arch, 32)
    try:
        source = ASTSource(launch.kernel, launch.signature, dict(launch.constants))
        made = triton.compile(source, target=target, options={"num_warps": warps})
    except Exception as problem:
        raise UserError(f"{launch} cannot be compiled for sm_{arch}: {problem.__cause__ or problem}") from problem
    report = assembled(made.asm["ptx"], arch)
    registers = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    return Compiled(max(map(int, registers)), max(map(int, spilled)), made.metadata.shared)


def assembled(ptx: str, arch: int) -> str:
    """What the assembler says of a program."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = folder / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [program, "-v", f"--gpu-name=sm_{arch}{SM_SUFFIX.get(arch, '')}", source, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main(arguments: list[str]) -> int:
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 is set, and then nothing is compiled; leave it away")
    arch = int(arguments[0]) if arguments and arguments[0].isdigit() else 90
    rows = []
    for launch in launches((torch.bfloat16,), tuple(arguments[1:])):
        made = compiled(launch, arch)
        rows.append([launch.name, str(launch).partition("; ")[2][:-1], made.registers, made.spilled, made.shared])
    print_table(f"sm_{arch}", ["kernel", "of", "registers", "bytes spilled", "bytes shared"], rows)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
