"""Which guesses may stand, how many should be made, by whom, and in what shape: what each choice gives and costs.

Five sections (`--only`): drafters x shapes, policies, controllers, the n-gram drafter, and this phase at its best
against the two before it. All timings take turns with plain decoding of the same engine; tokens per target forward are
counted on held-out text that is forced, on samples and on greedy output. Lossless variants are first held against plain
decoding wherever they must repeat its tokens, and a wrong one is not timed.

    python bench.py --quick
    python bench.py --output results --only drafters
    python bench.py --output results --resume
    python bench.py --calibrate
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, get_args

import torch
from benchmarks.calibrate import calibrate
from benchmarks.controllers import CONTROLLERS, measure_controllers
from benchmarks.drafters import DRAFTERS, measure_drafters
from benchmarks.lookup import LOOKUP, measure_ngram
from benchmarks.phases import PHASES, measure_phases
from benchmarks.pictures import draw
from benchmarks.policies import POLICIES, measure_policies
from benchmarks.runs import QUICK, SMALL, SPEED, Grid, Lab, Options, Section

from common.benchmark import Ratio, Results, environment, print_document, print_table
from common.device import dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.options import parse_options, run_main
from engine import load
from engine.pair import check_pair, resolve_draft

SECTIONS: dict[Section, Callable[[Lab], None]] = {
    "drafters": measure_drafters,
    "policies": measure_policies,
    "controllers": measure_controllers,
    "ngram": measure_ngram,
    "phases": measure_phases,
}
SPEEDS = "tokens_per_s speedup tokens_per_forward"
TABLES = {  # kind of row -> title, columns
    "drafter": (
        "Drafters and shapes: samples (temperature 1) and greedy output",
        f"drafter temperature shape {SPEEDS} acceptance draft_share loop_share",
    ),
    "forced": ("On forced held-out text", "drafter temperature shape k tokens_per_forward survival"),
    "policy": ("Policies", f"policy strength temperature {SPEEDS} acceptance perplexity"),
    "distance": ("How far lossy policies are off", "policy strength temperature first_token_tv excess_bits toy_tv"),
    "controller": ("Controllers", f"suite temperature controller {SPEEDS} of_best best_fixed"),
    "ngram": (
        "The n-gram drafter: forced text, and share of step time",
        "temperature k tokens_per_forward decoded_tokens_per_forward draft_share",
    ),
    "index": ("Its index", "length us_per_token us_per_lookup"),
    "choice": ("Chosen from, on the calibrate half", "temperature label speedup"),
    "phases": (
        "This phase at its best, against those before it",
        "temperature phase what tokens_per_s tokens_per_forward over_1 over_2",
    ),
}


def cell(row: dict[str, Any], name: str) -> object:
    """A ratio with its interval, a list with two digits."""
    value = row.get(name)
    if f"{name}_low" in row:
        return str(Ratio(row[name], row[f"{name}_low"], row[f"{name}_high"]))
    return " ".join(f"{share:.2f}" for share in value) if isinstance(value, list) else value


def report(lab: Lab) -> None:
    for kind, (title, names) in TABLES.items():
        if rows := lab.rows(kind):
            columns = names.split()
            print_table(title, columns, [[cell(row, name) for name in columns] for row in rows])


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    device = resolve_device(options.device)
    grid = Grid()
    if options.quick:
        options.repeats, options.prompts, options.max_tokens = 2, 1, min(options.max_tokens, 16)
        grid = QUICK
    elif (
        device.type == "cuda"
    ):  # launches, not arithmetic, take the time there: the shape of the curves says nothing new
        options.prompts, options.max_tokens, grid = min(options.prompts, 2), min(options.max_tokens, 32), SMALL
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = resolve_dtype(options.dtype, device)
    target = load(options.model, dtype, device)
    name = resolve_draft(options.draft, target)
    if name is None:
        raise UserError(f"{options.model} has no draft of its own; name one with --draft")
    draft = load(name, dtype, device)
    check_pair(target, draft)
    hashes = {loaded.checkpoint.name: loaded.checkpoint.content_hash() for loaded in (target, draft)}
    where = environment(device, dtype_name(dtype), torch.get_num_threads(), hashes)
    definitions = SPEED | DRAFTERS | POLICIES | CONTROLLERS | LOOKUP | PHASES
    with Results(options.output, definitions, where, options.resume) as results:
        lab = Lab(options, results, device, grid, name, {options.model: target, name: draft})
        if options.calibrate:
            calibrate(lab)
            return 0
        for section in options.only or get_args(Section):
            SECTIONS[section](lab)
        if options.output:
            draw(lab, options.output)
        report(lab)
        print_document(results.document())
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
