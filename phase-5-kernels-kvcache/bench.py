"""What must be remembered so that a token costs one token, and what that gives: speed, memory, the price of verifying.

Eight sections (`--only`). With torch's operations: end to end against phase 4 and transformers, one more token behind
texts of many lengths, what m verified tokens cost against one, and what a cache in fewer bits costs in perplexity. With
steps in C++: plain decoding and speculation in every number format, on a small model and on a large one. And kernels
against what the machine allows, rung by rung (`--ladder`), against other engines (`--peers`), and one by one on a card.

    python bench.py --quick
    python bench.py --output results --only speed
    python bench.py --output results --resume
"""

from __future__ import annotations

import sys
from typing import get_args

import torch
from benchmarks.fast import FAST, measure_fast
from benchmarks.lengths import LENGTHS, measure_lengths
from benchmarks.machines import MACHINES, measure_kernels, measure_ladder, measure_peers
from benchmarks.pictures import draw
from benchmarks.quality import QUALITY, measure_quality
from benchmarks.runs import Lab, Measure, Options, Section
from benchmarks.speed import SPEED, measure_speed
from benchmarks.verification import VERIFICATION, measure_verification

from common.benchmark import Results, environment, print_document
from common.checkpoint import open_checkpoint
from common.device import resolve_device
from common.options import parse_options, run_main

SECTIONS: dict[Section, Measure] = {
    "speed": measure_speed,
    "lengths": measure_lengths,
    "verification": measure_verification,
    "quality": measure_quality,
    "fast": measure_fast,
    "ladder": measure_ladder,
    "peers": measure_peers,
    "kernels": measure_kernels,
}
TITLES = {  # kind of row -> title of its table
    "speed": "End to end",
    "length": "One more token behind a text",
    "verification": "What verification costs",
    "quality": "Perplexity by the cache's format",
    "quality_cpp": "Perplexity by what the C++ kernels multiply",
    "fast": "Steps in C++",
    "fast_drafters": "Other drafters, steps in C++",
    "loop": "Plain decoding inside one call into C++",
    "cold_start": "From the start of the process to the first token",
    "gpu_kernel": "Kernels on a card",
    "gpu_ladder": "Ladders on a card",
    "gpu_peers": "Peers on a card",
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.repeats, options.prompts, options.max_tokens = 2, 1, min(options.max_tokens, 32)
        options.tokens = min(options.tokens, 1024)
    wanted: list[Section] = [*options.only]
    wanted += ["ladder"] if options.ladder else []
    wanted += ["peers"] if options.peers else []
    wanted = wanted or list(get_args(Section))
    threads = options.threads or torch.get_num_threads()
    checkpoint = open_checkpoint(options.model)
    where = environment(device, options.dtype, threads, {checkpoint.name: checkpoint.content_hash()})
    definitions = MACHINES | SPEED | LENGTHS | VERIFICATION | QUALITY | FAST
    with Results(options.output, definitions, where, options.resume) as results:
        lab = Lab(options, results, device)
        for section in wanted:
            torch.set_num_threads(threads)  # a session whose steps run in C++ leaves torch one
            SECTIONS[section](lab)
        if options.output:
            draw(lab, options.output)
        for kind, title in TITLES.items():
            if lab.rows(kind):
                lab.table(kind, title)
        print_document(results.document())
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
