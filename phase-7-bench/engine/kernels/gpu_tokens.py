"""The ops that choose tokens, for every GPU backend: checks and prepares the arguments, then launches a kernel.

python -c "from engine.kernels.gpu_tokens import TokenOps; print(TokenOps.verify_greedy.__doc__)"
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.philox import Purpose

from ..sampling import KeyedSampler
from ..verify import GreedySource, RandomSource, Verdict
from .arguments import floating, of_dtype, require, rows_of, same_shape
from .launches import GpuBackend
from .tokens import SamplingMetadata


class TokenOps(GpuBackend):
    """The acceptance rule, tokens and the next inputs, with the arguments and results of their references."""

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
        of_dtype(op, torch.int64, draft_tokens=draft_tokens, widths=widths, keys=keys, positions=positions)
        (accepted, following), ratios = widths.new_empty(2, R), target_probs.new_empty(R, K)
        dense = draft_tokens.contiguous(), draft_probs, target_probs.contiguous(), widths.contiguous()
        where = keys.contiguous(), positions.contiguous()
        self.launch.verify((*dense, *where), random, (accepted, following, ratios))
        return Verdict(accepted, following, ratios)

    def sample(self, logits: Tensor, rows: SamplingMetadata, out: Tensor | None = None) -> Tensor:
        """Choose the next token after each row of logits [R, V]: int64 [R]. UserError without a keyed sampler."""
        op, R = "sample", len(logits)
        logits = rows.penalised(logits)
        if rows.greedy:
            tokens = self._choices(op, logits)
            return tokens if out is None else out.copy_(tokens)
        op = self._filtered(op, logits, rows)
        require(op, len(rows.params) == R, f"{len(rows.params)} parameters", f"{R}, one for each row")
        require(op, is_keyed(op, rows.source), "a temperature above 0 and a greedy source", "a keyed one")
        out = torch.empty(R, dtype=torch.int64, device=logits.device) if out is None else out
        self.launch.sample(rows_of(logits), rows, out)
        return out

    def probabilities(self, logits: Tensor, rows: SamplingMetadata, out: Tensor | None = None) -> Tensor:
        """Return the distributions float32 [N, V] after logits [N, V]; each sequence has N // R rows."""
        op = self._filtered("probabilities", logits, rows)
        out = torch.empty_like(logits, dtype=torch.float32) if out is None else out
        self.launch.probabilities(rows_of(rows.penalised(logits)), rows, self._each(op, logits, len(rows.params)), out)
        return out

    def draw(
        self,
        probs: Tensor,
        keys: Tensor,
        positions: Tensor,
        source: RandomSource,
        purpose: Purpose,
        first: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Draw one token from each row of probs float32 [N, V]: int64 [N]. UserError for other than a keyed source."""
        op = self._checked("draw", probs=probs, keys=keys, positions=positions)
        of_dtype(op, torch.float32, probs=probs)
        of_dtype(op, torch.int64, keys=keys, positions=positions)
        same_shape(op, "keys", keys, len(positions), 2)
        require(op, is_keyed(op, source), "a greedy source", "a keyed one")
        each = self._each(op, probs, len(positions))
        out = torch.empty(len(probs), dtype=torch.int64, device=probs.device) if out is None else out
        self.launch.draw(rows_of(probs), keys.contiguous(), positions.contiguous(), each, int(purpose), first, out)
        return out

    def _filtered(self, op: str, logits: Tensor, rows: SamplingMetadata) -> str:
        op = self._checked(op, logits=logits, filters=rows.filters.tensor)
        floating(op, logits=logits)
        require(op, logits.shape[-1] > 0, "there are no scores", "a vocabulary")
        return op

    def _each(self, op: str, matrix: Tensor, R: int) -> int:
        """Return how many rows of [N, V] belong to each of R sequences."""
        N = len(matrix)
        require(op, N == 0 or (R > 0 and N % R == 0), f"{N} rows for {R} sequences", "as many for each")
        return N // max(1, R)

    def embed(self, weight: Tensor, tokens: Tensor, draft: Tensor | None = None) -> Tensor:
        """Return rows of weight [V, D] for tokens [R, T]: [R, T, D]; -1 - j names token j of the row's draft [R, K]."""
        op = self._checked("embed", weight=weight, tokens=tokens, draft=draft)
        floating(op, weight=weight)
        if draft is not None:
            of_dtype(op, torch.int64, draft=draft)
            same_shape(op, "draft", draft, len(tokens), draft.shape[1])
            draft = draft.contiguous()
        out = weight.new_empty(*tokens.shape, weight.shape[1])
        self.launch.embed(tokens.int().contiguous(), draft, weight.contiguous(), out)
        return out

    def advance(self, at: Tensor, counts: Tensor, W: int, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the next `at` int32 [3, R], positions and end [R, W], and lo [N, R, W], as the reference does."""
        op = self._checked("advance", at=at, counts=counts, windows=windows)
        of_dtype(op, torch.int32, at=at, counts=counts, windows=windows)
        R = len(counts)
        same_shape(op, "at", at, 3, R)
        positions, end = at.new_empty(2, R, W)
        outputs = torch.empty_like(at), positions, end, at.new_empty(len(windows), R, W)
        self.launch.advance((at.contiguous(), counts.contiguous(), windows.contiguous()), outputs)
        return outputs


def is_keyed(op: str, source: object) -> bool:
    """Return True for a keyed source, False for a greedy one. UserError for other sources."""
    if isinstance(source, GreedySource):
        return False
    require(op, isinstance(source, KeyedSampler), f"a source of type {type(source).__name__}", "a keyed or greedy one")
    return True
