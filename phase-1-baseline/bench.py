"""What does a token cost when nothing is reused, and what do the ways to choose it cost and give?

Five measurements: the time of a decoding step against the length of the sequence, beside what its floating-point
operations predict; tokens per second against transformers' `generate`, without and with its cache, on the model and on
a random GPT-2 shape; what a batch gains over one prompt at a time, what its padding wastes, and how much its matrix
products alone would allow; what each sampling knob does to one distribution; and what greedy decoding, beam search and
sampling write, and at what price.

    python bench.py --quick
    python bench.py --output results
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from common.benchmark import (
    BenchOptions,
    Results,
    environment,
    interleave,
    median,
    print_document,
    progress,
    refuse_if_different,
)
from common.device import dtype_name, resolve_device, resolve_dtype
from common.figures import distributions, figure
from common.harness import Bench
from common.matrix_products import matrix_products
from common.options import parse_options, run_main
from common.peers import TransformersPeer
from common.prompts import Prompt, load_prompts
from common.quality import QUALITY, quality
from common.random_checkpoint import random_checkpoint
from engine import LoadedModel, SamplingParams, Transformer, beam_search, generate, load, next_logits, probabilities
from engine.cost import forward_flops, weight_bytes
from engine.generate import of_similar_length

DEFINITIONS = {
    "step_ms": "median wall time of one decoding step: forward over the whole sequence, and the choice of a token",
    "flops": "floating-point operations of that forward (engine/cost.py)",
    "gflops_per_s": "flops / step time",
    "matmul_gflops_per_s": "rate of a 1024 x 1024 x 1024 matrix product (curve: timed in turns with the steps)",
    "predicted_ms": "flops / matmul rate: what the step would take if it were one large matrix product",
    "tokens_per_s": "new tokens / median wall time",
    "speedup": "peer: how many times as fast as that variant this phase is; batch: how many times as fast as one "
    "prompt at a time; median of the paired rounds with its bootstrap 95% interval",
    "padded": "the same ratio where all rows share every forward, padded to the longest; speedup: similar lengths do",
    "bound": "the same ratio if the batch cost nothing but its matrix products (common/matrix_products.py), no padding",
    "padding": "share of the positions that are padding where all rows share the batch's first forward",
    "forwards": "how many groups of similar length that first forward is split into",
    "rows_equal": "rows of the batch whose tokens are those of the prompt's single run (in float32: all, or no timing)",
    "entropy_bits": "of the distribution that is sampled, after the knob; kept: tokens with any probability",
    **QUALITY,
    "likelier": "prompts on which the text is likelier, per token, than greedy decoding's",
    "cost": "time per token, as a multiple of greedy's; every prompt is a round",
}
PROMPT_TOKENS, NEW_TOKENS = 16, 64
KNOBS: list[tuple[str, Any]] = [("temperature", 1.0), ("temperature", 0.5), ("temperature", 2.0), ("top_k", 5)]
KNOBS += [("top_p", 0.8), ("min_p", 0.1), ("presence_penalty", 1.5), ("repetition_penalty", 1.3)]
KNOB_PROMPT, KNOB_OUTPUT = 50, 52  # a line of code is about to begin: many tokens fit, and some have been used before
DECODERS = ["greedy", "4 beams", "sampling"]
TABLES = {
    "curve": "One decoding step",
    "peer": f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new at most, greedy",
    "dtype": "A large matrix product",
    "batch": "Eight ragged prompts in one batch, against one at a time",
    "knob": "One distribution after each knob",
    "decoder": "Ways to choose a token",
}


def prompt_of(loaded: LoadedModel, length: int) -> list[int]:
    """Some tokens; what they say does not matter for time, only how many they are."""
    return [1 + i % (loaded.config.vocab_size - 1) for i in range(length)]


def continuation(loaded: LoadedModel, prompt: Prompt, length: int) -> list[int]:
    """What truly follows a prompt, without the token by which some tokenizers begin every text."""
    tokens = loaded.tokenizer.encode(prompt.continuation)
    return [token for token in tokens if token not in loaded.tokenizer.special_ids][:length]


def one_by_one(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [generate(model, [prompt], params)[0].tokens for prompt in prompts]


@torch.inference_mode()
def padded(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Greedy decoding with all rows in one forward, padded to the longest: what the engine's grouping avoids."""
    texts, device = [list(prompt) for prompt in prompts], model.embedding.weight.device
    for _ in range(params.max_new_tokens):
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        last = torch.tensor([[len(text) - 1] for text in texts], device=device)
        best = model.logits(model.hidden(tokens, wanted=last)[:, 0]).argmax(-1)
        for text, token in zip(texts, best.tolist(), strict=True):
            text.append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def write(loaded: LoadedModel, decoder: str, prompt: list[int], length: int, sample: int, seed: int) -> list[int]:
    """New tokens after a prompt, by greedy decoding, beam search or sampling at temperature 1."""
    params = SamplingParams(temperature=float(decoder == "sampling"), max_new_tokens=length, seed=seed)
    if decoder == "4 beams":
        return beam_search(loaded.model, prompt, params, loaded.ending, beams=4).tokens
    return generate(loaded.model, [prompt], params, loaded.ending, [sample])[0].tokens


