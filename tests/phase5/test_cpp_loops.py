"""The loops over a model that runs in C++: plain, speculative, trees; the tokens of plain decoding in every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from phase5 import load
from phase5.drafters.model import ModelDrafter
from phase5.generate import decode
from phase5.kernels import cpp
from phase5.kernels.cpp.model import CppModel
from phase5.kv_cache import KVOptions
from phase5.model import Transformer
from phase5.runner import make_runner
from phase5.sampling import SamplingParams
from phase5.sequence import Ending, Sequence
from phase5.speculative import speculative_decode
from phase5.tree import Tree
from phase5.verify import Certain, KeyedDecisions

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))
FORMATS = ("float32", "bfloat16", "float16", "int8")
PROMPTS = [[5, 9, 200, 31], [7, 7, 8], [100, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]


@pytest.fixture(scope="module")
def pair(make_checkpoint: Callable[..., Path]) -> tuple[Transformer, Transformer]:
    """A target, and a draft that is often right: the same model, a little off."""
    target, draft = (load(str(make_checkpoint("llama")), torch.float32, torch.device("cpu")).model for _ in range(2))
    assert isinstance(target, Transformer)
    assert isinstance(draft, Transformer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return target, draft


def plain(model: Transformer, params: SamplingParams) -> list[list[int]]:
    sequences = [Sequence(prompt, params, Ending(), 0) for prompt in PROMPTS]
    runner = make_runner(model, KVOptions("static"), len(sequences), 80)
    for _ in decode(runner, sequences, params):
        pass
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_gives_the_tokens_of_plain_decoding(
    weights: cpp.model.Weights, temperature: float, pair: tuple[Transformer, Transformer]
) -> None:
    """Greedy; at temperature 1 the tokens differ from plain's, but not from themselves alone and in a batch."""
    target, draft = (cpp.CppTransformer(model, weights, 2) for model in pair)
    params = SamplingParams(temperature=temperature, max_new_tokens=40, ignore_eos=True, seed=2)
    decisions = Certain() if params.greedy else KeyedDecisions(2)

    def speculate(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        sequences = [Sequence(prompt, params, Ending(), 0) for prompt in prompts]
        runner = make_runner(target, KVOptions("static"), len(sequences), 80)
        drafter = ModelDrafter(make_runner(draft, KVOptions("static"), len(sequences), 80), params, decisions)
        steps = list(speculative_decode(runner, drafter, sequences, params, decisions=decisions))
        return [sequence.tokens for sequence in sequences], len(steps)

    together, steps = speculate(PROMPTS)
    assert steps < 40
    if params.greedy:
        assert together == plain(target, params)
    assert together == [speculate([prompt])[0][0] for prompt in PROMPTS]


def test_float32_is_the_torch_model(pair: tuple[Transformer, Transformer]) -> None:
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    assert plain(cpp.CppTransformer(pair[0], "float32", 2), params) == plain(pair[0], params)


def test_a_whole_generation_gives_the_same_tokens(pair: tuple[Transformer, Transformer]) -> None:
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_new_tokens=40, ignore_eos=True, seed=2)
        fast = CppModel(pair[0], "bfloat16", 2)
        expected = plain(cpp.CppTransformer(pair[0], "bfloat16", 2), params)
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert fast.generate_plain(fast.new_cache(1, 80), 0, prompt, 40, params) == tokens


def test_trees_and_taps_reach_the_kernels(pair: tuple[Transformer, Transformer]) -> None:
    tree = Tree([11, 12, 13, 14, 15], [-1, -1, 0, 0, 1])
    fast = cpp.CppTransformer(pair[0], "float32", 2)
    targets = []
    for model in (pair[0], fast):
        runner = make_runner(model, KVOptions("static"), 2, 80)
        targets.append(runner.step(["a", "b"], PROMPTS[:2], [tree, Tree.chain([9])], [2, 1], (0,)))
        runner.keep("a", [0, 3])
        targets.append(runner.step(["a"], [[*PROMPTS[0], 11, 14, 2]], [tree]))
    for ours, theirs in ((targets[2], targets[0]), (targets[3], targets[1])):
        torch.testing.assert_close(ours.logits[0], theirs.logits[0], rtol=1e-4, atol=1e-4)
    assert targets[2].states is not None
    assert targets[0].states is not None
    for mine, reference in zip(targets[2].states, targets[0].states, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_other_caches_are_refused(pair: tuple[Transformer, Transformer]) -> None:
    fast = cpp.CppTransformer(pair[0], "float32", 1)
    with pytest.raises(UserError, match="use --kv static, or --kernels torch"):
        make_runner(fast, KVOptions("off"), 1, 80).logits(["a"], [[1, 2]])
    with pytest.raises(UserError, match="PagedCache: use --kv static"):
        make_runner(fast, KVOptions("paged"), 1, 80).logits(["a"], [[1, 2]])


def test_the_draw_is_keyed(pair: tuple[Transformer, Transformer]) -> None:
    """Another seed gives other tokens; the same one the same."""
    fast = CppModel(pair[0], "float32", 1)
    runs = [
        fast.generate_plain(fast.new_cache(1, 80), 0, [1, 2], 30, SamplingParams(temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
