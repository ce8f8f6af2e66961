"""A toy language model with a known distribution, for tests, dry runs, and experiments with one parameter.

The distribution of the next token depends on the last two tokens, through the counter-based generator of
common/philox.py, so it is the same in every process and on every machine. After any two tokens half of the vocabulary
is possible. The draft `fake:0.7` has the target's own distribution after 70% of all contexts. After the others its
distribution is uniform over the tokens that the target excludes. So its acceptance is 0.7 at every temperature, and
nothing has to be trained.

    python generate.py --model fake --draft fake:0.7 --prompt "x" --show
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common import philox
from common.errors import UserError

from .attention import CachedAttention
from .config import ModelConfig
from .model import Embedding, Masks, Transformer

SHARPNESS = 2.0  # of the logits: a few tokens hold most of the probability
_SUPPORT, _LOGITS, _AGREES = 101, 102, 103  # purposes that sampling does not use


def is_fake(name: str) -> bool:
    """Return True for `fake` and `fake:0.7`."""
    return name.partition(":")[0] == "fake"


class FakeModel(Transformer):
    """A model with the methods of a Transformer that decoding uses. agreement 1 is the target itself."""

    def __init__(self, vocab_size: int, context: int, agreement: float = 1.0, seed: int = 0) -> None:
        if not 0 <= agreement <= 1:
            raise UserError(
                f"the agreement of a fake draft must be in [0, 1], got {agreement}; write for example fake:0.7"
            )
        nn.Module.__init__(self)  # not Transformer's, which would build layers
        self.config = ModelConfig(
            family="fake",
            vocab_size=vocab_size,
            layers=1,
            width=1,
            heads=1,
            kv_heads=1,
            head_dim=1,
            ffn_width=1,
            context=context,
            norm="rms",
            norm_eps=0.0,
            positions="rope",
            activation="silu",
            gated=False,
        )
        self.agreement, self.seed = agreement, seed
        self.embedding = Embedding(1, 1)  # no weights; only its device and dtype are read

    has_cache = False  # what it says depends on two tokens: there is nothing to remember

    def states(
        self,
        tokens: Tensor,
        positions: Tensor | range | None = None,
        wanted: Tensor | None = None,
        masks: Masks | None = None,
        taps: tuple[int, ...] = (),
        cached: dict[int | None, CachedAttention] | None = None,
        draft: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Number each context by its last two tokens, along the branch of a tree; int64 [B, T or W, 1]."""
        T = tokens.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool).tril()[None] if masks is None else masks[None] == 0
        order = torch.arange(T).expand_as(seen).masked_fill(~seen.tril(-1), -1).amax(-1).expand_as(tokens)
        before = tokens.gather(1, order.clamp(min=0)).masked_fill(order < 0, 0)
        numbers = before * self.config.vocab_size + tokens
        return (numbers if wanted is None else numbers.gather(1, wanted))[..., None], None

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute float32 [..., V] for contexts [..., 1]."""
        numbers = hidden.reshape(-1)
        size = self.config.vocab_size
        order = philox.uniforms(self.seed, torch.zeros_like(numbers), numbers, _SUPPORT, size).argsort(-1)
        possible = torch.zeros(len(numbers), size, dtype=torch.bool).scatter(-1, order[:, : (size + 1) // 2], True)
        agrees = philox.uniforms(self.seed, torch.zeros_like(numbers), numbers, _AGREES, 1) < self.agreement
        logits = philox.gumbel(self.seed, torch.zeros_like(numbers), numbers, _LOGITS, size) * SHARPNESS
        return logits.masked_fill(possible != agrees, float("-inf")).view(*hidden.shape[:-1], size)


def parse_agreement(name: str) -> float:
    """Parse the agreement: `fake` is 1, `fake:0.7` is 0.7."""
    _, colon, number = name.partition(":")
    try:
        return float(number) if colon else 1.0
    except ValueError:
        raise UserError(f"{name}: the agreement of a fake draft is a number in [0, 1], as in fake:0.7") from None
