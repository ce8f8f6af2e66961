"""The target forward of a step: logits after each sequence and after each of its draft tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import window_start
from .forward import next_logits
from .model import Masks, Transformer
from .steps import TargetOutput
from .tree import Tree


@torch.inference_mode()
def target_forward(
    model: Transformer,
    token_ids: list[list[int]],
    drafts: list[Tree],
    states_from: list[int] | None = None,
    taps: tuple[int, ...] = (),
) -> TargetOutput:
    """Run one forward over all rows, right-padded; shorter rows repeat their last position.

    states_from[r]: the first position of row r whose states are wanted, besides the draft's; None without states.
    Without drafts and states, rows of similar length share a forward.
    """
    if states_from is None and not any(draft.tokens for draft in drafts):
        return TargetOutput(next_logits(model, token_ids)[:, None])
    device, context = model.embedding.weight.device, model.config.context
    starts = [window_start(len(text) + draft.depth, context) for text, draft in zip(token_ids, drafts, strict=True)]
    windows = [text[start:] for text, start in zip(token_ids, starts, strict=True)]
    longest = max(len(window) + len(draft.tokens) for window, draft in zip(windows, drafts, strict=True))
    rows = [window + draft.tokens for window, draft in zip(windows, drafts, strict=True)]
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)

    asked = []  # positions within each window: the states that are wanted, the row's last token, and the draft
    for row, (window, start) in enumerate(zip(windows, starts, strict=True)):
        first = len(window) - 1 if states_from is None else min(max(states_from[row] - start, 0), len(window) - 1)
        asked.append(list(range(first, len(rows[row]))))
    width = max(map(len, asked))
    wanted = torch.tensor([row + row[-1:] * (width - len(row)) for row in asked], device=device)
    K = max(len(draft.tokens) for draft in drafts)
    read = torch.tensor(
        [
            [min(len(row) - len(draft.tokens) - 1 + j, len(row) - 1) for j in range(K + 1)]
            for row, draft in zip(asked, drafts, strict=True)
        ],
        device=device,
    )

    if all(draft.is_chain for draft in drafts):
        hidden, tapped = model.states(tokens, wanted=wanted, taps=taps)
    else:
        positions, masks = tree_layout(model, [len(window) for window in windows], drafts, longest)
        hidden, tapped = model.states(tokens, positions, wanted, masks, taps)
    at = hidden if states_from is None else hidden[torch.arange(len(token_ids), device=device)[:, None], read]
    if states_from is None:
        return TargetOutput(model.logits(at))
    states = hidden if tapped is None else torch.cat((hidden, tapped), -1)
    return TargetOutput(model.logits(at), [of_row[: len(row)] for of_row, row in zip(states, asked, strict=True)])


def tree_layout(model: Transformer, lengths: list[int], drafts: list[Tree], longest: int) -> tuple[Tensor, Masks]:
    """Return positions [R, T] and masks [R, T, T] of rows that end in trees: a node sees the row and its ancestors."""
    weight = model.embedding.weight
    within = torch.arange(longest, device=weight.device).clamp(max=model.config.context - 1)  # padding may lie past it
    positions = within.repeat(len(drafts), 1)
    causal = {window: model.mask(longest, weight, window) for window in set(model.config.windows)}
    masks = {window: mask.repeat(len(drafts), 1, 1) for window, mask in causal.items()}
    for row, (length, draft) in enumerate(zip(lengths, drafts, strict=True)):
        if not draft.tokens:
            continue
        end = length + len(draft.tokens)
        positions[row, length:end] = length - 1 + torch.tensor(draft.depths, device=weight.device)
        ancestors = draft.ancestors().to(weight.device)
        away = positions[row, length:end, None] - positions[row, :end]
        for window, mask in masks.items():
            sees = torch.cat((ancestors.new_ones(len(draft.tokens), length), ancestors), 1)
            if window is not None:
                sees &= away < window
            mask[row, length:end, :end] = torch.where(sees, 0.0, float("-inf")).to(mask)
    return positions, masks