class Lesson(Bench):
    """One method per measurement; what the results hold already is left out."""

    def curve(self, loaded: LoadedModel) -> None:
        """Step time by length. All lengths take turns, and with them the machine at its best: one large product."""
        lengths = [16, 64, 256] if self.options.quick else [16, 32, 64, 128, 256, 384, 512, 768, 1023]
        lengths = [n for n in lengths if n < loaded.config.context]
        if self.done(kind="curve", length=lengths[-1]):
            return
        one = SamplingParams(max_new_tokens=1, ignore_eos=True)
        square = torch.randn(1024, 1024, dtype=loaded.model.embedding.weight.dtype, device=self.device)
        runs: dict[str, Callable[[], object]] = {"matrix product": lambda: square @ square}
        runs |= {str(n): partial(generate, loaded.model, [prompt_of(loaded, n)], one) for n in lengths}
        times = {name: median(t) for name, t in self.times("step time", runs, 2 * self.options.repeats).items()}
        rate = 2 * 1024**3 / times["matrix product"]  # operations per second
        for length in lengths:
            flops, step_s = forward_flops(loaded.config, length), times[str(length)]
            rates = {"gflops_per_s": flops / step_s / 1e9, "matmul_gflops_per_s": rate / 1e9}
            ms = {"step_ms": step_s * 1e3, "predicted_ms": flops / rate * 1e3}
            self.add(kind="curve", length=length, flops=flops, **ms, **rates)

    def against_transformers(self, loaded: LoadedModel) -> None:
        """Tokens per second on the same weights; first that the tokens are the same."""
        model, dtype = loaded.checkpoint.folder.name, loaded.model.embedding.weight.dtype
        if self.done(kind="peer", model=model):
            return
        prompt, params = prompt_of(loaded, PROMPT_TOKENS), SamplingParams(max_new_tokens=NEW_TOKENS)
        peer = cache(lambda: TransformersPeer(loaded.checkpoint.folder, dtype, self.device))  # loaded at the first call
        ours, theirs = "this phase", "transformers, no cache"
        runs = {
            ours: lambda: generate(loaded.model, [prompt], params, loaded.ending)[0].tokens,
            theirs: lambda: peer().generate([prompt], NEW_TOKENS, use_cache=False)[0],
            "transformers, cache": lambda: peer().generate([prompt], NEW_TOKENS, use_cache=True)[0],
        }
        tokens = NEW_TOKENS
        if not self.options.dry_run:
            expected = runs[theirs]()
            refuse_if_different(ours, expected, runs[ours]())
            tokens = len(expected)
        times = self.times("against transformers", runs, self.options.repeats)
        for name, each in times.items():
            rate, speedup = tokens / median(each), self.ratio("speedup", each, times[ours])
            self.add(kind="peer", model=model, variant=name, tokens=tokens, tokens_per_s=rate, **speedup)

    def batches(self, loaded: LoadedModel) -> None:
        """Eight prompts in one batch against the same eight one after the other: short ones, and real ones."""
        model, dtype = loaded.model, loaded.model.embedding.weight.dtype
        texts = load_prompts("code", "test")[:8]
        real = [loaded.tokenizer.encode(prompt.text)[: loaded.config.context // 2] for prompt in texts]
        short = [prompt_of(loaded, n) for n in (4, 6, 8, 8, 10, 12, 14, 16)]
        params = SamplingParams(max_new_tokens=4 if self.options.quick else 16, ignore_eos=True)
        for suite, prompts in {"4 to 16 tokens": short, "code prompts": real}.items():
            key = {"kind": "batch", "dtype": dtype_name(dtype), "suite": suite}
            if self.done(**key):
                continue
            arguments, equal, floor = (model, prompts, params), len(prompts), lambda: None
            if not self.options.dry_run:
                alone, grouped = one_by_one(*arguments), [row.tokens for row in generate(*arguments)]
                equal = sum(one == row for one, row in zip(alone, grouped, strict=True))
                # In half precision a wide and a narrow product round differently, and a near tie may fall otherwise.
                if dtype == torch.float32:
                    for one, row in zip(alone * 2, grouped + padded(*arguments), strict=True):
                        refuse_if_different("a row of the batch", one, row)
                floor = matrix_products(model, [partial(generate, model, [prompt], params) for prompt in prompts])
            runs: dict[str, Callable[[], object]] = {
                "one by one": partial(one_by_one, *arguments),
                "together": partial(generate, *arguments),
                "padded": partial(padded, *arguments),
                "matrix products": floor,
            }
            times = self.times(f"batch, {key['dtype']}", runs, self.options.repeats)
            single, lengths = times["one by one"], [len(prompt) for prompt in prompts]
            self.add(
                **key,
                mean_prompt_tokens=sum(lengths) / len(prompts),
                padding=1 - sum(lengths) / (max(lengths) * len(prompts)),
                forwards=len(of_similar_length(lengths)),
                rows_equal=equal,
                tokens_per_s=params.max_new_tokens * len(prompts) / median(times["together"]),
                **self.ratio("speedup", single, times["together"]),
                **self.ratio("padded", single, times["padded"]),
                **self.ratio("bound", single, times["matrix products"]),
            )

    def knobs(self, loaded: LoadedModel) -> None:
        """One true distribution after each knob, in numbers and as a picture."""
        prompt = load_prompts("code", "test")[KNOB_PROMPT]
        before = loaded.tokenizer.encode(prompt.text)
        written = continuation(loaded, prompt, KNOB_OUTPUT)
        logits = torch.linspace(0, -20, loaded.config.vocab_size)[None]
        if not self.options.dry_run:
            logits = next_logits(loaded.model, [before + written])
        best, panels = logits[0].topk(20).indices.tolist(), {}
        for knob, value in KNOBS:
            params = SamplingParams(**{"temperature": 1.0, knob: value})
            probs = probabilities(logits, params, [before], [written])[0]
            bits, kept = torch.special.entr(probs).sum().item() / math.log(2), int((probs > 0).sum())
            panels[f"{knob.replace('_', '-')} {value:g}\n{bits:.1f} bits, {kept:,} tokens"] = probs[best].tolist()
            key = {"kind": "knob", "knob": knob, "value": value}
            if not self.done(**key):
                self.add(**key, entropy_bits=bits, kept=kept, likeliest=probs.max().item())
        if self.options.output:
            marks = ["* " if token in written else "+ " if token in before else "  " for token in best]
            tokens = [mark + repr(loaded.tokenizer.token_text(t)) for mark, t in zip(marks, best, strict=True)]
            text = " ".join(loaded.tokenizer.decode(before + written).split())[-31:]
            title = f"the token after   ... {text}   (*: was in the output before, +: in the prompt){self.mark}"
            distributions(self.options.output / "knobs.png", tokens, panels, title)

    def decoders(self, loaded: LoadedModel) -> None:
        """What greedy decoding, beams and sampling write after real prompts, beside what really follows there."""
        if self.done(kind="decoder", decoder=DECODERS[-1]):
            return
        count, length = (3, 24) if self.options.quick else (24, 48)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ("true text", *DECODERS)}
        spent: dict[str, list[float]] = {name: [1.0, 1.0] if self.options.dry_run else [] for name in DECODERS}
        prompts = load_prompts("code", "test")[: 0 if self.options.dry_run else count]
        with progress("decoders", len(prompts)) as step:
            for number, prompt in enumerate(prompts):
                before = loaded.tokenizer.encode(prompt.text)
                texts = {"true text": continuation(loaded, prompt, length)}
                turns = DECODERS[number % len(DECODERS) :] + DECODERS[: number % len(DECODERS)]
                runs = {name: partial(write, loaded, name, before, length, number, self.options.seed) for name in turns}
                for name, [run] in interleave(runs, 1, warmup=int(number == 0), device=self.device).items():
                    texts[name] = run.value
                    spent[name].append(run.seconds / len(run.value))
                for name, text in texts.items():
                    found[name].append(quality(loaded.model, before, text, loaded.config.context, self.device))
                step(prompt.id)
        for name, each in found.items():
            row = {column: statistics.fmean(one[column] for one in each) for column in each[0]} if each else {}
            if name in spent:
                pairs = zip(each, found["greedy"], strict=True)
                row["likelier"] = sum(one["bits_per_token"] < other["bits_per_token"] for one, other in pairs)
                row["ms_per_token"] = median(spent[name]) * 1e3
                row |= self.ratio("cost", spent[name], spent["greedy"])
            self.add(kind="decoder", decoder=name, prompts=len(each), **row)


def main(arguments: list[str]) -> int:
    options = parse_options(BenchOptions, arguments, program="bench.py")
    if options.quick:
        options.repeats = min(options.repeats, 3)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    loaded = load(options.model, dtype, device)
    where = environment(device, dtype, torch.get_num_threads(), {options.model: loaded.checkpoint.content_hash()})
    with Results(options.output, DEFINITIONS, where, options.resume) as results:
        lesson = Lesson(options, results, device)
        lesson.curve(loaded)
        lesson.against_transformers(loaded)
        if not options.quick:
            with random_checkpoint("gpt2") as folder:
                lesson.against_transformers(load(str(folder), dtype, device))
        for other in lesson.dtypes():
            lesson.batches(loaded if other == dtype else load(options.model, other, device))
        lesson.knobs(loaded)
        lesson.decoders(loaded)
        if options.output:
            steps = lesson.rows("curve")
            title = f"{options.model}, {dtype_name(dtype)}, no cache{lesson.mark}"
            with figure(options.output / "step_cost.png", title=title) as [axes]:
                lengths, ms, predicted = ([s[name] for s in steps] for name in ("length", "step_ms", "predicted_ms"))
                axes.plot(lengths, predicted, "--", color="tab:gray", label="operations / matmul rate")
                axes.plot(lengths, ms, "o-", color="tab:blue", label="measured")
                axes.set(xlabel="tokens in the sequence", ylabel="ms for one more token", ylim=(0, None))
                axes.legend()
        for kind, title in TABLES.items():
            lesson.table(kind, title)
        print(f"\nweights read per forward: {weight_bytes(loaded.config, dtype.itemsize) / 1e6:.1f} MB")
        print_document(results.document())
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
