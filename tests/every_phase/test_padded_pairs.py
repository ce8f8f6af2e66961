"""A target and a draft of one tokenizer, padded to different widths: the output is the target's, whichever is wider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.phases import Phase

Make = Callable[..., Path]


def ways(phase: int) -> list[dict[str, Any]]:
    """Return options under which the tokens are those of plain decoding."""
    if phase < 3:
        return [{}]
    coupled: dict[str, Any] = {"policy": "coupled", "temperature": 1.0}
    tree: dict[str, Any] = {"tree": "static"}
    if phase < 4:
        return [{}, coupled, tree]
    quant: dict[str, Any] = {"draft_quant": "int8", "quant_head": True}
    if phase < 5:
        return [{}, tree, quant]
    return [{"kernels": "torch"}, {}, coupled, tree, quant]


@pytest.mark.newest(2)
@pytest.mark.parametrize(("family", "widths"), [("gpt2", (352, 320)), ("llama", (320, 352))])
def test_the_output_is_that_of_plain_decoding(
    engine: ModuleType, phase: Phase, make_checkpoint: Make, family: str, widths: tuple[int, int]
) -> None:
    """Random weights ignore padding: the target writes ids that a narrower draft lacks."""
    if phase.number < 2:
        pytest.skip("nothing drafts yet")
    tied = family == "gpt2"
    target, draft = (make_checkpoint(family, vocab_size=width, tie_word_embeddings=tied) for width in widths)
    given: dict[str, Any] = {"model": str(target), "device": "cpu", "dtype": "float32", "max_tokens": 16, "k": 3}
    for way in ways(phase.number):
        plain = {key: value for key, value in way.items() if key in ("kernels", "temperature")}
        expected = engine.LLM(engine.Options(**given, **plain, draft="none")).generate(["import os\n"])
        got = engine.LLM(engine.Options(**given, **way, draft=str(draft))).generate(["import os\n"])
        assert got[0].tokens == expected[0].tokens, way


@pytest.mark.newest(2)
@pytest.mark.parametrize("widths", [(384, 320), (320, 384)])
def test_what_is_drawn_fits_both(
    engine: ModuleType, phase: Phase, make_checkpoint: Make, widths: tuple[int, int]
) -> None:
    if phase.number < 2:
        pytest.skip("nothing drafts yet")
    target, draft = (make_checkpoint("llama", vocab_size=width) for width in widths)
    given = {"model": str(target), "draft": str(draft), "device": "cpu", "dtype": "float32"}
    llm = engine.LLM(engine.Options(**given, max_tokens=40, temperature=1.5, n=4))
    sequences = llm.sequences(["import os\n"])
    for _ in llm.run(sequences):
        pass
    tokens = [token for sequence in sequences for token in sequence.tokens]
    assert 320 <= max(tokens) < widths[0] or widths[0] == 320 > max(tokens)
    steps = [step for sequence in sequences for step in sequence.steps]
    assert sum(step.proposed for step in steps) > sum(step.accepted for step in steps) > 0
