"""`lab kernel`: build, check and time one kernel; phase 5's checks/kernel.py, from anywhere in the repository.

CUDA kernels run on a CPU in an emulator, Triton's in Triton's interpreter, where there is no GPU.

    lab kernel sample --backend cpp --bench
    lab kernel step --backend cpp --bench      a whole step of a model in C++
    lab kernel rope --backend cuda
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.phases import ROOT, phases


def run(arguments: list[str], root: Path = ROOT) -> int:
    """Run the check in a process of its own: an emulator or an interpreter is chosen as the kernels are imported."""
    folder = next((phase.folder for phase in phases(root) if (phase.folder / "checks/kernel.py").is_file()), None)
    if folder is None:
        raise UserError("no phase here has checks/kernel.py; run this in a checkout of the repository")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if not torch.cuda.is_available():
        environment.setdefault("SPECDEC_CUDA_EMULATOR", str(folder / "checks/emulator.h"))
        environment.setdefault("TRITON_INTERPRET", "1")
    command = [sys.executable, "-m", "checks.kernel", *arguments]
    return subprocess.run(command, cwd=folder, env=environment).returncode
