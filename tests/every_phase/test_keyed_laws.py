"""Keyed random numbers give the laws that the enumeration proves for independent ones (chi-square tests).

Quick: the sources alone, the rule of every policy, and trees, each over thousands of samples at once, and some whole
loops. Slow: whole loops, every policy with every way to draft.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from common.phases import Phase
from common.philox import Purpose, uniforms
from tests.support.small import sequences_of, small_session
from tests.support.walker import Walker

pytestmark = pytest.mark.newest

RARE = 1e-4  # below this likelihood the law is rejected
DRAWS = 20_000
SIZE = 4
LOSSLESS = ("rejection", "coupled", "longest_prefix")
LOSSY = ("conf_threshold", "topk_agree", "typical")
SOME = {"tau": 0.3, "agree_k": 2, "epsilon": 0.9, "delta": 0.9}  # chosen so that some tokens are accepted


def likelihood(counts: Tensor, law: Tensor) -> float:
    """Return the likelihood of counts at least this uneven under the law; cells rarer than 5 times are merged."""
    counts, expected = counts.double().flatten(), law.double().flatten() * counts.sum()
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    assert int(counts[law.flatten() == 0].sum()) == 0
    common = expected >= 5
    cells = [(counts[common], expected[common]), (counts[~common].sum()[None], expected[~common].sum()[None])]
    observed, wanted = (torch.cat(each) for each in zip(*cells, strict=True))
    kept = wanted > 0
    return float(stats.chisquare(observed[kept], wanted[kept] * (observed.sum() / wanted.sum())).pvalue)


def law(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.fixture
def keyed(phase: Phase) -> Any:
    """Return the phase's source of random numbers."""
    if phase.number == 1:
        pytest.skip("nothing but plain sampling, which test_sampling.py checks")
    return importlib.import_module(phase.package).KeyedSource()


@pytest.fixture
def branching(keyed: Any, phase: Phase) -> Any:
    if phase.number == 2:
        pytest.skip("trees come with phase 3")
    return keyed


