"""Phase 2: the acceptance rule, its loop and its drafter; phase 3: the random numbers of trees."""
# ruff: noqa: E501

from __future__ import annotations

from tests.support.mutants import mutants

LAW = ("tests/every_phase/test_keys.py", "tests/every_phase/test_keyed_laws.py", "tests/phase2/test_lossless.py")
RULE = (*LAW, "-k", "not phase1 and not phase3 and not phase4 and not phase5")
LOOP = (
    "tests/every_phase/test_keys.py",
    "tests/phase2/test_exercise_loop.py",
    "tests/phase2/test_speculative.py",
    "tests/phase2/test_lossless.py",
    *RULE[-2:],
)
TREES = (*LAW[:2], "-k", "phase3")

VERIFY = mutants(
    "phase-2-specdec/engine/verify.py",
    RULE,
    # Keys: a number used twice, or one that is not in the table.
    ("positions[cut] + first, Purpose.RESIDUAL)", "positions[cut] + first, Purpose.ACCEPT)"),
    ("positions[cut] + first, Purpose.RESIDUAL)", "positions[cut] + first, Purpose.DRAFT)"),
    ("positions[cut] + first, Purpose.RESIDUAL)", "positions[cut], Purpose.RESIDUAL)"),
    ("positions[cut] + first, Purpose.RESIDUAL)", "positions[cut] + first + 1, Purpose.RESIDUAL)"),
    ("at = positions[full] + accepted[full]", "at = positions[full] + accepted[full] - 1"),
    ("at = positions[full] + accepted[full]", "at = positions[full]"),
    ("keys[full], at, Purpose.SAMPLE)", "keys[full], at, Purpose.RESIDUAL)"),
    ("positions[:, None] + columns)", "positions[:, None] + 0 * columns)"),
    ("positions[:, None] + columns)", "positions[:, None] + columns + 1)"),
    ("positions.reshape(-1), Purpose.ACCEPT, 1)", "positions.reshape(-1), Purpose.DRAFT, 1)"),
    ("uniforms(each[:, 0], each[:, 1]", "uniforms(each[:, 0], torch.zeros_like(each[:, 1])"),
    ("uniforms(each[:, 0], each[:, 1]", "uniforms(torch.zeros_like(each[:, 0]), each[:, 1]"),
    ("uniforms(keys[:, 0], keys[:, 1]", "uniforms(torch.zeros_like(keys[:, 0]), keys[:, 1]"),
    ("if purpose == Purpose.SAMPLE:", "if purpose != Purpose.DRAFT:"),
    # The rule.
    (".to(probability.dtype) < probability", ".to(probability.dtype) > probability"),
    ("uniform * cumulative[:, -1:], right=True)", "uniform, right=True)"),
    ("residual / mass, following[cut])", "residual, following[cut])"),
    ("residual = (following[cut] - draft_probs[cut, first]).clamp(min=0)", "residual = following[cut]"),
    ("residual = (following[cut] - draft_probs[cut, first]).clamp(min=0)", "residual = (following[cut] - draft_probs[cut, 0]).clamp(min=0)"),
    ("residual = following[cut].scatter(-1, draft_tokens[cut, first][:, None], 0.0)", "residual = following[cut]"),
    ("& (columns < widths[:, None])", "& (columns <= widths[:, None])"),
    ("accepted = passed.long().cumprod(dim=1).sum(dim=1)", "accepted = passed.long().sum(dim=1)"),
    ("rejected = accepted < widths", "rejected = accepted < K"),
    ("ratios = target_of\n", "ratios = torch.ones_like(target_of)\n"),
    ("return probability > 0.5", "return probability >= 0"),
    (
        "uniform * cumulative[:, -1:], right=True)",
        "uniform * cumulative[:, -1:], right=False)",
        "differs only if the number equals a running sum exactly, which 24 bits hardly ever do",
    ),
    (
        "[..., None])[..., 0]).clamp(max=1)",
        "[..., None])[..., 0])",
        "numbers are below 1, so below every ratio above 1; only the recorded ratio is larger",
    ),
)  # fmt: skip

