"""How well a model predicts a text longer than its context: negative log likelihood, token by token.

A window slides over the text. Every token but the first is scored exactly once, in the first window that contains it:
the first window scores all its tokens, each later one only its `stride` new tokens, and the rest of the window is
context. A small stride gives every token more context and costs more forward passes. With stride = context the windows
do not overlap, which is cheapest and makes the model look worse than it is.

    nll = token_nll(lambda window: model(window).logits, tokens, context=1024, stride=512)
    print(summary(nll, n_bytes=len(text.encode())))

Source of the scheme: "Perplexity of fixed-length models", documentation of Hugging Face transformers. There a window of
`context` tokens is both input and target. Here the window is the input, and its last token predicts one more, so no
token is lost between windows when stride = context.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

RESAMPLES = 2000


def token_nll(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, context: int, stride: int) -> Tensor:
    """Compute the negative log likelihood of each token but the first, in nats: float32 [N - 1], on `tokens`' device.

    `tokens` is int64 [N]; `logits_of` maps int64 [1, T] with T <= context to logits [1, T, V] of the next token. Token
    t is seen with all t tokens before it while t <= context, then with at least context - stride + 1 of them. Logits
    are cast to float32 first: in bfloat16 a log-probability has only two to three digits.
    Raises ValueError for invalid arguments.
    """
    if tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"a text of at least 2 tokens, [N], is needed; got shape {list(tokens.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if stride > context:
        raise ValueError(f"stride must be at most context, or tokens would be skipped; got {stride} > {context}")
    scored: list[Tensor] = []
    start = done = 0  # done: the tokens 1 .. done are scored
    while done < len(tokens) - 1:
        end = min(start + context, len(tokens) - 1)
        window = tokens[start:end]
        with torch.no_grad():
            logits = logits_of(window[None])
            if logits.ndim != 3 or logits.shape[:2] != (1, len(window)):
                raise ValueError(f"logits_of must give [1, {len(window)}, V]; got {list(logits.shape)}")
            targets = tokens[done + 1 : end + 1].to(logits.device)
            loss = functional.cross_entropy(logits[0, done - start :].float(), targets, reduction="none")
        scored.append(loss.to(tokens.device))
        start, done = start + stride, end
    return torch.cat(scored)


def summary(nll: Tensor, n_bytes: int | None = None, blocks: int = 200, seed: int = 0) -> dict[str, float]:
    """Return mean `nll` in nats per token, `perplexity`, and, given the text's size, `bits_per_byte`.

    Each comes with `..._low` and `..._high`, the ends of a bootstrap 95% interval (percentiles of 2,000 resamples).
    Neighbouring tokens are easy or hard together, so the bootstrap resamples contiguous blocks of the text, not tokens:
    `blocks` of them, or as many as there are tokens. A text too short for two blocks has an interval of width zero.
    `n_bytes` is the UTF-8 size of the scored text (without its first token, if that token is text).
    Raises ValueError for an empty `nll`, for blocks < 2 and for n_bytes < 1.
    """
    if nll.ndim != 1 or len(nll) < 1:
        raise ValueError(f"nll must be [N] with at least one token; got shape {list(nll.shape)}")
    if blocks < 2:
        raise ValueError(f"blocks must be at least 2, got {blocks}")
    if n_bytes is not None and n_bytes < 1:
        raise ValueError(f"n_bytes must be at least 1, got {n_bytes}")
    losses = nll.detach().double().cpu()
    parts = losses.tensor_split(min(blocks, len(losses)))
    sums = torch.stack([part.sum() for part in parts])
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    resamples = torch.randint(len(parts), (RESAMPLES, len(parts)), generator=torch.Generator().manual_seed(seed))
    means = sums[resamples].sum(1) / sizes[resamples].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))

    result: dict[str, float] = {}
    for suffix, value in (("", losses.mean()), ("_low", low), ("_high", high)):
        result["nll" + suffix] = value.item()
        result["perplexity" + suffix] = value.exp().item()
        if n_bytes is not None:
            result["bits_per_byte" + suffix] = value.item() * len(losses) / math.log(2) / n_bytes
    return result
