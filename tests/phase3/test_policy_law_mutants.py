"""Mutants that the enumeration catches, and one that some policies tolerate.

Each mutant is the engine with a piece of its source replaced; a test fails if its piece is missing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import phase3

pytestmark = pytest.mark.no_exercise
EXACT, SEEN = 1e-12, 1e-3


def distance(
    proof: Any,
    policy: Any,
    top_k: int = 0,
    chains: Any = None,
    loop: Any = None,
    tokens: int = 3,
) -> float:
    """Compute the output's distance from the target, with confident drafts of up to two tokens and given mutants."""
    target, draft = proof.tables(3, seed=11)
    params = phase3.SamplingParams(temperature=1.0, top_k=top_k, frequency_penalty=1.0, max_new_tokens=tokens)
    parts = proof.mutated("drafters.model", **({"ChainBuilder": chains.ChainBuilder} if chains else {}))
    controller = partial(phase3.ConfidenceController, phase3.Bounds(1, 2), 0.6)
    law = proof.law(target, proof.model_drafter(draft, parts), params, [1], policy, controller, loop=loop)
    return float(proof.total_variation(law, proof.plain_law(target, params, [1])))


DROPS_A_DRAWN_TOKEN = (
    "if self.stop is not None and self.stop(row, asked[0]):",
    "drawn = int(self.source.draw(probs, torch.tensor([sequence.key]), "
    "torch.tensor([sequence.length + len(self.tokens[row])]), self.noise))\n"
    "        if self.stop is not None and self.stop(row, asked[0, [drawn]]):",
)
MUTANTS: dict[str, tuple[str, tuple[str, str]]] = {
    "confidence drops a token that is drawn already": ("drafters.chains", DROPS_A_DRAWN_TOKEN),
    "unfiltered draft_probs": (
        "drafters.chains",
        ("self.probs[row].append(probs[0])", "self.probs[row].append(logits.softmax(-1))"),
    ),
    "argmax draft with soft draft_probs": (
        "drafters.chains",
        ("self.source.draw(probs, key, at, self.noise)", "probs.argmax(-1)"),
    ),
    "penalties blind to the draft": (
        "speculative",
        ("before = outputs_before(sequence.tokens, tree)", "before = [sequence.tokens] * (len(tree.tokens) + 1)"),
    ),
    "drawn from the target, not the residual": (
        "verify",
        ("torch.where(mass > 0, residual / mass, following[cut])", "following[cut]"),
    ),
    "the residual drawn with the draft's noise": ("verify", ("Purpose.RESIDUAL", "Purpose.DRAFT")),
    "the residual drawn with the noise that decided": ("verify", ("Purpose.RESIDUAL", "Purpose.ACCEPT")),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_proof_catches_this_mutant(proof: Any, name: str) -> None:
    where, change = MUTANTS[name]
    mutant = proof.mutated(where, change)
    policy, parts = phase3.make_policy("rejection"), {}
    if where == "verify":
        policy = proof.mutated("policies", verify=mutant.verify).make_policy("rejection")
    else:
        parts = {{"drafters.chains": "chains", "speculative": "loop"}[where]: mutant}
    top_k = 2 if "unfiltered" in name else 0
    assert distance(proof, phase3.make_policy("rejection"), top_k) < EXACT
    assert distance(proof, policy, top_k, **parts) > SEEN


@pytest.mark.parametrize("name", ["longest_prefix", "coupled"])
def test_own_choices_do_not_care_how_a_draft_was_chosen(proof: Any, name: Any) -> None:
    """Dropping drawn tokens selects drafts with a bias, which does not change the target's own draws."""
    chains = proof.mutated("drafters.chains", DROPS_A_DRAWN_TOKEN)
    assert distance(proof, phase3.make_policy(name), chains=chains) < EXACT


OWN_CHOICE_MUTANTS = {
    "draws once more after a rejection": (
        "return Verdict(accepted, own, ratios)",
        "again = source.draw(target.probs[:, int(accepted)], keys, positions + accepted, Purpose.RESIDUAL)\n"
        "        return Verdict(accepted, torch.where(accepted < widths, again, own), ratios)",
    ),
    "looks at what follows the draft token": (
        "target.probs[active, column]",
        "target.probs[active, min(column + 1, K)]",
    ),
    "draws the bonus from the distribution before": (
        "target.probs[active, column]",
        "target.probs[active, min(column, max(K - 1, 0))]",
    ),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("mutant", list(OWN_CHOICE_MUTANTS))
@pytest.mark.parametrize("name", ["longest_prefix", "coupled"])
def test_the_proof_catches_a_broken_own_choice(proof: Any, name: str, mutant: str) -> None:
    policies = proof.mutated("policies", OWN_CHOICE_MUTANTS[mutant])
    assert distance(proof, policies.make_policy(name), tokens=2) > SEEN


class Nosy(phase3.ConfidenceController):
    """Drafts nothing after a draft that reached three tokens."""

    reached = 0

    def next_k(self) -> int:
        return 0 if self.reached == 3 else super().next_k()

    def observe(self, step: Any) -> None:
        self.reached = step.depth


def test_what_a_confident_draft_reached_must_not_steer_the_next_one(proof: Any) -> None:
    """A draft's length depends on tokens after the first rejected one, whose noise the next draft uses again."""
    target, draft = proof.tables(2, seed=4)
    params = phase3.SamplingParams(temperature=1.0, max_new_tokens=4)
    distances = []
    for kind in (Nosy, phase3.ConfidenceController):
        policy, controller = phase3.make_policy("rejection"), partial(kind, phase3.Bounds(1, 3), 0.6)
        law = proof.law(target, proof.model_drafter(draft), params, [1], policy, controller)
        distances.append(proof.total_variation(law, proof.plain_law(target, params, [1])))
    assert distances[0] > SEEN
    assert distances[1] < EXACT
