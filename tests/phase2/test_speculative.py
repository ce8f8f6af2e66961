"""The loop on real models: the same tokens as plain decoding, honest counts, ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import phase1
import phase2
from common.errors import UserError
from common.prompts import load_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target() -> Any:
    return phase2.load("stdlib-10m", torch.float32, CPU)


@pytest.fixture(scope="module")
def draft() -> Any:
    return phase2.load("stdlib-1m", torch.float32, CPU)


def speculate(
    target: Any,
    draft: Any,
    prompts: list[list[int]],
    params: Any,
    ending: Any,
    k: int,
    samples: list[int] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Return the finished sequences and the steps."""
    source = phase2.GreedySource() if params.greedy else phase2.KeyedSource()
    drafter = phase2.ModelDrafter(draft, source)
    numbers = samples or [0] * len(prompts)
    sequences = [phase2.Sequence(p, params, ending, s) for p, s in zip(prompts, numbers, strict=True)]
    return sequences, list(phase2.speculative_decode(target, drafter, sequences, k, source))


@pytest.fixture(scope="module")
def plain_by_phase_1(target: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts, and phase 1's output after them."""
    plain = phase1.load("stdlib-10m", torch.float32, CPU)
    texts = [prompt.text for prompt in load_prompts("code", "test")[:4]]
    prompts = [target.tokenizer.encode(text)[-length:] for text, length in zip(texts, (44, 30, 60, 21), strict=True)]
    done = phase1.generate(plain.model, prompts, phase1.SamplingParams(max_new_tokens=24), plain.ending)
    return prompts, [generation.tokens for generation in done]


@pytest.mark.parametrize("k", [1, 8])
def test_greedy_equals_phase_1(target: Any, draft: Any, plain_by_phase_1: Any, k: int) -> None:
    """100 prompts over all K in the slow test; here 4."""
    prompts, expected = plain_by_phase_1
    got, steps = speculate(
        target.model, draft.model, prompts, phase2.SamplingParams(max_new_tokens=24), target.ending, k
    )
    assert [sequence.tokens for sequence in got] == expected
    assert sum(step.stats[0].accepted for step in steps) > 0


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 9))
def test_greedy_equals_phase_1_on_100_prompts(target: Any, draft: Any, k: int) -> None:
    params = phase2.SamplingParams(max_new_tokens=48)
    prompts = [target.tokenizer.encode(prompt.text) for prompt in load_prompts("code", "test")]
    for start in range(0, 100, 10):
        batch = prompts[start : start + 10]
        expected = phase2.generate(target.model, batch, params, target.ending)
        got, _ = speculate(target.model, draft.model, batch, params, target.ending, k)
        assert [sequence.tokens for sequence in got] == [generation.tokens for generation in expected]


def fakes(agreement: float, context: int = 64) -> tuple[Any, Any]:
    return phase2.FakeModel(40, context), phase2.FakeModel(40, context, agreement)


@given(
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=90),
    k=st.integers(1, 8),
    eos=st.sets(st.integers(0, 39), max_size=3),
    limit=st.integers(1, 60),
    agreement=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
@settings(max_examples=60)
def test_greedy_equals_plain_whatever_the_request(
    prompt: list[int], k: int, eos: set[int], limit: int, agreement: float
) -> None:
    """Prompts beyond the context, ends anywhere in a block, any limit."""
    model, guess = fakes(agreement)
    params, ending = phase2.SamplingParams(max_new_tokens=limit), phase2.Ending(tuple(eos))
    plain = phase2.generate(model, [prompt], params, ending)[0]
    (sequence,), steps = speculate(model, guess, [prompt], params, ending, k)
    assert sequence.tokens == plain.tokens
    assert sequence.finish_reason == plain.finish_reason
    assert sum(step.stats[0].emitted for step in steps) == len(plain.tokens)


