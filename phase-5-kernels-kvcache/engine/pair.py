"""A target and its draft: which draft a model comes with, and whether two models speak the same tokens."""

from __future__ import annotations

import dataclasses
import sys

from common.checkpoint import open_checkpoint
from common.companions import companion
from common.errors import UserError
from common.tokenizer import Tokenizer

from .fake import FakeModel, parse_agreement
from .load import LoadedModel

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
    """UserError unless a token id means the same to both. A draft with a shorter context is noted on stderr."""
    names = f"draft {draft.checkpoint.name} and target {target.checkpoint.name}"
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"{names} must share a vocabulary; they have {sizes[0]} and {sizes[1]} tokens")
    files = [loaded.checkpoint.folder / "tokenizer.json" for loaded in (draft, target)]
    same = all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
    if not same:
        for token in range(sizes[0]):
            theirs, ours = draft.tokenizer.piece(token), target.tokenizer.piece(token)
            if theirs != ours:
                raise UserError(f"{names} must share a vocabulary; token {token} is {theirs!r} and {ours!r}")
    if draft.config.context < target.config.context:
        print(
            f"note: the draft sees {draft.config.context} tokens, the target {target.config.context}; past that the "
            "draft guesses from a window of its own",
            file=sys.stderr,
        )


def load_fake(name: str) -> LoadedModel:
    """`fake` or `fake:0.7`: the toy model, with the embedded models' tokenizer."""
    checkpoint = open_checkpoint(FAKE_TOKENIZER)
    tokenizer = Tokenizer.load(checkpoint.folder, checkpoint.config, checkpoint.generation_config)
    model = FakeModel(tokenizer.vocab_size, checkpoint.config["max_position_embeddings"], parse_agreement(name))
    return LoadedModel(model, tokenizer, dataclasses.replace(checkpoint, name=name))
