"""The bench of GPU kernels: a dry run needs no GPU, and says that nothing was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import phase5
from tests.support import forked

PHASE = Path(phase5.__file__).resolve().parents[1]
CODE = """
import json, sys, torch
from common.results import Results
from benchmarks.gpu_kernels import measure_gpu_kernels
from benchmarks.runs import Lab, Options

options = Options(dry_run=sys.argv[1] == "dry")
with Results(None, {}, {}, {}, False) as results:
    measure_gpu_kernels(Lab(options, results, torch.device("cpu")))
    print(json.dumps([row.model_dump() for row in results.rows]))
"""


def run(how: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PHASE), str(PHASE.parent), os.environ.get("PYTHONPATH", "")])
    return forked.run([sys.executable, "-c", CODE, how], cwd=PHASE, env={**os.environ, "PYTHONPATH": path})


def test_a_dry_run_walks_the_grid() -> None:
    done = run("dry")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert all(row["synthetic"] for row in rows)
    timed = [row for row in rows if row["section"] == "kernels" and row["kind"] == "run"]
    assert {row["cell"]["shape"] for row in timed} == {"gpt2-xl", "Llama-3.1-8B"}
    assert {"triton", "cuda"} <= {row["variant"] for row in timed}
    ops = {row["cell"]["op"] for row in timed}
    assert {"linear", "gated_linear", "decode_attention", "sample", "verify_sample"} <= ops
    assert {row["baseline"] for row in timed if row["variant"] == "cuda, free"} == {"cuda"}


def test_without_a_card_it_says_so() -> None:
    done = run("real")
    if "GPU kernels cannot be timed here" not in done.stderr:
        assert importlib.util.find_spec("triton")
        import torch

        assert torch.cuda.is_available(), done.stderr
