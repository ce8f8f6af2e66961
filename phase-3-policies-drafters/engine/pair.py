"""A target and its draft: the default draft of a model, a check of both vocabularies, and fitting their sizes."""

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

FAKE_TOKENIZER = "stdlib-10m"


def resolve_draft(option: str, target: LoadedModel) -> str | None:
    """Return the draft to use. `auto`: the one that the target folder's lab.json names, if any."""
    if option == "none":
        return None
    if option != "auto":
        return option
    if target.checkpoint.name.startswith("fake"):
        return None
    return companion(target.checkpoint.folder, "draft")


def check_pair(target: LoadedModel, draft: LoadedModel) -> None:
    """Raise UserError unless every token id means the same to both.

    The tokenizers are compared; the padded sizes of the models' tables are ignored (see `fit_vocabulary`). Notes on
    stderr: special tokens with different names, and a draft with a shorter context.
    """
    names = f"draft {draft.checkpoint.name} and target {target.checkpoint.name}"
    theirs, ours = draft.tokenizer.pieces, target.tokenizer.pieces
    other = sorted({token for token, _ in theirs.items() ^ ours.items()})
    for token in other:
        if not _may_differ(token, draft.tokenizer, target.tokenizer):
            raise UserError(
                f"{names} must share a vocabulary; token {token} is {theirs.get(token)!r} and {ours.get(token)!r}"
            )
    if other:
        print(
            f"note: {names} have different names for {len(other)} special or added tokens, first {other[0]}: "
            f"{theirs.get(other[0])!r} and {ours.get(other[0])!r}; the target's are used",
            file=sys.stderr,
        )
    if draft.config.context < target.config.context:
        print(
            f"note: the draft sees {draft.config.context} tokens, the target {target.config.context}; past that the "
            "draft uses its own window",
            file=sys.stderr,
        )


def _may_differ(token: int, *tokenizers: Tokenizer) -> bool:
    """Return whether no text has this token: special to both, or added to one and unknown to the other."""
    if all(token in tokenizer.pieces for tokenizer in tokenizers):
        return all(token in tokenizer.special_ids for tokenizer in tokenizers)
    return any(token in tokenizer.added_ids for tokenizer in tokenizers)


def fit_vocabulary(draft: Transformer, size: int) -> None:
    """Give a draft the token ids of its target, 0 .. size - 1.

    Models of one tokenizer are padded to different sizes: Qwen2.5 0.5B has 151,936 rows, Qwen2.5 7B has 152,064.
    Ids past the target's are removed. Ids past the draft's own get the logit -inf, so their probability is 0
    under all sampling parameters; in a sequence their embedding is zero. verify.py is exact with any draft, so
    the output's distribution is unchanged.
    """
    own = draft.config.vocab_size
    if own == size:
        return
    draft.config = dataclasses.replace(draft.config, vocab_size=size)
    if isinstance(draft, FakeModel):  # its logits depend on the number of ids
        return
    tied = draft.head.weight is draft.embedding.weight
    draft.embedding.weight = _resized(draft.embedding.weight, size)
    draft.embedding.num_embeddings = size
    draft.head = _resized_head(draft.head, size, draft.embedding.weight)
    if tied:
        draft.head.weight = draft.embedding.weight


def _resized_head(head: Linear, size: int, like: Tensor) -> Linear:
    """Return the head with `size` rows in the format of `like`; added ids get weight 0 and bias -inf."""
    bias = like.new_zeros(head.out_features) if head.bias is None else head.bias
    fitted = _resized_matrix(head, size)
    if size > head.out_features or head.bias is not None:
        fitted.bias = _resized(bias, size, float("-inf"))
    return fitted


def _resized_matrix(head: Linear, size: int) -> Linear:
    fitted = Linear(head.in_features, size, bias=False, device="meta")
    fitted.weight = _resized(head.weight, size)
    return fitted


def _resized(rows: Tensor, size: int, fill: float = 0.0) -> nn.Parameter:
    """Return the first `size` rows; missing rows are filled."""
    added = rows.new_full((max(0, size - len(rows)), *rows.shape[1:]), fill)
    return nn.Parameter(torch.cat((rows[:size], added)), requires_grad=False)


def load_fake(name: str) -> LoadedModel:
    """Return the toy model of `fake` or `fake:0.7`, with the embedded models' tokenizer."""
    checkpoint = open_checkpoint(FAKE_TOKENIZER)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    model = FakeModel(tokenizer.vocab_size, checkpoint.config["max_position_embeddings"], parse_agreement(name))
    return LoadedModel(model, tokenizer, dataclasses.replace(checkpoint, name=name))
