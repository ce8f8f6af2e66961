"""Kernels against the limits of the machine and against other engines: the sections `ladder`, `peers` and `kernels`.

On a CPU the ladder and the peers are those of the C++ backend, on a GPU those of CUDA and Triton. A row says what the
machine lacks. A dry run walks the grids of both.

    python bench.py --ladder --output results
    python bench.py --peers --output results
"""

from __future__ import annotations

from common.errors import UserError

from .batch import BATCH
from .cpu_ladder import LADDER, measure_cpu_ladder
from .gpu_kernels import GPU_KERNELS, measure_gpu_kernels
from .gpu_ladder import GPU_LADDER, measure_gpu_ladder
from .gpu_peers import GPU_PEERS, measure_gpu_peers
from .peers import PEERS, measure_cpu_peers
from .runs import Lab
from .sizes import SIZES

MACHINES = {**LADDER, **BATCH, **PEERS, **SIZES, **GPU_KERNELS, **GPU_LADDER, **GPU_PEERS}


def on_card(lab: Lab) -> bool:
    return lab.device.type == "cuda"


def measure_ladder(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_ladder(lab)
    if not on_card(lab):
        measure_cpu_ladder(lab)


def measure_peers(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_peers(lab)
    if not on_card(lab):
        measure_cpu_peers(lab)


def measure_kernels(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_kernels(lab)
    elif "kernels" in lab.options.only:
        raise UserError("GPU kernels need a GPU, and this is a CPU; --dry-run walks their grid")
