"""Other engines on the same weights (`--peers`): llama.cpp, and transformers' generate with its ways to speculate.

All decode greedily after the same prompts, interleaved. llama.cpp is timed through its C API (see llama_cpp.py), at its
fastest thread count. Logits are compared with the float32 torch model's before timing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.benchmark import Outcome, WrongResult
from common.harness import Variant
from common.peers import TransformersPeer
from common.prompts import Prompt
from common.random_checkpoint import random_checkpoint
from engine import LoadedModel, SamplingParams, load
from engine.kernels import cpp
from engine.kernels.cpp import CppModel, default_threads
from engine.kernels.cpp.weights import Weights
from engine.pair import resolve_draft

from . import llama_cpp
from .cpu_ladder import read_speed
from .runs import Lab
from .sizes import measure_sizes

PEERS = {
    "peers": "greedy decoding after the first 64 tokens of a prompt; new_tokens 1: a forward and its argmax for every "
    "token, new_tokens 5: forwards over five tokens with their logits, which are not kept. For "
    "transformers the time of a whole request, including its prompt",
    "logits": "largest difference from the float32 torch model's logits, relative to the largest logit",
    "note": "how a peer ran, if not as usual",
}
BOUNDS = {"f16": 5e-3, "q8_0": 0.1, "float16": 1e-3, "bfloat16": 3e-2, "int8": 0.1}
RANDOM = "random-100m"
PROMPTS, PROMPT, WIDTHS = 12, 64, (1, 5)
OURS: tuple[Weights, ...] = ("float16", "bfloat16", "int8")
GGUF: tuple[llama_cpp.Format, ...] = ("f16", "q8_0")
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "transformers generate": {},
    "transformers prompt lookup": {"prompt_lookup_num_tokens": 4},
    "transformers assisted": {"assistant_model": True},
}


@contextmanager
def opened(name: str) -> Iterator[LoadedModel]:
    """Load a checkpoint by name; random weights are in a temporary folder until the exit."""
    if name != RANDOM:
        yield load(name, torch.float32, torch.device("cpu"))
        return
    with random_checkpoint("100m", "float16") as folder:
        yield load(str(folder), torch.float32, torch.device("cpu"))


@dataclass
class Peer:
    """A model of ours or of llama.cpp."""

    prefill: Callable[[list[int]], Tensor]  # prompt -> its logits [T, V], with the prompt in the cache
    forwards: Callable[[int, int], float]  # width, count -> seconds of `count` forwards over `width` tokens
    nbytes: float  # of matrices
    note: str


class Peers:
    """The engines for one model, created on first use."""

    def __init__(self, lab: Lab, name: str, stack: ExitStack) -> None:
        self.lab, self.tokens = lab, lab.options.max_tokens
        self.threads = lab.options.threads or default_threads()
        self.loaded = cache(lambda: stack.enter_context(opened(name)))
        self.folder = cache(lambda: Path(stack.enter_context(tempfile.TemporaryDirectory())))
        self.machine = cache(lambda: CppModel(self.loaded().model, "float32", self.threads))
        self.stack = stack

    def ids(self, prompt: Prompt | None) -> list[int]:
        assert prompt is not None
        found: list[int] = self.loaded().tokenizer.encode(prompt.text)[:PROMPT]
        return found

    def ours(self, weights: Weights) -> Peer:
        fast = CppModel(self.loaded().model, weights, self.threads)
        kept, first = fast.new_cache(1, PROMPT + self.tokens + 8), [0]

        def prefill(prompt: list[int]) -> Tensor:
            kept.truncate(0, 0)
            logits = fast.step(kept, [prompt], wanted=range(len(prompt))).logits
            assert logits is not None
            kept.keep(0, list(range(len(prompt))))
            first[0] = int(logits[-1].argmax())
            return logits

        def forwards(width: int, count: int) -> float:
            began = time.perf_counter()
            if width == 1:
                fast.decode([fast.sequence(kept, 0, first, SamplingParams())], None, [0], count)
            else:
                for _ in range(count):
                    fast.step(kept, [first * width], wanted=range(width))
            return time.perf_counter() - began

        return Peer(prefill, forwards, fast.weight_bytes, f"activations {fast.activations}")

    def llama(self, format: llama_cpp.Format) -> Peer:
        """Return llama.cpp at its fastest thread count."""
        file, config = self.folder() / f"{format}.gguf", self.loaded().config
        llama_cpp.write_gguf(self.loaded().checkpoint.folder, config, file, format)
        repack = llama_cpp.repacks(file, config.vocab_size)
        made = llama_cpp.LlamaCpp(file, config.vocab_size, 1024, default_threads(), repack)
        self.stack.callback(made.close)

        def prefill(prompt: list[int]) -> Tensor:
            made.cut(0)
            made.decode(prompt, every=True)
            return torch.from_numpy(made.logits(len(prompt)))

        prefill([1] * 8)
        best = made.use_best_threads(self.tokens)
        note = f"{best} threads" + ("" if repack else "; weights not repacked: its own kernels crash on this machine")
        return Peer(prefill, lambda width, count: count * made.time_steps(width, count), file.stat().st_size, note)

    def timed(self, name: str, make: Callable[[], Peer], width: int) -> Variant:
        """Return a variant of an engine. WrongResult if its logits differ from the model's."""
        bound = BOUNDS[name.split()[-1]]

        @cache
        def expected(prompt: Prompt | None) -> Tensor:
            with torch.inference_mode():
                found: Tensor = self.loaded().model(torch.tensor([self.ids(prompt)]))[0]
                return found

        def run(prompt: Prompt | None, round_: int) -> Outcome:
            peer, wanted = make(), expected(prompt)
            off = float((peer.prefill(self.ids(prompt)) - wanted).abs().max() / wanted.abs().max())
            if not off < bound:
                raise WrongResult(f"{name}: logits differ by {off:.2g} of the largest: not the same model")
            count = self.tokens if width == 1 else max(1, self.tokens // 4)
            seconds, gb = peer.forwards(width, count), peer.nbytes * count / 1e9
            bandwidth = gb / read_speed(self.machine(), int(peer.nbytes))
            figures = {"gb": gb, "bandwidth_s": bandwidth, "logits": off, "note": peer.note}
            return Outcome(count, figures, seconds=seconds)

        return run

    def transformers(self, **options: Any) -> Variant:
        """Return a variant of transformers' generate with a cache, in float32."""
        device = torch.device("cpu")

        @cache
        def made() -> tuple[Any, dict[str, Any]]:
            folder = self.loaded().checkpoint.folder
            if "assistant_model" in options:
                draft = resolve_draft(self.lab.options.draft, self.loaded())
                of_draft = load(str(draft), torch.float32, device).checkpoint.folder
                options["assistant_model"] = TransformersPeer(of_draft, torch.float32, device).model
            return TransformersPeer(folder, torch.float32, device).model, options

        def run(prompt: Prompt | None, round_: int) -> Outcome:
            model, how = made()
            ids = torch.tensor([self.ids(prompt)])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self.tokens,
                min_new_tokens=self.tokens, use_cache=True, pad_token_id=0, **how,
            )  # fmt: skip
            return Outcome(output.shape[1] - ids.shape[1])

        return run


