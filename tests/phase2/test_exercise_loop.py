"""The loop step by step: a target that counts (after 0 comes 1, then 2, ...), and given drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import phase2
from phase2.speculative import block_width, speculative_step, target_logits

SIZE = 6
COUNTING = torch.eye(SIZE, dtype=torch.float64).roll(1, dims=1) * 4  # logits by last token: the next number leads by 4


class Given:
    """A drafter that proposes given tokens, one row a sequence, and records its calls."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.asked, self.told = rows, list[int](), list[list[int]]()

    def propose(self, sequences: list[Any], k: int) -> phase2.Draft:
        self.asked.append(k)
        return phase2.Draft(torch.tensor([row[:k] for row in self.rows], dtype=torch.long), None)

    def observe(self, accepted: list[int]) -> None:
        self.told.append(accepted)


@pytest.mark.about("engine/speculative.py, block_width")
@pytest.mark.parametrize(
    ("length", "done", "limit", "k", "context", "expected"),
    [
        (5, 0, 60, 4, 64, 4),
        (5, 0, 3, 4, 64, 2),  # of three tokens two can be drafted: one always comes after them
        (5, 2, 3, 4, 64, 0),
        (5, 0, 60, 4, 8, 3),  # at 9 tokens the window of 8 jumps
        (8, 0, 60, 4, 8, 0),
        (9, 0, 60, 4, 8, 1),  # jumps of 2: at 9 and at 11
        (60, 2, 60, 8, 64, 2),
    ],
)
def test_how_many_tokens_to_draft(length: int, done: int, limit: int, k: int, context: int, expected: int) -> None:
    sequence = phase2.Sequence([1] * length, phase2.SamplingParams(max_new_tokens=limit), phase2.Ending())
    for token in range(done):
        sequence.append(token)
    inputs = f"prompt {length} tokens, output {done} of at most {limit}, k {k}, context {context}"
    assert block_width(sequence, k, context) == expected, inputs


class Summing(phase2.Transformer):
    """A model whose only logit is the sum of the tokens seen, up to each position. Counts its forwards."""

    def __init__(self, model: Any) -> None:
        torch.nn.Module.__init__(self)
        self.config, self.embedding, self.forwards = model.config, model.embedding, 0

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        self.forwards += 1
        sums = tokens.cumsum(1)
        return (sums if wanted is None else sums.gather(1, wanted))[..., None]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.double()


@pytest.mark.about("engine/speculative.py, target_logits")
@pytest.mark.parametrize(
    ("texts", "drafts", "sums"),
    [
        ([[1, 2]], [[10, 20]], [[3, 13, 33]]),
        ([[1, 2]], [[]], [[3]]),
        ([[1, 2], [5]], [[10], [10, 20]], [[3, 13, 13], [5, 15, 35]]),  # the shorter draft repeats its last position
        ([[1] * 8], [[10]], [[6, 16]]),  # sequence and draft are 9 tokens; a context of 8 shows the last 7
    ],
)
def test_one_forward_gives_what_follows_every_draft_token(
    proof: SimpleNamespace, texts: list[list[int]], drafts: list[list[int]], sums: list[list[int]]
) -> None:
    model = Summing(proof.TableModel(COUNTING, context=8))
    got = target_logits(model, texts, drafts)
    inputs = f"texts {texts}, drafts {drafts}, context 8; the logit is the sum of the tokens seen"
    assert got[..., 0].tolist() == sums, inputs
    assert model.forwards == 1, "forwards of the target"


def step(
    proof: SimpleNamespace, drafts: list[list[int]], k: int, eos: tuple[int, ...] = (), **settings: Any
) -> tuple[Any, list[Any], Given, str]:
    """Run one step for sequences that end in 0 (one for each draft), under a greedy target that counts."""
    params = phase2.SamplingParams(**settings)
    sequences = [phase2.Sequence([5, 0], params, phase2.Ending(eos), sample) for sample in range(len(drafts))]
    drafter = Given(drafts)
    done = speculative_step(proof.TableModel(COUNTING), drafter, sequences, k, phase2.GreedySource())
    return done, sequences, drafter, f"text [5, 0], drafts {drafts}, k {k}, eos {eos}, {settings or 'greedy'}"


stepping = pytest.mark.about("engine/speculative.py, speculative_step")
OUTCOMES = [
    # draft, eos, limit -> output, (k, proposed, accepted, emitted)
    ([1, 2, 3], (), 60, [1, 2, 3, 4], (3, 3, 3, 4)),
    ([1, 2, 5], (), 60, [1, 2, 3], (3, 3, 2, 3)),
    ([2, 2, 3], (), 60, [1], (3, 3, 0, 1)),
    ([1, 2, 3], (2,), 60, [1, 2], (3, 2, 2, 2)),  # tokens after the end count as neither proposed nor accepted
    ([1, 2, 5], (2,), 60, [1, 2], (3, 2, 2, 2)),  # the same if the text ends with the last accepted token
    ([1, 2, 5], (3,), 60, [1, 2, 3], (3, 3, 2, 3)),
    ([1, 2, 3], (), 3, [1, 2, 3], (2, 2, 2, 3)),
    ([1, 2, 3], (), 1, [1], (0, 0, 0, 1)),
]


