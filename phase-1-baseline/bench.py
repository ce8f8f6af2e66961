"""Measure what a token costs when nothing is reused, and what each way to choose it costs and gives.

Five measurements: the time of a decoding step against the sequence length, beside the prediction from its
floating-point operations; tokens per second against transformers' `generate`, without and with its cache, on the model
and on a random GPT-2 shape; what a batch gains over one prompt at a time, what its padding wastes, and how much its
matrix products alone would allow; what each sampling knob does to one distribution; and the quality and cost of greedy
decoding, beam search and sampling.

    python bench.py --quick
    python bench.py --output results
    python bench.py --model FOLDER --prompts-from FILE.jsonl
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import launch  # noqa: F401 (must come first)
import torch
from pydantic import Field

from common.benchmark import BenchOptions, Outcome, print_document
from common.device import dtype_name, resolve_device, resolve_dtype
from common.figures import distributions, figure, look
from common.harness import Bench, Variant, open_results, product
from common.matrix_products import matrix_products
from common.options import parse_options, run_main
from common.peers import TransformersPeer
from common.prompts import Prompt
from common.quality import QUALITY, quality
from common.random_checkpoint import random_checkpoint
from engine import LoadedModel, SamplingParams, Transformer, beam_search, generate, load, next_logits, probabilities
from engine.cost import forward_flops, weight_bytes
from engine.forward import of_similar_length

DEFINITIONS = {
    "curve": "ms_per_token: one decoding step (a forward over the whole sequence, a choice of a token) by the length "
    "of the sequence; gflop_per_s: floating-point operations of that forward (engine/cost.py) / its time; `matrix "
    "product`: a product of 1024 x 1024 matrices",
    "peer": "greedy decoding by this phase and by transformers' generate, same weights, same tokens; speedup: over "
    "`transformers, no cache`",
    "batch": "eight ragged prompts; speedup: over one prompt at a time. `padded`: all rows share every forward, padded "
    "to the longest; `together`: only rows of similar length do; `matrix products`: what the batch would take if it "
    "cost nothing but its matrix products, without padding (common/matrix_products.py)",
    "shape": "padding: share of the positions that are padding where all rows share the batch's first forward; groups: "
    "groups of similar length that it is split into; equal: rows whose tokens are those of the prompt's single run",
    "knob": "entropy_bits: of the distribution that is sampled, after the knob; kept: tokens with any probability",
    "decoder": "speedup: over greedy decoding, per token",
    **QUALITY,
}
KNOBS: list[tuple[str, Any]] = [("temperature", 1.0), ("temperature", 0.5), ("temperature", 2.0), ("top_k", 5)]
KNOBS += [("top_p", 0.8), ("min_p", 0.1), ("presence_penalty", 1.5), ("repetition_penalty", 1.3)]
KNOB_PROMPT, KNOB_OUTPUT = 50, 52  # at the start of a line of code: many tokens are likely, some of them used before
DECODERS = ["greedy", "4 beams", "sampling"]
TABLES = {
    "curve": "One decoding step",
    "peer": "Greedy decoding, against transformers",
    "dtypes": "A large matrix product",
    "batch": "Eight ragged prompts in one batch, against one at a time",
    "shape": "The batch's shape",
    "knob": "One distribution after each knob",
    "decoder": "Ways to choose a token",
}


class Options(BenchOptions):
    """The cost of a token when nothing is reused."""

    prompts: int = Field(12, ge=1, description="how many prompts are timed")
    budget: float = Field(40, gt=0, description="or until one comparison has taken this many seconds")


def prompt_of(loaded: LoadedModel, length: int) -> list[int]:
    """Return arbitrary token ids; their number, not their meaning, decides the time."""
    return [1 + i % (loaded.config.vocab_size - 1) for i in range(length)]


def flat(rows: list[list[int]]) -> list[int]:
    """Return the tokens of all rows, each row preceded by its length, so that different rows never compare equal."""
    return [token for row in rows for token in (len(row), *row)]


def continuation(loaded: LoadedModel, prompt: Prompt, length: int) -> list[int]:
    """Return the true tokens after a prompt, without the token by which some tokenizers begin every text."""
    tokens = loaded.tokenizer.encode(prompt.continuation)
    return [token for token in tokens if token not in loaded.tokenizer.special_ids][:length]


def one_by_one(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [generate(model, [prompt], params)[0].tokens for prompt in prompts]


@torch.inference_mode()
def padded(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Decode greedily with all rows in one forward, padded to the longest; the engine's grouping avoids this."""
    sequences, device = [list(prompt) for prompt in prompts], model.embedding.weight.device
    for _ in range(params.max_new_tokens):
        longest = max(map(len, sequences))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in sequences], device=device)
        last = torch.tensor([[len(row) - 1] for row in sequences], device=device)
        best = model.logits(model.hidden(tokens, wanted=last)[:, 0]).argmax(-1)
        for row, token in zip(sequences, best.tolist(), strict=True):
            row.append(token)
    return [row[len(prompt) :] for row, prompt in zip(sequences, prompts, strict=True)]


