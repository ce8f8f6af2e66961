"""The noise is Philox 4x32-10, bit for bit; it is uniform; and it depends only on its use."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from common.philox import Purpose, gumbel, philox4x32, uniforms, words

WORD = st.integers(0, 2**32 - 1)

# Random123, tests/kat_vectors: counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def from_hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute the paper's round, one word at a time, in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def row(sample: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([sample]), torch.tensor([position])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = from_hex(key)
    assert philox4x32(torch.tensor(from_hex(counter)), (k0, k1)).tolist() == from_hex(expected)


def test_known_answers_in_one_batch_with_a_key_each() -> None:
    counters, keys, expected = (torch.tensor([from_hex(line[i]) for line in KNOWN_ANSWERS]) for i in range(3))
    assert torch.equal(philox4x32(counters, keys), expected)
    every_pair = philox4x32(counters[:, None], keys)  # [3, 1, 4] with [3, 2] -> [3, 3, 4]
    assert every_pair.shape == (3, 3, 4)
    assert torch.equal(every_pair.diagonal().T, expected)


@settings(deadline=None)
@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_equals_the_scalar_implementation(counter: list[int], key: list[int]) -> None:
    expected = scalar_philox(counter, key)
    assert philox4x32(torch.tensor(counter), (key[0], key[1])).tolist() == expected
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    sample=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(-(2**63), 2**63 - 1),
    purpose=st.sampled_from(Purpose),
    count=st.integers(0, 21),
)
@example(seed=-1, sample=-1, position=2**32 - 1, purpose=Purpose.RESIDUAL, count=9)
@example(seed=2**64, sample=0, position=0, purpose=Purpose.SAMPLE, count=4)
def test_words_follow_the_documented_counter_for_any_seed(
    seed: int, sample: int, position: int, purpose: Purpose, count: int
) -> None:
    low, high = seed % 2**64 % 2**32, seed % 2**64 // 2**32
    blocks = [scalar_philox([b, position % 2**32, sample % 2**32, purpose], [low, high]) for b in range(6)]
    expected = list(itertools.chain(*blocks))[:count]
    assert words(seed, *row(sample, position), purpose, count).tolist() == [expected]


def test_a_row_does_not_depend_on_its_batch() -> None:
    samples, positions = torch.tensor([0, 3, 0, 7, 3]), torch.tensor([5, 5, 900, 0, 1023])
    for function in (words, uniforms, gumbel):
        batch = function(11, samples, positions, Purpose.DRAFT, 1003)
        for i in range(len(samples)):
            alone = function(11, samples[i : i + 1], positions[i : i + 1], Purpose.DRAFT, 1003)
            assert torch.equal(batch[i], alone[0])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 70), longer=st.integers(0, 70))
def test_asking_for_more_does_not_change_the_first_ones(count: int, longer: int) -> None:
    for function in (words, gumbel):
        few = function(5, *row(1, 2), Purpose.SAMPLE, count)
        many = function(5, *row(1, 2), Purpose.SAMPLE, count + longer)
        assert few.shape == (1, count)
        assert torch.equal(few, many[:, :count])


SEEDS = [0, 11, -1, 2**62, -(2**63), 2**32 + 11]


@pytest.mark.parametrize("count", [1, 5, 1003])
@pytest.mark.parametrize("few", [0, 10**6], ids=["torch", "plain Python"])
def test_rows_with_seeds_of_their_own(few: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the rows one by one, each with its seed as a number, whichever way either is computed."""
    samples, positions = torch.tensor([0, 3, 0, 7, 3, 3]), torch.tensor([5, 5, 900, 0, 1023, 5])
    for function in (words, uniforms, gumbel):
        alone = [
            function(seed, samples[i : i + 1], positions[i : i + 1], Purpose.RESIDUAL, count)[0]
            for i, seed in enumerate(SEEDS)
        ]
        with monkeypatch.context() as within:
            within.setattr("common.philox.FEW", few)
            together = function(torch.tensor(SEEDS), samples, positions, Purpose.RESIDUAL, count)
        assert torch.equal(together, torch.stack(alone))
    assert len({tuple(row) for row in together.tolist()}) == len(SEEDS)


