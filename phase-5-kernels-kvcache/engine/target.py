"""The one target forward of a step: what the target says after each text and after each of its draft tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import visible, window_start
from .model import Masks, Transformer
from .shapes import padded_length
from .tree import Tree


@dataclass(frozen=True)
class Target:
    """Column 0 stands after the text itself, column 1 + i after draft token i."""

    logits: Tensor  # [R, K+1, V]
    states: Tensor | list[Tensor] | None  # [R, W, F] or R of [W, F]: hidden states, tapped layers beside them
    columns: list[list[int]]  # for each row, where in `states` its positions are: those asked for, then the draft

    def states_of(self, row: int, nodes: list[int], draft: int) -> Tensor:
        """[n, F]: the positions of the text that were asked for, then the given ones of `draft` draft tokens."""
        assert self.states is not None, "the drafter did not ask for states"
        columns = self.columns[row]
        text = columns[: len(columns) - draft]
        return self.states[row][text + [columns[len(text) + node] for node in nodes]]


@torch.inference_mode()
def target_forward(
    model: Transformer,
    texts: list[list[int]],
    drafts: list[Tree],
    known: list[int] | None = None,
    taps: tuple[int, ...] = (),
) -> Target:
    """One forward over all rows, right-padded; shorter rows repeat their last position.

    `known[r]` is the first position of text r whose states are wanted besides the draft's; None where none are.
    """
    device, context = model.embedding.weight.device, model.config.context
    starts = [window_start(len(text) + draft.depth, context) for text, draft in zip(texts, drafts, strict=True)]
    windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
    longest = padded_length(
        max(len(window) + len(draft.tokens) for window, draft in zip(windows, drafts, strict=True)), model
    )
    rows = [window + draft.tokens for window, draft in zip(windows, drafts, strict=True)]
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)

    asked = []  # positions within each window: the states that are wanted, the text's last, and the draft
    for row, (window, start) in enumerate(zip(windows, starts, strict=True)):
        first = len(window) - 1 if known is None else min(max(known[row] - start, 0), len(window) - 1)
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
    at = hidden if known is None else hidden[torch.arange(len(texts), device=device)[:, None], read]
    states = None if known is None else hidden if tapped is None else torch.cat((hidden, tapped), -1)
    return Target(model.logits(at), states, [list(range(len(row))) for row in asked])


def tree_layout(model: Transformer, lengths: list[int], drafts: list[Tree], longest: int) -> tuple[Tensor, Masks]:
    """Positions [R, T] and masks [R, T, T] of texts with trees behind them: a node sees the text and its ancestors."""
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


def of_similar_length(lengths: list[int], forward: int = 64) -> list[list[int]]:
    """Row numbers in groups whose padding is at most a quarter of their real size, plus `forward` tokens.

    A padded position costs as much as a real one, and without a cache a forward is bound by arithmetic: long and short
    rows had better not share one. But a forward of its own has a fixed cost as well, about that of 64 tokens on a CPU.
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
def next_logits(model: Transformer, texts: list[list[int]]) -> Tensor:
    """Logits of the token that follows each text (token ids), [R, V]: a forward per group of similar length."""
    windows = [visible(text, model.config.context) for text in texts]
    device = model.embedding.weight.device
    groups = of_similar_length([len(window) for window in windows])
    parts = []
    for group in groups:
        longest = padded_length(len(windows[group[-1]]), model)
        padded = [windows[row] + [0] * (longest - len(windows[row])) for row in group]  # on the right
        last = torch.tensor([[len(windows[row]) - 1] for row in group], device=device)  # [G, 1]
        parts.append(model.logits(model.hidden(torch.tensor(padded, device=device), wanted=last)[:, 0]))
    if len(groups) == 1 and groups[0] == list(range(len(texts))):
        return parts[0]
    order = torch.tensor([row for group in groups for row in group], device=device)
    return torch.cat(parts)[order.argsort()]
