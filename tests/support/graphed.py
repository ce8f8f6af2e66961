"""The proof that a step can be captured: replays of recorded launches against phase 5, on the emulator of CUDA.

A program, because what it forbids may be a fault (SIGSEGV) that ends the process.

    python -m tests.support.graphed FOLDER '{"k": 3, "temperature": 1.0}' all [MUTANT]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import phase5
import phase6
from common.prompts import load_prompts
from phase6.device_step import Bucket
from phase6.graph_steps import GraphSteps, loaded
from tests.support.mutants import mutated

device_step: Any = importlib.import_module("phase6.device_step")
graph_steps: Any = importlib.import_module("phase6.graph_steps")
backends: Any = importlib.import_module("phase6.backends")
EMULATOR = Path(phase6.__file__).resolve().parents[1] / "recorder" / "emulator.h"
PROMPTS = ["import os", "def f(left, right):\n    return", "class A:", "x"]
HOST: dict[str, Any] = {}  # what mutants take from the host
DRAFTS = {"draft_quant": "int8"}  # of the target itself, so that most drafts are accepted

COUNTS = "counts = torch.where(live, widths + 1, 0)"
# What is wrong -> the module, and the change.
MUTANTS: dict[str, tuple[Any, tuple[str, str]]] = {
    "length by value": (
        device_step,
        ("self._begin(lanes.target, lengths - 1)", "self._begin(lanes.target, lengths * 0 + HOST['length'] - 1)"),
    ),
    "temperature by value": (
        device_step,
        ("Staged(lanes.filters)", "Staged(lanes.filters * 0 + lanes.filters.new_full((4,), HOST['temperature']))"),
    ),
    "an allocation": (
        device_step,
        ("drafted, probs = torch", "HOST['device'].empty(8)\n        drafted, probs = torch"),
    ),
    "an allocation that grows": (
        device_step,
        ("drafted, probs = self._draft(", "torch.empty(HOST['length'] * 64)\n        drafted, probs = self._draft("),
    ),
    "item": (device_step, (COUNTS, f"{COUNTS}\n        lengths.max().item()")),
    "tolist": (device_step, (COUNTS, f"{COUNTS}\n        lengths.tolist()")),
    "a copy to the device": (device_step, ("torch.zeros_like(starts[:, 0])", "torch.tensor([0] * len(starts)).int()")),
    "lanes that are not live": (device_step, ("(lanes.live != 0) & ", "")),
    "the draft's cache not advanced": (device_step, ("torch.where(widths > 0, 2, 0)", "torch.where(widths > 0, 1, 0)")),
    "state in the graph's memory": (
        device_step,
        ("lanes.lengths.add_(emitted.int())", "self.lanes = lanes._replace(lengths=lanes.lengths + emitted.int())"),
    ),
    "a second copy to the host": (
        graph_steps,
        (
            "waiting.append(self.device.copy_out(graph.replay()))",
            "waiting.append(self.device.copy_out(graph.replay()))\n"
            "                self.device.copy_out(step.memory)",
        ),
    ),
    "another block table": (
        graph_steps,
        (
            "self.device.copy_in(step.memory,",
            "step.memory = self.device.empty(len(step.memory))\n"
            "                step.lanes = Lanes.on(step.memory, step.bucket.rows, step.fields)\n"
            "                self.device.copy_in(step.memory,",
        ),
    ),
}  # fmt: skip


def make(engine: Any, folder: str, options: dict[str, Any]) -> Any:
    """Return an LLM on emulated CUDA: of phase 5, or of phase 6 with graphs."""
    chosen = {"model": folder, "device": "cpu", "dtype": "float32", "max_tokens": 8, **options}
    if "k" in chosen:
        chosen = {"draft": folder, **DRAFTS, **chosen}
    else:
        chosen["draft"] = "none"
    if engine is phase6:
        return phase6.LLM(phase6.Options(**{"cuda_graph": "on", "kernels": "cuda", **chosen}))
    with pytest.MonkeyPatch.context() as patch:  # on a GPU, too, matrices are loaded as files have them
        loader = importlib.import_module("phase5.load")
        patch.setattr(loader, "reserve", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
        return phase5.LLM(phase5.Options(**{"kernels": "cuda", **chosen}))


Decision = tuple[list[int], int, int]  # draft, how many of its tokens are accepted, the token that follows


def decisions(llm: Any, prompts: list[str], lengths: list[int] | None = None) -> list[tuple[list[int], list[Decision]]]:
    """Decode; return the tokens of every sequence, and what each of its steps decided. lengths: new tokens of each."""
    params = [dataclasses.replace(llm.params, max_new_tokens=n) for n in lengths] if lengths else llm.params
    sequences = llm.sequences(prompts, params)
    return decided(llm.run(sequences), sequences)


def decided(steps: Iterable[Any], sequences: list[Any]) -> list[tuple[list[int], list[Decision]]]:
    """Make the steps; return the tokens of every sequence, and what each of its steps decided."""
    found: dict[Any, list[Decision]] = {sequence: [] for sequence in sequences}
    for step in steps:
        for sequence, tree, path in zip(step.sequences, step.trees, step.paths, strict=True):
            HOST["length"] = sequence.length
            found[sequence].append((tree.tokens, len(path.nodes), path.next_token))
    return [(sequence.tokens, found[sequence]) for sequence in sequences]


def served(engine: Any) -> Iterator[Any]:
    """Yield the steps of an engine until it has nothing to do."""
    while engine.busy:
        yield from engine.advance()


def prove_tokens(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """All decisions are phase 5's; a step has one copy to the host; replays were not eager steps."""
    HOST["temperature"] = 0.5
    device, before = llm.backends.graphs.device, llm.backends.graphs.device.reads
    assert decisions(llm, PROMPTS[:3]) == decisions(make(phase5, folder, options), PROMPTS[:3]), "decisions differ"
    stats = llm.backends.graphs.stats
    assert stats.replays > 1, stats
    assert stats.captures == 1, stats
    assert set(stats.eager_steps) == {"a prompt"}, stats
    assert device.reads - before == stats.host_reads, "copies to the host that are not in the figures"
    assert stats.host_reads == stats.replays, f"{stats.host_reads} copies to the host in {stats.replays} steps"


