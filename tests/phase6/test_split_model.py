"""A model that several ranks share computes what one process computes: bit for bit, or within a tolerance."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import phase4
import phase6
from common.prompts import load_prompts
from phase4.quantize import Format, quantize_model
from phase4.quantize_calibrated import Method, quantize_calibrated
from phase4.quantize_files import save_quantized
from phase6.drafters.heads import build_heads, save_heads
from phase6.kv_cache import PagedCache
from tests.support.quantised import CASES, quantise
from tests.support.ranks import end, groups, logits_of, same_bits, split
from tests.support.served import WHY_NOT_CPP
from tests.support.small import randomise

pytestmark = pytest.mark.skipif(WHY_NOT_CPP is not None, reason=str(WHY_NOT_CPP))

PROMPTS = [[5, 6, 7, *list(range(20, 60))], [9, 8], list(range(100, 119))]
SHAPES: dict[str, dict[str, Any]] = {  # num_key_value_heads 2: with 4 ranks two of them share one
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
    },
    "gpt2": {"n_head": 4, "n_layer": 4, "tie_word_embeddings": True},
    "opt": {"num_attention_heads": 4, "num_hidden_layers": 4},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 4},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "gather": {"tensor_parallel": 2},
    "gather4": {"tensor_parallel": 4},
    "reduce": {"tensor_parallel": 2, "tensor_mode": "reduce"},
    "layers": {"pipeline_parallel": 2},
    "layers4": {"pipeline_parallel": 4, "micro_batches": 2},
}
HEADS: dict[str, dict[str, Any]] = {  # with layers of every rank, in an order of their own
    "eagle": {"ffn_width": 64, "reach": 32, "taps": (3, 0, 2)},
    "medusa": {"heads": 3, "read_token": True, "taps": (2, 1)},
}
EXACT = ["gather", "gather4", "layers", "layers4"]
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4", "quant_group": 32},
}
# The quick cases: a split of outputs cuts the packed matrices of every format and the tensors of every family; a split
# of layers cuts none, and needs one case with a position table and one with narrow numbers. With fewer key-value heads
# than ranks, two ranks share one.
QUICK = {
    *(("gather", format) for format in FORMATS),
    *(("gather", family) for family in SHAPES),
    *(("gather4", "int4"), ("gather4", "qwen2"), ("gather4", "gpt2")),
    *(("layers", "bfloat16"), ("layers", "gpt2"), ("layers4", "int8"), ("layers4", "opt")),
}
TOLERANCE = 1e-4  # of partial sums in float32, relative to the largest logit


def exact(*others: str) -> list[Any]:
    """Return every exact mode with every format or family; those outside of QUICK are slow."""
    every = itertools.product(EXACT, others)
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in every]


@pytest.fixture(scope="module")
def folder_of(make_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    made = dict[str, Path]()

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, **SHAPES[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def heads_of(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`heads_of("llama", "eagle")`: a folder with random heads for the model of that family."""

    def get(family: str, kind: Any) -> Path:
        target = phase6.load(str(folder_of(family)), torch.float32, torch.device("cpu"))
        folder = tmp_path_factory.mktemp("heads")
        save_heads(folder, randomise(build_heads(kind, HEADS[kind], target.config), seed=2), target)
        return folder

    return get


