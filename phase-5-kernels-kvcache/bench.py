"""What must be remembered so that a token costs one token, and what that gives: speed, memory, the price of verifying.

Sections (`--only`). Plain decoding against itself (`null`). With torch's operations: kinds of cache against phase 4 and
transformers, ways to draft, one more token behind texts of many lengths, what m verified tokens cost against one, and
what a cache in fewer bits costs in perplexity. With steps in C++ (`fast`): plain decoding and speculation in every
number format, on a small model and on a large one. Asked for by name: kernels against what the machine allows, rung by
rung (`--ladder`), and against other engines (`--peers`). A graphics card has its own ladder, peers and `kernels`.

    python bench.py --quick
    python bench.py --output results --only speed
    python bench.py --output results --resume
    python bench.py --prompts-from FILE.jsonl --drafters ngram --temperatures 1
    python bench.py --only null --tries 20 --output results
"""

from __future__ import annotations

import sys
from typing import get_args

import launch  # noqa: F401 (it has to come first)
import torch
from benchmarks.fast import FAST, measure_fast
from benchmarks.lengths import LENGTHS, measure_lengths
from benchmarks.machines import MACHINES, measure_kernels, measure_ladder, measure_peers
from benchmarks.pictures import draw
from benchmarks.quality import QUALITY, measure_quality
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
    "ladder": measure_ladder,
    "peers": measure_peers,
    "kernels": measure_kernels,
}
TITLES = {  # section, or a part of one -> title of its table
    "null": "Plain decoding against itself",
    "cache": "Greedy plain decoding, against phase 4",
    "speed": "Ways to draft, with torch's operations",
    "lengths": "One more token behind a text",
    "verification": "What verification costs",
    "quality": "Perplexity by the cache's format",
    "quality_cpp": "Perplexity by what the C++ kernels multiply",
    "fast_k": "Steps in C++: draft lengths on the calibrate half",
    "fast": "Steps in C++",
    "fast_drafters": "Other drafters, steps in C++",
    "loop": "Plain decoding inside one call into C++",
    "cold_start": "From the start of the process to the first token",
    "ladder": "CPU ladder",
    "machine": "What the processor allows",
    "peers": "Others on the same weights",
    "copy": "A copy on the card",
    "kernels": "Kernels on a card",
    "gpu_ladder": "Ladders on a card",
    "gpu_peers": "Peers on a card",
}


def sections(options: Options, on_card: bool) -> list[Section]:
    """Those that were asked for; else all but what takes other engines or many rungs, which a card always measures."""
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
    threads = options.threads or torch.get_num_threads()
    definitions = FIGURES | MACHINES | SPEED | LENGTHS | VERIFICATION | QUALITY | FAST
    with open_results(
        options, definitions, device, options.dtype, model_hashes(options.model, options.draft)
    ) as results:
        lab = Lab(options, results, device)
        for section in sections(options, device.type == "cuda"):
            torch.set_num_threads(threads)  # a llm whose steps run in C++ leaves torch one
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
