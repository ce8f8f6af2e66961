"""A prompt that the cache knows: time to the first token of a hit against a miss."""

from __future__ import annotations

import dataclasses
import time

from common.benchmark import Outcome
from common.harness import Variant
from common.prompts import Prompt
from engine import LLMEngine

from .runs import Format, Lab, forget

PREFIX = {
    "prefix": "time to the first token of a prompt of `length` tokens: all of it new, or all but its last block known",
}
LENGTHS = (64, 256, 512)


def measure_prefix(lab: Lab) -> None:
    for name in lab.options.formats:
        for length in LENGTHS[-1:] if lab.options.quick else LENGTHS:
            cell = {"model": lab.options.model, "format": name, "instruction_set": lab.instruction_set}
            runs = {"miss": first_token(lab, name, length, False), "hit": first_token(lab, name, length, True)}
            lab.compare("prefix", {**cell, "length": length}, runs)


def first_token(lab: Lab, name: Format, length: int, known: bool) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        llm = lab.llm(name, draft="none")
        text = [7 + (at * at + round_) % 500 for at in range(length)]
        params = dataclasses.replace(llm.params, max_new_tokens=1, ignore_eos=True)
        forget(llm)
        engine = LLMEngine(llm)
        for _ in range(1 + known):
            before, began = engine.target.manager.positions, time.perf_counter()  # type: ignore[attr-defined]
            engine.add_request(text, params)
            while engine.busy:
                outputs = engine.step()
            seconds = time.perf_counter() - began
        computed = engine.target.manager.positions - before  # type: ignore[attr-defined]
        engine.close()
        return Outcome(1, {"computed": computed}, output=outputs[-1].tokens, seconds=seconds)

    return run
