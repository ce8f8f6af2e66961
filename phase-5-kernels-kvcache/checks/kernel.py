"""Builds, checks and times one kernel of one backend: what to run after every change of a kernel.

An op is compared with its reference in torch on the cases of check.py. `step` is the whole step of a model in C++:
its logits are compared with torch's, and their bits must not depend on how many tokens one call computes. With
`--bench` the same calls are timed beside torch's, in turns. `lab kernel` runs this from anywhere:

    python -m checks.kernel sample --backend cpp --bench
    python -m checks.kernel step --backend cpp --bench
    SPECDEC_CUDA_EMULATOR=checks/emulator.h python -m checks.kernel rope --backend cuda
    TRITON_INTERPRET=1 python -m checks.kernel rms_norm --backend triton
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.benchmark import interleave, median, print_table
from common.device import synchronize
from common.errors import UserError
from common.lab.arguments import Parser
from common.options import run_main
from common.statistics import ratio
from engine.kernels import TORCH, registry
from engine.kernels.cpp import CppModel
from engine.load import load
from engine.model import Transformer
from engine.runner import UncachedRunner

from .check import Function, WrongKernel, cases, check, near, same_bits

STEP = "step"
BACKENDS = ("cpp", "triton", "cuda")


def function_of(backend: registry.Backend, op: str, device: torch.device) -> Function:
    """Return a kernel, built if it was not. UserError if the backend cannot run here, or has no such op."""
    if (reason := registry.why_not(backend, device)) is not None:
        raise UserError(f"--backend {backend}: {reason}")
    offered = registry.operations(backend)
    if op not in offered:
        steps = f" and {STEP}" if backend == "cpp" else ""
        raise UserError(f"{backend} has no kernel {op!r}; it has {', '.join(offered)}{steps}")
    registry.prepare(device)
    return offered[op]


def check_step(model: Transformer, text: list[int]) -> list[str]:
    """Check a model's step in C++: the logits of a prefill, a token and a draft; then the bits of all at once."""
    fast, reference = CppModel(model, "float32", exact_activations=True), UncachedRunner(model)
    cache, passed, at = fast.new_cache(1, len(text)), list[str](), 0
    for what, count in (("a prefill", len(text) - 6), ("one token", 1), ("five tokens at once", 5)):
        stepped = fast.step(cache, [text[at : at + count]], wanted=[count - 1])
        assert stepped.logits is not None
        cache.keep(0, list(range(count)))
        at += count
        near(f"{STEP}, {what}", stepped.logits, reference.forward([what], [text[:at]]).logits[0], 1e-4)
        passed.append(what)
    one, other = (logits_by(fast, text, chunk) for chunk in (1, 5))
    same_bits(f"{STEP}, one token at a time or five", one, other)
    return [*passed, "the same bits for one token at a time and for five"]


def logits_by(fast: CppModel, text: list[int], chunk: int) -> Tensor:
    """Return the logits [T, V] of all tokens, computed so many at a time."""
    cache, found = fast.new_cache(1, len(text)), list[Tensor]()
    for at in range(0, len(text), chunk):
        part = text[at : at + chunk]
        stepped = fast.step(cache, [part], wanted=range(len(part)))
        assert stepped.logits is not None
        found.append(stepped.logits)
        cache.keep(0, list(range(len(part))))
    return torch.cat(found)


def time_step(model: Transformer, text: list[int]) -> dict[str, Callable[[], float]]:
    """Return a function for each side: the seconds of one token after the text."""
    fast, reference = CppModel(model, "float32"), UncachedRunner(model)
    cache = fast.new_cache(1, len(text) + 1)
    fast.step(cache, [text[:-1]])
    cache.keep(0, list(range(len(text) - 1)))

    def of(run: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

        return timed

    one = text[-1:]
    return {"cpp": of(lambda: fast.step(cache, [one])), "torch": of(lambda: reference.forward(["torch"], [text]))}


def time_op(op: str, backend: str, function: Function, device: torch.device) -> dict[str, Callable[[], float]]:
    """Return a function for each side: the seconds inside the op over all cases of its check."""
    timed = [case for case in cases(op, device, True) if not case.invariance]

    def of(measured: Function) -> Callable[[], float]:
        def run() -> float:
            spent = 0.0

            def clocked(*arguments: object, **named: object) -> object:
                nonlocal spent
                synchronize(device)
                began = time.perf_counter()
                result = measured(*arguments, **named)
                synchronize(device)
                spent += time.perf_counter() - began
                return result

            for case in timed:
                case.run(clocked)
            return spent

        return run

    return {backend: of(function), "torch": of(getattr(TORCH, op))}


def print_times(what: str, sides: dict[str, Callable[[], float]], rounds: int) -> None:
    runs = interleave(sides, rounds)
    ours, torchs = ([run.value for run in runs[name]] for name in sides)
    rows = [[name, median([run.value for run in runs[name]]) * 1e3] for name in sides]
    print_table(f"{what}: the median of {rounds} rounds", ["", "ms"], rows)
    logs = [math.log(theirs / mine) for mine, theirs in zip(ours, torchs, strict=True)]
    print(f"{ratio({what: logs})} times the speed of torch")


def main(arguments: list[str]) -> int:
    parser = Parser("lab kernel", "Build, check and time one kernel of phase 5.")
    parser.add_argument(
        "name", metavar="NAME", help=f"an op (linear, rope, sample, ...), or {STEP}: a whole step in C++"
    )
    parser.add_argument("--backend", required=True, choices=BACKENDS)
    parser.add_argument("--bench", action="store_true", help="time it beside torch, once it is right")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds of --bench (default 20)")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if given.backend != "cpp" and torch.cuda.is_available() else "cpu")
    if given.bench and device.type == "cpu" and given.backend != "cpp":
        raise UserError(f"--bench needs a GPU: on a CPU the kernels of {given.backend} are emulated, and slow")
    whole = given.backend == "cpp" and given.name == STEP
    if whole:
        if (reason := registry.why_not("cpp", device)) is not None:
            raise UserError(f"--backend cpp: {reason}")
        loaded = load("stdlib-10m", torch.float32, device)
        text = loaded.tokenizer.encode("class Stack:\n    def push(self, item):\n        self.items.append(item)\n")
    else:
        function = function_of(given.backend, given.name, device)
    try:
        passed = (
            check_step(loaded.model, text)
            if whole
            else check(given.name, function, device, device.type != "cpu" or given.backend == "cpp")
        )
    except WrongKernel as wrong:
        print(f"wrong: {wrong}")
        return 1
    print(f"{given.backend} {given.name}: {len(passed)} checks passed")
    if given.bench:
        sides = time_step(loaded.model, text) if whole else time_op(given.name, given.backend, function, device)
        print_times(
            f"one token after {len(text)} with stdlib-10m" if whole else "all cases of the check", sides, given.rounds
        )
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
