"""Packing a model needs little more memory than the packed model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phase5.kernels import cpp

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

MEASURE = """
import sys, torch
from phase5.config import ModelConfig
from phase5.kernels.cpp import CppModel, library
from phase5.model import Transformer

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

library()
config = ModelConfig("llama", 512, 10, 768, 12, 4, 64, 2048, 256, "rms", 1e-5, "rope", "silu", True)
model = Transformer(config).half().eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(0.01)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
fast = CppModel(model, sys.argv[1], 2, release=True)
print(before, status("VmHWM"), status("VmRSS"), fast.weight_bytes / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("weights", [pytest.param("float16", marks=pytest.mark.slow), "int8"])
def test_the_peak_is_a_fifth_above_the_weights(weights: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, weights], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, after, packed = map(float, done.stdout.split())
    assert packed > 50
    source = packed if weights == "float16" else 2 * packed
    # Memory beyond the earlier content is at most 1.2 times the larger form of the weights.
    assert peak < before - source + 1.2 * max(source, packed)
    assert after < before - source + 1.2 * packed + 8
