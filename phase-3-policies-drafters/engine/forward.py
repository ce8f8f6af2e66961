"""Logits of the token that follows each sequence of a batch, computed without a cache.

next_logits(loaded.model, [loaded.tokenizer.encode("from pathlib import")]).argmax(-1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .context import visible
from .model import Transformer


def of_similar_length(lengths: list[int], forward: int = 64) -> list[list[int]]:
    """Group row numbers; a group's padding is at most a quarter of its real tokens, plus `forward` tokens.

    A padded position costs as much as a real one, and without a cache a forward is bound by arithmetic: long and short
    rows should not share one. But a forward of its own has a fixed cost as well, about that of 64 tokens on a CPU.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        joined = [*groups[-1], row] if groups else []
        real = sum(lengths[r] for r in joined)
        if joined and lengths[row] * len(joined) - real <= real // 4 + forward:
            groups[-1] = joined
        else:
            groups.append([row])
    return groups


@torch.inference_mode()
def next_logits(model: Transformer, token_ids: list[list[int]]) -> Tensor:
    """Compute the logits of the token that follows each row, [R, V]: a forward per group of similar length."""
    windows = [visible(ids, model.config.context) for ids in token_ids]
    device = model.embedding.weight.device
    groups = of_similar_length([len(window) for window in windows])
    parts = []
    for group in groups:
        longest = len(windows[group[-1]])
        padded = [windows[row] + [0] * (longest - len(windows[row])) for row in group]  # on the right
        last = torch.tensor([[len(windows[row]) - 1] for row in group], device=device)  # [G, 1]
        parts.append(model.logits(model.hidden(torch.tensor(padded, device=device), wanted=last)[:, 0]))
    if len(groups) == 1 and groups[0] == list(range(len(token_ids))):
        return parts[0]
    order = torch.tensor([row for group in groups for row in group], device=device)
    return torch.cat(parts)[order.argsort()]
