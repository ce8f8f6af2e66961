"""Trees: their layout in one forward, their best shape, and greedy decoding with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import phase3
from common.errors import UserError
from common.prompts import load_prompts
from phase3.tree_shapes import TYPICAL, measured_acceptance
from tests.support.beside import beside

calibrate = beside(3, "benchmarks.calibrate")
CPU = torch.device("cpu")
BUSHY = phase3.Tree([5, 6, 7, 8, 9, 10], [-1, -1, 0, 0, 1, 3])


@pytest.mark.about("engine/tree.py, Tree.chain")
@pytest.mark.parametrize("tokens", [[], [5], [5, 6, 5]])
def test_a_chain_is_the_tree_without_branches(tokens: list[int]) -> None:
    tree = phase3.Tree.chain(tokens)
    assert tree.tokens == tokens
    assert tree.parents == [-1, 0, 1][: len(tokens)]
    assert tree.is_chain
    assert not BUSHY.is_chain


MIXED = {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 2}),
        ("qwen2", {**MIXED, "sliding_window": 8}),
        ("qwen2", {**MIXED, "sliding_window": 2}),
        ("gpt2", {}),
        ("opt", {}),
        ("qwen3", {}),
    ],
)
def test_a_tree_in_one_forward_is_each_of_its_branches(
    make_checkpoint: Callable[..., Path], family: str, keys: dict[str, Any]
) -> None:
    """A window of 8 is shorter than the text, and one of 2 than a branch: distances count along the branch."""
    loaded = phase3.load(str(make_checkpoint(family, **keys)), torch.float32, CPU)
    texts = [list(range(20, 34)), list(range(40, 47))]  # ragged: the second row is padded
    trees = [BUSHY, phase3.Tree([3, 4], [-1, -1])]
    target = phase3.target_forward(loaded.model, texts, trees, states_from=[0, 0])
    for row, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        for node in range(-1, len(tree.tokens)):
            line = tree.line(node) if node >= 0 else []
            with torch.inference_mode():
                hidden = loaded.model.hidden(torch.tensor([text + line]))
            expected = loaded.model.logits(hidden)[0, -1]
            torch.testing.assert_close(target.logits[row, node + 1], expected, rtol=1e-4, atol=1e-4)
            if node >= 0:
                state = target.states_of(row, [node], len(tree.tokens))[-1]
                torch.testing.assert_close(state, hidden[0, -1], rtol=1e-4, atol=1e-4)


def test_past_the_context_a_tree_sees_the_window_of_its_depth(make_checkpoint: Callable[..., Path]) -> None:
    loaded = phase3.load(str(make_checkpoint("llama", max_position_embeddings=16)), torch.float32, CPU)
    text = list(range(20, 40))
    target = phase3.target_forward(loaded.model, [text], [BUSHY])
    start = phase3.window_start(len(text) + BUSHY.depth, 16)
    for node in range(len(BUSHY.tokens)):
        window = torch.tensor([text[start:] + BUSHY.line(node)])
        with torch.inference_mode():
            expected = loaded.model(window)[0, -1]
        torch.testing.assert_close(target.logits[0, node + 1], expected, rtol=1e-4, atol=1e-4)


def test_padding_beside_a_bushy_tree_stays_within_the_table_of_positions(make_checkpoint: Callable[..., Path]) -> None:
    """The row with the tree is longer than the context, but no branch is; GPT-2 has no positions beyond."""
    loaded = phase3.load(str(make_checkpoint("gpt2")), torch.float32, CPU)  # its context is 128
    texts, trees = [list(range(20, 144)), [5, 6, 7]], [BUSHY, phase3.Tree([8], [-1])]
    together = phase3.target_forward(loaded.model, texts, trees).logits
    alone = phase3.target_forward(loaded.model, texts[1:], trees[1:]).logits
    torch.testing.assert_close(together[1, :2], alone[0], rtol=1e-4, atol=1e-4)


def all_shapes(acceptance: list[list[float]], nodes: int) -> list[list[int]]:
    """List every tree with that many nodes and child ranks 0, 1, 2 ..., as parents level by level."""
    paths = [path for depth in range(1, len(acceptance) + 1) for path in itertools.product(range(2), repeat=depth)]
    shapes = []
    for chosen in itertools.combinations(paths, nodes):
        have = set(chosen)
        closed = all((len(p) == 1 or p[:-1] in have) and (p[-1] == 0 or (*p[:-1], p[-1] - 1) in have) for p in chosen)
        if closed:
            ordered = sorted(chosen, key=lambda p: (len(p), p))
            shapes.append([ordered.index(p[:-1]) if len(p) > 1 else -1 for p in ordered])
    return shapes


def expected_tokens(acceptance: list[list[float]], shape: list[int]) -> float:
    """Return the expected tokens per target forward: 1 plus the acceptance probability of every node."""
    tree = phase3.Tree([0] * len(shape), shape)
    chances: list[float] = []
    for node, (parent, depth) in enumerate(zip(shape, tree.depths, strict=True)):
        rank = tree.children(parent).index(node)
        chances.append(acceptance[depth - 1][rank] * (chances[parent] if parent >= 0 else 1.0))
    return 1 + sum(chances)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0.01, 0.6), st.floats(0.0, 1.0)), min_size=3, max_size=3), st.integers(1, 4))
@pytest.mark.about("engine/tree_shapes.py, best_shape")
def test_the_best_shape_is_the_best_of_all(rows: list[tuple[float, float]], nodes: int) -> None:
    acceptance = [[first, first * share * 0.6] for first, share in rows]
    best = phase3.best_shape(acceptance, nodes)
    most = max(expected_tokens(acceptance, shape) for shape in all_shapes(acceptance, len(best)))
    assert expected_tokens(acceptance, best) == pytest.approx(most)


def test_shapes_and_what_they_promise_by_hand() -> None:
    """Give no node to a rank that was never accepted, except before a rank that was."""
    assert expected_tokens([[0.5, 0.25], [0.5, 0.2]], [-1, -1, 0, 1]) == 1 + 0.5 + 0.25 + 0.25 + 0.125
    assert phase3.best_shape([[0.5, 0.0, 0.0], [0.5, 0.0, 0.0]], 9) == [-1, 0]
    assert phase3.best_shape([[0.0, 0.5]], 9) == [-1, -1]


def test_acceptance_by_rank_counts_only_where_the_walk_came() -> None:
    tree = phase3.Tree([1, 2, 3, 4], [-1, -1, 0, 0])
    steps = [(tree, [0, 3]), (tree, [0]), (tree, [1]), (tree, [])]
    assert calibrate.acceptance_by_rank(steps, 3, 2) == [[0.5, 0.25], [0.0, 0.5], [0.0, 0.0]]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return phase3.load("stdlib-10m", torch.float32, CPU), phase3.load("stdlib-1m", torch.float32, CPU)


def drafters(pair: tuple[Any, Any], policy: Any, source: Any) -> dict[str, Any]:
    base = phase3.ModelDrafter(pair[1].model, source, policy.draft_noise)
    shape = phase3.best_shape([[0.6, 0.2, 0.1]] * 4, 12)
    static = phase3.StaticTreeDrafter(base, shape, source, policy.draft_noise, policy.draws_children)
    return {"static": static, "dynamic": phase3.DynamicTreeDrafter(base, 12)}


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_give_the_tokens_of_plain_decoding(pair: tuple[Any, Any], kind: str, temperature: float) -> None:
    """Greedy, and sampled with `coupled`; two rows in a batch equal the rows alone."""
    target = pair[0]
    params = phase3.SamplingParams(temperature=temperature, max_new_tokens=20, frequency_penalty=0.3)
    texts = [prompt.text for prompt in load_prompts("code", "test")[:2]]
    prompts = [target.tokenizer.encode(text)[-length:] for text, length in zip(texts, (44, 30), strict=True)]
    policy = phase3.make_policy("coupled")
    source = phase3.GreedySource() if params.greedy else phase3.KeyedSource()
    drafter = drafters(pair, policy, source)[kind]
    sequences = [phase3.Sequence(prompt, params, target.ending) for prompt in prompts]
    steps = list(phase3.decode(target.model, drafter, sequences, policy, source=source))
    expected = [g.tokens for g in phase3.generate(target.model, prompts, params, target.ending)]
    assert [sequence.tokens for sequence in sequences] == expected
    assert sum(stats.accepted for step in steps for stats in step.stats) > 5
    assert max(step.trees[0].depth for step in steps) == 4
    assert max(len(step.trees[0].tokens) for step in steps) == 12
    for tree in [step.trees[0] for step in steps if step.trees[0].probs is None]:
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            rank = tree.children(parent).index(node)
            assert token == tree.chosen_from[parent].topk(rank + 1).indices[-1]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_batch_takes_one_draft_forward_per_level_and_each_row_gets_its_own_tree(
    pair: tuple[Any, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of different lengths, parameters and numbers of levels; the last has no draft."""
    levels, ways = [4, 2, 3, 0], [
        phase3.SamplingParams(),
        phase3.SamplingParams(temperature=1.0, seed=3),
        phase3.SamplingParams(temperature=0.7, top_k=9, seed=4, frequency_penalty=0.5, repetition_penalty=2.0),
        phase3.SamplingParams(temperature=1.0, seed=3),
    ]  # fmt: skip
    drafter = drafters(pair, phase3.Rejection(), phase3.KeyedSource())[kind]
    encode, sequences = pair[0].tokenizer.encode, list[Any]()
    for text, params in zip(("import os\n\ndef ", "from", "    for i in range(i):\n        i", "x"), ways, strict=True):
        sequence = phase3.Sequence(encode(text), params, pair[0].ending)
        for token in encode("self.a"):
            sequence.append(token)
        sequences.append(sequence)
    alone = [drafter.propose([each], [most]).trees[0] for each, most in zip(sequences, levels, strict=True)]

    rows, forward = list[int](), phase3.target_forward

    def counting(model: Any, texts: Any, *more: Any) -> Any:
        rows.append(len(texts))
        return forward(model, texts, *more)

    monkeypatch.setattr("phase3.drafters.model.target_forward", counting)
    trees = drafter.propose(sequences, levels).trees
    assert rows == [3, 3, 2, 1]
    assert [tree.depth for tree in trees] == levels
    for mine, single in zip(trees, alone, strict=True):
        assert (mine.tokens, mine.parents) == (single.tokens, single.parents)
        torch.testing.assert_close((mine.probs, dict(mine.chosen_from)), (single.probs, dict(single.chosen_from)))


