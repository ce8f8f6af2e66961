"""Measures number formats, quantisation, fused and compiled layers: speed, memory and quality.

Six sections (`--only`): speed against phase 3, perplexity, memory when loading, the tokenizer's cache, profiles, and
forwards at the shapes of gpt2-xl and Llama-3.1-8B. Variants that must give phase 3's tokens are compared with it run by
run, and a wrong variant is not timed.

    python bench.py --quick
    python bench.py --output results
    python bench.py --output results --resume
    python bench.py --model FOLDER --prompts-from FILE.jsonl --only speed
"""

from __future__ import annotations

import sys
from typing import get_args

import launch  # noqa: F401 (it has to come first)
import torch
from benchmarks.memory import MEMORY, measure_memory
from benchmarks.pictures import draw
from benchmarks.profile import PROFILE, measure_profile
from benchmarks.quality import QUALITY, measure_quality
from benchmarks.runs import Lab, Measure, Options, Section
from benchmarks.shapes import SHAPES, measure_shapes
from benchmarks.speed import SPEED, measure_speed
from benchmarks.tokens import TOKENS, measure_tokens

from common.benchmark import print_document
from common.device import resolve_device
from common.harness import model_hashes, open_results
from common.options import parse_options, run_main

SECTIONS: dict[Section, Measure] = {
    "speed": measure_speed,
    "quality": measure_quality,
    "memory": measure_memory,
    "tokens": measure_tokens,
    "profile": measure_profile,
    "shapes": measure_shapes,
}
TITLES = {  # section of the rows -> title of its table
    "dtypes": "A large matrix product",
    "choice": "Drafters, on the calibrate half",
    "speed": "Number formats and execution",
    "quality": "Perplexity on held-out text",
    "memory": "A new process that loads a model",
    "tokenizer": "Encoding prompts",
    "tokenizer_limit": "Hits of a limited cache",
    "profile": "Time of a step by range",
    "trace": "Time of the target's forwards by operators",
    "shapes": "Forwards of large models, random weights",
    "attention": "Attention of one layer of large models",
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    if options.quick:
        options.prompts, options.max_tokens = min(options.prompts, 2), min(options.max_tokens, 8)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    definitions = SPEED | QUALITY | MEMORY | TOKENS | PROFILE | SHAPES
    with open_results(
        options, definitions, device, options.dtype, model_hashes(options.model, options.draft)
    ) as results:
        lab = Lab(options, results, device)
        for section in options.only or get_args(Section):
            SECTIONS[section](lab)
        if options.output:
            draw(lab, options.output)
        for section, title in TITLES.items():
            lab.report(section, title)
        print_document(lab.document())
        return lab.close()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
