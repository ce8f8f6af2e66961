"""Kernels against what the machine allows, and against others: the sections `ladder`, `peers` and `kernels`.

On a processor the ladder and the peers are those of the C++ backend, on a graphics card those of CUDA and Triton; what
a machine lacks is said and left out.

    python bench.py --ladder --output results
    python bench.py --peers --output results
"""

from __future__ import annotations

import sys

from common.errors import UserError

from . import cpu_ladder, peers
from .gpu_kernels import GPU_KERNELS, measure_gpu_kernels
from .gpu_ladder import GPU_LADDER, measure_gpu_ladder
from .gpu_peers import GPU_PEERS, measure_gpu_peers
from .runs import Lab

MACHINES = {**cpu_ladder.DEFINITIONS, **peers.DEFINITIONS, **GPU_KERNELS, **GPU_LADDER, **GPU_PEERS}
SHAPES = ("stdlib-10m", peers.RANDOM)


def on_card(lab: Lab) -> bool:
    return lab.device.type == "cuda"


def measure_ladder(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_ladder(lab)
    if on_card(lab) or lab.done(kind="cpu_ladder"):
        return
    if lab.options.dry_run:
        lab.add(kind="cpu_ladder", rung="synthetic", tokens_per_s=1.0)
        return
    try:
        found = cpu_ladder.run(
            lab.options.model, lab.options.threads or 0, repeats=2 * lab.options.repeats, output=lab.options.output
        )
    except UserError as error:
        print(f"note: the ladder is left out: {error}", file=sys.stderr)
        return
    cpu_ladder.report(found)
    for row in found["rungs"]:
        lab.add(kind="cpu_ladder", **row, read_gb_per_s=found["read_gb_per_s"], isa=found["isa"])


def measure_peers(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_peers(lab)
    if on_card(lab):
        return
    for model in SHAPES[:1] if lab.options.quick else SHAPES:
        if lab.done(kind="cpu_peers", model=model):
            continue
        if lab.options.dry_run:
            lab.add(kind="cpu_peers", model=model, peer="synthetic", tokens_per_s=1.0)
            continue
        large = model == peers.RANDOM
        found = peers.run(model, threads=lab.options.threads or 0, repeats=2 * lab.options.repeats, only_cpp=large)
        peers.report(found)
        for row in found["peers"]:
            lab.add(kind="cpu_peers", model=model, **row)


def measure_kernels(lab: Lab) -> None:
    if on_card(lab) or lab.options.dry_run:
        measure_gpu_kernels(lab)
    elif "kernels" in lab.options.only:
        raise UserError("kernels for graphics cards are timed on one, and this is a CPU; --dry-run walks their grid")
