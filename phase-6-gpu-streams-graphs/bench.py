"""Measures an engine that serves many requests.

Sections (`--only`): `requests`, throughput and latency against the number of requests that arrive together, plain and
speculative, with static batching as the contrast; `prefix`, the time to the first token if the cache knows the prompt.

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
from benchmarks.prefix import PREFIX, measure_prefix
from benchmarks.requests import REQUESTS, draw_requests, measure_requests
from benchmarks.runs import FIGURES, Lab, Options, Section
from benchmarks.timeline import draw_timeline

from common.benchmark import print_document
from common.device import resolve_device
from common.harness import model_hashes, open_results
from common.options import parse_options, run_main

SECTIONS = {"requests": measure_requests, "prefix": measure_prefix}
TITLES = {"requests": "Requests that arrive together", "prefix": "Time to the first token of a known prompt"}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.requests, options.formats = options.requests[:4:3], options.formats[:1]
        options.max_tokens = min(options.max_tokens, 16)
    if options.threads:
        torch.set_num_threads(options.threads)
    definitions = FIGURES | REQUESTS | PREFIX
    hashes = model_hashes(options.model, options.draft)
    with open_results(options, definitions, device, options.dtype, hashes) as results:
        lab = Lab(options, results, device)
        for section in options.only or get_args(Section):
            SECTIONS[section](lab)
        if options.output:
            draw_requests(lab, options.output / "requests.png")
            draw_timeline(lab, options.output / "blocks.png")
        for name, title in TITLES.items():
            lab.report(name, title)
        status = lab.close()
        print_document(lab.document())
        return status


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
