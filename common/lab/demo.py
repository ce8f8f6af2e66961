"""`lab demo`: the same prompts through every phase that exists, in one table.

Every phase runs as its command line runs it by default, but always in float32: greedily, on the embedded models. The
phases and transformers' `generate` (with its cache, as it comes) take turns in the same run, so the ratios hold on a
noisy machine too. Before anything is timed, every phase's tokens are compared with phase 1's.

    lab demo
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.benchmark import Timed, interleave, median, print_table, progress, ratio_interval, seconds
from common.errors import UserError
from common.lab.arguments import Parser
from common.peers import TransformersPeer
from common.phases import Phase, installed_phases, phases
from common.prompts import load_prompts

PEER = "transformers"
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
    session = engine.Session(engine.Options(max_tokens=new_tokens, dtype="float32"))

    def run() -> Outcome:
        done = [session.complete([prompt])[0] for prompt in prompts]
        return Outcome([g.tokens for g in done], sum(g.stats.target_forwards for g in done))

    return run, session.loaded


def table_row(phase: Phase, timed: dict[str, list[Timed[Outcome]]], baseline: str, same: bool) -> tuple[object, ...]:
    runs = timed[phase.package]
    outcome, times = runs[0].value, seconds(runs)
    adds = (importlib.import_module(phase.package).__doc__ or "").split("\n")[0].rstrip(".")
    per_forward = outcome.count / outcome.forwards
    return (
        phase.number,
        adds,
        outcome.count / median(times),
        str(ratio_interval(seconds(timed[baseline]), times)) if phase.package != baseline else "1",
        str(ratio_interval(seconds(timed[PEER]), times)),
        per_forward if per_forward != 1 else None,
        "yes" if same else "NO",
    )


def run(arguments: list[str]) -> int:
    parser = Parser("lab demo", "Run every phase on the embedded models and compare them in one table.")
    parser.add_argument("--prompts", type=int, default=4, help="how many prompts (default 4)")
    parser.add_argument("--max-tokens", type=int, default=48, help="new tokens of each (default 48)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
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

    baseline = found[0].package
    with progress("running", len(runners) * (options.repeats + 1)) as step:
        timed = interleave(runners, options.repeats, on_run=step)
    expected = timed[baseline][0].value.tokens
    rows = [table_row(p, timed, baseline, timed[p.package][0].value.tokens == expected) for p in found]
    peer_runs = timed[PEER]
    peer_same = "yes" if peer_runs[0].value.tokens == expected else "NO"
    rows.append(
        (
            "",
            "transformers' generate, with its cache",
            peer_runs[0].value.count / median(seconds(peer_runs)),
            str(ratio_interval(seconds(timed[baseline]), seconds(peer_runs))),
            "1",
            None,
            peer_same,
        )
    )
    print_table(
        f"{loaded.checkpoint.name}, greedy, {len(prompts)} prompts, at most {options.max_tokens} new tokens each",
        ["phase", "what it adds", "tokens/s", "x phase 1", "x transformers", "tokens/forward", "same tokens"],
        rows,
    )
    print(f"\nPhase {found[-1].number} writes, at temperature 0.8:\n\n{STREAMED}", end="", flush=True)
    cli = importlib.import_module(f"{found[-1].package}.cli")
    cli.main(["--prompt", STREAMED, "--temperature", "0.8", "--max-tokens", "96", "--seed", "1"])
    return 0 if all(row[-1] == "yes" for row in rows) else 1
