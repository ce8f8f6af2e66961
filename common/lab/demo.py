"""`lab demo`: the same prompts through every phase that exists, in one table.

Every phase runs as its command line runs it by default, but always in float32: greedily, on the embedded models. The
phases and transformers' `generate` (with its cache, as it comes) take turns in the same run, so the ratios hold on a
noisy machine too. Before anything is timed, every phase's tokens are compared with phase 1's.

    lab demo
    lab demo --output results
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.benchmark import Timed, interleave, median, print_table, progress, ratio_interval, seconds
from common.errors import UserError
from common.figures import figure
from common.lab.arguments import Parser
from common.peers import TransformersPeer
from common.phases import Phase, installed_phases, phases
from common.prompts import load_prompts
from common.results import Results, environment

PEER = "transformers"
DEFINITIONS = {
    "tokens_per_s": "new tokens / median time of a pass over the prompts, one after the other",
    "over_first": "phase 1's time / this one's, taking turns; median of the paired rounds with its 95% interval",
    "over_transformers": "likewise, of transformers' generate",
    "tokens_per_forward": "new tokens / forwards of the target",
    "same_tokens": "whether the tokens are phase 1's",
}
STREAMED = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def __init__(self'


@dataclass(frozen=True)
class Outcome:
    """What one pass over the prompts gave."""

    tokens: list[list[int]]
    forwards: int  # of the target; 0 where they are not counted

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


def phase_runner(phase: Phase, prompts: list[str], new_tokens: int) -> tuple[Callable[[], Outcome], Any]:
    """A function that completes the prompts with this phase's engine, and the loaded model."""
    engine = importlib.import_module(phase.package)
    before = torch.get_num_threads()
    session = engine.Session(engine.Options(max_tokens=new_tokens, dtype="float32"))
    threads = torch.get_num_threads()  # one whose steps run outside of torch leaves it a single thread
    torch.set_num_threads(before)

    def run() -> Outcome:
        torch.set_num_threads(threads)
        done = [session.complete([prompt])[0] for prompt in prompts]
        torch.set_num_threads(before)
        return Outcome([g.tokens for g in done], sum(g.stats.target_forwards for g in done))

    return run, session.loaded


def rows_of(found: list[Phase], timed: dict[str, list[Timed[Outcome]]]) -> list[dict[str, Any]]:
    """A row for every phase, and one for transformers' generate."""
    baseline = found[0].package
    names = {phase.package: (importlib.import_module(phase.package).__doc__ or "").split("\n")[0] for phase in found}
    names[PEER] = "transformers' generate, with its cache"
    rows = []
    for package, adds in names.items():
        outcome, times = timed[package][0].value, seconds(timed[package])
        row: dict[str, Any] = {
            "phase": next((phase.number for phase in found if phase.package == package), None),
            "adds": adds.rstrip("."),
            "tokens_per_s": outcome.count / median(times),
        }
        for name, other in (("over_first", baseline), ("over_transformers", PEER)):
            ratio = ratio_interval(seconds(timed[other]), times)
            row |= {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
        row["tokens_per_forward"] = outcome.count / outcome.forwards if outcome.forwards else None
        rows.append(row | {"same_tokens": outcome.tokens == timed[baseline][0].value.tokens})
    return rows


def cells(row: dict[str, Any]) -> tuple[object, ...]:
    first, peers = (
        "1"
        if row[f"{name}_low"] == row[f"{name}_high"] == 1
        else f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
        for name in ("over_first", "over_transformers")
    )
    drafted = row["tokens_per_forward"] if row["tokens_per_forward"] != 1 else None
    same = "yes" if row["same_tokens"] else "NO"
    return (row["phase"] or "", row["adds"], row["tokens_per_s"], first, peers, drafted, same)


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Tokens per second, one bar for every phase and one for transformers."""
    with figure(file, size=(9.0, 1.2 + 0.6 * len(rows)), title=title) as [axes]:
        named = [f"{row['phase']}: {row['adds']}" if row["phase"] else row["adds"] for row in rows]
        labels = [textwrap.fill(words, 48) for words in named]
        colours = ["tab:blue" if row["phase"] else "tab:grey" for row in rows]
        bars = axes.barh(labels, [row["tokens_per_s"] for row in rows], color=colours)
        axes.bar_label(bars, [f"{row['tokens_per_s']:.0f} ({row['over_first']:.1f}x)" for row in rows], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_xlabel("tokens per second")


def run(arguments: list[str]) -> int:
    parser = Parser("lab demo", "Run every phase on the embedded models and compare them in one table.")
    parser.add_argument("--prompts", type=int, default=4, help="how many prompts (default 4)")
    parser.add_argument("--max-tokens", type=int, default=48, help="new tokens of each (default 48)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the rows there, and demo.png")
    options = parser.parse_args(arguments)
    if min(options.prompts, options.max_tokens) < 1 or options.repeats < 2:
        raise UserError("--prompts and --max-tokens start at 1, --repeats at 2 (an interval needs two rounds)")

    prompts = [prompt.text for prompt in load_prompts("code", "test")[: options.prompts]]
    runners: dict[str, Callable[[], Outcome]] = {}
    found = phases() or installed_phases()
    for phase in found:
        runners[phase.package], loaded = phase_runner(phase, prompts, options.max_tokens)
    peer = TransformersPeer(loaded.checkpoint.folder, torch.float32, torch.device("cpu"))
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    runners[PEER] = lambda: Outcome([peer.generate([p], options.max_tokens, use_cache=True)[0] for p in ids], 0)

    name, threads = loaded.checkpoint.name, torch.get_num_threads()
    where = environment("cpu", "float32", threads, {name: loaded.checkpoint.content_hash()})
    title = f"{name}, greedy, {len(prompts)} prompts, at most {options.max_tokens} new tokens each"
    with Results(options.output, DEFINITIONS, where) as results:
        with progress("running", len(runners) * (options.repeats + 1)) as step:
            timed = interleave(runners, options.repeats, on_run=step)
        rows = rows_of(found, timed)
        for row in rows:
            results.add(row)
    if options.output:
        draw(rows, f"{title}\n{where['cpu']}, {threads} threads, float32", options.output / "demo.png")
    print_table(
        title,
        ["phase", "what it adds", "tokens/s", "x phase 1", "x transformers", "tokens/forward", "same tokens"],
        [cells(row) for row in rows],
    )
    print(f"\nPhase {found[-1].number} writes, at temperature 0.8:\n\n{STREAMED}", end="", flush=True)
    cli = importlib.import_module(f"{found[-1].package}.cli")
    cli.main(["--prompt", STREAMED, "--temperature", "0.8", "--max-tokens", "96", "--seed", "1"])
    return 0 if all(row["same_tokens"] for row in rows) else 1
