"""Others on the same weights, in one run: transformers' generate, assisted generation and prompt lookup; llama.cpp.

All decode greedily behind the same prompts, in turns. llama.cpp is timed through its C API (see llama_cpp.py), at the
thread count that is fastest for it, and its logits are compared with ours first. `bench.py --peers`, or

    python -m benchmarks.peers --quick
    python -m benchmarks.peers --model random-100m --only-cpp
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings
from torch import Tensor

from common.benchmark import WrongResult, interleave, print_document, print_table, ratio_interval
from common.errors import UserError
from common.options import parse_options, run_main
from common.peers import TransformersPeer
from common.prompts import load_prompts
from engine import LoadedModel, SamplingParams, load
from engine.kernels.cpp import CppModel, default_threads
from engine.kernels.cpp.weights import Weights

from . import llama_cpp
from .cpu_ladder import read_speed

DEFINITIONS = {
    "token_us": "microseconds for one more token behind a prompt: a forward and its choice, median of the rounds",
    "five_us": "microseconds for one forward that gives the logits of five new tokens (nothing is kept of them)",
    "tokens_per_s": "1 / token_us",
    "of_read_speed": "bytes of matrices x tokens_per_s / speed at which the same threads read as much memory, same run",
    "logits": "largest difference from the float32 torch model's logits, as a share of the largest logit",
    "over_llama_f16": "time of llama.cpp at f16 / this time; with a 95% interval, round by round",
}
BOUNDS = {"f32": 1e-3, "f16": 5e-3, "q8_0": 0.1, "float32": 1e-4, "float16": 1e-3, "bfloat16": 3e-2, "int8": 0.1}
RANDOM = "random-100m"
RANDOM_SHAPE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 32_000, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


class PeersOptions(BaseSettings):
    """Time others on the same weights."""

    model: str = Field("stdlib-10m", description=f"a checkpoint, or {RANDOM}: 12 layers of 768, random weights")
    draft: str = Field("stdlib-1m", description="for transformers' assisted generation; none")
    threads: int = Field(0, ge=0, description="ours; 0: physical cores")
    tokens: int = Field(48, ge=8, description="tokens per timed round")
    repeats: int = Field(9, ge=2, description="timed rounds")
    only_cpp: bool = Field(False, description="ours and llama.cpp alone")
    quick: bool = Field(False, description="fewer rounds")


@dataclass
class Peer:
    """One way to decode: seconds for so many tokens, and for a forward of five."""

    name: str
    run: Callable[[], float]  # seconds per token
    five: Callable[[], float] | None = None  # seconds per forward of five tokens
    megabytes: float = 0.0
    logits: float | None = None
    note: str = ""
    close: list[Callable[[], None]] = field(default_factory=list)


@contextmanager
def opened(name: str) -> Iterator[LoadedModel]:
    """The checkpoint of this name; random weights lie in a temporary folder as long as they are needed."""
    if name != RANDOM:
        yield load(name, torch.float32, torch.device("cpu"))
        return
    import transformers

    source = load("stdlib-10m", torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / RANDOM
        torch.manual_seed(0)
        config: Any = transformers.LlamaConfig(**RANDOM_SHAPE, bos_token_id=0, eos_token_id=0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((source.checkpoint.folder / file).read_bytes())
        yield load(str(folder), torch.float32, torch.device("cpu"))


def run(
    model: str = "stdlib-10m",
    draft: str = "stdlib-1m",
    threads: int = 0,
    tokens: int = 48,
    repeats: int = 9,
    only_cpp: bool = False,
) -> dict[str, Any]:
    """Everyone who can be had, checked and then timed in turns. WrongResult where logits are not the model's."""
    threads = threads or default_threads()
    with opened(model) as loaded, tempfile.TemporaryDirectory() as folder:
        prompt = loaded.tokenizer.encode(load_prompts("code", "test")[0].text)[:64]
        with torch.inference_mode():
            expected = loaded.model(torch.tensor([prompt]))[0]
        formats: tuple[Weights, ...] = ("bfloat16", "float16", "int8")
        peers = [ours(loaded, prompt, expected, weights, threads, tokens) for weights in formats]
        machine = CppModel(load("stdlib-1m", torch.float32, torch.device("cpu")).model, "float32", threads)
        left_out: dict[str, str] = {}
        if (reason := llama_cpp.why_not(loaded.config)) is not None:
            left_out["llama.cpp"] = reason
        else:
            peers += [theirs(loaded, prompt, expected, format, Path(folder), tokens) for format in ("f16", "q8_0")]
        if not only_cpp:
            peers += of_transformers(loaded, prompt, draft, tokens)
        for peer in peers:
            if peer.logits is not None and not peer.logits < BOUNDS[peer.name.split()[-1]]:
                raise WrongResult(f"{peer.name}: logits differ by {peer.logits:.2g} of the largest: not the same model")
        variants = {peer.name: peer.run for peer in peers}
        variants |= {f"{peer.name}, five": peer.five for peer in peers if peer.five is not None}
        timed = {name: [each.value for each in runs] for name, runs in interleave(variants, repeats).items()}
        rows = []
        for peer in peers:
            token = statistics.median(timed[peer.name])
            five = timed.get(f"{peer.name}, five")
            row: dict[str, Any] = {
                "peer": peer.name,
                "token_us": token * 1e6,
                "five_us": None if five is None else statistics.median(five) * 1e6,
                "tokens_per_s": 1 / token,
                "logits": peer.logits,
                "note": peer.note,
            }
            if peer.megabytes:
                read = read_speed(machine, int(peer.megabytes * 1e6))
                row |= {"read_gb_per_s": read, "of_read_speed": peer.megabytes / 1e3 / token / read}
            for format in ("f16", "q8_0"):
                if f"llama.cpp {format}" in timed:
                    ratio = ratio_interval(timed[f"llama.cpp {format}"], timed[peer.name])
                    row |= {f"over_llama_{format}": ratio.median, f"over_llama_{format}_interval": str(ratio)}
            rows.append(row)
        for peer in peers:
            for close in peer.close:
                close()
    return {"model": model, "threads": threads, "definitions": DEFINITIONS, "peers": rows, "left_out": left_out}


