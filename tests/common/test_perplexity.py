"""The sliding window scores every token once with the promised context; the interval behaves like one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from common.perplexity import summary, token_nll

VOCABULARY = 50


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # large weights, so that the context changes the loss visibly
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def logits_of(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    return lambda window: model(input_ids=window, use_cache=False).logits


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def by_hand(model: LlamaForCausalLM, tokens: Tensor, context: int, stride: int) -> list[float]:
    """Compute one forward pass per token, over exactly the tokens that its window puts before it."""
    losses = []
    for t in range(1, len(tokens)):
        window = 0
        while window * stride + context < t:
            window += 1
        with torch.no_grad():
            last = model(input_ids=tokens[None, window * stride : t]).logits[0, -1].double()
        losses.append((last.exp().sum().log() - last[int(tokens[t])]).item())
    return losses


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [
        (40, 12, 4),
        (40, 12, 5),  # the last window is cut short
        (40, 12, 1),
        (40, 12, 12),  # no overlap
        (39, 13, 13),  # windows fill the 38 scored tokens with 12 to spare
        (25, 12, 12),  # ... and exactly
        (40, 1, 1),  # one token of context each
        (12, 12, 3),
        (13, 12, 3),
        (14, 12, 3),
        (7, 12, 3),  # shorter than the context
        (2, 12, 12),
    ],
)
def test_equals_one_forward_pass_per_token(model: LlamaForCausalLM, length: int, context: int, stride: int) -> None:
    tokens = text(length)
    nll = token_nll(logits_of(model), tokens, context, stride)
    assert nll.dtype == torch.float32
    assert nll.shape == (length - 1,)
    torch.testing.assert_close(nll, torch.tensor(by_hand(model, tokens, context, stride)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [2, 30, 64])
def test_within_the_context_equals_the_loss_of_transformers(model: LlamaForCausalLM, length: int) -> None:
    tokens = text(length)
    with torch.no_grad():
        expected = model(input_ids=tokens[None], labels=tokens[None]).loss
    nll = token_nll(logits_of(model), tokens, context=64, stride=16)
    torch.testing.assert_close(nll.mean(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(8, 1), (8, 3), (8, 8), (100, 100)])
def test_no_window_is_wider_than_the_context_and_each_token_has_its_share(context: int, stride: int) -> None:
    tokens = torch.arange(51)
    widths: list[int] = []

    def count_context(window: Tensor) -> Tensor:
        """Return logits under which position i of a window costs 100 - i nats, so the loss shows the context."""
        widths.append(window.shape[1])
        logits = torch.zeros(1, window.shape[1], 51)
        for i, token in enumerate(window[0].tolist()):
            probability = math.exp(i + 1) / math.exp(101)
            logits[0, i] = math.log((1 - probability) / 50)
            logits[0, i, token + 1] = math.log(probability)
        return logits

    nll = token_nll(count_context, tokens, context, stride)
    context_of = (101 - nll).round()
    assert max(widths) <= context
    assert (context_of >= torch.arange(1, 51).clamp(max=context - stride + 1)).all()
    assert (context_of <= torch.arange(1, 51).clamp(max=context)).all()


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(1, 9, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = text(10)
    nll = token_nll(lambda _: logits, tokens, context=9, stride=9)
    expected = -logits[0].double().log_softmax(-1)[torch.arange(9), tokens[1:]]
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "message"),
    [
        (text(9), 4, 0, "stride must be at least 1, got 0"),
        (text(9), 4, 5, "stride must be at most context.*got 5 > 4"),
        (text(1), 4, 2, "at least 2 tokens"),
        (text(8).view(1, 8), 4, 2, "at least 2 tokens"),
    ],
)
def test_senseless_arguments_are_refused(tokens: Tensor, context: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_nll(lambda window: torch.zeros(1, window.shape[1], VOCABULARY), tokens, context, stride)


def test_misshapen_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must give \[1, 4, V\]; got \[1, 50\]"):
        token_nll(lambda _: torch.zeros(1, VOCABULARY), text(9), context=4, stride=2)


def losses(length: int, seed: int = 0) -> Tensor:
    return -torch.rand(length, generator=torch.Generator().manual_seed(seed)).log()  # exponential, mean 1


def test_summary_figures_agree_with_their_definitions() -> None:
    nll = losses(5000)
    result = summary(nll, n_bytes=12_345)
    mean = sum(nll.tolist()) / 5000
    for suffix in ("", "_low", "_high"):
        assert result["perplexity" + suffix] == pytest.approx(math.exp(result["nll" + suffix]))
        assert result["bits_per_byte" + suffix] == pytest.approx(result["nll" + suffix] * 5000 / 12_345 / math.log(2))
    assert result["nll"] == pytest.approx(mean)
    assert "bits_per_byte" not in summary(nll)
    assert summary(nll, n_bytes=12_345) == result  # the same seed, the same resamples
    assert summary(nll, n_bytes=12_345, seed=1)["nll_low"] != result["nll_low"]


def test_interval_holds_the_mean_and_shrinks_with_length() -> None:
    widths = []
    for length in (400, 6_400, 102_400):
        result = summary(losses(length))
        assert result["nll_low"] < result["nll"] < result["nll_high"]
        assert result["perplexity_low"] < result["perplexity"] < result["perplexity_high"]
        widths.append(result["nll_high"] - result["nll_low"])
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)  # 16 times the text, a quarter of the width
    assert widths[1] / widths[2] == pytest.approx(4, rel=0.4)


def test_interval_covers_the_true_mean_about_nineteen_times_in_twenty() -> None:
    results = [summary(losses(2000, seed), blocks=50) for seed in range(100)]
    covered = sum(result["nll_low"] <= 1 <= result["nll_high"] for result in results)
    assert 88 <= covered <= 99


def test_blocks_keep_neighbours_together() -> None:
    runs = losses(100).repeat_interleave(16)  # 1,600 tokens, but only 100 independent ones
    by_runs, by_tokens = summary(runs, blocks=100), summary(runs, blocks=1600)
    ratio = (by_runs["nll_high"] - by_runs["nll_low"]) / (by_tokens["nll_high"] - by_tokens["nll_low"])
    assert ratio == pytest.approx(4, rel=0.2)


def test_short_texts_have_a_summary_too() -> None:
    assert summary(losses(3))["nll_low"] <= summary(losses(3))["nll"]
    single = summary(torch.tensor([2.0]))
    assert single["nll_low"] == single["nll"] == single["nll_high"] == 2.0


def test_summary_refuses_senseless_arguments() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        summary(torch.zeros(0))
    with pytest.raises(ValueError, match="blocks must be at least 2"):
        summary(losses(9), blocks=1)
    with pytest.raises(ValueError, match="n_bytes must be at least 1"):
        summary(losses(9), n_bytes=0)
