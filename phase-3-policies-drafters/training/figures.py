"""The figures of a card: what heads guess right on text that nobody trained on, and what that is worth in a draft."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.benchmark import progress
from common.philox import Purpose
from common.prompts import load_prompts
from engine.controllers import FixedController
from engine.drafters.eagle import EagleDrafter
from engine.drafters.heads import Heads, target_states
from engine.drafters.medusa import MedusaDrafter, MedusaHeads
from engine.drafting import Drafter
from engine.load import LoadedModel
from engine.policies import Rejection
from engine.sampling import SamplingParams
from engine.sequence import Sequence
from engine.speculative import decode
from engine.teacher_forced import teacher_forced_acceptance
from engine.verify import KeyedSource, RandomSource

from .features import features
from .loss import acceptance


def learned_drafter(heads: Heads, target: LoadedModel, source: RandomSource, noise: Purpose = Purpose.DRAFT) -> Drafter:
    if isinstance(heads, MedusaHeads):
        return MedusaDrafter(target.model, heads, source, noise)
    return EagleDrafter(target.model, heads, source, noise)


@torch.no_grad()
def text_figures(heads: Heads, target: LoadedModel, rows: Tensor, depths: int, table: Tensor) -> dict[str, Any]:
    """On given text int64 [R, W]: accuracy and acceptance by depth, and what the table of counts gets right.

    The table sees the token of the first depth's last input: for EAGLE the one just drawn, for Medusa the one before.
    """
    right, passed, survives, counted = [], [], [], []
    device = target.model.embedding.weight.device
    gap = 2 if isinstance(heads, MedusaHeads) else 1
    for row in rows.to(device).split(4):
        states = target_states(target, row, heads.taps)
        logits = target.model.logits(features(heads, target.model, row, states, depths)).float()
        probs = target.model.logits(states[..., : target.config.width]).float().softmax(-1)
        T = row.shape[1] - depths
        of_depth = [(logits[d, :, : T - 1].argmax(-1) == row[:, d + 2 : d + 1 + T]).float() for d in range(depths)]
        right.append(torch.stack(of_depth))
        both = acceptance(probs, logits, row)
        passed.append(both[0])
        survives.append(both[1])
        last = row[:, 2 - gap : 1 - gap + T]
        counted.append((table.to(device)[last] == row[:, 2 : 1 + T]).float())
    survival = torch.cat(survives, 1).mean((1, 2))
    return {
        "positions": sum(part[0].numel() for part in right),
        "accuracy": torch.cat(right, 1).mean((1, 2)).tolist(),
        "table_accuracy": float(torch.cat(counted).mean()),
        "acceptance": torch.cat(passed, 1).mean((1, 2)).tolist(),
        "survival": survival.tolist(),
        "tokens_per_forward": 1 + float(survival.sum()),
    }


def decoding_figures(heads: Heads, target: LoadedModel, prompts: int, k: int, length: int, seed: int) -> dict[str, Any]:
    """Tokens per target forward of chains at temperature 1, on the prompts of the `test` half.

    forced: on the true continuation; sampled: on the target's own, whose first step has no states to draft from.
    """
    policy, suite = Rejection(), load_prompts("code", "test")[:prompts]
    accepted: list[int] = []
    emitted = forwards = 0
    with progress("tokens per target forward", 2 * len(suite)) as step:
        for number, prompt in enumerate(suite):
            params = SamplingParams(temperature=1.0, seed=seed + number, max_new_tokens=length, ignore_eos=True)
            source = KeyedSource()
            text = target.tokenizer.encode(prompt.text)
            truth = target.tokenizer.encode(prompt.continuation)[: length - 1]
            drafter = learned_drafter(heads, target, source)
            accepted += teacher_forced_acceptance(target.model, drafter, text, truth, params, policy, k, source)
            step("forced")
            sequence = Sequence(text, params, target.ending)
            controller = partial(FixedController, k)
            for done in decode(target.model, drafter, [sequence], policy, controller, source):
                emitted, forwards = emitted + done.stats[0].emitted, forwards + 1
            step("sampled")
    return {
        "k": k,
        "prompts": len(suite),
        "forced_tokens_per_forward": 1 + sum(accepted) / len(accepted),
        "forced_survival": [sum(n >= d for n in accepted) / len(accepted) for d in range(1, k + 1)],
        "sampled_tokens_per_forward": emitted / forwards,
    }
