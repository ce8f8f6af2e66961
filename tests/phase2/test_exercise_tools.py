"""The code around the loop, by hand: the toy model, the draft of a model, and the account of a run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import phase2
from common.errors import UserError
from phase2.explain import Account, smallest, survival, textbook_speedup, tokens_per_forward
from phase2.fake import parse_agreement
from phase2.pair import load_fake, resolve_draft
from phase2.speculative import StepStats


@pytest.mark.about("engine/fake.py, FakeModel.__init__")
def test_a_fakes_shape() -> None:
    model = phase2.FakeModel(7, 64, agreement=0.5)
    assert (model.config.vocab_size, model.config.context) == (7, 64)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match=r"\[0, 1\]"):
            phase2.FakeModel(7, 64, agreement=wrong)


@pytest.mark.about("engine/fake.py, FakeModel.hidden")
def test_a_context_is_its_last_two_tokens() -> None:
    model, tokens = phase2.FakeModel(7, 64), torch.tensor([[3, 5, 2]])
    assert model.hidden(tokens).tolist() == [[[3], [26], [37]]], "tokens [3, 5, 2], 7 of them: 0*7+3, 3*7+5, 5*7+2"
    assert model.hidden(tokens, wanted=torch.tensor([[2, 0]])).tolist() == [[[37], [3]]], "wanted [2, 0]"


@pytest.mark.about("engine/fake.py, FakeModel.logits")
def test_a_draft_agrees_or_takes_what_the_target_rules_out() -> None:
    contexts = torch.arange(49)[:, None]
    target, draft = (phase2.FakeModel(7, 64, agreement).logits(contexts) for agreement in (1.0, 0.7))
    assert target.isfinite().sum(-1).tolist() == [4] * 49, "possible tokens of 7, after every context"
    same = (target.isfinite() == draft.isfinite()).all(-1)
    assert torch.equal(target[same], draft[same])
    assert bool((target[~same].isfinite() != draft[~same].isfinite()).all())
    assert 0.5 < same.double().mean() < 0.9, "the share of 49 contexts in which a draft of agreement 0.7 agrees"


@pytest.mark.about("engine/fake.py, parse_agreement")
def test_the_name_of_a_fake() -> None:
    assert [parse_agreement(name) for name in ("fake", "fake:0.7", "fake:0")] == [1.0, 0.7, 0.0]
    with pytest.raises(UserError, match=r"fake:often.*fake:0\.7"):
        parse_agreement("fake:often")


@pytest.mark.about("engine/pair.py, resolve_draft")
def test_which_draft_a_model_gets() -> None:
    target = phase2.load("stdlib-10m", torch.float32, torch.device("cpu"))
    got = [resolve_draft(option, target) for option in ("none", "auto", "gpt2")]
    assert got == [None, "stdlib-1m", "gpt2"], "--draft none, auto, gpt2 for stdlib-10m"


@pytest.mark.about("engine/pair.py, load_fake")
def test_a_fake_is_loaded_with_the_embedded_tokenizer() -> None:
    loaded = load_fake("fake:0.7")
    assert loaded.checkpoint.name == "fake:0.7"
    assert loaded.config.vocab_size == loaded.tokenizer.vocab_size == 4096
    assert resolve_draft("auto", loaded) is None, "a fake has no draft of its own"


def ran(accepted: list[int], proposed: int = 2) -> list[StepStats]:
    return [StepStats(proposed, proposed, a, a + 1, draft_ms=2.0, verify_ms=10.0, accept_ms=0.0) for a in accepted]


@pytest.mark.about("engine/explain.py, survival")
def test_survival_by_position() -> None:
    assert survival(ran([2, 1, 0, 2]), 2) == [0.75, 0.5], "accepted 2, 1, 0, 2 of 2"
    assert survival(ran([2, 0]) + ran([1], proposed=1), 2) == [2 / 3, 0.5], (
        "a draft of one token says nothing of the second"
    )
    assert survival(ran([1]), 3) == [1.0, 0.0, 0.0], "no draft was 3 long"


@pytest.mark.about("engine/explain.py, tokens_per_forward")
def test_tokens_per_forward() -> None:
    assert [tokens_per_forward([0.75, 0.5], k) for k in (0, 1, 2)] == [1.0, 1.75, 2.25], "survival 0.75, 0.5"


@pytest.mark.about("engine/explain.py, textbook_speedup")
def test_the_textbooks_formula() -> None:
    assert textbook_speedup(0.5, 0.1, 3) == pytest.approx(1.875 / 1.3), "a 0.5, c 0.1, k 3"
    assert textbook_speedup(1.0, 0.25, 4) == pytest.approx(2.5), "a 1: the limit"


@pytest.mark.about("engine/explain.py, smallest")
def test_the_smallest_share() -> None:
    assert smallest(lambda share: share >= 0.25) == pytest.approx(0.25)
    assert smallest(lambda share: False) is None


COSTS = SimpleNamespace(plain_ms=9.0, draft_ms=1.0, verify_ms=10.0, accept_ms=0.0, shares=[0.75, 0.5])


@pytest.mark.about("engine/explain.py, Account.speedup")
def test_the_speedup_of_another_k() -> None:
    costs = Account(**vars(COSTS))
    assert costs.k == 2
    assert costs.speedup(1) == pytest.approx(1.75 * 9 / 11), COSTS
    assert costs.speedup(2) == pytest.approx(2.25 * 9 / 12), COSTS


@pytest.mark.about("engine/explain.py, Account.break_even_acceptance")
def test_from_which_acceptance_on_it_pays() -> None:
    assert Account(**vars(COSTS)).break_even_acceptance() == pytest.approx(0.264, abs=0.002), COSTS
    dear = {**vars(COSTS), "draft_ms": 20.0}
    assert Account(**dear).break_even_acceptance() is None, dear
