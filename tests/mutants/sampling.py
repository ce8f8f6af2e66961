"""Phase 1: from logits to a token."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

MUTANTS = mutants(
    "phase-1-baseline/engine/sampling.py",
    ("tests/every_phase/test_sampling.py", "-k", "phase1 or equal_logits or valid_setting"),
    ("dropped = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p", "dropped = ascending.softmax(-1).cumsum(-1) < 1 - params.top_p"),
    ("dropped[..., -1] = False  # the most likely token is always kept", "pass"),
    ("logits.sort(dim=-1, descending=True, stable=True))\n", "logits.sort(dim=-1, descending=False, stable=True))\n"),
    ("(each.flip(-1) for each in logits.sort(dim=-1, descending=True, stable=True))", "(each for each in logits.sort(dim=-1, stable=True))"),
    ("unlikely = probs < params.min_p", "unlikely = probs <= params.min_p"),
    ("params.min_p * probs.amax(-1, keepdim=True)", "params.min_p"),
    ("logits.masked_fill(unlikely, float(\"-inf\")).softmax(-1)", "probs.masked_fill(unlikely, 0.0)"),
    ("if 0 < params.top_k < logits.shape[-1]:", "if 1 < params.top_k < logits.shape[-1]:"),
    ("logits = logits / params.temperature", "logits = logits * params.temperature"),
    ("equal.cumsum(-1) <= count - above", "equal.cumsum(-1) < count - above"),
    ("equal.cumsum(-1) <= count - above", "equal.flip(-1).cumsum(-1).flip(-1) <= count - above"),
    ("above, equal = scores > least, scores == least", "above, equal = scores >= least, scores == least"),
    ("scores.gather(-1, ids).sort(dim=-1, descending=True, stable=True)", "scores.gather(-1, ids).sort(dim=-1, descending=False, stable=True)"),
    ("torch.where(values > 0, values / params.repetition_penalty", "torch.where(values < 0, values / params.repetition_penalty"),
    ("seen = torch.tensor(sorted({*prompt, *output})", "seen = torch.tensor(sorted({*output})"),
    ("params.presence_penalty + params.frequency_penalty * times", "params.presence_penalty * times + params.frequency_penalty"),
    ("counts = Counter(output)", "counts = Counter([*prompt, *output])"),
    ("logits = logits.clone()", "pass"),
    ("return (probs.log() + noise).argmax(-1)", "return (probs + noise).argmax(-1)"),
    ("philox.gumbel(self.seed, samples, positions, purpose, probs.shape[-1])", "philox.gumbel(self.seed, positions, positions, purpose, probs.shape[-1])"),
    ("philox.gumbel(self.seed, samples, positions, purpose, probs.shape[-1])", "philox.gumbel(self.seed, samples, samples, purpose, probs.shape[-1])"),
    ("return self.temperature < COLDEST", "return self.temperature == 0"),
    ("if not bool(logits.amax(-1).isfinite().all())", "if not bool(logits.amax().isfinite())"),
    (
        "seen = torch.tensor(sorted({*prompt, *output})",
        "seen = torch.tensor(list({*prompt, *output})",
        "each token is scaled by itself, so their order does not matter",
    ),
    (
        "if 0 < params.top_k < logits.shape[-1]:",
        "if 0 < params.top_k <= logits.shape[-1]:",
        "k equals the number of tokens: none is masked",
    ),
    (
        "if params.top_p < 1:",
        "if params.top_p <= 1:",
        "at top_p = 1 only tokens of probability 0 would be dropped",
    ),
)  # fmt: skip
