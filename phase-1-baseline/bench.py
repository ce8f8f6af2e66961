"""What does a token cost when nothing is reused?

Three measurements: the time of a decoding step against the length of the sequence, beside what its floating-point
operations predict; tokens per second against transformers' `generate`, without and with its cache, on the model and on
a random GPT-2 shape; and what a batch gains over one prompt at a time.

    python bench.py --quick
    python bench.py --output results
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

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
    seconds,
)
from common.device import resolve_device, resolve_dtype
from common.options import parse_options, run_main
from common.peers import TransformersPeer
from common.prompts import load_prompts
from common.random_checkpoint import random_checkpoint
from engine import LoadedModel, SamplingParams, generate, load
from engine.cost import forward_flops, weight_bytes

DEFINITIONS = {
    "step_ms": "median wall time of one decoding step: forward over the whole sequence, and the choice of a token",
    "flops": "floating-point operations of that forward (engine/cost.py)",
    "gflops_per_s": "flops / step time",
    "matmul_gflops_per_s": "rate of a 1024 x 1024 x 1024 matrix product, timed in turns with the steps",
    "predicted_ms": "flops / matmul rate: what the step would take if it were one large matrix product",
    "tokens_per_s": "new tokens / median wall time",
    "speedup": "peer: how many times as fast as that variant this phase is; batch: how many times as fast as one "
    "prompt at a time; median of the paired rounds with its bootstrap 95% interval",
    "padding": "share of the positions that would be padding if all rows shared the batch's first forward",
}
PROMPT_TOKENS, NEW_TOKENS = 16, 64


def prompt_of(loaded: LoadedModel, length: int) -> list[int]:
    """Some tokens; what they say does not matter for time, only how many they are."""
    return [1 + i % (loaded.config.vocab_size - 1) for i in range(length)]


def curve(
    loaded: LoadedModel, options: BenchOptions, results: Results, dtype: torch.dtype, device: torch.device
) -> None:
    """Step time by length. All lengths take turns, and with them one large matrix product: the machine at its best."""
    lengths = [16, 64, 256] if options.quick else [16, 32, 64, 128, 256, 384, 512, 768, 1023]
    lengths = [n for n in lengths if n < loaded.config.context]
    if results.has({"kind": "curve", "length": lengths[-1]}):
        return
    one = SamplingParams(max_new_tokens=1, ignore_eos=True)
    square = torch.randn(1024, 1024, dtype=dtype, device=device)
    runs: dict[str, Callable[[], object]] = {"matrix product": lambda: square @ square}
    runs |= {str(n): partial(generate, loaded.model, [prompt_of(loaded, n)], one) for n in lengths}
    if options.dry_run:
        times = {name: 0.01 for name in runs}
    else:
        with progress("step time", len(runs) * (2 * options.repeats + 1)) as step:
            timed = interleave(runs, 2 * options.repeats, device=device, on_run=step)
        times = {name: median(seconds(timed[name])) for name in runs}
    rate = 2 * 1024**3 / times["matrix product"]  # operations per second
    for length in lengths:
        flops, step_s = forward_flops(loaded.config, length), times[str(length)]
        results.add(
            {
                "kind": "curve",
                "length": length,
                "step_ms": step_s * 1e3,
                "flops": flops,
                "gflops_per_s": flops / step_s / 1e9,
                "matmul_gflops_per_s": rate / 1e9,
                "predicted_ms": flops / rate * 1e3,
                "synthetic": options.dry_run,
            }
        )


def against_transformers(
    loaded: LoadedModel, options: BenchOptions, results: Results, dtype: torch.dtype, device: torch.device
) -> None:
    """Tokens per second on the same weights; first that the tokens are the same."""
    if results.has({"kind": "peer", "model": loaded.checkpoint.folder.name}):
        return
    prompt = prompt_of(loaded, PROMPT_TOKENS)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    ours = "this phase"
    if options.dry_run:
        rows = {name: [1.0, 1.0] for name in (ours, "transformers, no cache", "transformers, cache")}
        tokens = NEW_TOKENS
    else:
        peer = TransformersPeer(loaded.checkpoint.folder, dtype, device)
        runs = {
            ours: lambda: generate(loaded.model, [prompt], params, loaded.ending)[0].tokens,
            "transformers, no cache": lambda: peer.generate([prompt], NEW_TOKENS, use_cache=False)[0],
            "transformers, cache": lambda: peer.generate([prompt], NEW_TOKENS, use_cache=True)[0],
        }
        expected = runs["transformers, no cache"]()
        refuse_if_different(ours, expected, runs[ours]())
        tokens = len(expected)
        with progress("against transformers", len(runs) * (options.repeats + 1)) as step:
            timed = interleave(runs, options.repeats, device=device, on_run=step)
        rows = {name: seconds(timed[name]) for name in runs}
    for name, times in rows.items():
        speedup = ratio_interval(times, rows[ours], seed=options.seed)
        results.add(
            {
                "kind": "peer",
                "model": loaded.checkpoint.folder.name,
                "variant": name,
                "tokens": tokens,
                "tokens_per_s": tokens / median(times),
                "speedup": speedup.median,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
                "synthetic": options.dry_run,
            }
        )


def batches(loaded: LoadedModel, options: BenchOptions, results: Results, device: torch.device) -> None:
    """Eight prompts in one batch against the same eight one after the other: short ones, and real ones."""
    texts = load_prompts("code", "test")[:8]
    real = [loaded.tokenizer.encode(prompt.text)[: loaded.config.context // 2] for prompt in texts]
    lengths = (4, 6, 8, 8, 10, 12, 14, 16)
    suites = {"4 to 16 tokens": [prompt_of(loaded, n) for n in lengths], "code prompts": real}
    params = SamplingParams(max_new_tokens=8 if options.quick else 16, ignore_eos=True)
    for suite, prompts in suites.items():
        if results.has({"kind": "batch", "suite": suite}):
            continue

        def together(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [g.tokens for g in generate(loaded.model, prompts, params)]

        def one_by_one(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [generate(loaded.model, [prompt], params)[0].tokens for prompt in prompts]

        if options.dry_run:
            times = {"together": [1.0, 1.0], "one by one": [1.0, 1.0]}
        else:
            for alone, row in zip(one_by_one(), together(), strict=True):
                refuse_if_different("a row of the batch", alone, row)
            with progress("batch", 2 * (options.repeats + 1)) as step:
                runs = {"together": together, "one by one": one_by_one}
                timed = interleave(runs, options.repeats, device=device, on_run=step)
            times = {name: seconds(timed[name]) for name in timed}
        speedup = ratio_interval(times["one by one"], times["together"], seed=options.seed)
        longest = max(map(len, prompts))
        results.add(
            {
                "kind": "batch",
                "suite": suite,
                "mean_prompt_tokens": sum(map(len, prompts)) / len(prompts),
                "padding": 1 - sum(map(len, prompts)) / (longest * len(prompts)),
                "tokens_per_s": params.max_new_tokens * len(prompts) / median(times["together"]),
                "speedup": speedup.median,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
                "synthetic": options.dry_run,
            }
        )


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Step time against length: measured points, predicted line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axes.plot(lengths, [row["predicted_ms"] for row in rows], "--", color="tab:gray", label="operations / matmul rate")
    axes.plot(lengths, [row["step_ms"] for row in rows], "o-", color="tab:blue", label="measured")
    axes.set(xlabel="tokens in the sequence", ylabel="ms for one more token", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def interval(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def main(arguments: list[str]) -> int:
    options = parse_options(BenchOptions, arguments, program="bench.py")
    if options.quick:
        options.repeats = min(options.repeats, 3)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    loaded = load(options.model, dtype, device)
    hashes = {options.model: loaded.checkpoint.content_hash()}
    with Results(
        options.output, DEFINITIONS, environment(device, dtype, torch.get_num_threads(), hashes), options.resume
    ) as results:
        curve(loaded, options, results, dtype, device)
        against_transformers(loaded, options, results, dtype, device)
        if not options.quick:
            with random_checkpoint("gpt2") as folder:
                against_transformers(load(str(folder), dtype, device), options, results, dtype, device)
        batches(loaded, options, results, device)
        steps = [row for row in results.rows if row["kind"] == "curve"]
        peers = [row for row in results.rows if row["kind"] == "peer"]
        batched = [row for row in results.rows if row["kind"] == "batch"]
        if options.output:
            draw(steps, f"{options.model}, {results.environment['dtype']}, no cache", options.output / "step_cost.png")
        columns = ["length", "step_ms", "predicted_ms", "gflops_per_s", "matmul_gflops_per_s"]
        print_table("One decoding step", columns, [[row[c] for c in columns] for row in steps])
        print_table(
            f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new at most, greedy",
            ["model", "variant", "tokens/s", "this phase is faster by"],
            [[row["model"], row["variant"], row["tokens_per_s"], interval(row)] for row in peers],
        )
        print_table(
            "Eight ragged prompts in one batch",
            ["prompts", "mean length", "padding", "tokens/s", "x one at a time"],
            [
                [r["suite"], r["mean_prompt_tokens"], f"{r['padding']:.0%}", r["tokens_per_s"], interval(r)]
                for r in batched
            ],
        )
        megabytes = weight_bytes(loaded.config, dtype.itemsize) / 1e6
        print(f"\nweights read per forward: {megabytes:.1f} MB")
        print_document(results.document())
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
