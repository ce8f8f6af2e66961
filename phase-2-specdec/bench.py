"""How much faster is draft-and-verify, for which K, and what does the textbook say?

For every dtype, temperature and K = 1..8: speculative against plain decoding of the same engine, interleaved, with the
acceptance by position; beside it the speed-up predicted from the measured acceptance a and draft cost c,
(1 - a^(K+1)) / ((1 - a)(cK + 1)), and the better prediction from survival by position. And, on held-out text that is
forced, the tokens per target forward, free of what the model itself likes to write.

    python bench.py --quick
    python bench.py --output results
    python bench.py --model gpt2-large --draft gpt2 --dtypes bfloat16
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from common.benchmark import (
    BenchOptions,
    Results,
    environment,
    interleave,
    median,
    print_document,
    print_table,
    progress,
    ratio_interval,
    refuse_if_different,
)
from common.device import dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.figures import figure
from common.loops import loop_share
from common.options import parse_options, run_main
from common.prompts import Prompt, load_prompts
from engine import (
    Certain,
    KeyedDecisions,
    LoadedModel,
    ModelDrafter,
    SamplingParams,
    Sequence,
    StepStats,
    generate,
    load,
    speculative_decode,
)
from engine.explain import account, plain_step_ms, survival, textbook_speedup, tokens_per_forward
from engine.forced import forced_acceptance
from engine.pair import check_pair, resolve_draft

DEFINITIONS = {
    "speedup": "plain over speculative wall time, median of the paired rounds with its bootstrap 95% interval",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens all stand",
    "draft_cost": "time of one draft token / time of a plain target step",
    "predicted_textbook": "(1 - a^(K+1)) / ((1 - a)(cK + 1)) with a = acceptance of single tokens, c = draft_cost",
    "predicted_survival": "(1 + sum of survival) x plain step time / measured step time",
    "loop_share": "share of the tokens that end an 8-gram which the same output held before",
    "forced": "at each point of held-out text the draft proposes from the true prefix; the text then moves on by as "
    "many true tokens as the step would have given",
}


class Options(BenchOptions):
    """Speculative against plain decoding."""

    draft: str = Field("auto", description="the draft; auto: the model's own")
    dtypes: list[Literal["float32", "bfloat16", "float16"]] = Field([], description="dtypes to measure; repeatable")
    max_k: int = Field(8, ge=1, le=16, description="largest number of draft tokens")
    prompts: int = Field(12, ge=1, le=100, description="prompts of the test half")
    max_tokens: int = Field(48, ge=8, description="new tokens per prompt")


@dataclass(frozen=True)
class Pair:
    """A target and its draft in one dtype."""

    target: LoadedModel
    draft: LoadedModel

    def prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        return [self.target.tokenizer.encode(prompt.text) for prompt in prompts]


@dataclass(frozen=True)
class Output:
    tokens: list[list[int]]
    steps: list[StepStats]
    sequences: list[Sequence]


def speculate(pair: Pair, prompts: list[list[int]], params: SamplingParams, k: int) -> Output:
    """All prompts, one after the other."""
    decisions = Certain() if params.greedy else KeyedDecisions(params.seed)
    drafter = ModelDrafter(pair.draft.model, params, decisions)
    steps, sequences = [], []
    for prompt in prompts:
        sequence = Sequence(prompt, params, pair.target.ending)
        for step in speculative_decode(pair.target.model, drafter, [sequence], params, k, decisions):
            steps.append(step.stats[0])
        sequences.append(sequence)
    return Output([sequence.tokens for sequence in sequences], steps, sequences)


def plain(pair: Pair, prompts: list[list[int]], params: SamplingParams) -> Output:
    done = [generate(pair.target.model, [prompt], params, pair.target.ending)[0].tokens for prompt in prompts]
    return Output(done, [], [])


def measure_speed(pair: Pair, options: Options, results: Results, dtype: str, temperature: float) -> None:
    """One row per K: speed-up, acceptance, costs, predictions."""
    ks = range(1, options.max_k + 1)
    key = {"kind": "speed", "dtype": dtype, "temperature": temperature}
    if results.has({**key, "k": options.max_k}):
        return
    params = SamplingParams(temperature=temperature, max_new_tokens=options.max_tokens, seed=options.seed)
    prompts = pair.prompts(load_prompts("code", "test")[: options.prompts])
    device = pair.target.model.embedding.weight.device
    variants = {"plain": partial(plain, pair, prompts, params)}
    variants |= {str(k): partial(speculate, pair, prompts, params, k) for k in ks}
    if temperature == 0 and dtype == "float32":  # in half precision wide and narrow forwards round differently
        expected = variants["plain"]().tokens
        for k in ks:
            for prompt, (one, other) in enumerate(zip(expected, variants[str(k)]().tokens, strict=True)):
                refuse_if_different(f"K = {k}, prompt {prompt}", one, other)
    with progress(f"{dtype}, temperature {temperature}", len(variants) * (options.repeats + 1)) as step:
        timed = interleave(variants, options.repeats, device=device, on_run=step)
    plain_rate = [r.seconds / sum(map(len, r.value.tokens)) for r in timed["plain"]]  # seconds per token
    for k in ks:
        runs = timed[str(k)]
        count = sum(map(len, runs[0].value.tokens))
        rate = [r.seconds / count for r in runs]
        speedup = ratio_interval(plain_rate, rate, seed=options.seed)
        steps = [stats for run in runs for stats in run.value.steps]
        own = runs[0].value.steps
        costs = account(steps, median([plain_step_ms(pair.target.model, s) for s in runs[0].value.sequences]))
        shares = survival(own, k)
        single = [s for s in own if s.proposed]
        first = sum(s.accepted >= 1 for s in single) / len(single)
        cost = costs.draft_ms / costs.plain_ms if costs else 0.0
        results.add(
            {
                **key,
                "k": k,
                "k_ran": max(s.k for s in own),
                "tokens": count,
                "tokens_per_s": 1 / median(rate),
                "plain_tokens_per_s": 1 / median(plain_rate),
                "speedup": speedup.median,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
                "tokens_per_forward": count / len(own),
                "acceptance": sum(s.accepted for s in own) / sum(s.proposed for s in own),
                "survival": shares,
                "draft_cost": cost,
                "predicted_textbook": textbook_speedup(first, cost, k),
                "predicted_survival": costs.speedup(k) if costs else 1.0,
                "loop_share": sum(map(loop_share, runs[0].value.tokens)) / len(prompts),
                "peak_rss_mib": max(r.memory.get("peak_rss", r.memory["rss"]) for r in runs),
                "synthetic": False,
            }
        )


def measure_forced(pair: Pair, options: Options, results: Results, dtype: str, temperature: float) -> None:
    """Tokens per target forward along the true text, for K = max_k, and by survival for every smaller K."""
    key = {"kind": "forced", "dtype": dtype, "temperature": temperature}
    if results.has(key):
        return
    params = SamplingParams(temperature=temperature, max_new_tokens=10**6, seed=options.seed, ignore_eos=True)
    decisions = Certain() if params.greedy else KeyedDecisions(params.seed)
    drafter, K = ModelDrafter(pair.draft.model, params, decisions), options.max_k
    stood: list[int] = []
    prompts = load_prompts("code", "test")[: options.prompts]
    encode = pair.target.tokenizer.encode
    with progress(f"forced, {dtype}, temperature {temperature}", len(prompts)) as show:
        for prompt in prompts:
            truth = encode(prompt.continuation)[: 2 * options.max_tokens]
            stood += forced_acceptance(pair.target.model, drafter, encode(prompt.text), truth, params, K, decisions)
            show(prompt.id)
    shares = [sum(s >= j for s in stood) / len(stood) for j in range(1, K + 1)]
    results.add(
        {
            **key,
            "k": K,
            "steps": len(stood),
            "survival": shares,
            "tokens_per_forward_by_k": [tokens_per_forward(shares, k) for k in range(1, K + 1)],
            "synthetic": False,
        }
    )


def dry_rows(options: Options, results: Results, dtype: str, temperature: float) -> None:
    """The grid without computing."""
    names = ("tokens_per_s", "speedup", "speedup_low", "speedup_high", "tokens_per_forward", "acceptance", "draft_cost")
    figures = dict.fromkeys((*names, "predicted_textbook", "predicted_survival", "loop_share"), 1.0)
    for k in range(1, options.max_k + 1):
        row = {"kind": "speed", "dtype": dtype, "temperature": temperature, "k": k, "k_ran": k, "tokens": 1}
        results.add({**row, **figures, "synthetic": True})


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Measured speed-up with its interval over K, and both predictions, one panel per dtype and temperature."""
    panels = list(dict.fromkeys((row["dtype"], row["temperature"]) for row in rows))
    with figure(file, columns=len(panels), size=(4.2, 3.8), title=title, sharey=True) as grid:
        for axes, (dtype, temperature) in zip(grid, panels, strict=True):
            here = [row for row in rows if (row["dtype"], row["temperature"]) == (dtype, temperature)]
            ks = [row["k"] for row in here]
            middle = [row["speedup"] for row in here]
            below = [row["speedup"] - row["speedup_low"] for row in here]
            above = [row["speedup_high"] - row["speedup"] for row in here]
            axes.errorbar(ks, middle, yerr=[below, above], fmt="o-", capsize=3, label="measured")
            axes.plot(ks, [r["predicted_survival"] for r in here], "--", label="from survival, costs")
            axes.plot(ks, [r["predicted_textbook"] for r in here], ":", label="textbook, from a and c")
            axes.axhline(1, color="black", linewidth=0.6)
            axes.set(title=f"{dtype}, temperature {temperature:g}", xlabel="draft tokens K")
        grid[0].set_ylabel("times as fast as plain decoding")
        grid[0].legend()


