"""A target and its draft: which draft a model comes with, whether both speak the same tokens, and as many of them."""

from __future__ import annotations

import dataclasses
import sys

import torch
from torch import Tensor, nn

from common.checkpoint import open_checkpoint
from common.companions import companion
from common.errors import UserError
from common.tokenizer import Tokenizer

from .fake import FakeModel, parse_agreement
from .load import LoadedModel
from .model import Linear, Transformer
from .quantize import QuantLinear, replace

FAKE_TOKENIZER = "stdlib-10m"


def resolve_draft(option: str, target: LoadedModel) -> str | None:
    """The draft to use. `auto`: the one that the target's folder names in lab.json, if it names one."""
    if option == "none":
        return None
    if option != "auto":
        return option
    if target.checkpoint.name.startswith("fake"):
        return None
    return companion(target.checkpoint.folder, "draft")


def check_pair(target: LoadedModel, draft: LoadedModel) -> None:
    """UserError unless a token id means the same to both.

    The tokenizers are compared; how many rows a model's tables are padded to says nothing (see `fit_vocabulary`). On
    stderr are noted special tokens that have other names, and a draft with a shorter context.
    """
    names = f"draft {draft.checkpoint.name} and target {target.checkpoint.name}"
    theirs, ours = draft.tokenizer.pieces, target.tokenizer.pieces
    other = [token for token in sorted(theirs.keys() | ours.keys()) if theirs.get(token) != ours.get(token)]
    for token in other:
        if not _may_differ(token, draft.tokenizer, target.tokenizer):
            raise UserError(
                f"{names} must share a vocabulary; token {token} is {theirs.get(token)!r} and {ours.get(token)!r}"
            )
    if other:
        print(
            f"note: {names} call {len(other)} special or added tokens by other names, first {other[0]}: "
            f"{theirs.get(other[0])!r} and {ours.get(other[0])!r}; the target's count",
            file=sys.stderr,
        )
    if draft.config.context < target.config.context:
        print(
            f"note: the draft sees {draft.config.context} tokens, the target {target.config.context}; past that the "
            "draft guesses from a window of its own",
            file=sys.stderr,
        )


def _may_differ(token: int, *tokenizers: Tokenizer) -> bool:
    """Whether no text has this token: it is special to both, or added to one and unknown to the other."""
    if all(token in tokenizer.pieces for tokenizer in tokenizers):
        return all(token in tokenizer.special_ids for tokenizer in tokenizers)
    return any(token in tokenizer.added_ids for tokenizer in tokenizers)


def fit_vocabulary(draft: Transformer, size: int) -> None:
    """Give a draft the ids of its target, 0 .. size - 1.

    Models of one tokenizer are padded to different widths: Qwen2.5 has 151,936 rows with 0.5B parameters, and 152,064
    with 7B. Ids past the target's are cut off. Ids past the draft's own get the logit -inf, so their probability is 0
    under all sampling parameters; in a text they enter the draft as zeros. The rule of verify.py is exact with any
    draft, so nothing of this shows in the output.
    """
    own = draft.config.vocab_size
    if own == size:
        return
    draft.config = dataclasses.replace(draft.config, vocab_size=size)
    if isinstance(draft, FakeModel):  # its logits are made of its number of ids
        return
    tied = draft.head.weight is draft.embedding.weight
    draft.embedding.weight = _resized(draft.embedding.weight, size)
    draft.embedding.num_embeddings = size
    replace(draft, "head", _resized_head(draft.head, size, draft.embedding.weight))
    if tied:
        draft.head.weight = draft.embedding.weight


def _resized_head(head: Linear | QuantLinear, size: int, like: Tensor) -> Linear | QuantLinear:
    """With a bias where ids are added, in the format of `like`: 0, and -inf for those."""
    bias = like.new_zeros(head.out_features) if head.bias is None else head.bias
    fitted = _resized_matrix(head, size)
    if size > head.out_features or head.bias is not None:
        fitted.bias = _resized(bias, size, float("-inf"))
    return fitted


def _resized_matrix(head: Linear | QuantLinear, size: int) -> Linear | QuantLinear:
    if isinstance(head, QuantLinear):
        return head.resized(size)
    fitted = Linear(head.in_features, size, bias=False, device="meta")
    fitted.weight = _resized(head.weight, size)
    return fitted


def _resized(rows: Tensor, size: int, fill: float = 0.0) -> nn.Parameter:
    """The first `size` rows, others added where there are fewer."""
    added = rows.new_full((max(0, size - len(rows)), *rows.shape[1:]), fill)
    return nn.Parameter(torch.cat((rows[:size], added)), requires_grad=False)


def load_fake(name: str) -> LoadedModel:
    """`fake` or `fake:0.7`: the toy model, with the embedded models' tokenizer."""
    checkpoint = open_checkpoint(FAKE_TOKENIZER)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    model = FakeModel(tokenizer.vocab_size, checkpoint.config["max_position_embeddings"], parse_agreement(name))
    return LoadedModel(model, tokenizer, dataclasses.replace(checkpoint, name=name))