def rows(count: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Return distinct keys (seed, sample) and positions for `count` rows: 5 seeds, 10 samples of each."""
    each = torch.arange(count)
    return torch.stack((3 + each % 5, each // 5 % 10), 1), 7 + each // 50


@pytest.mark.parametrize("purpose", [Purpose.SAMPLE, Purpose.DRAFT, Purpose.RESIDUAL])
def test_draws_follow_the_distribution(keyed: Any, purpose: Purpose) -> None:
    probs = law(1, SIZE)
    tokens = keyed.draw(probs.expand(DRAWS, SIZE), *rows(), purpose)
    assert likelihood(torch.bincount(tokens, minlength=SIZE), probs) > RARE


def test_a_draw_is_that_of_a_running_sum(keyed: Any) -> None:
    """Of weights with any sum, the last two of them zero: the first whose sum is above the number's share."""
    (keys, positions), sizes = rows(500), torch.linspace(0.2, 5, 500)
    weights = law(8, 500, 6) * sizes[:, None]
    weights[:, 4:] = 0
    sums = weights.double().cumsum(-1)
    share = uniforms(keys[:, 0], keys[:, 1], positions, Purpose.RESIDUAL, 1).double() * sums[:, -1:]
    assert keyed.draw(weights, keys, positions, Purpose.RESIDUAL).tolist() == (sums <= share).sum(-1).tolist()


def test_neighbours_are_independent(keyed: Any) -> None:
    """Each row has a draft token, its acceptance, the token after it, and the draft token at the next position."""
    probs, (keys, positions) = law(2, SIZE), rows()
    every = probs.expand(DRAWS, SIZE)
    coin = keyed.decide(torch.full((DRAWS, 1), 0.4), keys, positions[:, None])[:, 0].long()
    drawn = [keyed.draw(every, keys, positions, purpose) for purpose in (Purpose.DRAFT, Purpose.RESIDUAL)]
    drawn.append(keyed.draw(every, keys, positions + 1, Purpose.DRAFT))
    joint = torch.tensor([0.6, 0.4])
    cells = coin
    for tokens in drawn:
        joint, cells = joint[..., None] * probs, cells * SIZE + tokens
    assert likelihood(torch.bincount(cells, minlength=joint.numel()), joint) > RARE


@pytest.mark.parametrize("purpose", [Purpose.DRAFT, Purpose.SAMPLE])
def test_several_tokens_are_drawn_in_order_without_replacement(branching: Any, purpose: Purpose) -> None:
    probs = law(3, SIZE)
    pairs = branching.draw_several(probs.expand(DRAWS, SIZE), 2, *rows(), purpose)
    expected = probs[:, None] * probs / (1 - probs[:, None])
    counts = torch.bincount(pairs[:, 0] * SIZE + pairs[:, 1], minlength=SIZE * SIZE)
    assert likelihood(counts, expected * (1 - torch.eye(SIZE))) > RARE


def test_siblings_are_tried_with_numbers_of_their_own(branching: Any) -> None:
    chances, (keys, positions) = torch.tensor([0.3, 0.5, 0.7]), rows()
    cells = torch.zeros(DRAWS, dtype=torch.long)
    for trial, chance in enumerate(chances):
        decided = branching.decide(chance.expand(DRAWS, 1), keys, positions[:, None], trial)[:, 0]
        cells = cells * 2 + decided.long()
    yes = torch.stack((1 - chances, chances), 1)
    assert likelihood(torch.bincount(cells, minlength=8), torch.einsum("a,b,c->abc", *yes)) > RARE


def judged(engine: Any, policy: str, tokens: Tensor, probs: Tensor | None, target: Tensor, source: Any) -> Any:
    """Return the verdict over rows() of chains of one token; target [DRAWS, 2, SIZE]."""
    keys, positions = rows()
    widths = torch.ones(DRAWS, dtype=torch.long)
    if not hasattr(engine, "make_policy"):
        return engine.verify(tokens, probs, target, widths, keys, positions, source)
    draft, said = engine.Draft(tokens, probs, [1] * DRAWS), engine.TargetProbs(target, target)
    return engine.make_policy(policy, **SOME).verify(draft, said, engine.DraftRows(widths, keys, positions, source))


@pytest.mark.parametrize(
    ("policy", "certain"), [*itertools.product((*LOSSLESS, *LOSSY), [False]), *itertools.product(LOSSLESS, [True])]
)
def test_chains_of_one_token(phase: Phase, keyed: Any, policy: str, certain: bool) -> None:
    """The first token follows the target (with a lossy policy: the promised law), and so does the second."""
    if phase.number == 2 and policy != "rejection":
        pytest.skip("comes with phase 3")
    engine = importlib.import_module(phase.package)
    target, law_after = law(4, SIZE), law(5, SIZE, SIZE)
    draft = torch.eye(SIZE)[2] if certain else law(6, SIZE)
    noise = Purpose.SAMPLE if policy == "coupled" else Purpose.DRAFT
    tokens = torch.full((DRAWS,), 2) if certain else keyed.draw(draft.expand(DRAWS, SIZE), *rows(), noise)
    probs = None if certain else draft.expand(DRAWS, 1, SIZE)
    said = torch.stack((target.expand(DRAWS, SIZE), law_after[tokens]), 1)
    verdict = judged(engine, policy, tokens[:, None], probs, said, keyed)
    accepted, following = verdict.accepted == 1, verdict.next_tokens
    first = torch.where(accepted, tokens, following)
    expected = target
    if policy in LOSSY:
        good = engine.make_policy(policy, **SOME).good(target)
        expected = draft * good + (1 - (draft * good).sum()) * target
    assert likelihood(torch.bincount(first, minlength=SIZE), expected) > RARE
    kept = torch.bincount(tokens[accepted], minlength=SIZE).double()
    assert 0 < int(kept.sum()) < DRAWS
    pairs = torch.bincount(tokens[accepted] * SIZE + following[accepted], minlength=SIZE * SIZE)
    assert likelihood(pairs, (kept / kept.sum())[:, None] * law_after) > RARE


TREES = 1000


@pytest.mark.newest(3)
@pytest.mark.parametrize("policy", LOSSLESS)
def test_trees_of_two_children(phase: Phase, branching: Any, policy: str) -> None:
    """Children are sampled without replacement, or the likeliest, by policy; the first token is the target's."""
    engine = importlib.import_module(phase.package)
    rule = engine.make_policy(policy)
    target, law_after, draft = law(4, SIZE), law(5, SIZE, SIZE), law(6, SIZE)
    keys, positions = rows(TREES)
    drawn = branching.draw_several(draft.expand(TREES, SIZE), 2, keys, positions, rule.draft_noise)
    if not rule.draws_children:
        drawn = draft.topk(2).indices.expand(TREES, 2)
    probs = torch.zeros(3, SIZE)
    probs[0] = draft
    first, second = [], []
    all_rows = engine.DraftRows(torch.zeros(TREES, dtype=torch.long), keys, positions, branching)
    for row, children in enumerate(drawn.tolist()):
        tree = engine.Tree(children, [-1, -1], probs if rule.draws_children else None)
        said = torch.stack((target, *law_after[children]))[None]
        path = rule.accept_tree(tree, engine.TargetProbs(said, said), all_rows.only(slice(row, row + 1)))
        if path.nodes:
            second.append((children[path.nodes[0]], path.next_token))
        first.append(children[path.nodes[0]] if path.nodes else path.next_token)
    assert likelihood(torch.bincount(torch.tensor(first), minlength=SIZE), target) > RARE
    assert 0.5 * TREES < len(second) < TREES
    pairs = torch.zeros(SIZE, SIZE)
    for before, after in second:
        pairs[before, after] += 1
    assert likelihood(pairs, (pairs.sum(1, keepdim=True) / pairs.sum()) * law_after) > RARE


STATIC, DYNAMIC = {"tree": "static", "tree_nodes": 6}, {"tree": "dynamic", "tree_nodes": 5}
MODEL = {"draft": "fake:0.7", "max_tokens": 3}
READER = {"max_tokens": 4}  # nothing is drafted for the first token: it is the target's states that are read
DRAFTING: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "confidence": {**MODEL, "controller": "confidence"},
    "ngram": {"drafter": "ngram", "max_tokens": 3},
    "static tree": {**MODEL, **STATIC},
    "dynamic tree": {**MODEL, **DYNAMIC},
    "extrapolate": {**READER, "drafter": "extrapolate"},
    **{
        name + how: {**READER, "drafter": name, **tree}
        for name in ("medusa", "eagle")
        for how, tree in (("", {}), (", static tree", STATIC), (", dynamic tree", DYNAMIC))
    },
}
VOCABULARY = 3
PROMPT = [0, 1, 1, 0, 1]  # its last n-gram occurs twice before