def ours(loaded: LoadedModel, prompt: list[int], expected: Tensor, weights: Weights, threads: int, tokens: int) -> Peer:
    fast = CppModel(loaded.model, weights, threads)
    cache = fast.new_cache(1, len(prompt) + tokens + 8)
    logits = fast.step(cache, [prompt], wanted=range(len(prompt))).logits
    assert logits is not None
    cache.keep(0, list(range(len(prompt))))
    first = int(logits[-1].argmax())

    def decode() -> float:
        began = time.perf_counter()
        fast.generate_plain(cache, 0, [first], tokens, SamplingParams())
        return (time.perf_counter() - began) / tokens

    def five() -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            fast.step(cache, [[first] * 5], wanted=range(5))
        return (time.perf_counter() - began) / tokens

    error = float((logits - expected).abs().max() / expected.abs().max())
    note = f"activations {fast.activations}"
    return Peer(f"ours {weights}", decode, five, fast.weight_bytes / 1e6, error, note)


def theirs(
    loaded: LoadedModel, prompt: list[int], expected: Tensor, format: llama_cpp.Format, folder: Path, tokens: int
) -> Peer:
    """llama.cpp at the number of threads that is fastest for it."""
    file = folder / f"{format}.gguf"
    config = loaded.config
    llama_cpp.write_gguf(loaded.checkpoint.folder, config, file, format)
    repack = llama_cpp.repacks(file, config.vocab_size)
    made = llama_cpp.LlamaCpp(file, config.vocab_size, 1024, default_threads(), repack)
    error = llama_cpp.compare_logits(made, expected, prompt)
    made.decode(prompt)
    times: dict[int, float] = {}
    for threads in range(1, default_threads() + 1):
        made.set_threads(threads)
        times[threads] = min(made.time_steps(1, tokens) for _ in range(3))
    best = min(times, key=lambda threads: times[threads])
    made.set_threads(best)
    note = f"{best} threads" + ("" if repack else "; weights not repacked: its AMX kernels crash on this machine")
    one, five = (lambda: made.time_steps(1, tokens)), (lambda: made.time_steps(5, tokens // 4))
    return Peer(f"llama.cpp {format}", one, five, file.stat().st_size / 1e6, error, note, [made.close])


def of_transformers(loaded: LoadedModel, prompt: list[int], draft: str, tokens: int) -> list[Peer]:
    """Their loops with a cache, in float32 and bfloat16; the same tokens as their own plain loop in float32."""
    device, peers = torch.device("cpu"), []
    wanted: list[tuple[str, torch.dtype, dict[str, Any]]] = [
        ("transformers generate float32", torch.float32, {}),
        ("transformers generate bfloat16", torch.bfloat16, {}),
        ("transformers prompt lookup float32", torch.float32, {"prompt_lookup_num_tokens": 4}),
    ]
    if draft != "none":
        wanted.append(("transformers assisted float32", torch.float32, {"assistant_model": draft}))
    for name, dtype, options in wanted:
        model = TransformersPeer(loaded.checkpoint.folder, dtype, device).model
        if "assistant_model" in options:
            folder = load(draft, torch.float32, device).checkpoint.folder
            options = {"assistant_model": TransformersPeer(folder, dtype, device).model}
        peers.append(Peer(name, generating(model, prompt, tokens, options)))
    return peers


def generating(model: Any, prompt: list[int], tokens: int, options: dict[str, Any]) -> Callable[[], float]:
    ids = torch.tensor([prompt])

    def decode() -> float:
        began = time.perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
            use_cache=True, pad_token_id=0, **options,
        )  # fmt: skip
        made: int = output.shape[1] - ids.shape[1]
        return (time.perf_counter() - began) / made

    return decode


COLUMNS = (
    "peer",
    "token_us",
    "five_us",
    "tokens_per_s",
    "of_read_speed",
    "over_llama_f16",
    "over_llama_q8_0",
    "logits",
    "note",
)


def report(found: dict[str, Any]) -> None:
    """The human table."""
    for name, reason in found["left_out"].items():
        print(f"left out: {name} ({reason})")
    rows = [["" if row.get(name) is None else row[name] for name in COLUMNS] for row in found["peers"]]
    print_table(f"{found['model']}, {found['threads']} threads", COLUMNS, rows)


def main(arguments: list[str]) -> int:
    options = parse_options(PeersOptions, arguments, program="peers.py")
    if options.model == RANDOM and not options.only_cpp and options.draft != "none":
        raise UserError(f"--model {RANDOM} has no draft of its vocabulary; give --only-cpp or --draft none")
    repeats = 3 if options.quick else options.repeats
    found = run(options.model, options.draft, options.threads, options.tokens, repeats, options.only_cpp)
    report(found)
    print_document(json.loads(json.dumps(found)))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
