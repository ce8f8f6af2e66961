"""Medusa's heads in C++ against drafters/medusa.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phase5
from common.philox import Purpose
from common.prompts import load_prompts
from phase5 import load
from phase5.drafters.medusa import MedusaHeads, MedusaShape
from phase5.kernels import cpp
from phase5.model import Transformer
from phase5.quantize import Format, QuantLinear, rtn
from phase5.sampling import SamplingParams, probabilities
from phase5.verify import KeyedSource

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.mark.parametrize(
    "shape",
    [MedusaShape(), MedusaShape(heads=3, blocks=2), MedusaShape(heads=2, blocks=0, taps=(1,), read_token=True)],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_head_says_what_it_says_in_torch(
    family: str, shape: MedusaShape, make_checkpoint: Callable[..., Path]
) -> None:
    target = load(str(make_checkpoint(family)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    heads = MedusaHeads(shape, target.config.width).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    fast = cpp.CppMedusa(heads, target, cpp.CppModel(target, "float32", 2))
    with torch.inference_mode():
        for rows in (1, 3):
            states = torch.randn(rows, target.config.width * (1 + len(shape.taps)))
            tokens = torch.randint(0, target.config.vocab_size, (rows,)).tolist()
            got = fast.logits(states, tokens)
            assert got.shape == (rows, shape.heads, target.config.vocab_size)
            for row, token in enumerate(tokens):  # the same bits alone
                embedded = target.embedding(torch.tensor([token]))
                expected = target.logits(heads(states[row : row + 1], embedded)[:, 0])
                torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)
                assert torch.equal(got[row], fast.logits(states[row : row + 1], [token])[0])


@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 32), Format("int4", 32, asymmetric=True)], ids=str)
def test_quantised_heads_multiply_by_the_rounded_matrices(format: Format, make_checkpoint: Callable[..., Path]) -> None:
    target = load(str(make_checkpoint("llama", hidden_size=96)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    heads = MedusaHeads(MedusaShape(heads=2, blocks=1, taps=(0,), read_token=True), target.config.width).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model = cpp.CppModel(target, "float32", 2, exact_activations=True)
    fast, plain = cpp.CppMedusa(heads, target, model, format), cpp.CppMedusa(heads, target, model)
    states, tokens = torch.randn(2, target.config.width * 2), [5, 9]
    got, unrounded = fast.logits(states, tokens), plain.logits(states, tokens)
    with torch.no_grad():
        for weight in (*heads.weight, heads.mix):
            for matrix in weight:  # [in, out]
                matrix.copy_(dequantised(matrix.T, format).T)
        for linear in (heads.reduce, heads.token[1] if heads.token else None, target.head):
            if isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(dequantised(linear.weight, format), requires_grad=False)
    with torch.inference_mode():
        expected = target.logits(heads(states, target.embedding(torch.tensor(tokens)))).transpose(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, unrounded, rtol=1e-3, atol=1e-3)


def dequantised(weight: Tensor, format: Format) -> Tensor:
    return QuantLinear.of(rtn(weight.contiguous(), format), format, None).matrix(torch.float32)


def test_a_chain_is_drawn_from_the_heads(make_checkpoint: Callable[..., Path]) -> None:
    target = load(str(make_checkpoint("llama")), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    heads = MedusaHeads(MedusaShape(heads=3), target.config.width).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model = cpp.CppModel(target, "float32", 2)
    fast, states, params = cpp.CppMedusa(heads, target, model), torch.randn(2, target.config.width), WAYS
    cache = model.new_cache(2, 8)
    batch = [model.sequence(cache, row, [7 + row], mine, 1, 30) for row, mine in enumerate(params)]
    tokens, probs = model.propose(fast.drafter(batch, states, [Purpose.SAMPLE, Purpose.DRAFT]), [3, 2])
    logits = fast.logits(states, [7, 8])
    assert tokens[0] == logits[0].argmax(-1).tolist()
    torch.testing.assert_close(probs[0], logits[0])
    torch.testing.assert_close(probs[1], probabilities(logits[1, :2], [params[1]] * 2), rtol=1e-3, atol=1e-6)
    for at, token in enumerate(tokens[1]):
        keys = torch.tensor([[5, 1]]), torch.tensor([30 + at])
        assert token == int(KeyedSource().draw(probs[1][at][None], *keys, Purpose.DRAFT))
    with pytest.raises(ValueError, match="at most one token for each head"):
        fast.drafter(batch, states, [Purpose.DRAFT] * 2).propose([4, 1], 0)
    with pytest.raises(ValueError, match="states must be"):
        fast.logits(states, [7])
    reading = MedusaHeads(MedusaShape(heads=1, read_token=True), target.config.width)
    with_token = cpp.CppMedusa(reading, target, model)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        with_token.logits(states[:1], [target.config.vocab_size])


WAYS = [SamplingParams(), SamplingParams(temperature=0.8, top_k=30, seed=5)]


def test_in_a_loop_torch_computes_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted(kernels: str) -> int:
        chosen: Any = {"dtype": "float32", "device": "cpu", "max_tokens": 32, "drafter": "medusa", "kernels": kernels}
        llm = phase5.LLM(phase5.Options(**chosen))
        assert llm.backends.report["draft_step"] == kernels
        sequences = llm.sequences([prompt.text for prompt in load_prompts("code", "test")[:2]])
        for _ in llm.run(sequences):
            pass
        return sum(step.accepted for sequence in sequences for step in sequence.steps)

    def never(*arguments: Any) -> None:
        raise AssertionError("Medusa's heads ran in torch")

    slow = accepted("torch")
    monkeypatch.setattr("phase5.drafters.medusa.MedusaHeads.forward", never)
    fast = accepted("cpp")
    assert slow > 0
    assert slow == pytest.approx(fast, rel=0.2)