COLUMNS = ["dtype", "T", "K", "tokens/s", "x plain", "per forward", "acceptance", "c", "textbook", "survival", "loops"]


def report(results: Results) -> None:
    speed = [row for row in results.rows if row["kind"] == "speed"]
    print_table(
        "Speculative against plain decoding",
        COLUMNS,
        [
            [
                r["dtype"],
                f"{r['temperature']:g}",
                r["k"],
                r["tokens_per_s"],
                f"{r['speedup']:.2f} [{r['speedup_low']:.2f}, {r['speedup_high']:.2f}]",
                r["tokens_per_forward"],
                r["acceptance"],
                r["draft_cost"],
                r["predicted_textbook"],
                r["predicted_survival"],
                f"{r['loop_share']:.0%}",
            ]
            for r in speed
        ],
    )
    forced = [row for row in results.rows if row["kind"] == "forced"]
    if forced:
        ks = [f"K={k}" for k in range(1, forced[0]["k"] + 1)]
        print_table(
            "Tokens per target forward on forced held-out text",
            ["dtype", "T", *ks],
            [[r["dtype"], f"{r['temperature']:g}", *r["tokens_per_forward_by_k"]] for r in forced],
        )


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    if options.quick:
        options.repeats, options.prompts = min(options.repeats, 2), min(options.prompts, 2)
        options.max_tokens, options.max_k = min(options.max_tokens, 24), min(options.max_k, 4)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtypes = options.dtypes or (["float32"] if options.quick else ["float32", "bfloat16"])
    first = load(options.model, resolve_dtype(dtypes[0], device), device)
    name = resolve_draft(options.draft, first)
    if name is None:
        raise UserError(f"{options.model} has no draft of its own; name one with --draft")
    hashes = {options.model: first.checkpoint.content_hash()}
    where = environment(device, ",".join(dtypes), torch.get_num_threads(), hashes)
    with Results(options.output, DEFINITIONS, where, options.resume) as results:
        for dtype in dtypes:
            cast = resolve_dtype(dtype, device)
            pair = Pair(load(options.model, cast, device), load(name, cast, device))
            check_pair(pair.target, pair.draft)
            for temperature in (0.0, 1.0):
                if options.dry_run:
                    dry_rows(options, results, dtype_name(cast), temperature)
                else:
                    measure_speed(pair, options, results, dtype_name(cast), temperature)
                    measure_forced(pair, options, results, dtype_name(cast), temperature)
        if options.output:
            speed = [row for row in results.rows if row["kind"] == "speed"]
            draw(speed, f"{options.model} with draft {name}, no cache", options.output / "speedup.png")
        report(results)
        print_document(results.document())
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