def prove_many(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """40 prompts that come and go, with 1 to 7 new tokens each: phase 5's decisions."""
    prompts = [prompt.text[:24] for prompt in load_prompts("code", "test")[:40]]
    lengths = [1 + at * 5 % 7 for at in range(len(prompts))]
    assert len(prompts) == 40
    found = decisions(llm, prompts, lengths)
    assert found == decisions(make(phase5, folder, options), prompts, lengths), "decisions differ"
    stats = llm.backends.graphs.stats
    assert stats.replays == stats.host_reads > 1, stats
    assert set(stats.eager_steps) == {"a prompt"}, stats


MIXED: list[tuple[Any, float]] = [("coupled", 0.7), ("rejection", 0.7), ("longest_prefix", 0.7), ("rejection", 0.0)]


def prove_mixed(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """Sequences of several policies share a graph, or an eager step: each decides what it does alone in phase 5."""
    alone = [make(phase5, folder, {**options, "policy": name, "temperature": t}) for name, t in MIXED]
    wanted = [decisions(each, PROMPTS[:1])[0] for each in alone]
    assert wanted[0] != wanted[1] != wanted[2] != wanted[0], "the policies decide the same"
    for used in (llm, make(phase6, folder, {**options, "cuda_graph": "off"})):
        engine = phase6.LLMEngine(used, len(MIXED), 64)
        numbers = [
            engine.add_request(PROMPTS[0], dataclasses.replace(used.params, temperature=t), policy=name)
            for name, t in MIXED
        ]
        sequences = [engine.requests[number][0] for number in numbers]
        assert decided(served(engine), sequences) == wanted, "decisions differ"
    assert max(len(bucket.policies) for bucket in llm.backends.graphs.made) == 3
    assert set(llm.backends.graphs.stats.eager_steps) == {"a prompt"}


def prove_drafters(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """Between drafts on the device, a text that is looked up: it ends with a plain step, which keeps the graphs."""
    (wanted,) = decisions(make(phase5, folder, options), PROMPTS[:1])
    engine = phase6.LLMEngine(llm, 2, 64, others=[phase6.with_drafter(llm, "ngram")])
    asked: list[tuple[Any, int]] = [("model", llm.params.max_new_tokens), ("ngram", 4), ("model", 8)]
    for name, length in asked:
        number = engine.add_request(PROMPTS[0], dataclasses.replace(llm.params, max_new_tokens=length), drafter=name)
        (sequence,) = engine.requests[number]
        while engine.busy:
            engine.step()
        assert sequence.tokens == wanted[0][:length], "tokens differ"
    stats = llm.backends.graphs.stats
    assert set(stats.eager_steps) == {"a prompt", "the drafter drafts on the host"}, stats
    assert stats.captures == 2, stats


def prove_known(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """The key of a text's last token is not computed. A later prompt that begins with the text computes it."""
    reference, engine = make(phase5, folder, options), phase6.LLMEngine(llm, 2, 64)
    prompt = list(range(7, 16))
    for new in (16 - len(prompt), 6):
        params = dataclasses.replace(llm.params, max_new_tokens=new, ignore_eos=True)
        sequences = engine.requests[engine.add_request(prompt, params)]
        params = dataclasses.replace(reference.params, max_new_tokens=new, ignore_eos=True)
        alone = phase5.Sequence(prompt, params, reference.loaded.ending)
        assert decided(served(engine), sequences) == decided(reference.run([alone]), [alone]), "decisions differ"
        prompt = [*prompt, *alone.tokens, 5]
    assert llm.backends.graphs.stats.replays > 2


def prove_dead(llm: Any, folder: str, options: dict[str, Any]) -> None:
    """A lane past its end computes token 0. If its logits are not finite, the other lanes go on."""
    reference = make(phase5, folder, options)
    for each in (llm, reference):
        each.loaded.model.embedding.weight.data[0] = float("nan")
    lengths = [3, 8]
    assert decisions(llm, PROMPTS[1:3], lengths) == decisions(reference, PROMPTS[1:3], lengths), "decisions differ"


class Steps:
    """A step of its own over prompts that are prefilled, to look at its lanes and at its memory."""

    def __init__(self, llm: Any, prompts: list[str], rows: int) -> None:
        self.engine = phase6.LLMEngine(llm, rows, 64)
        self.sequences = llm.sequences(prompts)
        for sequence in self.sequences:
            sequence.eos_ids = ()  # a random model may begin with an end
            self.engine.add(sequence)
        while any(not sequence.tokens for sequence in self.sequences):
            list(self.engine.advance())
        runners: list[Any] = [self.engine.target, *([self.engine.draft] if self.engine.draft else [])]
        for runner in runners:
            for sequence in self.sequences:
                runner.manager.reserve(sequence, sequence.length + 40)
                runner.manager.begin(sequence, sequence.prompt + sequence.tokens)
        graphs: GraphSteps = llm.backends.graphs
        self.device: Any = graphs.device
        self.device.adopt([runner.model for runner in runners], [runner.manager.cache for runner in runners])
        k, greedy = llm.options.k if llm.speculative else 0, llm.params.greedy
        bucket = Bucket(rows, k, greedy, () if greedy or not k else (llm.policy,))
        self.step = graph_steps.DeviceStep(runners[0], runners[1] if k else None, bucket, self.device)
        self.caches = [store for runner in runners for store in runner.manager.cache.stores]
        self.runners = runners

    def load(self) -> None:
        self.device.copy_in(self.step.memory, loaded(self.step, self.sequences))

    def saved(self) -> list[torch.Tensor]:
        return [each.clone() for store in self.caches for each in (store.values, store.scales) if each is not None]

    def restore(self, saved: list[torch.Tensor]) -> None:
        each = [tensor for store in self.caches for tensor in (store.values, store.scales) if tensor is not None]
        for tensor, content in zip(each, saved, strict=True):
            tensor.copy_(content)


def prove_arguments(llm: Any) -> None:
    """Captured at different lengths and temperatures, in the same memory, the arguments are equal."""
    HOST["length"], HOST["temperature"] = 7, 0.5
    steps = Steps(llm, PROMPTS[:2], 2)
    first = steps.device.capture(steps.step.step)
    steps.load()
    first.replay()
    HOST["length"], HOST["temperature"] = 11, 0.75
    second = steps.device.capture(steps.step.step, like=first)
    assert first.recording.arguments == second.recording.arguments, "frozen arguments differ"
    assert len(first.recording.arguments) > 20


def prove_shrinking(llm: Any) -> None:
    """4 live lanes, then 3 and 1: dead ones hold poison, and no block of a dead lane or of nobody changes."""
    steps = Steps(llm, PROMPTS, 4)
    graph, before = steps.device.capture(steps.step.step), steps.saved()
    steps.load()
    whole = steps.step.results(steps.device.copy_out(graph.replay())())
    for live in (3, 1):
        steps.restore(before)
        steps.load()
        for field in steps.step.lanes:
            field[live:] = torch.full((), float("nan") if field.is_floating_point() else -1515870811)
        steps.step.lanes.live[live:] = 0
        kept = [tensor.clone() for tensor in untouched(steps, live)]
        results = steps.step.results(steps.device.copy_out(graph.replay())())
        assert results[:live] == whole[:live], f"{live} live lanes: other tokens"
        assert [result.emitted for result in results[live:]] == [0] * (4 - live), "a dead lane gains tokens"
        for now, then in zip(untouched(steps, live), kept, strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8)), "a block of others changed"


def untouched(steps: Steps, live: int) -> Iterator[torch.Tensor]:
    """Yield the memory of both caches that no live lane owns."""
    for runner in steps.runners:
        cache = runner.manager.cache
        numbers = [runner.manager.rows[sequence].number for sequence in steps.sequences[:live]]
        mine = (
            {page for number in numbers for page in cache.tables[number]} if hasattr(cache, "tables") else set(numbers)
        )
        others = [page for page in range(len(cache.keys[0].values)) if page not in mine]
        for store in cache.stores:
            yield from (each[others] for each in (store.values, store.scales) if each is not None)


def prove(folder: str, options: dict[str, Any], part: str, mutant: str | None) -> None:
    HOST["length"] = 7
    if mutant is not None:
        module, change = MUTANTS[mutant]
        changed = mutated(module, change, HOST=HOST)
        graph_steps.DeviceStep = changed.DeviceStep
        if module is graph_steps:
            backends.GraphSteps = changed.GraphSteps
    llm = make(phase6, folder, options)
    HOST["device"] = llm.backends.graphs.device
    if part in ("tokens", "all"):
        prove_tokens(llm, folder, options)
    if part == "many":
        prove_many(llm, folder, options)
    if part == "mixed":
        prove_mixed(llm, folder, options)
    if part == "drafters":
        prove_drafters(llm, folder, options)
    if part == "known":
        prove_known(llm, folder, options)
    if part == "dead":
        prove_dead(llm, folder, options)
    if part in ("arguments", "all"):
        prove_arguments(llm)
    if part in ("shrinking", "all"):
        prove_shrinking(llm)


if __name__ == "__main__":
    os.environ["SPECDEC_CUDA_EMULATOR"] = str(EMULATOR)
    prove(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
    print("proved")