@given(text=st.text(alphabet="abcd ", min_size=1, max_size=12), k=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_stop_strings_cut_where_plain_decoding_would(target: Any, text: str, k: int, seed: int) -> None:
    model, guess = (phase2.FakeModel(120, 64, agreement) for agreement in (1.0, 0.8))
    stop = tuple(target.tokenizer.token_text(token) for token in (40 + seed, 60 + seed, 80 + seed))
    params, ending = phase2.SamplingParams(max_new_tokens=40, stop=stop), phase2.Ending((), target.tokenizer)
    prompt = [ord(character) % 120 for character in text]
    plain = phase2.generate(model, [prompt], params, ending)[0]
    (sequence,), _ = speculate(model, guess, [prompt], params, ending, k)
    assert (sequence.tokens, sequence.text, sequence.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_batches_equal_single_runs(temperature: float) -> None:
    model, guess = fakes(0.7)
    params = phase2.SamplingParams(temperature=temperature, max_new_tokens=30, seed=4)
    ending = phase2.Ending((3, 17))
    prompts = [[1], [5, 6, 7, 8, 9], [30] * 70, [2, 2], [1]]
    together, _ = speculate(model, guess, prompts, params, ending, 4, samples=[0, 0, 0, 0, 1])
    for index, prompt in enumerate(prompts):
        (alone,), _ = speculate(model, guess, [prompt], params, ending, 4, samples=[index // 4])
        assert together[index].tokens == alone.tokens
    assert temperature == 0 or together[0].tokens != together[4].tokens


class Counted(phase2.FakeModel):
    """Counts forwards, and the positions whose logits were requested."""

    forwards = 0
    asked = 0

    def hidden(self, tokens: torch.Tensor, positions: Any = None, wanted: Any = None) -> torch.Tensor:
        self.forwards += 1
        self.asked += wanted.numel()
        return super().hidden(tokens, positions, wanted)


def test_one_target_forward_per_step_and_none_besides() -> None:
    model, guess = Counted(40, 64), phase2.FakeModel(40, 64, 0.7)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=50)
    _, steps = speculate(model, guess, [[1, 2]], params, phase2.Ending(), 4)
    assert model.forwards == len(steps) < 50
    assert model.asked == sum(step.stats[0].k + 1 for step in steps)


def check_counts(steps: list[Any], total: int) -> None:
    assert sum(step.stats[0].emitted for step in steps) == total
    for step in steps[:-1]:
        stats = step.stats[0]
        assert stats.emitted == stats.accepted + 1  # the token after the draft: a correction or a bonus
        assert stats.proposed == stats.k >= stats.accepted


@pytest.mark.parametrize("agreement", [0.0, 0.6, 1.0])
def test_counts_add_up(agreement: float) -> None:
    model, guess = fakes(agreement, context=256)
    params = phase2.SamplingParams(temperature=1.0, max_new_tokens=101)
    (sequence,), steps = speculate(model, guess, [[1]], params, phase2.Ending(), 4)
    check_counts(steps, len(sequence.tokens))
    assert all(step.stats[0].k < 101 - step.starts[0] for step in steps)  # a token follows the draft
    accepted, proposed = (sum(getattr(s.stats[0], name) for s in steps) for name in ("accepted", "proposed"))
    if agreement == 0.0:
        assert accepted == 0
        assert len(steps) == 101
    if agreement == 1.0:
        assert accepted == proposed
        assert len(steps) == 21  # five tokens a step, and one for the last


def test_draft_tokens_past_the_end_are_not_counted() -> None:
    """A draft that always agrees, cut by EOS in the middle of a block."""
    model, guess = fakes(1.0, context=256)
    free = phase2.generate(model, [[1]], phase2.SamplingParams(max_new_tokens=12))[0].tokens
    ends_at = next(i for i in range(5, 9) if free.index(free[i]) == i)  # inside the second block of five
    ending = phase2.Ending((free[ends_at],))
    (sequence,), steps = speculate(model, guess, [[1]], phase2.SamplingParams(max_new_tokens=40), ending, 4)
    assert sequence.tokens == free[: ends_at + 1]
    last = steps[-1].stats[0]
    assert last.proposed == last.accepted == last.emitted == ends_at - 4


def test_a_fakes_agreement_is_its_acceptance() -> None:
    for temperature in (0.0, 1.0):
        model, guess = fakes(0.7, context=2048)
        params = phase2.SamplingParams(temperature=temperature, max_new_tokens=300, seed=1)
        _, steps = speculate(model, guess, [[1], [2], [3]], params, phase2.Ending(), 1)
        stats = [s for step in steps for s in step.stats]
        rate = sum(s.accepted for s in stats) / sum(s.proposed for s in stats)
        # Greedy text of a toy soon loops and visits few contexts, so its rate says less.
        assert abs(rate - 0.7) < (0.05 if temperature else 0.3)


def test_a_fake_is_the_same_everywhere() -> None:
    logits = phase2.FakeModel(7, 64).logits(torch.tensor([[[5]]]))[0, 0]
    possible = logits.isfinite()
    assert possible.sum() == 4
    assert logits[possible].softmax(0).max() > 0.4
    disagreeing = phase2.FakeModel(7, 64, agreement=0.0).logits(torch.tensor([[[5]]]))[0, 0]
    assert torch.equal(disagreeing.isfinite(), ~possible)


def test_sampled_tokens_follow_the_exact_probabilities(target: Any, draft: Any) -> None:
    """Chi-square on the first three sampled tokens, against conditional probabilities of the plain model."""
    from scipy.stats import chisquare

    prompt = target.tokenizer.encode("import os\nimport ")
    params = phase2.SamplingParams(temperature=1.0, top_k=8, max_new_tokens=3, seed=9)
    runs = 600
    sequences, _ = speculate(target.model, draft.model, [prompt] * runs, params, target.ending, 2, list(range(runs)))
    for position in range(3):
        expected: dict[int, float] = {}
        observed: dict[int, int] = {}
        for start in {tuple(s.tokens[:position]) for s in sequences}:
            logits = target.model.logits(target.model.hidden(torch.tensor([[*prompt, *start]])))[:, -1]
            here = [s for s in sequences if tuple(s.tokens[:position]) == start and len(s.tokens) > position]
            for token, p in enumerate(phase2.probabilities(logits, [params])[0].tolist()):
                expected[token] = expected.get(token, 0.0) + p * len(here)
            for sequence in here:
                observed[sequence.tokens[position]] = observed.get(sequence.tokens[position], 0) + 1
        common = [token for token, count in expected.items() if count >= 5]
        rare = [token for token in expected if token not in common]
        counts = [observed.get(t, 0) for t in common] + [sum(observed.get(t, 0) for t in rare)]
        wanted = [expected[t] for t in common] + [sum(expected[t] for t in rare)]
        if wanted[-1] < 1e-9:
            assert counts.pop() == 0
            wanted.pop()
        assert len(counts) > 1
        scale = sum(counts) / sum(wanted)
        assert chisquare(counts, [w * scale for w in wanted]).pvalue > 1e-4


@pytest.mark.about("engine/pair.py, check_pair")
def test_two_vocabularies_do_not_go_together(make_checkpoint: Callable[..., Path]) -> None:
    small = make_checkpoint("llama")
    options = phase2.Options(model="stdlib-10m", draft=str(small))
    with pytest.raises(UserError, match=r"must share a vocabulary; token \d+ is '.*' and '.*'$"):
        phase2.LLM(options)


@pytest.mark.about("engine/pair.py, check_pair")
def test_a_draft_with_a_shorter_context_is_noted(
    make_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_checkpoint("llama")
    draft = make_checkpoint("llama", max_position_embeddings=32)
    llm = phase2.LLM(phase2.Options(model=str(target), draft=str(draft), max_tokens=60))
    assert "32" in capsys.readouterr().err
    plain = phase2.LLM(phase2.Options(model=str(target), draft="none", max_tokens=60))
    assert llm.generate(["import os"])[0].tokens == plain.generate(["import os"])[0].tokens
