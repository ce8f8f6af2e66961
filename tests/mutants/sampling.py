"""Phase 1: from logits to a token."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

MUTANTS = mutants(
    "phase-1-baseline/engine/sampling.py",
    (
        "tests/every_phase/test_row_parameters.py",
        "tests/every_phase/test_sampling.py",
        "-k",
        "phase1 or equal_logits or valid_setting",
    ),
    ("dropped = ascending.softmax(-1).cumsum(-1) <= column(1 - p for p in top_p)", "dropped = ascending.softmax(-1).cumsum(-1) < column(1 - p for p in top_p)"),
    ("dropped[..., -1] = False  # the most likely token is always kept", "pass"),
    ("logits.sort(dim=-1, descending=True, stable=True))\n", "logits.sort(dim=-1, descending=False, stable=True))\n"),
    ("(each.flip(-1) for each in logits.sort(dim=-1, descending=True, stable=True))", "(each for each in logits.sort(dim=-1, stable=True))"),
    ("unlikely = probs < column(min_p)", "unlikely = probs <= column(min_p)"),
    ("column(min_p) * probs.amax(-1, keepdim=True)", "column(min_p)"),
    ("logits.masked_fill(unlikely, float(\"-inf\")).softmax(-1)", "probs.masked_fill(unlikely, 0.0)"),
    ("if any(0 < k < V for k in top_k):", "if any(1 < k < V for k in top_k):"),
    ("logits = logits / column(temperature)", "logits = logits * column(temperature)"),
    ("(1.0, 1, 1.0, 0.0) if self.greedy", "(1.0, 0, 1.0, 0.0) if self.greedy"),
    ("values.gather(-1, count - 1)", "values[..., -1:]"),
    ("counts = [min(k, V) or V for k in top_k]", "counts = [max(top_k) for k in top_k]"),
    ("equal.cumsum(-1) <= count - above", "equal.cumsum(-1) < count - above"),
    ("equal.cumsum(-1) <= count - above", "equal.flip(-1).cumsum(-1).flip(-1) <= count - above"),
    ("above, equal = scores > least, scores == least", "above, equal = scores >= least, scores == least"),
    ("scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)", "scores.gather(-1, ids).sort(dim=-1, descending=False, stable=True)"),
    ("torch.where(values > 0, values / mine.repetition_penalty", "torch.where(values < 0, values / mine.repetition_penalty"),
    ("seen = torch.tensor(sorted({*prompt, *output})", "seen = torch.tensor(sorted({*output})"),
    ("mine.presence_penalty + mine.frequency_penalty * times", "mine.presence_penalty * times + mine.frequency_penalty"),
    ("counts = Counter(output)", "counts = Counter([*prompt, *output])"),
    ("logits = logits.clone()", "pass"),
    ("return (probs.log() + noise).argmax(-1)", "return (probs + noise).argmax(-1)"),
    ("philox.gumbel(keys[:, 0], keys[:, 1], positions,", "philox.gumbel(keys[:, 0], positions, positions,"),
    ("philox.gumbel(keys[:, 0], keys[:, 1], positions,", "philox.gumbel(keys[:, 0], keys[:, 1], keys[:, 1],"),
    ("philox.gumbel(keys[:, 0], keys[:, 1], positions,", "philox.gumbel(torch.zeros_like(keys[:, 0]), keys[:, 1], positions,"),
    ("philox.gumbel(keys[:, 0], keys[:, 1], positions,", "philox.gumbel(int(keys[0, 0]), keys[:, 1], positions,"),
    ("return self.temperature < COLDEST", "return self.temperature == 0"),
    ("if not bool(logits.amax(-1).isfinite().all())", "if not bool(logits.amax().isfinite())"),
    (
        "seen = torch.tensor(sorted({*prompt, *output})",
        "seen = torch.tensor(list({*prompt, *output})",
        "each token is scaled by itself, so their order does not matter",
    ),
    (
        "if any(0 < k < V for k in top_k):",
        "if any(0 < k <= V for k in top_k):",
        "k equals the number of tokens: none is masked",
    ),
    (
        "if any(p < 1 for p in top_p):",
        "if any(p <= 1 for p in top_p):",
        "at top_p = 1 only tokens of probability 0 would be dropped",
    ),
)  # fmt: skip
