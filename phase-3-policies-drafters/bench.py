"""Measures acceptance policies, K controllers, drafters and trees: speed, acceptance, and distance from the target.

Five sections (`--only`): drafters x shapes, policies, controllers, the n-gram index, and this phase's best options
against the two earlier phases. Timed runs alternate with plain decoding by the same engine. Tokens per target forward
are counted on forced held-out text, on samples and on greedy output. Variants that must repeat plain decoding's tokens
are compared with it run by run, and a wrong variant is not timed. Best options are chosen on prompts of the calibrate
half.

    python bench.py --quick
    python bench.py --output results --only drafters
    python bench.py --output results --resume
    python bench.py --model FOLDER --draft FOLDER --prompts-from FILE.jsonl --drafters model --k 3 --k 5
    python bench.py --calibrate
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import get_args

import launch  # noqa: F401 (it has to come first)
import torch
from benchmarks.calibrate import calibrate
from benchmarks.choice import CHOICE
from benchmarks.controllers import CONTROLLERS, measure_controllers
from benchmarks.drafters import DRAFTERS, measure_drafters
from benchmarks.lookup import LOOKUP, measure_ngram
from benchmarks.phases import PHASES, measure_phases
from benchmarks.pictures import draw
from benchmarks.policies import POLICIES, measure_policies
from benchmarks.runs import SPEED, Lab, Options, Section

from common.benchmark import print_document
from common.device import dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.harness import open_results
from common.options import parse_options, run_main
from engine import load
from engine.pair import check_pair, fit_vocabulary, resolve_draft

SECTIONS: dict[Section, Callable[[Lab], None]] = {
    "drafters": measure_drafters,
    "policies": measure_policies,
    "controllers": measure_controllers,
    "ngram": measure_ngram,
    "phases": measure_phases,
}
SPEEDS = "variant tokens_per_s speedup tokens_per_forward"
TABLES = {  # section of the rows -> title, columns
    "drafters": ("Drafters and shapes", f"temperature {SPEEDS} acceptance draft_share loop_share"),
    "forced": ("On forced held-out text", "temperature variant tokens_per_forward n_prompts"),
    "policies": ("Policies", f"temperature {SPEEDS} acceptance perplexity"),
    "distance": ("Distance of lossy policies from the target", "temperature variant first_token_tv excess_bits toy_tv"),
    "choice": ("Candidates, on the calibrate half", f"temperature {SPEEDS}"),
    "controllers": ("Controllers", f"draft temperature {SPEEDS} acceptance"),
    "index": ("The n-gram index", "operation variant tokens_per_s speedup"),
    "phases": ("This phase's best options against earlier phases", f"temperature {SPEEDS} what"),
}


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    if options.quick:
        options.prompts, options.max_tokens = 1, min(options.max_tokens, 16)
        if "temperatures" not in options.model_fields_set:
            options.temperatures = [1.0]
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = resolve_dtype(options.dtype, device)
    target = load(options.model, dtype, device)
    name = resolve_draft(options.draft, target)
    if name is None:
        raise UserError(f"{options.model} has no draft of its own; name one with --draft")
    draft = load(name, dtype, device)
    check_pair(target, draft)
    fit_vocabulary(draft.model, target.config.vocab_size)
    loaded = {options.model: target, name: draft}
    hashes = {which: model.checkpoint.content_hash() for which, model in loaded.items()}
    definitions = SPEED | DRAFTERS | POLICIES | CHOICE | CONTROLLERS | LOOKUP | PHASES
    with open_results(options, definitions, device, dtype_name(dtype), hashes) as results:
        lab = Lab(options, results, device, name, loaded)
        if options.calibrate:
            calibrate(lab)
            return 0
        for section in options.only or get_args(Section):
            SECTIONS[section](lab)
        if options.output:
            draw(lab, options.output)
        for section, (title, columns) in TABLES.items():
            lab.report(section, title, columns.split())
        print_document(lab.document())
        return lab.close()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