def test_a_greedy_sequence_among_sampled_ones_gets_the_likeliest_children(pair: tuple[Any, Any]) -> None:
    """The policy draws children, but at temperature 0 they are chosen, and certain."""
    drafter = drafters(pair, phase3.Rejection(), phase3.KeyedSource())["static"]
    assert drafter.drawn
    prompt = pair[0].tokenizer.encode("import os\n\ndef ")
    ways = [phase3.SamplingParams(temperature=1.0, seed=3), phase3.SamplingParams(temperature=0.0)]
    sequences = [phase3.Sequence(prompt, params, pair[0].ending) for params in ways]
    sampled, greedy = drafter.propose(sequences, [3, 3]).trees
    assert sampled.probs is not None
    assert greedy.probs is None
    for node, (token, parent) in enumerate(zip(greedy.tokens, greedy.parents, strict=True)):
        assert token == greedy.chosen_from[parent].topk(greedy.children(parent).index(node) + 1).indices[-1]


class Flat(phase3.drafting.Brancher):
    """A drafter that expects the same whatever precedes: token 0, a little less token 1, and so on."""

    taps, deepest = None, 8

    def propose(self, *_: Any) -> Any:
        raise NotImplementedError

    def ready(self, sequence: Any) -> bool:
        return True

    def expand(self, frontiers: list[Any]) -> list[torch.Tensor]:
        return [-torch.arange(16.0).repeat(len(each.nodes), 1) / 8 for each in frontiers]


