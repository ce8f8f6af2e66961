"""Files in the formats of vLLM and llama.cpp are read by those projects' own scripts, which `make interop` brings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.environment import environment
from common.results import Row
from tests.support.beside import beside
from tests.support.interop import python

formats = beside(7, "instruments.formats")
loads = beside(7, "instruments.loads")
# The keys without which compare-llama-bench.py refuses a file.
LLAMA_KEYS = {
    *("cpu_info", "gpu_info", "backends", "n_gpu_layers", "n_cpu_moe", "tensor_buft_overrides", "model_filename"),
    *("model_type", "n_batch", "n_ubatch", "embeddings", "cpu_mask", "cpu_strict", "poll", "n_threads", "type_k"),
    *("type_v", "load_mode", "no_kv_offload", "split_mode", "main_gpu", "tensor_split", "flash_attn", "n_prompt"),
    *("n_gen", "n_depth", "fit_target", "fit_min_ctx", "build_commit", "test_time", "avg_ts"),
}
# The columns of vLLM's table of serving results that do not come from the command line.
VLLM_KEYS = {
    *("model_id", "completed", "max_concurrency", "request_throughput", "total_token_throughput", "output_throughput"),
    *(f"{what}_{name}_ms" for what in ("mean", "median", "p99", "std") for name in ("ttft", "tpot", "itl")),
}


def rows() -> list[Row]:
    found = []
    for number in range(10):
        figures: dict[str, Any] = {
            "scheduled_s": number / 2,
            "late_ms": 0.1,
            "ttft_ms": 100.0 + number,
            "e2e_ms": 300.0,
        }
        figures |= {"itl_ms": [100.0, 95.0], "tokens_per_chunk": 1.0, "prompt_tokens": 7, "tpot_ms": 97.0}
        row = Row(kind="count", section="latency", cell={"arrivals": "poisson", "rate": 2.0}, prompt=str(number))
        found.append(row.model_copy(update={"seconds": 0.3, "tokens": 3.0, "figures": figures}))
    return found


def llama_file(file: Path, commit: str, faster: float = 1.0) -> Path:
    where = {**environment("cpu", "float32", 2, {}), "commit": commit}
    tests = formats.llama_document(rows(), loads.summary(rows()), "stdlib-10m", where)
    for test in tests:
        test["avg_ts"] *= faster
    file.write_text(json.dumps(tests), encoding="utf-8")
    return file


def command(name: str, script: str) -> list[str]:
    found = python(name)
    return [str(found), str(found.parents[1] / script)]


def test_every_key_that_they_need_is_there(tmp_path: Path) -> None:
    (test,) = json.loads(llama_file(tmp_path / "a.json", "a" * 40).read_text(encoding="utf-8"))
    assert test.keys() >= LLAMA_KEYS
    assert test["avg_ts"] == pytest.approx(10)
    (line,) = loads.summary(rows())
    assert formats.vllm_document(rows(), line, "m").keys() >= VLLM_KEYS


@pytest.mark.slow
def test_llama_cpp_compares_two_files(tmp_path: Path) -> None:
    reader = command("llama.cpp", "compare-llama-bench.py")
    files = [llama_file(tmp_path / "a.json", "a" * 40), llama_file(tmp_path / "b.json", "b" * 40, 1.5)]
    reader += ["--tool", "llama-bench", "-b", "a" * 8, "-c", "b" * 8]
    reader += [word for file in files for word in ("-i", str(file))]
    done = subprocess.run(reader, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "10.00" in done.stdout
    assert "1.50" in done.stdout


@pytest.mark.slow
def test_vllm_makes_a_table(tmp_path: Path) -> None:
    reader = command("vllm", "convert-results-json-to-markdown.py")
    (line,) = loads.summary(rows())
    (tmp_path / "serving_lab.json").write_text(json.dumps(formats.vllm_document(rows(), line, "m")), encoding="utf-8")
    commands = {"server_command": "lab serve", "client_command": "lab latency --request-rate 2", "gpu_type": "none"}
    (tmp_path / "serving_lab.commands").write_text(json.dumps(commands), encoding="utf-8")
    subprocess.run([*reader, "-r", str(tmp_path)], capture_output=True, text=True, check=True)
    (read,) = json.loads((tmp_path / "benchmark_results.json").read_text(encoding="utf-8"))
    assert read["# of req."] == 10
    assert read["Median TTFT (ms)"] == pytest.approx(104.5)
