"""The CUDA sources compile for the intended GPUs, and the kernels of decoding do not spill registers.

The quick test compiles the smallest source.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import phase5
from common.errors import UserError
from phase5.kernels import build
from phase5.kernels.cuda import SOURCES, library

ARCHITECTURES = ("80", "90a", "100")
KERNELS = [source for source in library.SOURCES if source.endswith(".cu")]
LADDER = Path(phase5.__file__).resolve().parents[1] / "ladder" / "cuda"
RUNGS = sorted(path.name for path in LADDER.glob("*.cu"))


class Used(NamedTuple):
    kernel: str
    registers: int
    stack: int
    spilled: int  # bytes, stores and loads


def compile_for(arch: str, source: Path, folder: Path) -> list[Used]:
    """Return ptxas' report of every kernel in a source."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("there is no nvcc on the PATH")
    flags = [*library.nvcc_flags(arch), f"-I{library.FOLDER}", "-Xptxas", "-v"]
    command = [compiler, *flags, "-c", str(source), "-o", str(folder / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return read_report(done.stderr)


def read_report(text: str) -> list[Used]:
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers",
        text,
    )
    return [Used(name, int(used), int(stack), int(out) + int(back)) for name, stack, out, back, used in found]


def no_spills(used: list[Used]) -> None:
    assert used
    assert not [each for each in used if each.spilled or each.stack], (
        "a kernel goes through memory for what it computes"
    )


def test_a_report_with_spills_is_read() -> None:
    """A report in the format of ptxas."""
    text = (
        "ptxas info    : Function properties for _Z4slowPf\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert read_report(text) == [Used("_Z4slowPf", 255, 16, 20)]
    with pytest.raises(AssertionError, match="goes through memory"):
        no_spills(read_report(text))


def test_a_kernel_of_every_step_keeps_to_registers(tmp_path: Path) -> None:
    no_spills(compile_for("90a", library.FOLDER / "norm.cu", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_everything_compiles(source: str, arch: str, tmp_path: Path) -> None:
    used = compile_for(arch, library.FOLDER / source, tmp_path)
    if source.startswith(("attention", "linear", "norm", "rope", "prefix", "prefill")):
        no_spills(used)


@pytest.mark.slow
@pytest.mark.parametrize("source", RUNGS)
def test_the_rungs_compile(source: str, tmp_path: Path) -> None:
    assert compile_for("90a", LADDER / source, tmp_path)


def test_every_file_belongs_to_an_op() -> None:
    """A change of any source file of a kernel must invalidate its check in the ledger."""
    files = {path.name for path in library.FOLDER.iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".py")}
    named = {name for names in SOURCES.values() for name in names if not name.startswith("../")}
    assert files - named == {"__init__.py"}
    assert named <= files
    for names in SOURCES.values():
        sources = [library.FOLDER / name for name in names if name.endswith(".cu")]
        included = {path.name for path in build.with_headers(sources)}
        assert included <= set(names)


@pytest.mark.parametrize("arch", ["80", "90a", "100", "120f"])
def test_another_architecture_can_be_asked_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CUDA_ARCH", arch)
    assert library.architecture(library.CPU) == arch


def test_an_architecture_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CUDA_ARCH", "sm_90; rm")
    with pytest.raises(UserError, match="names no architecture; use one like 80, 90a or 100"):
        library.architecture(library.CPU)