def test_every_part_of_the_address_matters() -> None:
    seeds, samples, positions = (0, 1, 2**32, 2**63, -1), (0, 1, 2), (0, 1, 2)
    addresses = list(itertools.product(seeds, samples, positions, Purpose))
    drawn = {tuple(words(s, *row(n, p), purpose, 4)[0].tolist()) for s, n, p, purpose in addresses}
    assert len(drawn) == len(addresses)


def test_uniforms_are_the_exact_middles_of_their_cells() -> None:
    drawn = uniforms(3, *row(0, 0), Purpose.ACCEPT, 4096)
    upper = words(3, *row(0, 0), Purpose.ACCEPT, 4096) >> 9
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn.double(), (upper.double() + 0.5) / 2**23)  # float64 has bits to spare: nothing was rounded


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_extreme_words_stay_inside_the_open_interval(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.philox.words", lambda *_: torch.tensor([[word]]))
    drawn = uniforms(0, *row(0, 0), Purpose.SAMPLE, 1).item()
    noise = gumbel(0, *row(0, 0), Purpose.SAMPLE, 1).item()
    assert 0 < drawn < 1
    assert -2.82 < noise < 16.64


@pytest.mark.parametrize("purpose", Purpose)
def test_uniforms_are_uniform_along_tokens_positions_and_samples(purpose: Purpose) -> None:
    n = 20_000
    zeros, steps = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    for drawn in (
        uniforms(0, *row(0, 0), purpose, n)[0],
        uniforms(0, zeros, steps, purpose, 1)[:, 0],
        uniforms(0, steps, zeros, purpose, 1)[:, 0],
    ):
        assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
        cells = torch.bincount((drawn * 64).long(), minlength=64)
        assert stats.chisquare(cells.numpy()).pvalue > 1e-3
        pairs = torch.bincount((drawn[:-1] * 8).long() * 8 + (drawn[1:] * 8).long(), minlength=64)  # neighbours
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


def test_every_bit_of_the_words_is_a_fair_coin() -> None:
    n = 20_000
    drawn = words(1, *row(0, 0), Purpose.SAMPLE, n)[0]
    ones = (drawn[:, None] >> torch.arange(32) & 1).sum(0).double()
    assert ((ones - n / 2).abs() < 4.5 * math.sqrt(n) / 2).all()


def test_gumbel_max_samples_the_distribution() -> None:
    n, probabilities = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], dtype=torch.float64)
    noise = gumbel(0, torch.zeros(n, dtype=torch.int64), torch.arange(n), Purpose.SAMPLE, len(probabilities))
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    chosen = torch.bincount((probabilities.log() + noise).argmax(-1), minlength=len(probabilities))
    assert stats.chisquare(chosen.numpy(), (probabilities * n).numpy()).pvalue > 1e-3


def test_misshapen_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        words(0, torch.tensor([0]), torch.tensor([0, 1]), Purpose.SAMPLE, 4)
    with pytest.raises(ValueError, match="count"):
        words(0, *row(0, 0), Purpose.SAMPLE, -1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_bits_also_from_a_graph() -> None:
    sample, position = torch.tensor([0, 5]), torch.tensor([3, 2**31])
    on_card = sample.cuda(), position.cuda()
    expected = uniforms(9, sample, position, Purpose.SAMPLE, 4097)
    assert torch.equal(uniforms(9, *on_card, Purpose.SAMPLE, 4097).cpu(), expected)
    seeds = torch.tensor([9, -4], device="cuda")
    of_two = uniforms(seeds, *on_card, Purpose.SAMPLE, 4097).cpu()
    assert torch.equal(of_two, uniforms(seeds.cpu(), sample, position, Purpose.SAMPLE, 4097))
    assert torch.equal(of_two[0], expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = uniforms(9, *on_card, Purpose.SAMPLE, 4097)
    graph.replay()
    assert torch.equal(captured.cpu(), expected)
