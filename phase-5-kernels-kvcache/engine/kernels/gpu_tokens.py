"""The ops that choose tokens, for every GPU backend: checks and prepares the arguments, then launches a kernel.

python -c "from engine.kernels.gpu_tokens import TokenOps; print(TokenOps.verify_greedy.__doc__)"
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from ..sampling import KeyedSampler, Sampler, SamplingParams, penalise
from ..verify import GreedySource, RandomSource, Verdict
from .arguments import floating, of_dtype, require, rows_of, same_shape
from .launches import GpuBackend


class TokenOps(GpuBackend):
    """The acceptance rule and the next token, with the arguments and results of their references."""

    def verify_prefix(self, draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> Tensor:
        """Return how many leading draft_tokens [R, K] equal the target's choices [R, K+1]: int64 [R]."""
        return self._count("verify_prefix", draft_tokens, choices, widths)[0]

    def verify_greedy(self, draft_tokens: Tensor, scores: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same with the argmax of scores [R, K+1, V]; return the counts and the next tokens, both int64 [R]."""
        op = "verify_greedy"
        return self._count(op, draft_tokens, self._choices(op, scores), widths)

    def _choices(self, op: str, scores: Tensor) -> Tensor:
        """Return the argmax of each row of scores [..., V]: int64 [...]. Ties: the lowest index."""
        op = self._checked(op, scores=scores)
        floating(op, scores=scores)
        require(op, scores.shape[-1] > 0, "there are no scores", "a vocabulary")
        out = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
        self.launch.choices(rows_of(scores), out)
        return out

    def _count(self, op: str, draft_tokens: Tensor, choices: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of accepted tokens of each row, and the next token."""
        op = self._checked(op, draft_tokens=draft_tokens, choices=choices, widths=widths)
        R, K = draft_tokens.shape
        same_shape(op, "choices", choices, R, K + 1)
        same_shape(op, "widths", widths, R)
        of_dtype(op, torch.int64, draft_tokens=draft_tokens, choices=choices, widths=widths)
        accepted, following = widths.new_empty(2, R)
        self.launch.prefix(
            (draft_tokens.contiguous(), choices.contiguous(), widths.contiguous()), (accepted, following)
        )
        return accepted, following

    def verify_sample(
        self,
        draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        widths: Tensor,
        keys: Tensor,
        positions: Tensor,
        source: RandomSource,
    ) -> Verdict:
        """Apply the acceptance rule, as verify() does.

        draft_tokens int64 [R, K], draft_probs float32 [R, K, V] or None for one-hot, target_probs float32 [R, K+1, V],
        widths, positions int64 [R], keys int64 [R, 2]. UserError for a source that is neither keyed nor greedy.
        """
        op = self._checked(
            "verify_sample", draft_tokens=draft_tokens, draft_probs=draft_probs, target_probs=target_probs,
            widths=widths, keys=keys, positions=positions,
        )  # fmt: skip
        random, (R, K), V = is_keyed(op, source), draft_tokens.shape, target_probs.shape[-1]
        same_shape(op, "target_probs", target_probs, R, K + 1, V)
        if draft_probs is not None:
            same_shape(op, "draft_probs", draft_probs, R, K, V)
            draft_probs = draft_probs.contiguous()
        of_dtype(op, torch.float32, target_probs=target_probs, draft_probs=draft_probs)
        of_dtype(op, torch.int64, draft_tokens=draft_tokens, widths=widths)
        (accepted, following), ratios = widths.new_empty(2, R), target_probs.new_empty(R, K)
        dense = draft_tokens.contiguous(), draft_probs, target_probs.contiguous(), widths.contiguous()
        self.launch.verify((*dense, keyed(keys, positions)), random, (accepted, following, ratios))
        return Verdict(accepted, following, ratios)

    def sample(
        self,
        logits: Tensor,
        params: Rows[SamplingParams],
        sampler: Sampler,
        keys: Rows[tuple[int, int]],
        positions: Rows[int],
        prompts: Rows[Rows[int]],
        outputs: Rows[Rows[int]],
    ) -> list[int]:
        """Choose the next token of every row of logits [R, V], as choose() does. UserError without a keyed sampler."""
        op = self._checked("sample", logits=logits)
        floating(op, logits=logits)
        require(op, len(params) == len(logits), f"{len(params)} parameters", f"{len(logits)}, one for each row")
        if any(mine.penalised for mine in params):
            logits = penalise(logits.float(), params, prompts, outputs)
        if all(mine.greedy for mine in params):
            return self._choices("sample", logits).tolist()
        require(op, is_keyed(op, sampler), "a temperature above 0 and a greedy source", "a keyed one")
        rows, device = rows_of(logits), logits.device
        require(op, rows.shape[1] > 0, "there are no scores", "a vocabulary")
        positions_, seeds = (torch.tensor(each, dtype=torch.int64, device=device) for each in (positions, keys))
        out = torch.empty(len(rows), dtype=torch.int64, device=device)
        self.launch.sample(rows, keyed(seeds, positions_), [mine.filters for mine in params], out)
        return out.tolist()


def is_keyed(op: str, source: object) -> bool:
    """Return True for a keyed source, False for a greedy one. UserError for other sources."""
    if isinstance(source, GreedySource):
        return False
    require(op, isinstance(source, KeyedSampler), f"a source of type {type(source).__name__}", "a keyed or greedy one")
    return True


def keyed(keys: Tensor, positions: Tensor) -> Tensor:
    """Return the kernels' keys, int64 [R, 4], from (seed, sample): sample, low and high half of the seed, position."""
    seed, sample = keys.unbind(1)
    return torch.stack((sample, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, positions), 1)
