"""Pairs padded to different widths, with every policy and with trees: lossless, by enumeration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import phase3
from phase3.model import Embedding, Linear, Masks
from phase3.pair import fit_vocabulary

EXACT = 1e-12
LOSSLESS = ["rejection", "longest_prefix", "coupled"]
PARAMS = phase3.SamplingParams(temperature=1.0, max_new_tokens=3)


class OneHot(phase3.Transformer):
    """A model whose states are one-hot tokens and whose head is a table [V, V]: only the last token matters."""

    def __init__(self, table: Tensor) -> None:
        nn.Module.__init__(self)
        V = len(table)
        self.config = phase3.ModelConfig(
            family="table", vocab_size=V, layers=1, width=V, heads=1, kv_heads=1, head_dim=1, ffn_width=1,
            context=64, norm="rms", norm_eps=0.0, positions="rope", activation="silu", gated=False,
        )  # fmt: skip
        self.embedding, self.head = Embedding(V, V), Linear(V, V, bias=False)
        self.embedding.weight = nn.Parameter(torch.eye(V, dtype=table.dtype), requires_grad=False)
        self.head.weight = nn.Parameter(table.T.contiguous(), requires_grad=False)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        wanted: Tensor | None = None,
        masks: Masks | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        return self.embedding(tokens if wanted is None else tokens.gather(1, wanted)), None


def pair(target: int, draft: int) -> tuple[OneHot, OneHot]:
    """Make models with the given vocabulary sizes, and similar distributions over shared ids."""
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(2, max(target, draft), max(target, draft), generator=generator, dtype=torch.float64)
    models = OneHot(both[0, :target, :target].clone()), OneHot(both.sum(0)[:draft, :draft].clone())
    fit_vocabulary(models[1], target)
    return models


@pytest.mark.parametrize("widths", [(3, 2), (3, 5)])
@pytest.mark.parametrize("name", LOSSLESS)
def test_chains(proof: Any, name: Any, widths: tuple[int, int]) -> None:
    target, draft = pair(*widths)
    prompt = [0, widths[0] - 1]
    expected = proof.plain_law(target, PARAMS, prompt)
    policy = phase3.make_policy(name)
    got = proof.law(target, proof.model_drafter(draft), PARAMS, prompt, policy, lambda: phase3.FixedController(2))
    assert proof.total_variation(got, expected) < EXACT
    assert len(expected) == widths[0] ** 3


@pytest.mark.parametrize("shape", [[-1, -1, -1, 0], None])
@pytest.mark.parametrize("widths", [(3, 2), (3, 5)])
@pytest.mark.parametrize("name", LOSSLESS)
def test_trees(proof: Any, name: Any, widths: tuple[int, int], shape: list[int] | None) -> None:
    """With three children and a draft of two ids the tree is smaller than its shape. None: a dynamic tree."""
    target, draft = pair(*widths)
    policy, prompt = phase3.make_policy(name), [0, widths[0] - 1]

    def make(walker: Any, noise: Any) -> Any:
        base = phase3.ModelDrafter(draft, walker, noise)
        if shape is None:
            return phase3.DynamicTreeDrafter(base, nodes=4, beam=2)
        return phase3.StaticTreeDrafter(base, shape, walker, noise, policy.draws_children)

    expected = proof.plain_law(target, PARAMS, prompt)
    got = proof.law(target, make, PARAMS, prompt, policy, lambda: phase3.FixedController(2))
    assert proof.total_variation(got, expected) < EXACT
