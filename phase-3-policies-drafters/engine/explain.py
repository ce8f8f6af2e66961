"""`--explain`: why speculation was faster here, or why not, from the costs and acceptances of this run.

With c = the cost of one draft token in target forwards, and s_j = the share of drafts whose first j tokens are all
accepted, a step gives 1 + s_1 + ... + s_K tokens and costs 1 + cK target forwards (plus the acceptance rule). If every
token were accepted with the same probability a, independently, that would be (1 - a^(K+1)) / ((1 - a)(cK + 1))
(Leviathan et al. 2023, Theorem 3.8).

Times are means, because a text takes the sum of its steps. The first step, which also reads the prompt, does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from common.benchmark import interleave, print_table, seconds

from .forward import next_logits
from .model import Transformer
from .sequence import Sequence
from .steps import StepStats


def survival(steps: list[StepStats], k: int) -> list[float]:
    """Return s_1 .. s_k: of the drafts of at least j tokens, the share whose first j tokens were all accepted."""
    shares = []
    for j in range(1, k + 1):
        tried = [step for step in steps if step.depth >= j]
        shares.append(sum(step.accepted >= j for step in tried) / len(tried) if tried else 0.0)
    return shares


def tokens_per_forward(shares: list[float], k: int) -> float:
    """Return the mean number of tokens that a step of k draft tokens gives."""
    return 1 + sum(shares[:k])


def textbook_speedup(a: float, c: float, k: int) -> float:
    """Compute (1 - a^(k+1)) / ((1 - a)(ck + 1)), with its limit (k + 1) / (ck + 1) at a = 1."""
    tokens = k + 1 if a >= 1 else (1 - a ** (k + 1)) / (1 - a)
    return tokens / (c * k + 1)


def smallest(good: Callable[[float], bool], steps: int = 1000) -> float | None:
    """Return the smallest share in [0, 1] for which `good` holds (`good` is monotone), or None."""
    return next((i / steps for i in range(steps + 1) if good(i / steps)), None)


@dataclass(frozen=True)
class Account:
    """The measured costs of a run, in milliseconds, and the speed-ups computed from them."""

    plain_ms: float  # one plain target step on the same sequence
    draft_ms: float  # one draft token
    verify_ms: float  # one verification
    accept_ms: float  # the acceptance rule, and appending the tokens
    shares: list[float]  # survival by position

    @property
    def k(self) -> int:
        return len(self.shares)

    def speedup(self, k: int) -> float:
        """Predict the speed-up for another k, from the measured survival of each position."""
        step = k * self.draft_ms + self.verify_ms + self.accept_ms
        return tokens_per_forward(self.shares, k) * self.plain_ms / step

    def break_even_acceptance(self) -> float | None:
        """Return the acceptance per token, equal at all positions, from which this k pays; None if none does."""
        step = self.k * self.draft_ms + self.verify_ms + self.accept_ms
        return smallest(lambda a: sum(a**j for j in range(self.k + 1)) * self.plain_ms >= step)


def plain_step_ms(model: Transformer, sequence: Sequence, repeats: int = 5) -> float:
    """Measure the mean time of a plain decoding step at the middle of this sequence."""
    text = sequence.prompt + sequence.tokens[: len(sequence.tokens) // 2]
    device = model.embedding.weight.device
    runs = interleave({"plain": lambda: next_logits(model, [text])}, repeats, warmup=2, device=device)["plain"]
    return fmean(seconds(runs)) * 1e3


def account(steps: list[StepStats], plain_ms: float) -> Account | None:
    """Compute the account; None if no step drafted a token."""
    drafted = [step for step in steps if step.depth > 0]
    if not drafted:
        return None
    k, later = max(step.depth for step in drafted), drafted[1:] or drafted
    return Account(
        plain_ms=plain_ms,
        draft_ms=sum(step.draft_ms for step in later) / sum(step.depth for step in later),
        verify_ms=fmean(step.verify_ms for step in later),
        accept_ms=fmean(step.accept_ms for step in later),
        shares=survival(steps, k),
    )


def verdict(costs: Account, measured: float) -> str:
    """Return one paragraph for people."""
    best = max(range(1, costs.k + 1), key=costs.speedup)
    threshold = costs.break_even_acceptance()
    need = (
        "no acceptance would make it pay" if threshold is None else f"it pays from an acceptance of {threshold:.2f} on"
    )
    tokens = tokens_per_forward(costs.shares, costs.k)
    outcome = "faster" if measured > 1.02 else "slower" if measured < 0.98 else "about as fast"
    change = f"{measured:.2f} times the speed of plain decoding" if outcome != "about as fast" else "no clear change"
    text = (
        f"Speculation was {outcome} here: {change}. A step gave {tokens:.2f} tokens for one verification "
        f"({costs.verify_ms:.1f} ms, where a plain step takes {costs.plain_ms:.1f} ms) and {costs.k} draft tokens of "
        f"{costs.draft_ms:.2f} ms ({costs.draft_ms / costs.plain_ms:.2f} plain steps each). With these costs {need}."
    )
    if best != costs.k:
        text += f" K = {best} should do better: {costs.speedup(best):.2f} predicted."
    if max(costs.speedup(k) for k in range(1, costs.k + 1)) < 1:
        text += (
            " No K up to this one pays: the draft is too slow or guesses too badly; decode without it (--draft none)."
        )
    return text


def print_explanation(costs: Account, measured: float) -> None:
    """Print the paragraph and the table on stderr, so that stdout holds only the text."""
    rows = [
        [k, costs.shares[k - 1], tokens_per_forward(costs.shares, k), costs.speedup(k)] for k in range(1, costs.k + 1)
    ]
    print_table(
        "By number of draft tokens",
        ["K", "first K accepted", "tokens per step", "predicted speed-up"],
        rows,
        file=sys.stderr,
    )
    print(verdict(costs, measured), file=sys.stderr)