def plain_law(made: Any) -> Tensor:
    """[V ** n] the law of the texts of n tokens behind the prompt, by the target's logits."""
    model, length = made.loaded.model, made.params.max_new_tokens
    texts = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * length)
    whole = torch.cat((torch.tensor(PROMPT).expand(len(texts), -1), texts), 1)
    with torch.inference_mode():
        said: Tensor = model.logits(model.hidden(whole)).double().log_softmax(-1)
    return said[:, len(PROMPT) - 1 : -1].gather(-1, texts[..., None]).sum((1, 2)).exp()


def numbered(tokens: Tensor) -> Tensor:
    """Texts [N, n] as numbers [N], in the order of plain_law()."""
    return (tokens * VOCABULARY ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)


def whole_texts(engine: Any, made: Any, count: int) -> Tensor:
    """How often each text was written, by so many samples of one batch."""
    sequences = sequences_of(engine, made, [PROMPT], list(range(count)))
    proposed = 0
    for step in made.run(sequences):
        proposed += sum(each.proposed for each in step.stats)
    assert proposed > count
    texts = numbered(torch.tensor([sequence.tokens for sequence in sequences]))
    return torch.bincount(texts, minlength=VOCABULARY**made.params.max_new_tokens)


def enumerated_law(engine: Any, made: Any, patch: pytest.MonkeyPatch) -> Tensor:
    """The law of whole_texts() where independent numbers stand in for the keyed ones, and every outcome is visited."""

    def write(walker: Walker) -> int:
        sequences = sequences_of(engine, made, [PROMPT], [0])
        with patch.context() as within:
            within.setattr(f"{engine.__name__}.llm.random_source", lambda params: walker)
            for _ in made.run(sequences):
                pass
        return int(numbered(torch.tensor([sequences[0].tokens])))

    found = torch.zeros(VOCABULARY**made.params.max_new_tokens, dtype=torch.double)
    for text, weight in Walker().law(write).items():
        found[text] = weight
    return found


QUICK = [
    *(("model", policy) for policy in ("rejection", "coupled")),
    *((how, "rejection") for how in ("static tree", "extrapolate", "medusa")),
]


@pytest.mark.newest(3)
@pytest.mark.parametrize(("how", "policy"), QUICK)
def test_some_whole_loops(phase: Phase, how: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of two tokens: one number for both, or for both levels of a tree, would show."""
    if phase.number < (2 if (how, policy) == QUICK[0] else 3):
        pytest.skip("comes later")
    engine = importlib.import_module(phase.package)
    options = DRAFTING[how] if phase.number == 2 else {**DRAFTING[how], "policy": policy}
    made = small_session(engine, monkeypatch, VOCABULARY, k=2, **options)
    assert likelihood(whole_texts(engine, made, 700 if how == "model" else 500), plain_law(made)) > RARE


@pytest.mark.slow
@pytest.mark.parametrize("how", list(DRAFTING))
@pytest.mark.parametrize("policy", [*LOSSLESS, *LOSSY])
def test_whole_loops(phase: Phase, policy: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law is the target's own; with a lossy policy it is the one that the loop has with independent numbers."""
    if phase.number < 3:
        pytest.skip("comes with phase 3")
    engine = importlib.import_module(phase.package)
    made = small_session(engine, monkeypatch, VOCABULARY, k=2, **SOME, **DRAFTING[how], policy=policy)
    law = enumerated_law(engine, made, monkeypatch) if policy in LOSSY else plain_law(made)
    assert likelihood(whole_texts(engine, made, 2000 if policy == "rejection" else 1000), law) > RARE


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda pairs: pairs.flip(1),
    "with replacement": lambda pairs: torch.stack((pairs[:, 0], pairs[:, 1].roll(1)), 1),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_the_law_of_pairs_is_tested(branching: Any, mistake: str) -> None:
    probs = law(3, SIZE)
    pairs = MISTAKES[mistake](branching.draw_several(probs.expand(DRAWS, SIZE), 2, *rows(), Purpose.DRAFT))
    distinct = pairs[pairs[:, 0] != pairs[:, 1]]
    expected = probs[:, None] * probs / (1 - probs[:, None]) * (1 - torch.eye(SIZE))
    counts = torch.bincount(distinct[:, 0] * SIZE + distinct[:, 1], minlength=SIZE * SIZE)
    assert likelihood(counts, expected) < RARE
