"""Measures an engine that serves many requests.

Sections (`--only`): `requests`, throughput and latency against the number of requests that arrive together, plain and
speculative, greedy, with static batching as the contrast; `sampled`, the same at temperature 1; `crossover`, the number
of rows at which speculation stops to pay, predicted and measured; `prefix`, the time to the first token if the cache
knows the prompt; `overlap`, drafting while the target verifies; `parallel`, one process against two that share the
model. Only on request (`--only peers`): llama.cpp with the same weights and requests.

    python bench.py --quick
    python bench.py --output results --only prefix
    python bench.py --output results --resume
    python bench.py --requests 8 --formats float32
"""

from __future__ import annotations

import sys
from typing import get_args

import launch  # noqa: F401 (must be the first import)
import torch
from benchmarks.crossover import CROSSOVER, crossings, draw_crossover, measure_crossover
from benchmarks.overlap import OVERLAP, measure_overlap
from benchmarks.parallel import PARALLEL, measure_parallel
from benchmarks.peers import PEERS, measure_peers
from benchmarks.prefix import PREFIX, measure_prefix
from benchmarks.requests import REQUESTS, draw_requests, measure_requests, measure_sampled
from benchmarks.runs import FIGURES, Lab, Options, Section
from benchmarks.timeline import draw_timeline

from common.benchmark import print_document
from common.device import resolve_device
from common.harness import model_hashes, open_results
from common.options import parse_options, run_main

SECTIONS = {
    "requests": measure_requests,
    "sampled": measure_sampled,
    "crossover": measure_crossover,
    "prefix": measure_prefix,
    "overlap": measure_overlap,
    "parallel": measure_parallel,
    "peers": measure_peers,
}
TITLES = {
    "requests": "Requests that arrive together",
    "sampled": "Requests that arrive together, temperature 1",
    "crossover": "Speculation in a batch",
    "prefix": "Time to the first token of a known prompt",
    "overlap": "The next block drafted while this one is verified",
    "parallel": "One process, or two that share the model",
    "peers": "Eight requests at once, against llama.cpp",
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.requests, options.formats = options.requests[:4:3], options.formats[:1]
        options.max_tokens = min(options.max_tokens, 16)
    if options.threads:
        torch.set_num_threads(options.threads)
    definitions = FIGURES | REQUESTS | CROSSOVER | PREFIX | OVERLAP | PARALLEL | PEERS
    hashes = model_hashes(options.model, options.draft)
    with open_results(options, definitions, device, options.dtype, hashes) as results:
        lab = Lab(options, results, device)
        for section in options.only or (name for name in get_args(Section) if name != "peers"):
            SECTIONS[section](lab)
        if options.output:
            draw_requests(lab, options.output / "requests.png")
            draw_crossover(lab, options.output / "crossover.png")
            draw_timeline(lab, options.output / "blocks.png")
        for name, title in TITLES.items():
            lab.report(name, title)
        for line in crossings(lab):
            print("Speculation pays up to so many rows (none: all that were measured, or no row):", line)
        status = lab.close()
        print_document(lab.document())
        return status


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
