"""EAGLE's layer in C++ against drafters/eagle.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.philox import Purpose
from phase5 import load
from phase5.drafters.eagle import EagleHead, EagleShape, Lookahead
from phase5.kernels import cpp
from phase5.model import Transformer
from phase5.sampling import SamplingParams, probabilities
from phase5.tree import Tree
from phase5.verify import KeyedDecisions

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_chain_and_a_tree(family: str, make_checkpoint: Callable[..., Path]) -> None:
    target = load(str(make_checkpoint(family)), torch.float32, torch.device("cpu")).model
    assert isinstance(target, Transformer)
    torch.manual_seed(0)
    head = EagleHead(EagleShape(ffn_width=64, reach=10), target.config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    layer = cpp.CppEagle(head, target, "float32", 2)
    slow = Lookahead(head, target, 128)
    cache = layer.new_cache(1, 128)
    with torch.inference_mode():
        for count in (14, 3):
            inputs = torch.randn(count, target.config.width)
            expected = slow.begin(inputs, 0)
            begun = layer.begin(cache, 0, inputs)
            assert begun.hidden is not None
            torch.testing.assert_close(begun.hidden, expected, rtol=1e-4, atol=1e-4)
            cache.keep(0, list(range(count)))

        params = SamplingParams(temperature=1.0, seed=5)
        drawn, probs = layer.continue_chain(cache, 0, begun, 5, params, sample=1, position=30)
        feature = expected
        for at, token in enumerate(drawn):
            if at:
                feature = slow.extend(Tree.chain(drawn[:at]), [at - 1])
            of_torch = probabilities(target.logits(feature), params)
            torch.testing.assert_close(probs[at], of_torch[0], rtol=1e-3, atol=1e-5)
            keys = torch.tensor([1]), torch.tensor([30 + at])
            assert token == int(KeyedDecisions(5).draw(probs[at][None], *keys, Purpose.DRAFT))

        tree = Tree([5, 6, 7, 8], [-1, -1, 0, 1])
        fresh, theirs = Lookahead(head, target, 128), layer.new_cache(1, 128)
        first = fresh.begin(inputs, 0)
        layer.begin(theirs, 0, inputs)
        theirs.keep(0, list(range(len(inputs))))
        level = fresh.extend(tree, [0, 1])
        below = fresh.extend(tree, [2, 3])
        of_nodes = torch.cat((first, first, level))
        inputs_of_nodes = head.inputs(target.embedding(torch.tensor(tree.tokens)), of_nodes)
        got = layer.extend(theirs, 0, inputs_of_nodes, tree.parents).hidden
        assert got is not None
        torch.testing.assert_close(got, torch.cat((level, below)), rtol=1e-4, atol=1e-4)
