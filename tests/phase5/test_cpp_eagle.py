"""EAGLE's layer in C++ against drafters/eagle.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import phase5
from common.errors import UserError
from common.philox import Purpose
from phase5 import load
from phase5.drafters.eagle import EagleHead, EagleShape, Lookahead
from phase5.drafters.eagle_fast import FastLookahead
from phase5.kernels import cpp
from phase5.kernels.cpp import library
from phase5.model import Transformer
from phase5.quantize import Format, QuantLinear, rtn
from phase5.sampling import SamplingParams, probabilities
from phase5.tree import Tree
from phase5.verify import KeyedSource

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.mark.parametrize("taps", [(), (1,)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_chain_and_a_tree(family: str, taps: tuple[int, ...], make_checkpoint: Callable[..., Path]) -> None:
    target = load(str(make_checkpoint(family)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    head = EagleHead(EagleShape(ffn_width=64, reach=10, taps=taps), target.config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    layer = cpp.CppEagle(head, target, cpp.CppModel(target, "float32", 2))
    slow = Lookahead(head, target, 128)
    cache = layer.new_cache(1, 128)
    params = SamplingParams(temperature=1.0, seed=5)
    with torch.inference_mode():
        for count in (14, 3):
            tokens, states = list(range(count)), torch.randn(count, target.config.width * (1 + len(taps)))
            features = head.read(states)
            inputs = head.inputs(target.embedding(torch.tensor(tokens)), features)
            torch.testing.assert_close(layer.inputs(tokens, features), inputs, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer.read(states), features, rtol=1e-4, atol=1e-4)
            expected = slow.begin(inputs, 0)
            torch.testing.assert_close(layer.begin(cache, 0, inputs), expected, rtol=1e-4, atol=1e-4)
            sequence = layer.sequence(cache, 0, tokens, params, 1, 30)
            (drawn,), (probs,) = layer.propose(layer.drafter([sequence], [states], [Purpose.DRAFT]), [5])
            cache.keep(0, list(range(count)))

        feature = expected
        for at, token in enumerate(drawn):
            if at:
                feature = slow.extend(Tree.chain(drawn[:at]), [at - 1])
            of_torch = probabilities(target.logits(feature), [params])
            torch.testing.assert_close(probs[at], of_torch[0], rtol=1e-3, atol=1e-5)
            keys = torch.tensor([[5, 1]]), torch.tensor([30 + at])
            assert token == int(KeyedSource().draw(probs[at][None], *keys, Purpose.DRAFT))

        tree = Tree([5, 6, 7, 8], [-1, -1, 0, 1])
        fresh, theirs = Lookahead(head, target, 128), FastLookahead(layer, head, target, 128)
        torch.testing.assert_close(theirs.begin(inputs, 0), fresh.begin(inputs, 0), rtol=1e-4, atol=1e-4)
        for level in ([0, 1], [2, 3]):
            torch.testing.assert_close(theirs.extend(tree, level), fresh.extend(tree, level), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [Format("int8"), Format("int4", 32)], ids=str)
def test_a_quantised_layer_multiplies_by_the_rounded_matrices(
    format: Format, make_checkpoint: Callable[..., Path]
) -> None:
    target = load(str(make_checkpoint("llama", hidden_size=96)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    head = EagleHead(EagleShape(ffn_width=64, taps=(0,)), target.config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    beside = cpp.CppModel(target, "float32", 2, exact_activations=True)
    layer, plain = cpp.CppEagle(head, target, beside, format), cpp.CppEagle(head, target, beside)
    states, tokens = torch.randn(6, target.config.width * 2), list(range(6))
    before = plain.logits(plain.begin(plain.new_cache(1, 8), 0, plain.inputs(tokens, plain.read(states))))
    got = layer.logits(layer.begin(layer.new_cache(1, 8), 0, layer.inputs(tokens, layer.read(states))))
    for linear in [part for part in (*head.modules(), target.head) if isinstance(part, nn.Linear)]:
        rounded = QuantLinear.of(rtn(linear.weight.detach(), format), format, None).matrix(torch.float32)
        linear.weight = nn.Parameter(rounded, requires_grad=False)
    with torch.inference_mode():
        inputs = head.inputs(target.embedding(torch.tensor(tokens)), head.read(states))
        expected = target.logits(Lookahead(head, target, 8).begin(inputs, 0))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("drafter", ["eagle", "medusa"])
def test_quantised_heads_leave_the_tokens_as_they_are(drafter: str) -> None:
    def tokens(**more: Any) -> list[list[int]]:
        llm = phase5.LLM(phase5.Options(max_tokens=24, device="cpu", dtype="float32", kernels="cpp", **more))
        return [completion.tokens for completion in llm.generate(["from pathlib import", "class Stack:"])]

    assert tokens(drafter=drafter, draft_quant="int8") == tokens(draft="none")
    with pytest.raises(
        UserError, match=r"--draft-quant int8 quantises the heads for the C\+\+ step, .*--kernels torch"
    ):
        phase5.LLM(phase5.Options(drafter=drafter, draft_quant="int8", kernels="torch"))  # type: ignore[arg-type]


def test_what_cannot_be_is_named(make_checkpoint: Callable[..., Path]) -> None:
    target = load(str(make_checkpoint("llama")), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    layer = cpp.CppEagle(
        EagleHead(EagleShape(ffn_width=64), target.config).eval(), target, cpp.CppModel(target, "float32", 1)
    )
    features = torch.zeros(1, target.config.width)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        layer.inputs([target.config.vocab_size], features)
    with pytest.raises(ValueError, match="features must be"):
        layer.inputs([1, 2], features)
    penalties = SamplingParams(presence_penalty=1)
    with pytest.raises(UserError, match="penalties"):
        layer.sequence(layer.new_cache(1, 8), 0, [1], penalties)
    with pytest.raises(ValueError, match="at least one token"):
        layer.sequence(layer.new_cache(1, 8), 0, [], SamplingParams())
    sequence = layer.sequence(layer.new_cache(1, 8), 0, [1], SamplingParams())
    with pytest.raises(ValueError, match="tokens and features differ in number"):
        layer.propose(layer.drafter([sequence], [torch.zeros(2, target.config.width)], [Purpose.DRAFT]), [2])
    with pytest.raises(ValueError, match="sequences and states differ in number"):
        layer.drafter([sequence, sequence], [features], [Purpose.DRAFT] * 2)
    states = torch.zeros(4, target.config.width)
    for width, reduce in ((8, None), (target.config.width, layer._head)):
        with pytest.raises(ValueError, match="reduces states has another shape"):
            library().EagleDrafter(layer._engine, [sequence], [1], reduce, width, states.data_ptr(), [4])