DRAFTING = mutants(
    "phase-2-specdec/engine/drafting.py",
    ("tests/phase2/test_exercise.py", *RULE),
    ("(lengths + j).to(probs.device), Purpose.DRAFT", "lengths.to(probs.device), Purpose.DRAFT"),
    ("(lengths + j).to(probs.device), Purpose.DRAFT", "(lengths + j).to(probs.device), Purpose.SAMPLE"),
    ("(lengths + j).to(probs.device), Purpose.DRAFT", "(lengths + j).to(probs.device), Purpose.ACCEPT"),
    ("keys.to(probs.device), (lengths", "(keys * torch.tensor([1, 0])).to(probs.device), (lengths"),
    ("keys.to(probs.device), (lengths", "(keys * torch.tensor([0, 1])).to(probs.device), (lengths"),
    ("params = [sequence.params for sequence in sequences]", "params = [sequences[0].params] * len(sequences)"),
    ("all(mine.greedy for mine in params)", "any(mine.greedy for mine in params)"),
    ("[p + o for p, o in zip(prompts, outputs, strict=True)]", "[p for p, o in zip(prompts, outputs, strict=True)]"),
    ("torch.stack(used, dim=1)", "torch.stack(used[:1] * len(used), dim=1)"),
)  # fmt: skip

SPECULATIVE = mutants(
    "phase-2-specdec/engine/speculative.py",
    LOOP,
    ("min(k, remaining - 1)", "min(k, remaining)"),
    ("window_start(length + width, context) != window_start(length, context)", "window_start(length + width, context) < 0"),
    ("torch.tensor([s.length for s in sequences], device=device)", "torch.tensor([len(s.tokens) for s in sequences], device=device)"),
    ("torch.tensor([s.key for s in sequences], device=device)", "torch.tensor([(s.key[0], 0) for s in sequences], device=device)"),
    ("params = [s.params for s in sequences for", "params = [sequences[0].params for s in sequences for"),
    ("len(window) - len(draft) - 1 + j", "len(window) - len(draft) + j"),
    ("outputs = [s.tokens + new[:j]", "outputs = [s.tokens + new[: j + 1]"),
    ("for token in [*new[:kept], following]:", "for token in [following, *new[:kept]]:"),
    ("proposed=emitted if cut else width", "proposed=width"),
    ("accepted=min(kept, emitted)", "accepted=kept"),
    ("cut = emitted <= kept", "cut = emitted < kept"),
)  # fmt: skip

SEVERAL = mutants(
    "phase-3-policies-drafters/engine/verify.py",
    TREES,
    ("return ranked(probs.log() + noise, count)", "return ranked(probs.log() + noise, count).flip(-1)"),
    ("return ranked(probs.log() + noise, count)", "return ranked(probs + noise, count)"),
    ("return ranked(probs.log() + noise, count)", "return ranked(probs.log(), count)"),
    ("noise = philox.gumbel(keys[:, 0], keys[:, 1], positions, purpose", "noise = philox.gumbel(keys[:, 0], keys[:, 1], positions, Purpose.SAMPLE"),
    ("noise = philox.gumbel(keys[:, 0],", "noise = philox.gumbel(torch.zeros_like(keys[:, 0]),"),
    ("Purpose.ACCEPT, trial + 1)[:, trial]", "Purpose.ACCEPT, 1)[:, 0]"),
    ("Purpose.ACCEPT, trial + 1)[:, trial]", "Purpose.ACCEPT, trial + 1)[:, 0]"),
    ("Purpose.ACCEPT, trial + 1)[:, trial]", "Purpose.RESIDUAL, trial + 1)[:, trial]"),
)  # fmt: skip

MUTANTS = [*VERIFY, *DRAFTING, *SPECULATIVE, *SEVERAL]