def write(loaded: LoadedModel, decoder: str, prompt: list[int], length: int, sample: int, seed: int) -> list[int]:
    """Return new tokens after a prompt, by greedy decoding, beam search or sampling at temperature 1."""
    params = SamplingParams(temperature=float(decoder == "sampling"), max_new_tokens=length, seed=seed)
    if decoder == "4 beams":
        return beam_search(loaded.model, prompt, params, loaded.ending, beams=4).tokens
    return generate(loaded.model, [prompt], params, loaded.ending, [sample])[0].tokens


class Lesson(Bench):
    """One method per measurement; measurements that the results hold already are skipped."""

    def curve(self, loaded: LoadedModel) -> None:
        """Time a step by sequence length, all lengths in turns with one large matrix product, the machine's peak."""
        lengths = [16, 64, 256] if self.options.quick else [16, 32, 64, 128, 256, 384, 512, 768, 1023]
        one = SamplingParams(max_new_tokens=1, ignore_eos=True)

        def step(length: int) -> Variant:
            prompt, gflop = prompt_of(loaded, length), forward_flops(loaded.config, length) / 1e9

            def run(_: Prompt | None, round_: int) -> Outcome:
                generate(loaded.model, [prompt], one)
                return Outcome(1, {"gflop": gflop})

            return run

        dtype = loaded.model.embedding.weight.dtype
        square = torch.randn(1024, 1024, dtype=dtype, device=self.device)
        runs = {"matrix product": product(square)} | {str(n): step(n) for n in lengths if n < loaded.config.context}
        self.compare("curve", {"dtype": dtype_name(dtype)}, runs)

    def against_transformers(self, loaded: LoadedModel, prompts: list[Prompt]) -> None:
        """Compare tokens per second on the same weights and tokens. Without prompts: after 16 arbitrary tokens."""
        dtype, length = loaded.model.embedding.weight.dtype, self.options.max_tokens
        params, arbitrary = SamplingParams(max_new_tokens=length), prompt_of(loaded, 16)
        peer = cache(lambda: TransformersPeer(loaded.checkpoint.folder, dtype, self.device))  # loaded at the first call

        def ids(prompt: Prompt | None) -> list[int]:
            return loaded.tokenizer.encode(prompt.text) if prompt else arbitrary

        def ours(prompt: Prompt | None, round_: int) -> Outcome:
            tokens = generate(loaded.model, [ids(prompt)], params, loaded.ending)[0].tokens
            return Outcome(len(tokens), output=tokens)

        def theirs(use_cache: bool, prompt: Prompt | None, round_: int) -> Outcome:
            tokens = peer().generate([ids(prompt)], length, use_cache=use_cache)[0]
            return Outcome(len(tokens), output=tokens)

        without, with_cache = partial(theirs, False), partial(theirs, True)
        runs: dict[str, Variant] = {"transformers, no cache": without, "this phase": ours}
        runs["transformers, cache"] = with_cache
        cell = {"model": loaded.checkpoint.folder.name, "dtype": dtype_name(dtype)}
        # In half precision different orders of summation round differently, so a near tie can go either way.
        self.compare("peer", cell, runs, prompts, exact=list(runs)[1:] if dtype == torch.float32 else ())

    def batches(self, loaded: LoadedModel) -> None:
        """Time eight prompts in one batch against the same eight one after the other: short ones, and real ones."""
        model, dtype = loaded.model, loaded.model.embedding.weight.dtype
        real = [loaded.tokenizer.encode(p.text)[: loaded.config.context // 2] for p in self.prompts(8)]
        short = [prompt_of(loaded, n) for n in (4, 6, 8, 8, 10, 12, 14, 16)]
        params = SamplingParams(max_new_tokens=4 if self.options.quick else 16, ignore_eos=True)
        for suite, prompts in {"4 to 16 tokens": short, "real prompts": real}.items():
            cell = {"dtype": dtype_name(dtype), "suite": suite}
            if not self.finished("batch", cell):
                self.batch(cell, model, prompts, params)

    def batch(self, cell: dict[str, Any], model: Transformer, prompts: list[list[int]], params: SamplingParams) -> None:
        tokens, floor = (
            params.max_new_tokens * len(prompts),
            cache(lambda: matrix_products(model, [partial(generate, model, [prompt], params) for prompt in prompts])),
        )

        def tokens_of(run: Callable[[], list[list[int]]]) -> Variant:
            return lambda prompt, round_: Outcome(tokens, output=flat(run()))

        def products(prompt: Prompt | None, round_: int) -> Outcome:
            floor()()
            return Outcome(tokens)

        def together() -> list[list[int]]:
            return [row.tokens for row in generate(model, prompts, params)]

        def shape() -> Outcome:
            lengths = [len(prompt) for prompt in prompts]
            pairs = zip(one_by_one(model, prompts, params), together(), strict=True)
            figures = {"equal_rows": sum(one == row for one, row in pairs), "compared_rows": len(prompts)}
            padding = 1 - sum(lengths) / (max(lengths) * len(prompts))
            forwards = len(of_similar_length(lengths))
            return Outcome(sum(lengths), {"padding": padding, "groups": forwards, **figures})

        runs = {
            "one by one": tokens_of(partial(one_by_one, model, prompts, params)),
            "together": tokens_of(together),
            "padded": tokens_of(partial(padded, model, prompts, params)),
            "matrix products": products,
        }
        # In half precision a wide and a narrow product round differently, so a near tie can go either way.
        exact = ["together", "padded"] if cell["dtype"] == "float32" else []
        self.compare("batch", cell, runs, exact=exact)
        self.count("shape", cell, "eight prompts", None, shape)

    def knobs(self, loaded: LoadedModel) -> None:
        """Record one real distribution after each knob, in numbers and as a picture."""
        prompt = self.prompts(KNOB_PROMPT + 1)[-1]
        before = loaded.tokenizer.encode(prompt.text)
        written = continuation(loaded, prompt, KNOB_OUTPUT)
        logits = torch.linspace(0, -20, loaded.config.vocab_size)[None]
        if not self.options.dry_run:
            logits = next_logits(loaded.model, [before + written])
        best, panels = logits[0].topk(20).indices.tolist(), {}
        for knob, value in KNOBS:
            params = SamplingParams(**{"temperature": 1.0, knob: value})
            probs = probabilities(logits, [params], [before], [written])[0]
            bits, kept = torch.special.entr(probs).sum().item() / math.log(2), int((probs > 0).sum())
            panels[f"{knob.replace('_', '-')} {value:g}\n{bits:.1f} bits, {kept:,} tokens"] = probs[best].tolist()
            figures = {"entropy_bits": bits, "kept": kept, "likeliest": probs.max().item()}
            self.count("knob", {"knob": knob, "value": value}, "", prompt.id, partial(Outcome, 1, figures))
        if self.options.output:
            marks = ["* " if token in written else "+ " if token in before else "  " for token in best]
            tokens = [mark + repr(loaded.tokenizer.token_text(t)) for mark, t in zip(marks, best, strict=True)]
            text = " ".join(loaded.tokenizer.decode(before + written).split())[-31:]
            title = f"the token after   ... {text}   (*: was in the output before, +: in the prompt){self.mark}"
            distributions(self.options.output / "knobs.png", tokens, panels, title)

    def decoders(self, loaded: LoadedModel) -> None:
        """Compare greedy decoding, beams and sampling after real prompts with the true continuations."""
        length = 24 if self.options.quick else self.options.max_tokens

        def judged(before: list[int], tokens: list[int]) -> Outcome:
            return Outcome(len(tokens), quality(loaded.model, before, tokens, loaded.config.context, self.device))

        def way(name: str, prompt: Prompt | None, round_: int) -> Outcome:
            assert prompt is not None
            before = loaded.tokenizer.encode(prompt.text)
            began = time.perf_counter()
            tokens = write(loaded, name, before, length, round_, self.options.seed)
            seconds = time.perf_counter() - began
            return replace(judged(before, tokens), seconds=seconds)

        prompts = self.prompts()
        self.compare("decoder", {}, {name: partial(way, name) for name in DECODERS}, prompts)
        for prompt in prompts:
            before, true = loaded.tokenizer.encode(prompt.text), continuation(loaded, prompt, length)
            if true:
                self.count("decoder", {}, "true text", prompt.id, partial(judged, before, true))

    def draw_curve(self, file: Path) -> None:
        """Draw step time over length, and the time of as many operations at the rate of one large product."""
        peak, *steps = self.table("curve")
        at = [(int(row["variant"]), row["ms_per_token"], row.get("gflop_per_s", 1)) for row in steps[1:]]
        rate = peak.get("gflop_per_s", 1)
        title = f"{self.options.model}, {peak['dtype']}, no cache{self.mark}"
        with figure(file, title=title) as [axes]:
            lengths, ms, rates = zip(*at, strict=True)
            predicted = [each * found / rate for each, found in zip(ms, rates, strict=True)]
            axes.plot(lengths, predicted, **look(1), linestyle="--", label="operations / matmul rate")
            axes.plot(lengths, ms, **look(0), label="measured")
            axes.set(xlabel="tokens in the sequence", ylabel="ms for one more token", ylim=(0, None))
            axes.legend()


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, program="bench.py")
    if options.quick:
        options.prompts, options.max_tokens = min(options.prompts, 2), min(options.max_tokens, 24)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    loaded = load(options.model, dtype, device)
    hashes = {options.model: loaded.checkpoint.content_hash()}
    with open_results(options, DEFINITIONS, device, dtype_name(dtype), hashes) as results:
        lesson = Lesson(options, results, device)
        lesson.curve(loaded)
        lesson.against_transformers(loaded, lesson.prompts())
        if not options.quick:
            with random_checkpoint("gpt2") as folder:
                lesson.against_transformers(load(str(folder), dtype, device), [])
        for other in lesson.dtypes():
            lesson.batches(loaded if other == dtype else load(options.model, other, device))
        lesson.knobs(loaded)
        lesson.decoders(loaded)
        if options.output:
            lesson.draw_curve(options.output / "step_cost.png")
        for section, title in TABLES.items():
            lesson.report(section, title)
        print(f"weights read per forward: {weight_bytes(loaded.config, dtype.itemsize) / 1e6:.1f} MB")
        print_document(lesson.document())
        return lesson.close()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
