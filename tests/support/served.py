"""Small models for schedules of many requests, and each request alone in phase 5."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import phase5
import phase6
from phase6.kernels import registry
from phase6.tree_shapes import best_shape
from tests.support.small import small_heads

CONTEXT = 64
TEXT = tuple(range(10, 43))  # a prompt
WHY_NOT_CPP = registry.why_not("cpp", torch.device("cpu"))
DRAFTERS: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none"},
    "model": {"draft_quant": "int8"},  # of the target itself, so that most drafts are accepted
    "ngram": {"drafter": "ngram"},
    "medusa": {"drafter": "medusa"},
    "eagle": {"drafter": "eagle"},
    "tree": {"draft_quant": "int8", "tree": "static", "tree_nodes": 6},
}


class Request(NamedTuple):
    """What a request asks for."""

    prompt: tuple[int, ...]
    params: Any  # phase5.SamplingParams
    policy: str = "coupled"
    controller: str = "fixed"
    k: int = 3


class Result(NamedTuple):
    tokens: list[int]
    text: str
    finish_reason: str | None


class Pair:
    """An LLM of phase 6, and one of phase 5 with the same models, which decodes single requests."""

    def __init__(self, folder: Path, kernels: str, how: str, kv: str = "paged", **more: Any) -> None:
        chosen = {"model": str(folder), "dtype": "float32", "device": "cpu", "kernels": kernels, "threads": 1}
        chosen |= DRAFTERS[how]
        if "draft_quant" in chosen:
            chosen["draft"] = str(folder)
        chosen |= more
        made = list[Any]()
        for engine in (phase5, phase6):
            with pytest.MonkeyPatch.context() as patch:
                if how in ("medusa", "eagle"):
                    patch.setattr(f"{engine.__name__}.llm.find_heads", lambda option, target, kind: None)
                    heads = lambda folder, target, kind, engine=engine: small_heads(engine, kind, target.model)  # noqa: E731
                    patch.setattr(f"{engine.__name__}.llm.load_heads", heads)
                made.append(engine.LLM(engine.Options(**chosen, **({"kv": kv} if engine is phase6 else {}))))
        self.old, self.llm = made
        # A static tree has the shape for the engine's K, whatever the request's.
        self.shape = best_shape(self.llm.tree_acceptance()[: self.llm.options.k], self.llm.options.tree_nodes)
        self.known: dict[tuple[Request, int], Result] = {}

    def engine(self, rows: int = 4, pages: int = 0, budget: int = 32, **more: Any) -> Any:
        """Return an engine with a cache of its own."""
        self.llm.caches.clear()
        self.llm.options = self.llm.options.model_copy(update={"kv_pages": pages})
        return phase6.LLMEngine(self.llm, rows=rows, tokens=CONTEXT, budget=budget, **more)

    def alone(self, request: Request, sample: int = 0) -> Result:
        """Decode a request alone in phase 5."""
        if (request, sample) not in self.known:
            how = {"controller": request.controller, "k": request.k, "policy": request.policy}
            if not request.k:  # without drafts every request is decoded plainly
                how = {"controller": "fixed", "k": 1, "policy": "coupled"}
            self.old.options = self.old.options.model_copy(update=how)
            self.old.policy = self.old.options.acceptance_policy()
            params = request.params
            sequence = phase5.Sequence(list(request.prompt), params, self.old.loaded.ending, sample)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("phase5.llm.best_shape", lambda *_: self.shape)
                for _ in self.old.run([sequence]):
                    pass
            self.known[request, sample] = Result(sequence.tokens, sequence.text, sequence.finish_reason)
        return self.known[request, sample]


def add(engine: Any, request: Request, n: int = 1) -> int:
    params = phase6.SamplingParams(**dataclasses.asdict(request.params))
    number: int = engine.add_request(
        list(request.prompt), params, n=n, policy=request.policy, controller=request.controller, k=request.k
    )
    return number


def drain(engine: Any, found: dict[tuple[int, int], Result] | None = None) -> dict[tuple[int, int], Result]:
    """Make steps until nobody is left; return what every sample got."""
    found = {} if found is None else found
    while engine.busy:
        take(engine, found)
    return found


def take(engine: Any, found: dict[tuple[int, int], Result]) -> None:
    """Make one step, and add what it gave."""
    for output in engine.step():
        if output.error is not None:
            raise output.error
        before = found.get((output.request, output.sample), Result([], "", None))
        assert before.finish_reason is None
        both = before.tokens + output.tokens, before.text + output.text
        found[output.request, output.sample] = Result(*both, output.finish_reason)


def asked(prompt: tuple[int, ...] = TEXT, tokens: int = 8, **more: Any) -> Request:
    """Return a request that ends by its length; more: sampling parameters, policy, controller, k."""
    how = {name: more.pop(name) for name in ("policy", "controller", "k") if name in more}
    return Request(prompt, phase5.SamplingParams(max_new_tokens=tokens, ignore_eos=True, **more), **how)