@pytest.mark.parametrize("dynamic", [False, True])
def test_penalties_count_the_draft_tokens_above_a_node(dynamic: bool) -> None:
    params = phase3.SamplingParams(temperature=0.0, presence_penalty=2.0)
    sequence = phase3.Sequence([9], params, phase3.Ending())
    chain, source = list(range(-1, 3)), phase3.GreedySource()
    static = phase3.StaticTreeDrafter(Flat(), chain, source, phase3.Rejection().draft_noise, False)
    (tree,) = (phase3.DynamicTreeDrafter(Flat(), 40) if dynamic else static).propose([sequence], [4]).trees or []
    lines = [tree.line(node) for node in range(len(tree.tokens))]
    assert [0, 1, 2, 3] in lines  # each token once, for what was drafted above is penalised
    assert [0, 0] not in lines


def test_a_tree_of_some_nodes_and_what_lies_above_them() -> None:
    branches, numbers = BUSHY.branches([4, 0])
    assert (branches.tokens, branches.parents) == ([5, 6, 9], [-1, -1, 1])
    assert [branches.line(number) for number in numbers] == [BUSHY.line(4), BUSHY.line(0)]
    assert BUSHY.branches([-1]) == (phase3.Tree([], []), [-1])


@pytest.mark.parametrize("nodes", [1, 5, 12])
def test_a_dynamic_tree_never_sends_more_nodes_than_its_budget_through_the_draft(
    pair: tuple[Any, Any], nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven levels of four nodes of four children each would be 100."""
    sent = []
    forward = phase3.target_forward

    def counting(model: Any, texts: Any, trees: Any, *more: Any) -> Any:
        sent.append(len(trees[0].tokens))
        return forward(model, texts, trees, *more)

    monkeypatch.setattr("phase3.drafters.model.target_forward", counting)
    params = phase3.SamplingParams(temperature=1.0)
    base = phase3.ModelDrafter(pair[1].model, phase3.KeyedSource())
    sequence = phase3.Sequence(pair[0].tokenizer.encode("import"), params, pair[0].ending)
    (tree,) = phase3.DynamicTreeDrafter(base, nodes).propose([sequence], [7]).trees or []
    assert len(tree.tokens) == nodes
    assert max(sent) <= nodes

    (every,) = phase3.DynamicTreeDrafter(base, 10_000).propose([sequence], [7]).trees or []  # this tree is not cut
    worth: dict[tuple[int, ...], float] = {}
    for node in range(len(every.tokens)):
        line = every.line(node)
        text = torch.tensor([sequence.prompt + line[:-1]])
        with torch.inference_mode():
            last = pair[1].model(text)[0, -1].softmax(-1)[line[-1]]
        worth[tuple(line)] = float(last) * worth.get(tuple(line[:-1]), 1.0)
    best = sorted(worth, key=lambda line: -worth[line])[:nodes]
    assert {tuple(tree.line(node)) for node in range(nodes)} == set(best)


def test_a_dynamic_tree_has_no_node_that_cannot_be_drawn(pair: tuple[Any, Any]) -> None:
    """Of two tokens that top-k leaves: 2, 4 and 8 nodes, for four of a level are extended."""
    params = phase3.SamplingParams(temperature=1.0, top_k=2)
    base = phase3.ModelDrafter(pair[1].model, phase3.KeyedSource())
    sequence = phase3.Sequence(pair[0].tokenizer.encode("import"), params, pair[0].ending)
    (tree,) = phase3.DynamicTreeDrafter(base, 100).propose([sequence], [3]).trees or []
    assert [tree.depths.count(depth) for depth in (1, 2, 3)] == [2, 4, 8]


def test_a_dynamic_tree_keeps_the_likeliest_nodes(pair: tuple[Any, Any]) -> None:
    params = phase3.SamplingParams(temperature=1.0)
    target = pair[0]
    drafter = drafters(pair, phase3.Rejection(), phase3.KeyedSource())["dynamic"]
    sequence = phase3.Sequence(target.tokenizer.encode("import os\n\ndef "), params, target.ending)
    tree = drafter.propose([sequence], [4]).trees[0]
    assert len(tree.tokens) == 12
    assert tree.probs is None
    for node in range(-1, len(tree.tokens)):
        children = [tree.tokens[child] for child in tree.children(node)]
        assert len(set(children)) == len(children)
        if children:
            likeliest = tree.chosen_from[node].topk(len(children)).indices.tolist()
            assert children == likeliest


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"model": []}, "model should have at least 1 item"),
        ({"model": [[0.5], 3]}, "model.1 should be a valid list, got 3"),
        ({"model": [[1.5]]}, "model.0.0 should be less than or equal to 1, got 1.5"),
        ({"model": [[float("nan")]]}, "model.0.0 should be .*, got nan"),
        ({"medusa": [["0.5"]]}, "medusa.0.0 should be a valid number, got '0.5'"),
        ({"model": [[0.0, 0.0], [0.5]]}, r"model.0 should hold a share above 0, got \[0.0, 0.0\]"),
        ({"model": [[]]}, r"model.0 should hold a share above 0, got \[\]"),
        ({"model": [[0.5]] * 65}, "model should have at most 64 items"),
    ],
)
def test_shares_that_cannot_be(tmp_path: Path, document: dict[str, Any], words: str) -> None:
    (tmp_path / "tree_acceptance.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=f"tree_acceptance.json: {words}"):
        measured_acceptance(tmp_path, "model")


def test_measured_shares_or_typical_ones(tmp_path: Path) -> None:
    assert measured_acceptance(tmp_path, "model") == TYPICAL
    (tmp_path / "tree_acceptance.json").write_text('{"model": [[0.5, 0], []]}')
    assert measured_acceptance(tmp_path, "model") == [[0.5, 0.0], []]
    assert measured_acceptance(tmp_path, "medusa") == TYPICAL