@pytest.fixture
def both(folder_of: Callable[[str], Path]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`both("llama", "gather", ...)`: LLMs of one process and of several ranks, with the same options."""
    started = list[Any]()

    def get(family: str, mode: str, **more: Any) -> tuple[Any, Any]:
        folder = str(folder_of(family))
        options: dict[str, Any] = {
            "model": folder,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "draft": "none",
        } | more
        if options["draft"] == "itself":
            options["draft"] = folder
        llm, threads = split(phase6.Options(**options, **MODES[mode]))
        started.append((llm, threads))
        for name in ("draft_parallel", "micro_batches"):
            options.pop(name, None)
        return phase6.LLM(phase6.Options(**options)), llm

    yield get
    for llm, threads in started:
        end(llm, threads)


def params(**more: Any) -> Any:
    return phase6.SamplingParams(max_new_tokens=8, ignore_eos=True, **more)


@pytest.mark.parametrize(("mode", "format"), exact(*FORMATS))
def test_outputs_that_are_gathered_and_layers_have_the_same_bits(
    both: Callable[..., tuple[Any, Any]], mode: str, format: str
) -> None:
    one, several = both("llama", mode, **FORMATS[format])
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)


@pytest.mark.parametrize(("mode", "family"), exact("gpt2", "opt", "qwen2", "qwen3"))
def test_every_family_is_split(both: Callable[..., tuple[Any, Any]], mode: str, family: str) -> None:
    """Learned positions, biases, norms of heads, tied and untied heads; fewer key-value heads than ranks."""
    one, several = both(family, mode)
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)


@pytest.mark.parametrize("mode", ["gather", "layers"])
@pytest.mark.parametrize("name", ["gptq, act-order, zeros", "awq", "compressed-tensors, int8"])
def test_files_of_other_tools_are_split(
    folder_of: Callable[[str], Path], both: Callable[..., tuple[Any, Any]], tmp_path: Path, name: str, mode: str
) -> None:
    meant, folder = tmp_path / "meant", tmp_path / "quantised"
    shutil.copytree(folder_of("llama"), meant)
    quantise(CASES[name], meant, folder)
    one, several = both("llama", mode, model=str(folder))
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)


@pytest.mark.parametrize("mode", ["gather", "layers4"])
@pytest.mark.parametrize(
    ("family", "format", "method", "head"),
    [
        ("llama", Format("int8"), "rtn", True),
        ("llama", Format("int4", 32, asymmetric=True), "awq", False),
        ("gpt2", Format("int8"), "gptq", True),
    ],
    ids=["int8 and head", "int4, awq", "tied, int8, gptq and head"],
)
def test_files_of_quantize_py_are_split(
    folder_of: Callable[[str], Path],
    both: Callable[..., tuple[Any, Any]],
    tmp_path: Path,
    family: str,
    format: Format,
    method: Method,
    head: bool,
    mode: str,
) -> None:
    """Fused matrices are cut part by part; scales of activations and a quantised output matrix go with them."""
    source = phase4.load(str(folder_of(family)), torch.float32, torch.device("cpu"))
    if method == "rtn":
        quantize_model(source.model, format, head)
    else:
        quantize_calibrated(source.model, format, method, torch.arange(64).view(2, 32), head)
    save_quantized(tmp_path / "saved", source.checkpoint, source.model, format, torch.float32, {})
    one, several = both(family, mode, model=str(tmp_path / "saved"))
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)


@pytest.mark.parametrize("family", SHAPES)
def test_partial_sums_are_within_the_tolerance(both: Callable[..., tuple[Any, Any]], family: str) -> None:
    one, several = both(family, "reduce")
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert theirs == tokens
    assert largest_error(logits, their_logits) < TOLERANCE


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_partial_sums_in_narrow_formats(both: Callable[..., tuple[Any, Any]], format: str) -> None:
    """Quantised activations jump by a level where a sum differs in its last bit."""
    one, several = both("llama", "reduce", **FORMATS[format])
    (_, logits), (_, their_logits) = (logits_of(llm, PROMPTS, params()) for llm in (one, several))
    assert largest_error(logits[:1], their_logits[:1]) < (TOLERANCE if format == "bfloat16" else 0.05)


@pytest.mark.parametrize("mode", ["gather", "layers"])
@pytest.mark.parametrize(
    "how",
    [
        {"draft": "itself", "draft_quant": "int8"},
        {"draft": "itself", "draft_quant": "int8", "draft_parallel": True},
        {"drafter": "ngram", "draft": "auto"},
        {"draft": "itself", "draft_quant": "int8", "tree": "static", "tree_nodes": 6},
    ],
    ids=["whole draft", "split draft", "ngram", "tree"],
)
def test_speculative_decoding_has_the_same_tokens_and_steps(
    both: Callable[..., tuple[Any, Any]], mode: str, how: dict[str, Any]
) -> None:
    """Rejected drafts are dropped on every rank; accepted branches of a tree are moved there."""
    one, several = both("llama", mode, policy="coupled", **how)
    sampled = params(temperature=1.0, seed=3)
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, sampled) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)
    assert len(logits) < 3 * 8


@pytest.mark.parametrize(
    ("mode", "kind", "family", "how"),
    [
        ("gather", "eagle", "llama", {}),
        ("gather", "medusa", "gpt2", {"quant": "int8", "draft_quant": "int8"}),
        ("gather", "extrapolate", "llama", {"stop": ["no such text"]}),
        ("gather4", "medusa", "llama", {"tree": "static", "tree_nodes": 6}),
        ("layers", "eagle", "gpt2", {"dtype": "bfloat16"}),
        ("layers", "medusa", "llama", {"quant": "int8", "quant_head": True}),
        ("layers", "extrapolate", "opt", {}),
        ("layers4", "eagle", "llama", {"tree": "dynamic", "tree_nodes": 6}),
        ("layers4", "medusa", "qwen2", {"frequency_penalty": 0.3}),
    ],
)
def test_drafters_that_read_hidden_states_draft_the_same(
    both: Callable[..., tuple[Any, Any]],
    heads_of: Callable[[str, str], Path],
    mode: str,
    kind: str,
    family: str,
    how: dict[str, Any],
) -> None:
    """Rank 0 gets the states of the last layer and of those that the heads name, in their order, on whatever rank.

    The logits are of draft tokens too, so equal bits are equal drafts.
    """
    heads = {"heads": str(heads_of(family, kind))} if kind in HEADS else {}
    one, several = both(family, mode, draft="auto", drafter=kind, policy="coupled", **heads, **how)
    sampled = dataclasses.replace(one.params, max_new_tokens=8, ignore_eos=True, temperature=1.0, seed=3)
    (tokens, logits), (theirs, their_logits) = (logits_of(llm, PROMPTS, sampled) for llm in (one, several))
    assert theirs == tokens
    assert same_bits(logits, their_logits)
    assert logits[1].shape[1] > 1  # something was drafted


@pytest.mark.parametrize("mode", ["gather", "reduce", "layers"])
@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_drafts_of_trained_heads_are_accepted(mode: str, kind: str) -> None:
    """States of accepted tokens, of prompts in chunks and of known prompts reach the heads of a split model."""
    chosen: dict[str, Any] = {"model": "stdlib-10m", "dtype": "float32", "device": "cpu", "threads": 1, "drafter": kind}
    one, (several, threads) = phase6.LLM(phase6.Options(**chosen)), split(phase6.Options(**chosen, **MODES[mode]))
    texts = [prompt.text for prompt in load_prompts("code", "test")[:2]]
    for _ in range(2):
        found = [logits_of(llm, one.encoder.encode(texts), params()) for llm in (one, several)]
        (tokens, logits), (theirs, their_logits) = found
        assert theirs == tokens
        assert len(their_logits) < 8
        if mode == "reduce":
            assert largest_error(logits, their_logits) < TOLERANCE
        else:
            assert same_bits(logits, their_logits)
    end(several, threads)


def test_numbers_that_were_taken_are_freed() -> None:
    """A rank that sends states or logits in every step keeps those of few steps."""
    first, second = groups("layers", 2)
    sent = list[weakref.ref[Tensor]]()
    for _ in range(200):
        tensor = torch.zeros(4)
        sent.append(weakref.ref(tensor))
        second.send(tensor, 0)
        first.receive(torch.empty(4), 1)
        first.tell("the next step")
        second.hear()
    del tensor
    assert sum(each() is not None for each in sent) < 100


@pytest.mark.parametrize("mode", ["gather", "layers"])
@pytest.mark.parametrize("kv", [{"kv": "static"}, {"kv_dtype": "int8"}, {"kv_pages": 9, "batch_size": 3}], ids=str)
def test_samples_share_their_prompt_on_every_rank(
    both: Callable[..., tuple[Any, Any]], mode: str, kv: dict[str, Any]
) -> None:
    """Copy-on-write, known prompts, preemption for lack of pages: the ranks have the tables of rank 0."""
    one, several = both("llama", mode, n=3, temperature=1.0, max_tokens=20, **kv)
    texts = ["def read(path):\n    return", "class Stack:"]
    for _ in range(2):  # the second time the prompts are known
        assert [each.tokens for each in several.generate(texts)] == [each.tokens for each in one.generate(texts)]


def test_times_are_kept_for_each_way_of_splitting(both: Callable[..., tuple[Any, Any]]) -> None:
    """`--controller cost` does not take the times of one process, or of another split, for its own."""
    ways: list[tuple[str, dict[str, Any]]] = [(mode, {"draft": "itself"}) for mode in MODES]
    ways += [
        ("layers", {"draft": "itself", "micro_batches": 1}),
        ("gather", {"draft": "itself", "draft_parallel": True}),
    ]
    made = [both("llama", mode, **more) for mode, more in ways]
    keys = {llm.prices.key(params(), 1) for llm in (made[0][0], *(several for _, several in made))}
    assert len(keys) == 1 + len(ways)


def test_a_second_run_takes_a_larger_cache(both: Callable[..., tuple[Any, Any]]) -> None:
    """The ranks make the new cache, and forget the one that rank 0 has freed."""
    one, several = both("llama", "gather")
    for count in (1, 3, 1):
        assert logits_of(several, PROMPTS[:count], params())[0] == logits_of(one, PROMPTS[:count], params())[0]


def test_caches_that_rank_0_has_freed_are_freed_on_every_rank(
    both: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, made, make = weakref.WeakSet[Any](), list[int](), PagedCache.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        alive.add(self)
        made.append(1)

    _, several = both("llama", "gather")
    monkeypatch.setattr(PagedCache, "__init__", counted)
    for count in (1, 2, 3):  # each needs a larger cache than the one before
        logits_of(several, PROMPTS[:count], params())
        gc.collect()
        assert (len(alive), len(made)) == (2, 2 * count)  # one on each rank


def largest_error(logits: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of steps with the same number of rows, relative to the largest logit."""
    assert [each.shape for each in logits] == [each.shape for each in theirs]
    errors = [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(logits, theirs, strict=True)]
    assert torch.isfinite(torch.tensor(errors)).all()
    return max(errors)
