"""Measures the KV cache and the C++ kernels: speed, memory, the cost of verification.

Sections (`--only`). Plain decoding against itself (`null`). With torch: kinds of cache against phase 4 and
transformers, drafters, one more token after sequences of many lengths, the cost of m verified tokens, and the
perplexity of a cache in fewer bits. With steps in C++: plain and speculative decoding in every number format, on a
small and a large model (`fast`), and of several prompts at a time (`rows`). Only on request: kernels against the limits
of the machine, rung by rung (`--ladder`), and against other engines (`--peers`). A GPU has its own ladder, peers and
`kernels`.

    python bench.py --quick
    python bench.py --output results --only speed
    python bench.py --output results --resume
    python bench.py --prompts-from FILE.jsonl --drafters ngram --temperatures 1
    python bench.py --only null --tries 20 --output results
"""

from __future__ import annotations

import sys
from typing import get_args

import launch  # noqa: F401 (must be the first import)
import torch
from benchmarks.fast import FAST, measure_fast
from benchmarks.lengths import LENGTHS, measure_lengths
from benchmarks.machines import MACHINES, measure_kernels, measure_ladder, measure_peers
from benchmarks.pictures import draw
from benchmarks.quality import QUALITY, measure_quality
from benchmarks.rows import ROWS, measure_rows
from benchmarks.runs import FIGURES, Lab, Measure, Options, Section
from benchmarks.speed import SPEED, measure_cache, measure_null, measure_speed, null_verdicts
from benchmarks.verification import VERIFICATION, measure_verification

from common.benchmark import print_document
from common.device import resolve_device
from common.harness import model_hashes, open_results
from common.options import parse_options, run_main

SECTIONS: dict[Section, Measure] = {
    "null": measure_null,
    "cache": measure_cache,
    "speed": measure_speed,
    "lengths": measure_lengths,
    "verification": measure_verification,
    "quality": measure_quality,
    "fast": measure_fast,
    "rows": measure_rows,
    "ladder": measure_ladder,
    "peers": measure_peers,
    "kernels": measure_kernels,
}
TITLES = {  # section, or a part of one -> title of its table
    "null": "Plain decoding against itself",
    "cache": "Greedy plain decoding, against phase 4",
    "speed": "Drafters, with torch's operations",
    "lengths": "One more token after a sequence",
    "verification": "What verification costs",
    "quality": "Perplexity by the cache's format",
    "quality_cpp": "Perplexity by the C++ kernels' number formats",
    "fast_k": "C++ steps: draft lengths on the calibrate half",
    "fast": "C++ steps",
    "fast_drafters": "Other drafters, C++ steps",
    "rows": "Plain decoding, some prompts at a time",
    "rows_cost": "Speculation with several rows",
    "loop": "Plain decoding inside one C++ call",
    "cold_start": "From the start of the process to the first token",
    "ladder": "CPU ladder",
    "machine": "Limits of the CPU",
    "batch": "Several rows in one step",
    "peers": "Other engines on the same weights",
    "sizes": "Real sizes, random weights",
    "copy": "A copy on the GPU",
    "kernels": "GPU kernels",
    "gpu_ladder": "GPU ladders",
    "gpu_peers": "Other engines on the GPU",
}


def sections(options: Options, on_card: bool) -> list[Section]:
    """Return the requested sections; else all, but `ladder`, `peers` and `kernels` only on a GPU."""
    wanted: list[Section] = [*options.only]
    wanted += ["ladder"] if options.ladder else []
    wanted += ["peers"] if options.peers else []
    every = on_card or options.dry_run
    return wanted or [name for name in get_args(Section) if every or name not in ("ladder", "peers", "kernels")]


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.prompts, options.max_tokens = min(options.prompts, 3), min(options.max_tokens, 16)
        options.tokens, options.k, options.formats = min(options.tokens, 1024), options.k[:2], options.formats[:1]
        options.temperatures = options.temperatures[-1:]
    if options.threads:
        torch.set_num_threads(options.threads)
    definitions = FIGURES | MACHINES | SPEED | LENGTHS | VERIFICATION | QUALITY | FAST | ROWS
    with open_results(
        options, definitions, device, options.dtype, model_hashes(options.model, options.draft)
    ) as results:
        lab = Lab(options, results, device)
        for section in sections(options, device.type == "cuda"):
            SECTIONS[section](lab)
        if options.output:
            draw(lab, options.output)
        for name, title in TITLES.items():
            lab.report(name, title)
        print(*null_verdicts(lab), sep="\n")
        status = lab.close()
        print_document(lab.document())
        return status


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
