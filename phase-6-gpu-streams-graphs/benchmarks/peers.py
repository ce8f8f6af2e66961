"""Eight requests at once: this engine against llama.cpp on the same weights and prompts (`--only peers`).

llama.cpp runs through its C API, with one sequence per request and one batch per step: what llama-server's continuous
batching computes, without its HTTP and JSON. Ours is an LLMEngine, whose scheduling is inside the time. Both compute
all prompts and then the same number of greedy tokens, as a closed loop of requests of one length does. Both hold keys
and values in float16.

    python bench.py --only peers --output results
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np

from common.benchmark import Outcome, WrongResult
from common.harness import Variant
from common.prompts import Prompt
from common.results import Scalar
from engine.config import ModelConfig
from engine.kernels.cpp import default_threads

from . import llama_cpp
from .runs import Format, Lab, serve

PEERS = {
    "peers": "greedy; 8 requests of 64 prompt tokens at once, with the same number of new tokens each; seconds are "
    "those until the last has ended, prompts included",
    "agreement": "share of the requests whose tokens are those of the baseline; rounding may part greedy texts",
    "note": "how a peer ran",
}
ROWS, PROMPT = 8, 64
FORMATS: dict[Format, llama_cpp.Format] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "q8_0"}


class Batched(llama_cpp.LlamaCpp):
    """A context of llama.cpp with a sequence for every row."""

    def __init__(self, file: Path, config: ModelConfig, tokens: int, threads: int) -> None:
        super().__init__(file, config.vocab_size, ROWS * tokens, threads, llama_cpp.repacks(file, config.vocab_size))
        self.api.llama_free(self.context)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = ROWS * tokens, 512, 512, ROWS
        params.n_threads = params.n_threads_batch = threads
        self.context = self.api.llama_init_from_model(self.model, params)

    def set_threads(self, threads: int) -> None:
        super().set_threads(threads)
        self.threads = threads

    def forward(self, tokens: list[list[int]], held: int) -> list[int]:
        """Compute the new tokens of every row after `held` cached ones; return the likeliest next token of each."""
        batch, at, last = self.batch, 0, list[int]()
        for row, of_row in enumerate(tokens):
            for i, token in enumerate(of_row):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, held + i, 1, row
                batch.logits[at] = i == len(of_row) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.vocab,)) for i in last]
        return [int(row.argmax()) for row in rows]

    def serve(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """Return new tokens for every prompt of PROMPT tokens, and the seconds."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        began = time.perf_counter()
        outputs = [[token] for token in self.forward(prompts, 0)]
        for step in range(1, new):
            for output, token in zip(
                outputs, self.forward([each[-1:] for each in outputs], PROMPT + step - 1), strict=True
            ):
                output.append(token)
        return outputs, time.perf_counter() - began


def measure_peers(lab: Lab) -> None:
    for name in lab.options.formats:
        if name not in FORMATS:
            continue
        cell: dict[str, Scalar] = {
            "model": lab.options.model,
            "format": name,
            "instruction_set": lab.instruction_set,
            "requests": ROWS,
        }
        theirs = f"llama.cpp {FORMATS[name]}"
        if not lab.options.dry_run and (reason := llama_cpp.why_not()) is not None:
            lab.refuse("peers", cell, theirs, reason)
            continue
        with ExitStack() as stack:
            peer = cache(partial(opened, lab, name, stack))
            lab.compare("peers", cell, {theirs: of_llama(lab, name, peer), "ours": ours(lab, name)})


def opened(lab: Lab, name: Format, stack: ExitStack) -> Batched:
    """Write the weights as GGUF, and load them at the thread count at which llama.cpp's batches are fastest."""
    loaded = lab.llm("float32", draft="none").loaded
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "peer.gguf"
    if FORMATS[name] == "q8_0":
        llama_cpp.write_gguf(loaded.checkpoint.folder, loaded.config, file.with_suffix(".f32"), "f32")
        llama_cpp.quantize_gguf(file.with_suffix(".f32"), file, "q8_0")
    else:
        llama_cpp.write_gguf(loaded.checkpoint.folder, loaded.config, file, FORMATS[name])
    made = Batched(file, loaded.config, PROMPT + lab.options.max_tokens, default_threads())
    stack.callback(made.close)
    times = dict[int, float]()
    for threads in range(1, default_threads() + 1):
        made.set_threads(threads)
        times[threads] = min(made.serve(prompts(lab), 8)[1] for _ in range(2))
    made.set_threads(min(times, key=lambda threads: times[threads]))
    return made


def prompts(lab: Lab) -> list[list[int]]:
    """Return a prompt of PROMPT tokens for every request: pieces of the suite's prompts, one after the other."""
    texts = lab.llm("float32", draft="none").encoder.encode(lab.texts(64))
    ids = [token for text in texts for token in text]
    return [ids[at : at + PROMPT] for at in range(0, ROWS * PROMPT, PROMPT)]


def of_llama(lab: Lab, name: Format, peer: Callable[[], Batched]) -> Variant:
    """WrongResult if no request begins with the token of ours."""
    tokens = cache(lambda: ours(lab, name)(None, 0).output)

    def run(prompt: Prompt | None, round_: int) -> Outcome:
        new = lab.options.max_tokens
        outputs, seconds = peer().serve(prompts(lab), new)
        mine = [tokens()[at : at + new] for at in range(0, ROWS * new, new)]
        if not any(left[0] == right[0] for left, right in zip(mine, outputs, strict=True)):
            raise WrongResult("no request begins with our token: not the same model")
        agreement = sum(left == right for left, right in zip(mine, outputs, strict=True)) / ROWS
        return Outcome(ROWS * new, {"agreement": agreement, "note": f"{peer().threads} threads"}, seconds=seconds)

    return run


def ours(lab: Lab, name: Format) -> Variant:
    def run(prompt: Prompt | None, round_: int) -> Outcome:
        llm = lab.llm(name, draft="none", kv_dtype="float16")
        return serve(llm, prompts(lab), [lab.options.max_tokens] * ROWS, rows=ROWS)

    return run
