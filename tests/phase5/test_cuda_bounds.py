"""No CUDA kernel accesses memory outside of its tensors: emulated, between protected pages.

A GPU would not report most such accesses, and the checks would pass: the memory there is often harmless.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from phase5.kernels import Kernels
from tests.support import forked

# Every tensor that a wrapper passes to the library is moved to separate pages for the call. It ends (begins) at a
# protected page, and an access to that page ends the process.
PROGRAM = """
import ctypes, mmap, sys
import torch
from phase5.kernels import cuda
from phase5.kernels.cuda import kernels
from tests.support.beside import beside

check = beside(5, "checks.check")
op, side, wrong = sys.argv[1:]
libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
away = []  # (memory, offset, the tensor's address, bytes)

def guarded(tensor):
    if tensor is None:
        return 0
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    size = span * tensor.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    place = base + PAGE + (pages * PAGE - size if side == "behind" else 0)
    ctypes.memmove(place, tensor.data_ptr(), size)
    for guard in (base, base + (pages + 1) * PAGE):
        assert libc.mprotect(guard, PAGE, 0) == 0
    away.append((memory, place, tensor, size))
    return place + (tensor.element_size() if wrong == "wrong" else 0)

class Library:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        def call(*arguments):
            result = getattr(self.real, name)(*arguments)
            for _, place, tensor, size in away:
                ctypes.memmove(tensor.data_ptr(), place, size)
            away.clear()
            return result
        return call

real = kernels.library_of
kernels.address, kernels.library_of = guarded, lambda tensor: Library(real(tensor))
with torch.inference_mode():
    print(len(check.check(op, cuda.ops()[op], check.CPU, full=False, dtypes=(torch.bfloat16,))), "checks passed")
"""


def run(op: str, side: str, wrong: str = "right") -> subprocess.CompletedProcess[str]:
    return forked.run([sys.executable, "-c", PROGRAM, op, side, wrong])


@pytest.fixture(scope="module")
def _emulated(emulate: Callable[[pytest.MonkeyPatch], None]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        emulate(patch)
        yield


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("side", ["behind", pytest.param("before", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "op",
    [
        op if op in ("linear", "decode_attention") else pytest.param(op, marks=pytest.mark.slow)
        for op in Kernels._fields
    ],
)
def test_no_access_outside(op: str, side: str) -> None:
    done = run(op, side)
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    assert "checks passed" in done.stdout


@pytest.mark.usefixtures("_emulated")
def test_an_access_outside_is_noticed() -> None:
    assert run("rms_norm", "behind", "wrong").returncode == -11  # SIGSEGV
