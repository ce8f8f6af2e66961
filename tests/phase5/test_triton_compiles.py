"""Every Triton kernel compiles to GPU instructions, without a GPU, and the kernels of decoding do not spill registers.

The interpreter accepts types that the compiler rejects. Compilation needs a separate process: in this one kernels are
interpreted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import phase5

PHASE = Path(phase5.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CODE = """
import json, sys, torch
from checks import offline
arch, dtypes, ops = int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = []
for launch in offline.launches(tuple(getattr(torch, d) for d in dtypes), tuple(ops)) + offline.real(tuple(ops)):
    made = offline.compiled(launch, arch)
    found.append([launch.name, str(launch), made.registers, made.spilled, made.shared])
print(json.dumps(found))
"""


def compile_all(arch: int, dtypes: list[str], ops: list[str], cache: Path) -> list[list[Any]]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(PHASE), str(PHASE.parent), clean.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(arch), json.dumps(dtypes), json.dumps(ops)],
        capture_output=True,
        text=True,
        env={**clean, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        cwd=PHASE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_compile(arch: int, tmp_path: Path) -> None:
    """Compile all launches of the checks; float16 has the same instructions as bfloat16."""
    found = compile_all(arch, ["bfloat16", "float32"], [], tmp_path)
    assert len({name for name, *_ in found}) >= 12


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
@pytest.mark.parametrize(
    ("op", "kernels"),
    [("decode_attention", {"parts", "join"}), pytest.param("linear", {"linear", "add_up"}, marks=pytest.mark.slow)],
)
def test_those_of_a_large_models_step_spill_nothing(op: str, kernels: set[str], arch: int, tmp_path: Path) -> None:
    found = compile_all(arch, [], [op], tmp_path)
    assert {name for name, *_ in found} == kernels
    assert not {launch: spilled for _, launch, _, spilled, _ in found if spilled}
