"""The cost of loading for the C++ kernels in CPU time and memory, against reading the files and copying them once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import MODELS
from phase5.kernels import cpp
from phase5.load import load
from phase5.model import Transformer

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

READ = """
import sys, time
from pathlib import Path
from safetensors import safe_open

began = time.process_time()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            file.get_tensor(name).clone()
print(time.process_time() - began)
"""
LOAD = """
import sys, time
import phase5
from phase5.kernels.cpp import library

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

library()
phase5.LLM(phase5.Options(model="stdlib-1m", draft="none", device="cpu", kernels="cpp"))  # what is imported late
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
began = time.process_time()
options = {"dtype": "bfloat16"} if sys.argv[2] == "bfloat16" else {"dtype": "bfloat16", "quant": "int8"}
llm = phase5.LLM(phase5.Options(model=sys.argv[1], draft="none", device="cpu", kernels="cpp", **options))
seconds = time.process_time() - began
fast = llm.backends.fast[llm.loaded.model]
tables = llm.loaded.model.embedding.weight.nbytes
print(seconds, status("VmHWM") - before, (fast.weight_bytes + tables) / 2**20)
"""


def python(code: str, *arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


def write_llama(folder: Path, source: Path, layers: int, width: int, ffn: int) -> None:
    """Write a Llama shape with random bfloat16 weights, in shards, with the tokenizer of `source`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "head_dim": width // 32, "vocab_size": 32_000, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.02).bfloat16()

    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 8, width), "self_attn.v_proj": (width // 8, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    ends = {name: random(32_000, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**ends, "model.norm.weight": random(width)}, folder / "model-1.safetensors")
    made = {name: random(*shape) for name, shape in block.items()}  # the same in every layer: only the cost matters
    for shard, numbers in enumerate((range(layers // 2), range(layers // 2, layers))):
        tensors = {f"model.layers.{n}.{name}.weight": tensor.clone() for n in numbers for name, tensor in made.items()}
        save_file(tensors, folder / f"model-{shard + 2}.safetensors")
    names = {path.name: list(_names(path)) for path in sorted(folder.glob("*.safetensors"))}
    index = {"weight_map": {name: file for file, inside in names.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_billion_weights_are_ready_soon_and_in_little_memory(weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "llama-1b"
    write_llama(folder, MODELS / "stdlib-10m", layers=22, width=2048, ffn=5632)
    python(READ, str(folder))  # the files are in the page cache
    readings, loads = [], []
    for _ in range(3):  # the machine's speed varies: interleave both, and compare the minima
        readings += python(READ, str(folder))
        loads.append(python(LOAD, str(folder), weights))
    seconds, peak, packed = min(loads)
    assert seconds < 2.5 * min(readings), (seconds, readings)
    assert peak < 1.25 * packed, (peak, packed)


def test_matrices_that_are_packed_are_not_laid_out_for_torch(make_checkpoint: Callable[..., Path]) -> None:
    name, cpu = str(make_checkpoint("llama")), torch.device("cpu")
    plain, laid_out = (load(name, torch.float32, cpu, as_stored=stored).model for stored in (True, False))
    assert isinstance(plain, Transformer)
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(plain(tokens), laid_out(tokens))
    for (key, one), two in zip(plain.named_parameters(), laid_out.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.is_contiguous()
        assert two.is_contiguous() == (one.ndim != 2 or not key.startswith("layers"))
    one_step, other = (cpp.CppModel(model, "bfloat16", 2) for model in (plain, laid_out))
    logits = [fast.step(fast.new_cache(1, 16), [[1, 2, 3]]).logits for fast in (one_step, other)]
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])
