"""Compiles the kernels for a GPU that is not present, and reports registers, spills and shared memory.

The checks of check.py run with a recorder in place of the GPU: every kernel that they would launch is compiled to
the GPU's instructions instead. So a kernel that does not compile is found on any machine. Registers and spills are
reported by NVIDIA's assembler, which comes with Triton.

    python -m checks.offline 90
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
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.errors import UserError
from common.options import run_main
from common.terminal import print_table
from engine.kernels.triton import ops as all_ops
from engine.kernels.triton.support import INTERPRETED, RECORDER
from engine.model import Linear
from engine.quantize import Format, QuantLinear
from engine.sampling import SamplingParams

from . import check
from .attention import Setting, chain
from .attention import asked as asked_of
from .tokens import metadata_of

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
SM_SUFFIX = {90: "a", 100: "a"}  # architectures whose specific instructions Triton uses


class Launch(NamedTuple):
    """A kernel with its argument types, which determine the compiled program."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]  # warps and stages
    aligned: tuple[int, ...]  # indices of arguments that are multiples of 16, which allows wider loads

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
    """Record the kernels that would be launched within, each once, without launching them."""
    found: dict[str, Launch] = {}

    def note(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        options: dict[str, int] = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
        constants = {name: value for name, value in constants.items() if name not in options}
        signature = dict(zip(kernel.arg_names, map(kind_of, arguments), strict=False))
        signature |= dict.fromkeys(constants, "constexpr")
        constants = {**constants, "WIDE": False} if "WIDE" in constants else constants
        aligned = tuple(number for number, argument in enumerate(arguments) if is_aligned(argument))
        launch = Launch(kernel, signature, constants, options, aligned)
        found.setdefault(f"{launch} {sorted(signature.items())} {aligned}", launch)

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


def is_aligned(argument: Any) -> bool:
    """Return True if Triton would specialise the program for an aligned argument."""
    if isinstance(argument, Tensor):
        return argument.data_ptr() % 16 == 0
    return isinstance(argument, int) and argument % 16 == 0


def launches(dtypes: tuple[torch.dtype, ...] = check.DTYPES, ops: tuple[str, ...] = ()) -> list[Launch]:
    """Return the launches of the checks of all ops, or of some."""
    with recording() as found, torch.inference_mode():
        for op, function in all_ops().items():
            if not ops or op in ops:
                for case in check.cases(op, check.CPU, full=False, dtypes=dtypes):
                    if not case.invariance:
                        case.run(function)
    return list(found.values())


def real(ops: tuple[str, ...] = ()) -> list[Launch]:
    """Return the launches of a step of Llama-3.1-8B in bfloat16: 16 tokens after 1,000, and a tree."""
    asked, dtype = ops or tuple(all_ops()), torch.bfloat16
    with recording() as found, torch.inference_mode():
        x = torch.zeros(16, 4096, dtype=dtype)
        for op in ("linear", "gated_linear"):
            for layer in layers(4096, 4096, dtype) if op in asked else []:
                all_ops()[op](layer, x)
        if "rms_norm" in asked:
            all_ops()["rms_norm"](x, x[0], 1e-5)
        if "add_rms_norm" in asked:
            all_ops()["add_rms_norm"](x, x, x[0], 1e-5)
        for stored in (dtype, torch.int8):
            of = Setting("paged", stored, dtype, 32, 8, 128)
            for op in ("decode_attention", "flash_prefill"):
                if op in asked:
                    for parents in (chain(16), [-1, 0, 0, 1]):
                        all_ops()[op](*asked_of(check.CPU, of, [1000], parents))
        if "verify_greedy" in asked:
            all_ops()["verify_greedy"](
                torch.zeros(1, 1).long(), torch.zeros(1, 2, 128256, dtype=dtype), torch.ones(1).long()
            )
        if "sample" in asked:
            params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)
            all_ops()["sample"](torch.zeros(1, 128256, dtype=dtype), metadata_of(check.CPU, [params], [(0, 0)], [0]))
    return list(found.values())


def layers(outputs: int, inputs: int, dtype: torch.dtype) -> Iterator[nn.Module]:
    """Yield an uninitialised matrix in every format."""
    layer = Linear(inputs, outputs, bias=False)
    layer.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), False)
    yield layer
    for format in (Format("int8"), Format("int4", 64)):
        yield QuantLinear((outputs, inputs), format, False, False, check.CPU)


def compiled(launch: Launch, arch: int) -> Compiled:
    """Compile for an architecture such as 90. UserError with the compiler's message if that fails."""
    target = GPUTarget("cuda", arch, 32)
    try:
        attributes = {(number,): [["tt.divisibility", 16]] for number in launch.aligned}
        source = ASTSource(launch.kernel, launch.signature, dict(launch.constants), attributes)
        made = triton.compile(source, target=target, options=launch.options)
    except Exception as problem:
        raise UserError(f"{launch} cannot be compiled for sm_{arch}: {problem.__cause__ or problem}") from problem
    report = assembled(made.asm["ptx"], arch)
    registers = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    return Compiled(max(map(int, registers)), max(map(int, spilled)), made.metadata.shared)


def assembled(ptx: str, arch: int) -> str:
    """Assemble a program, and return the assembler's report."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = folder / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [str(program), "-v", f"--gpu-name=sm_{arch}{SM_SUFFIX.get(arch, '')}", str(source), "-o", "/dev/null"]
        report: str = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return report


def main(arguments: list[str]) -> int:
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET=1 is set, and then nothing is compiled; unset it")
    arch = int(arguments[0]) if arguments and arguments[0].isdigit() else 90
    rows = []
    for launch in real(tuple(arguments[1:])):
        made = compiled(launch, arch)
        rows.append([str(launch), made.registers, made.spilled, made.shared])
    print_table(f"Llama-3.1-8B on sm_{arch}", ["kernel", "registers", "bytes spilled", "bytes shared"], rows)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
