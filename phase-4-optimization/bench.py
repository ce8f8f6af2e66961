"""How much faster and smaller the same loop gets by how numbers are stored and operations are run, and at what cost.

Six sections (`--only`): speed against phase 3, perplexity, memory when loading, the tokenizer's cache, where the time
goes, and forwards at the shapes of gpt2-xl and Llama-3.1-8B. What must write the tokens of phase 3 is held against it
first, and is not timed if it does not.

    python bench.py --quick
    python bench.py --output results --only speed
    python bench.py --output results --resume
"""

from __future__ import annotations

import sys
from typing import get_args

import torch
from benchmarks.memory import MEMORY, measure_memory
from benchmarks.pictures import draw
from benchmarks.profile import PROFILE, measure_profile
from benchmarks.quality import QUALITY, measure_quality
from benchmarks.runs import Lab, Measure, Options, Section
from benchmarks.shapes import SHAPES, measure_shapes
from benchmarks.speed import SPEED, measure_speed
from benchmarks.tokens import TOKENS, measure_tokens

from common.benchmark import Results, environment, print_document
from common.checkpoint import open_checkpoint
from common.device import resolve_device
from common.options import parse_options, run_main

SECTIONS: dict[Section, Measure] = {
    "speed": measure_speed,
    "quality": measure_quality,
    "memory": measure_memory,
    "tokens": measure_tokens,
    "profile": measure_profile,
    "shapes": measure_shapes,
}
TITLES = {  # kind of row -> title of its table
    "speed": "The same loop, stored and run in other ways",
    "quality": "Perplexity on held-out text",
    "memory": "A fresh process that loads GPT-2's shape",
    "tokenizer": "Encoding prompts",
    "profile": "Where the time goes",
    "profile_cost": "What profiling costs",
    "shapes": "Forwards of large models, random weights",
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.repeats, options.prompts, options.max_tokens = 2, 1, min(options.max_tokens, 16)
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(options.model)
    where = environment(device, options.dtype, torch.get_num_threads(), {checkpoint.name: checkpoint.content_hash()})
    definitions = SPEED | QUALITY | MEMORY | TOKENS | PROFILE | SHAPES
    with Results(options.output, definitions, where, options.resume) as results:
        lab = Lab(options, results, device)
        for section in options.only or get_args(Section):
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
