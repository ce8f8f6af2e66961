"""The formats of other tools, so that their scripts read results measured here.

`vllm bench serve --save-result`: one JSON object for one rate (vllm/benchmarks/serve.py).
`llama-bench -o json`: a list of tests (llama.cpp, tools/llama-bench), read by scripts/compare-llama-bench.py. A test is
the decoding of `n_gen` tokens by one request; its speed is that of one user.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.results import Row

PERCENTILES = (50, 90, 99)


def _of(rows: Sequence[Row], line: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the rate of this line of a summary."""
    return [
        row for row in rows if row.cell.get("rate") == line["rate"] and row.cell.get("arrivals") == line["arrivals"]
    ]


def vllm_document(rows: Sequence[Row], line: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the results at one rate as `vllm bench serve` saves them. Times are in seconds where theirs are."""
    mine = _of(rows, line)
    good = [row for row in mine if row.status == "ok"]
    seconds = line.get("seconds", 0.0)
    inputs = [int(row.figures.get("prompt_tokens") or 0) for row in good]
    outputs = [int(row.tokens or 0) for row in good]
    per_second = (lambda count: count / seconds) if seconds else (lambda count: 0.0)
    found: dict[str, Any] = {
        "backend": "openai",
        "endpoint_type": "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(mine),
        "request_rate": line["rate"],
        "burstiness": 1.0 if line["arrivals"] == "poisson" else None,
        "max_concurrency": None,
        "duration": seconds,
        "completed": len(good),
        "failed": len(mine) - len(good),
        "total_input_tokens": sum(inputs),
        "total_output_tokens": sum(outputs),
        "request_throughput": per_second(len(good)),
        "request_goodput": line.get("goodput"),
        "output_throughput": per_second(sum(outputs)),
        "total_token_throughput": per_second(sum(inputs) + sum(outputs)),
        "input_lens": inputs,
        "output_lens": outputs,
        "ttfts": [row.figures["ttft_ms"] / 1e3 for row in good],
        "itls": [[gap / 1e3 for gap in row.figures["itl_ms"]] for row in good],
        "errors": [row.reason or "" for row in mine],
    }
    gaps = [gap for row in good for gap in row.figures["itl_ms"]]
    columns = {name: [row.figures[f"{key}_ms"] for row in good if f"{key}_ms" in row.figures] for name, key in NAMES}
    for name, values in {**columns, "itl": gaps}.items():
        found[f"mean_{name}_ms"] = statistics.fmean(values) if values else 0.0
        found[f"median_{name}_ms"] = statistics.median(values) if values else 0.0
        found[f"std_{name}_ms"] = float(np.std(values)) if values else 0.0
        for share in PERCENTILES:
            found[f"p{share}_{name}_ms"] = float(np.percentile(values, share)) if values else 0.0
    return found


NAMES = (("ttft", "ttft"), ("tpot", "tpot"), ("e2el", "e2e"))


def llama_document(
    rows: Sequence[Row], lines: Sequence[Mapping[str, Any]], model: str, where: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a test of llama-bench for every rate; what has no counterpart here is empty or 0."""
    found = []
    for line in lines:
        good = [row for row in _of(rows, line) if row.status == "ok" and row.tokens]
        if not good:
            continue
        nanoseconds = [1e9 * (row.seconds or 0.0) for row in good]
        speeds = [(row.tokens or 0.0) / (row.seconds or 1.0) for row in good]
        many = len(good) > 1
        found.append(
            {
                "build_commit": (where.get("commit") or "unknown")[:8],
                "build_number": 0,
                "cpu_info": where["cpu"],
                "gpu_info": where["device_name"] if where["device"] != "cpu" else "",
                "backends": str(where["device"]).upper(),
                "model_filename": model,
                "model_type": f"{model}, {line['rate']:g} requests/s ({line['arrivals']})",
                "model_size": 0,
                "model_n_params": 0,
                "n_batch": 0,
                "n_ubatch": 0,
                "n_threads": where["threads"],
                "cpu_mask": "0x0",
                "cpu_strict": False,
                "poll": 0,
                "type_k": where["dtype"],
                "type_v": where["dtype"],
                "n_gpu_layers": 0 if where["device"] == "cpu" else 99,
                "split_mode": "none",
                "main_gpu": 0,
                "no_kv_offload": False,
                "flash_attn": False,
                "tensor_split": "0.00",
                "tensor_buft_overrides": "none",
                "use_mmap": False,  # of versions before load_mode
                "load_mode": "none",
                "embeddings": False,
                "no_op_offload": 0,
                "n_prompt": 0,
                "n_gen": round(statistics.fmean(row.tokens or 0.0 for row in good)),
                "n_depth": round(statistics.fmean(float(row.figures.get("prompt_tokens") or 0) for row in good)),
                "test_time": str(where["timestamp"]).replace("+00:00", "Z"),
                "avg_ns": round(statistics.fmean(nanoseconds)),
                "stddev_ns": round(statistics.stdev(nanoseconds)) if many else 0,
                "avg_ts": statistics.fmean(speeds),
                "stddev_ts": statistics.stdev(speeds) if many else 0.0,
                "n_cpu_moe": 0,
                "fit_target": 0,
                "fit_min_ctx": 0,
                "samples_ns": [round(each) for each in nanoseconds],
                "samples_ts": speeds,
            }
        )
    json.dumps(found, allow_nan=False)
    return found
