"""The text that heads are trained on: files, and text that the target writes itself.

At temperature 1 a drafter has to guess what the target writes, not what people wrote. So a share of the training text
can be the target's own: samples that continue random pieces of the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.benchmark import progress
from common.errors import UserError
from common.models.batches import Batches, Stage
from common.models.corpus import SourceFile, read_corpus, read_files
from engine.load import LoadedModel


def encode_files(target: LoadedModel, files: list[SourceFile]) -> Tensor:
    """All files as one stream of token ids, int64 [N], an end-of-text token before each where the target has one."""
    tokenizer = Tokenizer.from_file(str(target.checkpoint.folder / "tokenizer.json"))
    between = list(target.tokenizer.eos_ids[:1])
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([file.text for file in files], add_special_tokens=False):
        stream += between + encoding.ids
    return torch.tensor(stream, dtype=torch.long)


def read_streams(target: LoadedModel, corpus: list[Path]) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens: both halves of the standard library, or the given files, the last held out."""
    files = read_files(corpus)
    if any(not file.text.strip() for file in files):
        empty = next(file.path for file in files if not file.text.strip())
        raise UserError(f"--corpus {empty}: the file has no text")
    train, heldout = (files[:-1] or files, files[-1:]) if files else (read_corpus("train"), read_corpus("heldout"))
    return encode_files(target, train), encode_files(target, heldout)


@torch.inference_mode()
def write_text(target: LoadedModel, stream: Tensor, count: int, length: int, rows: int, seed: int) -> Tensor:
    """About `count` tokens in the target's own words, int64 [N]: samples at temperature 1 behind pieces of `stream`.

    `rows` texts at a time, each of `length` tokens, of which the first eighth comes from the stream. This engine has no
    cache yet, so the text is written by transformers from the same folder.
    """
    from transformers import AutoModelForCausalLM

    weight = target.model.embedding.weight
    model: Any = AutoModelForCausalLM.from_pretrained(target.checkpoint.folder, dtype=weight.dtype)
    model.to(weight.device).eval()
    generator = torch.Generator(weight.device).manual_seed(seed)
    given, texts = max(1, length // 8), []
    rounds = -(-count // (rows * length))
    with progress("the target writes", rounds * (length - given)) as step:
        for _ in range(rounds):
            starts = torch.randint(len(stream) - given, (rows,), generator=generator, device=weight.device)
            tokens = stream.to(weight.device)[starts[:, None] + torch.arange(given, device=weight.device)]
            text, cache = [tokens], None
            for _ in range(length - given):
                output = model(input_ids=text[-1], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                text.append(output.logits[:, -1].float().softmax(-1).multinomial(1, generator=generator))
                step(f"{rows} texts of {length} tokens")
            texts.append(torch.cat(text, 1))
    return torch.cat(texts).flatten().cpu()


class MixedBatches:
    """Rows of files and rows of the target's own text, in a fixed proportion; a pure function of the step."""

    def __init__(
        self, stream: Tensor, written: Tensor | None, share: float, steps: int, window: int, tokens: int, seed: int
    ) -> None:
        rows = max(1, tokens // window)
        own = round(rows * share) if written is not None else 0
        parts = [(stream, rows - own, seed)] + ([(written, own, seed + 1)] if written is not None else [])
        self.parts = [
            Batches(part, [Stage(0, steps, window)], count * window, seed) for part, count, seed in parts if count
        ]

    def at(self, step: int) -> Tensor:
        """int64 [rows, window]"""
        return torch.cat([part.at(step) for part in self.parts])


def count_table(stream: Tensor, gap: int, vocabulary: int) -> Tensor:
    """For every token, the one that occurs most often `gap` positions after it, int64 [V]; nothing is added to counts.

    A token that never occurred gets the token that is most frequent overall.
    """
    pairs, counts = (stream[:-gap] * vocabulary + stream[gap:]).unique(return_counts=True)
    order = counts.argsort()  # the most frequent pair is written last, and stays
    table = torch.full((vocabulary,), int(stream.bincount().argmax()))
    best = dict(zip((pairs[order] // vocabulary).tolist(), (pairs[order] % vocabulary).tolist(), strict=True))
    table[list(best)] = torch.tensor(list(best.values()))
    return table
