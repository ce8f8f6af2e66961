"""Measure the figures of the model cards, on held-out files.

The figures are the held-out loss in bits per byte, beside that of `xz -9` on the same files; the agreement of a draft
with a target, sum min(p, q), which is the probability that speculative sampling accepts a draft token at temperature 1
(Leviathan et al. 2023), on the true text and on the target's own samples; and the tokens per target forward at K.

    python -m common.models.evaluate --model common/models/stdlib-10m --draft common/models/stdlib-1m
"""

from __future__ import annotations

import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings
from torch import Tensor

from common.benchmark import progress
from common.checkpoint import open_checkpoint
from common.models.corpus import fingerprint, read_corpus
from common.options import parse_options, run_main
from common.perplexity import summary, token_nll
from common.prompts import Prompt, load_prompts
from common.tokenizer import Tokenizer


class EvaluateOptions(BaseSettings):
    """Measure a trained model, and a draft against it."""

    model: Path = Field(description="folder of the target")
    draft: Path | None = Field(default=None, description="folder of the draft to measure against it")
    tokens: int = Field(default=200_000, ge=2000, description="held-out tokens for the loss")
    prompts: int = Field(default=100, ge=1, description="prompts of the test half for the acceptance")
    k: int = Field(default=4, ge=1, description="draft tokens per target forward")
    new_tokens: int = Field(default=64, ge=1, description="sampled tokens per prompt")
    seed: int = 0


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def heldout_loss(model: Any, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """Compute bits per byte over whole held-out files, in order of their hash, until `limit` tokens are reached."""
    files = sorted(read_corpus("heldout"), key=lambda file: fingerprint([file]))
    losses, size, packed, used = [], 0, 0, 0
    context = model.config.max_position_embeddings
    separator = tokenizer.eos_ids[0]
    with progress("held-out loss", len(files)) as step:
        for file in files:
            if used >= limit:
                break
            tokens = torch.tensor([separator, *tokenizer.encode(file.text)])
            losses.append(token_nll(lambda window: model(window).logits, tokens, context, context // 2))
            data = file.text.encode()
            size, used = size + len(data), used + len(tokens) - 1
            packed += len(lzma.compress(data, preset=9))
            step(file.path)
    figures = summary(torch.cat(losses), n_bytes=size)
    return {**figures, "tokens": used, "bytes": size, "files": len(losses), "xz_bits_per_byte": 8 * packed / size}


@torch.no_grad()
def forced_acceptance(target: Any, draft: Any, tokenizer: Tokenizer, prompts: list[Prompt]) -> float:
    """Compute the mean of sum min(p, q) over the true continuations of the prompts."""
    overlaps = []
    for prompt in prompts:
        head, tail = tokenizer.encode(prompt.text), tokenizer.encode(prompt.continuation)[:256]
        tokens = torch.tensor([head + tail])
        probs = [model(tokens).logits[0, len(head) - 1 : -1].softmax(-1) for model in (target, draft)]
        overlaps.append(torch.minimum(*probs).sum(-1))
    return float(torch.cat(overlaps).mean())


def next_probs(model: Any, rows: list[list[int]], count: int) -> Tensor:
    """Compute probabilities after the last `count` tokens of every row, [R, count, V]; rows are padded on the right."""
    longest = max(map(len, rows))
    logits = model(torch.tensor([row + [0] * (longest - len(row)) for row in rows])).logits
    return torch.stack([logits[i, len(row) - count : len(row)] for i, row in enumerate(rows)]).softmax(-1)


@torch.no_grad()
def sampled_speculation(
    target: Any, draft: Any, tokenizer: Tokenizer, prompts: list[Prompt], options: EvaluateOptions
) -> dict[str, float]:
    """Sample speculatively at temperature 1, by Algorithm 1 of Leviathan et al. (2023), all prompts at once.

    The engine's own loops (from phase 2 on) are measured by their benches. This function measures a freshly trained
    draft, independently of the engine.
    """
    generator = torch.Generator().manual_seed(options.seed)
    rows = [tokenizer.encode(prompt.text) for prompt in prompts]
    wanted = [len(row) + options.new_tokens for row in rows]
    emitted = forwards = 0
    overlaps = []
    with progress("sampled acceptance", options.new_tokens) as step:
        while active := [i for i, row in enumerate(rows) if len(row) < wanted[i]]:
            drafted = [list(rows[i]) for i in active]
            q = []
            for _ in range(options.k):
                q.append(next_probs(draft, drafted, 1)[:, 0])
                for row, token in zip(drafted, q[-1].multinomial(1, generator=generator), strict=True):
                    row.append(int(token))
            p = next_probs(target, drafted, options.k + 1)  # [R, K+1, V]
            overlaps += torch.minimum(p[:, 0], q[0]).sum(-1).tolist()
            for r, i in enumerate(active):
                proposed = drafted[r][-options.k :]
                for j, token in enumerate(proposed):
                    if torch.rand((), generator=generator) >= p[r, j, token] / q[j][r, token]:
                        residual = (p[r, j] - q[j][r]).clamp(min=0)
                        break
                else:
                    j, residual = options.k, p[r, options.k]
                fresh = [*proposed[:j], int(residual.multinomial(1, generator=generator))]
                rows[i] += fresh
                emitted, forwards = emitted + len(fresh), forwards + 1
            step(f"{emitted / forwards:.2f} tokens per target forward")
    return {"tokens_per_target_forward": emitted / forwards, "sum_min_p_q": sum(overlaps) / len(overlaps)}


def main(arguments: list[str]) -> int:
    options = parse_options(EvaluateOptions, arguments, program="evaluate.py")
    checkpoint = open_checkpoint(str(options.model))
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    target = load(options.model)
    corpus = read_corpus("heldout")
    figures: dict[str, Any] = {
        "model": options.model.name,
        "parameters": sum(p.numel() for p in target.parameters()),
        "python": sys.version.split()[0],
        "heldout_fingerprint": fingerprint(corpus),
        "heldout": heldout_loss(target, tokenizer, options.tokens),
    }
    if options.draft:
        draft = load(options.draft)
        prompts = load_prompts("code", "test")[: options.prompts]
        figures["draft"] = {
            "model": options.draft.name,
            "parameters": sum(p.numel() for p in draft.parameters()),
            "heldout": heldout_loss(draft, tokenizer, options.tokens),
            "forced_sum_min_p_q": forced_acceptance(target, draft, tokenizer, prompts),
            "k": options.k,
            "sampled": sampled_speculation(target, draft, tokenizer, prompts, options),
        }
    print(json.dumps(figures, indent=2))
    assert math.isfinite(figures["heldout"]["nll"])
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
