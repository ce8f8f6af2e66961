"""`lab demo`: the same prompts through every existing phase, in one table.

Every phase runs with its command line's defaults, but always in float32: greedily, on the embedded models. The phases
and transformers' `generate` (with its cache, by default) run in turns, so the ratios hold on a noisy machine too. A
variant that does not write phase 1's tokens is not timed.

    lab demo
    lab demo --output results
"""

from __future__ import annotations

import importlib
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.benchmark import BenchOptions, Outcome, print_table
from common.errors import UserError
from common.figures import BLUE, GREY, figure
from common.harness import Bench, Variant, open_results
from common.lab.arguments import Parser
from common.peers import TransformersPeer
from common.phases import Phase, installed_phases, phases
from common.prompts import Prompt
from common.tables import notes, text_of

PEER = "transformers"
DEFINITIONS = {
    "demo": "greedy decoding in float32, one prompt after the other; speedup: over phase 1; all write its tokens"
}
STREAMED = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self'


def phase_runner(phase: Phase, new_tokens: int) -> tuple[Variant, Any]:
    """Return a function that runs one prompt with this phase's engine, and the loaded model."""
    engine = importlib.import_module(phase.package)
    llm = engine.LLM(engine.Options(max_tokens=new_tokens, dtype="float32"))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        done = llm.generate([prompt.text])[0]
        return Outcome(len(done.tokens), {"forwards": done.stats.target_forwards}, done.tokens)

    return run, llm.loaded


def peer_runner(loaded: Any, new_tokens: int) -> Variant:
    """Return transformers' generate with its cache, on the same weights."""
    peer = TransformersPeer(loaded.checkpoint.folder, torch.float32, torch.device("cpu"))

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        tokens = peer.generate([loaded.tokenizer.encode(prompt.text)], new_tokens, use_cache=True)[0]
        return Outcome(len(tokens), output=tokens)

    return run


def lines_of(bench: Bench, found: list[Phase]) -> list[dict[str, Any]]:
    """Return the derived table with each phase's addition, and the speed-up over transformers."""
    adds = {phase.package: (importlib.import_module(phase.package).__doc__ or "").split("\n")[0] for phase in found}
    for before, phase in pairwise(found):
        if adds[phase.package] == adds[before.package]:
            adds[phase.package] = f"the engine of phase {before.number}"
    adds[PEER] = "transformers' generate, with its cache"
    over_peer = {line["variant"]: line for line in bench.table("demo", baseline=PEER)}
    lines = []
    for line in bench.table("demo"):
        first, _, again = line["variant"].partition(", ")
        number = next((str(phase.number) for phase in found if phase.package == first), "")
        lines.append(
            {
                **line,
                "phase": number + (f", {again}" if again else ""),
                "adds": "the same again: the noise of this machine" if again else adds[first].rstrip("."),
                "over_transformers": text_of(over_peer[line["variant"]], "speedup"),
            }
        )
    return lines


def draw(lines: list[dict[str, Any]], title: str, file: Path) -> None:
    """Draw tokens per second, one bar for every phase and one for transformers."""
    lines = [line for line in lines if "," not in line["phase"] and "tokens_per_s" in line]
    with figure(file, size=(9.0, 1.2 + 0.6 * len(lines)), title=title) as [axes]:
        named = [f"{line['phase']}: {line['adds']}" if line["phase"] else line["adds"] for line in lines]
        labels = [textwrap.fill(words, 48) for words in named]
        colours = [BLUE if line["phase"] else GREY for line in lines]
        bars = axes.barh(labels, [line["tokens_per_s"] for line in lines], color=colours)
        rates = [f"{line['tokens_per_s']:.0f} ({line.get('speedup', 1.0):.1f}x)" for line in lines]
        axes.bar_label(bars, rates, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_xlabel("tokens per second")


def run(arguments: list[str]) -> int:
    parser = Parser("lab demo", "Run every phase on the embedded models and compare them in one table.")
    parser.add_argument("--prompts", type=int, default=5, help="how many prompts (default 5)")
    parser.add_argument("--max-tokens", type=int, default=48, help="new tokens of each (default 48)")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds (default 2)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the rows there, and demo.png")
    given = parser.parse_args(arguments)
    if min(given.prompts, given.max_tokens, given.rounds) < 1:
        raise UserError("--prompts, --max-tokens and --rounds start at 1")
    chosen: dict[str, Any] = vars(given)
    options = BenchOptions(**chosen, dtype="float32")

    runners: dict[str, Variant] = {}
    found = phases() or installed_phases()
    for phase in found:
        runners[phase.package], loaded = phase_runner(phase, options.max_tokens)
    runners[PEER] = peer_runner(loaded, options.max_tokens)
    name, device = loaded.checkpoint.name, torch.device("cpu")
    hashes = {name: loaded.checkpoint.content_hash()}
    title = f"{name}, greedy, {options.prompts} prompts, at most {options.max_tokens} new tokens each"
    with open_results(options, DEFINITIONS, device, "float32", hashes) as results:
        bench = Bench(options, results, device)
        bench.compare("demo", {}, runners, bench.prompts(), exact=list(runners)[1:])
        lines = lines_of(bench, found)
        status = bench.close()
        where = results.environment
    if options.output:
        draw(lines, f"{title}\n{where['cpu']}, {where['threads']} threads, float32", options.output / "demo.png")
    columns = ("phase", "adds", "tokens_per_s", "speedup", "over_transformers", "tokens_per_forward", "reason")
    heads = ["phase", "what it adds", "tokens/s", "x phase 1", "x transformers", "tokens/forward", "left out"]
    shown = len(columns) if any("reason" in line for line in lines) else len(columns) - 1
    print_table(title, heads[:shown], [[text_of(line, column) for column in columns[:shown]] for line in lines])
    print("\nAll write the same tokens." if status == 0 else "\nVariants that write other tokens are left out.")
    for note in notes(lines):
        print(note)
    print(f"\nPhase {found[-1].number} writes, at temperature 0.8:\n\n{STREAMED}", end="", flush=True)
    cli = importlib.import_module(f"{found[-1].package}.cli")
    cli.main(["--prompt", STREAMED, "--temperature", "0.8", "--max-tokens", "96", "--seed", "1"])
    return status