def measure_cpu_peers(lab: Lab) -> None:
    if lab.refused("peers", cpp.why_not(lab.device)):
        return
    for name in [lab.options.model] if lab.options.quick else [lab.options.model, RANDOM]:
        with ExitStack() as stack:
            of_model(lab, name, Peers(lab, name, stack))
    measure_sizes(lab)


def of_model(lab: Lab, name: str, peers: Peers) -> None:
    makers: dict[str, Callable[[], Peer]] = {}
    for weights in OURS:
        makers[f"ours {weights}"] = cache(lambda weights=weights: peers.ours(weights))
    cell = {"model": name, "instruction_set": lab.instruction_set}
    reason = None if lab.options.dry_run else llama_cpp.why_not(peers.loaded().config)
    for format in GGUF:
        if reason is not None:
            lab.refuse("peers", cell, f"llama.cpp {format}", reason)
        else:
            makers[f"llama.cpp {format}"] = cache(lambda format=format: peers.llama(format))
    prompts = lab.prompts(min(PROMPTS, lab.options.prompts))
    for width in WIDTHS:
        runs = {each: peers.timed(each, make, width) for each, make in makers.items()}
        if width == 1 and name != RANDOM:
            runs |= {each: peers.transformers(**options) for each, options in TRANSFORMERS.items()}
        lab.compare("peers", {**cell, "new_tokens": width}, runs, prompts)
