"""Measure how much faster draft-and-verify is, for which K, and how many tokens a target forward gives.

For every dtype, temperature and K: speculative against plain decoding of the same engine, prompt by prompt in turns.
In float32 greedy output must equal plain decoding's. The bench also counts the tokens per target forward on forced
held-out text, which does not depend on what the model itself prefers to write.

    python bench.py --quick
    python bench.py --output results
    python bench.py --model gpt2-large --draft gpt2 --dtypes bfloat16 --prompts-from FILE.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import launch  # noqa: F401 (must come first)
import torch
from pydantic import Field

from common.benchmark import BenchOptions, Outcome, print_document
from common.device import dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.figures import figure, look
from common.harness import Bench, Variant, open_results
from common.loops import loop_share
from common.options import parse_options, run_main
from common.prompts import Prompt
from common.results import Scalar
from engine import (
    LoadedModel,
    ModelDrafter,
    SamplingParams,
    Sequence,
    generate,
    load,
    speculative_decode,
)
from engine.pair import check_pair, fit_vocabulary, resolve_draft
from engine.teacher_forced import teacher_forced_acceptance
from engine.verify import random_source

DEFINITIONS = {
    "speed": "speedup: seconds per token of plain decoding over this variant's, same engine, in turns; at "
    "temperature > 0 every round has its own seed",
    "forced": "at each point of held-out text the draft proposes from the true prefix; the text then moves on by as "
    "many true tokens as the step would have given",
    "tokens_per_forward": "new tokens / target forwards",
    "acceptance": "accepted / proposed draft tokens",
    "survival": "share of the drafts whose first 1, 2, ... tokens are all accepted",
    "draft_share": "time spent drafting / time of all steps",
    "loop_share": "share of the tokens that end an 8-gram which the same output held before",
}
TABLES = {
    "speed": "Speculative against plain decoding",
    "forced": "Tokens per target forward on forced held-out text",
}


class Options(BenchOptions):
    """Speculative decoding against plain decoding."""

    draft: str = Field("auto", description="the draft; auto: the model's own")
    dtypes: list[Literal["float32", "bfloat16", "float16"]] = Field(
        [], description="dtypes to measure; repeatable; none: float32, and bfloat16 where it is no slower"
    )
    temperatures: list[float] = Field([0.0, 1.0], description="temperatures to measure; repeatable")
    k: list[int] = Field([1, 2, 3, 4, 5, 6, 8], description="numbers of draft tokens; repeatable")
    budget: float = Field(300, gt=0, description="or until one comparison has taken this many seconds")
    max_tokens: int = Field(32, ge=1, description="new tokens per prompt")


class Lesson(Bench):
    """One method per measurement, for one pair in one dtype."""

    options: Options

    def speed(self, target: LoadedModel, draft: LoadedModel, temperature: float) -> None:
        """Time plain decoding and every K."""
        dtype = target.model.embedding.weight.dtype
        params = SamplingParams(temperature=temperature, max_new_tokens=self.options.max_tokens)
        runs: dict[str, Variant] = {"plain": partial(self.plain, target, params)}
        runs |= {f"K={k}": partial(self.speculative, target, draft, params, k) for k in self.options.k}
        # In half precision wide and narrow forwards round differently, so a near tie can go either way.
        exact = list(runs)[1:] if temperature == 0 and dtype == torch.float32 else []
        cell: dict[str, Scalar] = {"dtype": dtype_name(dtype), "temperature": temperature}
        self.compare("speed", cell, runs, self.prompts(), exact=exact)

    def plain(self, target: LoadedModel, params: SamplingParams, prompt: Prompt | None, round_: int) -> Outcome:
        assert prompt is not None
        params = replace(params, seed=self.options.seed + round_)
        tokens = generate(target.model, [target.tokenizer.encode(prompt.text)], params, target.ending)[0].tokens
        return Outcome(len(tokens), {"forwards": len(tokens), "looped": loop_share(tokens) * len(tokens)}, tokens)

    def speculative(
        self,
        target: LoadedModel,
        draft: LoadedModel,
        params: SamplingParams,
        k: int,
        prompt: Prompt | None,
        round_: int,
    ) -> Outcome:
        assert prompt is not None
        params = replace(params, seed=self.options.seed + round_)
        source = random_source([params])
        sequence = Sequence(target.tokenizer.encode(prompt.text), params, target.ending)
        drafter = ModelDrafter(draft.model, source)
        steps = [s.stats[0] for s in speculative_decode(target.model, drafter, [sequence], k, source)]
        drafted, tokens = [step for step in steps if step.proposed], sequence.tokens
        figures = {
            "forwards": len(steps),
            "proposed": sum(step.proposed for step in steps),
            "accepted": sum(step.accepted for step in steps),
            "drafts": len(drafted),
            "survived": survived([step.accepted for step in drafted], k),
            "draft_s": sum(step.draft_ms for step in steps) / 1e3,
            "steps_s": sum(step.draft_ms + step.verify_ms + step.accept_ms for step in steps) / 1e3,
            "looped": loop_share(tokens) * len(tokens),
        }
        return Outcome(len(tokens), figures, tokens)

    def forced(self, target: LoadedModel, draft: LoadedModel, temperature: float) -> None:
        """Count acceptance along the true text, a row per prompt and K; nothing is timed."""
        params = SamplingParams(temperature=temperature, max_new_tokens=10**6, seed=self.options.seed, ignore_eos=True)
        source = random_source([params])
        drafter, encode = ModelDrafter(draft.model, source), target.tokenizer.encode
        dtype = dtype_name(target.model.embedding.weight.dtype)

        def follow(prompt: Prompt, k: int) -> Outcome:
            truth = encode(prompt.continuation)[: 2 * self.options.max_tokens]
            accepted = teacher_forced_acceptance(target.model, drafter, encode(prompt.text), truth, params, k, source)
            given, steps = sum(accepted) + len(accepted), len(accepted)
            return Outcome(given, {"forwards": steps, "drafts": steps, "survived": survived(accepted, k)})

        for k in self.options.k:
            cell: dict[str, Scalar] = {"dtype": dtype, "temperature": temperature}
            with_text = [prompt for prompt in self.prompts() if prompt.continuation]
            for prompt in with_text[: 2 if self.options.quick else 12]:
                self.count("forced", cell, f"K={k}", prompt.id, partial(follow, prompt, k))
            if not with_text:
                self.refuse("forced", cell, f"K={k}", "no prompt has a continuation to follow")

    def draw(self, file: Path, title: str) -> None:
        """Draw the speed-up over K with its interval, one panel per dtype and temperature."""
        rows = [row for row in self.table("speed") if str(row["variant"]).startswith("K=") and "speedup" in row]
        panels = list(dict.fromkeys((row["dtype"], row["temperature"]) for row in rows))
        with figure(file, columns=max(1, len(panels)), size=(4.2, 3.8), title=title, sharey=True) as grid:
            for axes, (dtype, temperature) in zip(grid, panels, strict=False):
                here = [row for row in rows if (row["dtype"], row["temperature"]) == (dtype, temperature)]
                ks = [int(row["variant"].removeprefix("K=")) for row in here]
                axes.errorbar(ks, [row["speedup"] for row in here], yerr=around(here), capsize=3, **look(0))
                axes.axhline(1, color="black", linewidth=0.6)
                axes.set(title=f"{dtype}, temperature {temperature:g}", xlabel="draft tokens K")
            grid[0].set_ylabel("times as fast as plain decoding")


def survived(accepted: list[int], k: int) -> list[int]:
    """Count the drafts that had at least 1, 2, ..., k accepted tokens."""
    return [sum(each >= j for each in accepted) for j in range(1, k + 1)]


def around(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Return how far each interval reaches below and above its ratio; 0 without an interval."""
    low = [row["speedup"] - (row["speedup_low"] or row["speedup"]) for row in rows]
    return [low, [(row["speedup_high"] or row["speedup"]) - row["speedup"] for row in rows]]


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    if options.quick:
        options.prompts, options.k = min(options.prompts, 2), options.k[1:4:2] or options.k
        options.max_tokens = min(options.max_tokens, 16)
    if min(options.k) < 1:
        raise UserError(f"--k starts at 1, got {min(options.k)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    first = load(options.model, resolve_dtype((options.dtypes or ["float32"])[0], device), device)
    name = resolve_draft(options.draft, first)
    if name is None:
        raise UserError(f"{options.model} has no draft of its own; name one with --draft")
    check_pair(first, second := load(name, torch.float32, device))
    hashes = {options.model: first.checkpoint.content_hash(), name: second.checkpoint.content_hash()}
    with open_results(options, DEFINITIONS, device, ",".join(options.dtypes) or "auto", hashes) as results:
        lesson = Lesson(options, results, device)
        for cast in [resolve_dtype(dtype, device) for dtype in options.dtypes] or lesson.dtypes():
            target, draft = load(options.model, cast, device), load(name, cast, device)
            fit_vocabulary(draft.model, target.config.vocab_size)
            for temperature in options.temperatures:
                lesson.speed(target, draft, temperature)
                lesson.forced(target, draft, temperature)
        if options.output:
            title = f"{options.model} with draft {name}, no cache{lesson.mark}"
            lesson.draw(options.output / "speedup.png", title)
        for section, title in TABLES.items():
            lesson.report(section, title)
        print_document(lesson.document())
        return lesson.close()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