@stepping
@pytest.mark.parametrize(("draft", "eos", "limit", "output", "counts"), OUTCOMES)
def test_a_step(
    proof: SimpleNamespace,
    draft: list[int],
    eos: tuple[int, ...],
    limit: int,
    output: list[int],
    counts: tuple[int, ...],
) -> None:
    done, (sequence,), drafter, inputs = step(proof, [draft], 3, eos, max_new_tokens=limit)
    stats = done.stats[0]
    assert sequence.tokens == output, inputs
    assert (stats.k, stats.proposed, stats.accepted, stats.emitted) == counts, (
        f"k, proposed, accepted, emitted: {inputs}"
    )
    assert drafter.asked == [counts[0]], f"the k that the drafter was asked for: {inputs}"


@stepping
def test_rows_advance_each_at_its_own_pace(proof: SimpleNamespace) -> None:
    done, sequences, drafter, inputs = step(proof, [[1, 2, 3], [1, 5, 3], [4, 2, 3]], 3)
    assert [sequence.tokens for sequence in sequences] == [[1, 2, 3, 4], [1, 2], [1]], inputs
    assert drafter.told == [[3, 1, 0]], f"what the drafter was told: {inputs}"
    assert done.starts == [0, 0, 0], f"the outputs' lengths before the step: {inputs}"


@stepping
def test_penalties_see_the_draft_up_to_each_position(proof: SimpleNamespace) -> None:
    """After 1 and 1 again, a second 1 has been penalised twice, as in plain decoding."""
    settings: dict[str, Any] = {"temperature": 1.0, "frequency_penalty": 2.0}
    done, _, _, inputs = step(proof, [[1, 1]], 2, **settings)
    params = phase2.SamplingParams(**settings)
    expected = [
        phase2.probabilities(COUNTING[last][None], [params], [[5, 0]], [output])[0].tolist()
        for last, output in [(0, []), (1, [1]), (1, [1, 1])]
    ]
    got = [[round(p, 6) for p in row] for row in done.target_probs[0].tolist()]
    assert got == [[round(p, 6) for p in row] for row in expected], inputs


@stepping
def test_every_text_has_its_own_parameters(proof: SimpleNamespace) -> None:
    """A greedy text, and one at temperature 1 with a penalty, in one step."""
    params = [phase2.SamplingParams(), phase2.SamplingParams(temperature=1.0, presence_penalty=2.0, top_k=3)]
    sequences = [phase2.Sequence([5, 0], mine, phase2.Ending()) for mine in params]
    done = speculative_step(proof.TableModel(COUNTING), Given([[1, 2]] * 2), sequences, 2, phase2.KeyedSource())
    for row, mine in enumerate(params):
        outputs: list[list[int]] = [[], [1], [1, 2]]
        expected = phase2.probabilities(COUNTING[[0, 1, 2]], [mine] * 3, [[5, 0]] * 3, outputs)
        assert torch.equal(done.target_probs[row], expected), f"text [5, 0], draft [1, 2], {mine}"
    assert sequences[0].tokens == [1, 2, 3]


decoding = pytest.mark.about("engine/speculative.py, speculative_decode")


@decoding
def test_a_batch_is_decoded_to_its_end(proof: SimpleNamespace) -> None:
    """With the counting model as its own draft every token is accepted; ended rows take no further part."""
    model, params = proof.TableModel(COUNTING), phase2.SamplingParams(max_new_tokens=7)
    sequences = [phase2.Sequence([start], params, phase2.Ending((4,))) for start in (0, 4)]
    drafter = phase2.ModelDrafter(model, phase2.GreedySource())
    steps = list(phase2.speculative_decode(model, drafter, sequences, 2))
    inputs = "texts [0] and [4], k 2, eos 4, at most 7 tokens"
    assert [sequence.tokens for sequence in sequences] == [[1, 2, 3, 4], [5, 0, 1, 2, 3, 4]], inputs
    assert [len(step.sequences) for step in steps] == [2, 2], f"how many rows took part in each step: {inputs}"
    assert [sequence.finish_reason for sequence in sequences] == ["eos", "eos"], inputs


@decoding
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_its_own_decisions_are_keyed_by_the_seed(proof: SimpleNamespace, temperature: float) -> None:
    target, draft = proof.tables(5, seed=3)
    params = phase2.SamplingParams(temperature=temperature, max_new_tokens=20, seed=6)
    outputs = []
    for source in (None, phase2.KeyedSource() if temperature else phase2.GreedySource()):
        sequence = phase2.Sequence([1], params, phase2.Ending())
        drafter = phase2.ModelDrafter(draft, phase2.KeyedSource() if temperature else phase2.GreedySource())
        for _ in phase2.speculative_decode(target, drafter, [sequence], 3, source):
            pass
        outputs.append(sequence.tokens)
    assert outputs[0] == outputs[1], f"temperature {temperature}, seed 6, source None and given"
