"""The C++ step against the torch model: every family, format, cache and instruction set; and equal bits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from phase5 import load
from phase5.attention import CachedAttention
from phase5.kernels import cpp
from phase5.kernels.cpp import library
from phase5.kernels.cpp.weights import Weights
from phase5.kernels.key_ranges import paths_of
from phase5.kernels.metadata import attention_metadata
from phase5.kv_cache import CacheShape, PagedCache, RingCache, StaticCache
from phase5.model import Transformer
from phase5.quantize import Format, quantize_model
from phase5.transfers import Upload
from phase5.tree import Tree

pytestmark = pytest.mark.skipif(cpp.why_not() is not None, reason=str(cpp.why_not()))

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "mixed")
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
CACHES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
ISAS = ("avx512", "avx512-plain", "avx2", "portable")
TREE = Tree([11, 12, 13, 14, 15, 16, 17], [-1, -1, 0, 0, 1, 2, 5])


def loaded(folder: Path) -> Transformer:
    model = load(str(folder), torch.float32, torch.device("cpu")).model
    assert isinstance(model, Transformer)
    return model


def has(isa: str) -> bool:
    return cpp.has_isa(isa)


@pytest.fixture(scope="module")
def folders(make_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            # 64 features, so that groups of int4 fit
            made[family] = make_checkpoint("qwen2" if family == "mixed" else family, **widths(family))
        return made[family]

    return folder


def widths(family: str) -> dict[str, Any]:
    if family == "gpt2":
        return {"n_embd": 64}
    if family == "opt":
        return {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96}
    more: dict[str, Any] = {} if family in ("mistral", "qwen3") else {"num_attention_heads": 4}
    if family == "mixed":  # the first layer sees eight tokens, the second all
        more |= {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    return {"hidden_size": 64, "intermediate_size": 96, **more}


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def torch_step(
    model: Transformer, cache: StaticCache, tokens: list[int], tree: Tree | None = None
) -> tuple[Tensor, Tensor]:
    """Append new tokens to row 0, and a tree after the last; return hidden states and logits."""
    held, text = cache.lengths[0], len(tokens)
    places = list(range(held, held + text))
    parents = list(range(-1, text - 1))
    if tree is not None:
        places += [held + text - 1 + depth for depth in tree.depths]
        tokens = tokens + tree.tokens
        parents += [text + parent if parent >= 0 else text - 1 for parent in tree.parents]
    positions = torch.tensor(places)
    windows, paths = set(model.config.windows), [paths_of(held, parents)]
    metadata = attention_metadata(cache, [0], [len(tokens)], Upload(torch.device("cpu")), windows=windows, paths=paths)
    behind = {window: CachedAttention(metadata, ranges) for window, ranges in metadata.ranges.items()}
    with torch.inference_mode():
        hidden, _ = model.states(torch.tensor([tokens]), positions[None], cached=behind)
        return hidden[0], model.logits(hidden)[0]


def rounded(model: Transformer, weights: str) -> None:
    """Round the matrices to the format, in place."""
    if weights in ("int8", "int4"):
        quantize_model(model, Format("int8") if weights == "int8" else Format("int4", 32), head=True)
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            kind = getattr(torch, weights)
            module.weight = torch.nn.Parameter(module.weight.detach().to(kind).float(), requires_grad=False)


def close(got: Tensor, expected: Tensor, bound: float) -> None:
    """Check that logits differ by less than `bound` of the largest."""
    scale = expected.abs().max()
    assert ((got - expected).abs().max() / scale).item() < bound


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_step_is_the_models(family: str, weights: Weights, folders: Callable[[str], Path]) -> None:
    """Prefill, decode, taps and hidden states with float32 activations: only the order of sums differs."""
    model = loaded(folders(family))
    rounded(model, weights)
    fast = cpp.CppModel(model, weights, 2, exact_activations=True)
    ours, theirs = fast.new_cache(1, 128), fast.new_cache(1, 128)
    for count in (21, 1, 1, 5):
        tokens = tokens_of(count, count)
        hidden, logits = torch_step(model, theirs, tokens)
        stepped = fast.step(ours, [tokens], wanted=range(count), hidden=True)
        assert stepped.logits is not None
        assert stepped.hidden is not None
        close(stepped.logits, logits, 2e-5)
        close(stepped.hidden, hidden, 2e-5)
        ours.keep(0, list(range(count)))
        theirs.keep(0, list(range(count)))
    for mine, reference in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        torch.testing.assert_close(mine.values[:, :, :28], reference.values[:, :, :28], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_rounded_activations_stay_near(weights: Weights, folders: Callable[[str], Path]) -> None:
    """bfloat16 has 8 bits of mantissa, int8 a scale per 64 activations: the tiny models' logits move by percents."""
    model = loaded(folders("llama"))
    rounded(model, weights)
    fast = cpp.CppModel(model, weights, 2, exact_activations=False)
    cache = fast.new_cache(1, 64)
    tokens = tokens_of(24)
    _, logits = torch_step(model, fast.new_cache(1, 64), tokens)
    stepped = fast.step(cache, [tokens], wanted=range(24))
    assert stepped.logits is not None
    close(stepped.logits, logits, 0.08)


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "mixed"])
def test_every_cache(kind: torch.dtype, family: str, folders: Callable[[str], Path]) -> None:
    """The cache equals what storage.py writes, except for single roundings; reads return it."""
    model = loaded(folders(family))
    fast = cpp.CppModel(model, "float32", 2)
    ours, theirs = fast.new_cache(1, 64, kind), fast.new_cache(1, 64, kind)
    for count in (17, 3, 1):
        tokens = tokens_of(count, count)
        _, logits = torch_step(model, theirs, tokens)
        stepped = fast.step(ours, [tokens], wanted=range(count))
        assert stepped.logits is not None
        close(stepped.logits, logits, {torch.float32: 2e-5, torch.float16: 1e-3}.get(kind, 1e-2))
        ours.keep(0, list(range(count)))
        theirs.keep(0, list(range(count)))
    for mine, reference in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        got, expected = mine.read((0, slice(None), slice(0, 21))), reference.read((0, slice(None), slice(0, 21)))
        close(got, expected, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(kind, 2e-2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", FORMATS)
def test_every_instruction_set(
    isa: str, weights: Weights, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has(isa):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("SPECDEC_CPU_ISA", isa)
    model = loaded(folders("qwen3"))
    rounded(model, weights)
    tokens = tokens_of(23)
    _, logits = torch_step(model, StaticCache(*cache_arguments(model)), tokens)
    for exact, bound in ((True, 2e-5), (False, 0.08)):
        fast = cpp.CppModel(model, weights, 2, exact_activations=exact)
        assert fast.isa == isa
        whole = fast.step(fast.new_cache(1, 64), [tokens], wanted=range(23)).logits
        assert whole is not None
        close(whole, logits, bound)
        assert torch.equal(whole, one_by_one(fast, tokens))


def cache_arguments(model: Transformer) -> tuple[CacheShape, int, int, torch.dtype, torch.dtype, torch.device]:
    from phase5.runner import cache_shape

    return cache_shape(model.config), 1, 64, torch.float32, torch.float32, torch.device("cpu")


def one_by_one(fast: cpp.CppModel, tokens: list[int], kind: torch.dtype = torch.float32) -> Tensor:
    """Compute every token in its own step."""
    cache = fast.new_cache(1, 80, kind)
    rows = []
    for token in tokens:
        logits = fast.step(cache, [[token]]).logits
        assert logits is not None
        rows.append(logits)
        cache.keep(0, [0])
    return torch.cat(rows)


@pytest.mark.covering(1)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_same_bits_for_any_number_of_tokens_and_threads(
    weights: Weights, kind: torch.dtype, every: bool, folders: Callable[[str], Path]
) -> None:
    """Some: every number of tokens with one thread, and with two or with three; small numbers for 27 tokens."""
    model = loaded(folders("llama"))
    tokens = tokens_of(70)  # more than a block
    expected = one_by_one(cpp.CppModel(model, weights, 1, exact_activations=False), tokens, kind)
    for threads in (1, 2, 3):
        fast = cpp.CppModel(model, weights, threads, exact_activations=False)
        for width in (*range(1, 14), 40, 70):
            if not every and threads > 1 and (width + threads) % 2:
                continue
            cache = fast.new_cache(1, 80, kind)
            rows = []
            text = tokens if every or width > 13 else tokens[:27]
            for first in range(0, len(text), width):
                some = text[first : first + width]
                logits = fast.step(cache, [some], wanted=range(len(some))).logits
                assert logits is not None
                rows.append(logits)
                cache.keep(0, list(range(len(some))))
            assert torch.equal(torch.cat(rows), expected[: len(text)]), (threads, width)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "mixed"])
def test_a_tree_is_its_lines(family: str, folders: Callable[[str], Path]) -> None:
    """Every node's logits equal those of its path decoded alone, bit for bit, and are close to the torch model's."""
    model = loaded(folders(family))
    fast = cpp.CppModel(model, "float32", 2)
    text = tokens_of(13)
    cache, theirs = fast.new_cache(1, 64), fast.new_cache(1, 64)
    _, logits = torch_step(model, theirs, text, TREE)
    parents = [*range(-1, len(text) - 1), *(len(text) - 1 if p < 0 else len(text) + p for p in TREE.parents)]
    got = fast.step(cache, [text + TREE.tokens], parents=[parents], wanted=range(len(parents))).logits
    assert got is not None
    close(got, logits, 2e-5)
    for node in range(len(TREE.tokens)):
        line = one_by_one(fast, text + TREE.line(node))
        assert torch.equal(got[len(text) + node], line[-1])
    kept = [len(text) + node for node in (0, 2, 5, 6)]
    cache.keep(0, [*range(len(text)), *kept])
    after = fast.step(cache, [[3]]).logits
    assert after is not None
    assert torch.equal(after[0], one_by_one(fast, [*text, 11, 13, 16, 17, 3])[-1])


def cache_of(fast: cpp.CppModel, place: str, kind: torch.dtype, rows: int = 2) -> Any:
    """A cache with room for 64 tokens in a row; the pages of a row are in random order, between those of others."""
    config, device = fast.config, torch.device("cpu")
    shape = CacheShape(config.layers, config.kv_heads, config.head_dim)
    if place == "static":
        return StaticCache(shape, rows, 64, kind, torch.float32, device)
    if place == "ring":
        return RingCache(shape, rows, 8, kind, torch.float32, device)
    cache = PagedCache(shape, rows, 4 * rows, kind, torch.float32, device)
    random.Random(4).shuffle(cache.free)
    return cache


def grown(fast: cpp.CppModel, cache: Any, tree: bool) -> list[Tensor]:
    """Compute ragged steps of two rows, with a tree in each of them; return all logits."""
    texts, found, at = [tokens_of(48, 1), tokens_of(48, 2)], list[Tensor](), 0
    for widths in ((5, 3), (1, 1), (2, 9), (1, 0), (4, 4), (16, 1), (3, 3), (1, 1), (13, 13)):
        parents = [[max(-1, token - 2) if tree else token - 1 for token in range(width)] for width in widths]
        tokens = [
            text[cache.lengths[row] :][:width] for row, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        for row, width in enumerate(widths):
            cache.make_room(row, width)
        logits = fast.step(cache, tokens, parents=parents, wanted=range(sum(widths))).logits
        assert logits is not None
        found.append(logits)
        for row, width in enumerate(widths):  # a tree keeps every second token
            at = width - 1 if width else -1
            kept = [token for token in range(width) if not tree or (token - at) % 2 == 0]
            cache.keep(row, kept)
    return found


@pytest.mark.covering(2)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize(
    "where",
    [("llama", "paged"), ("mixed", "paged"), ("mistral", "paged"), ("mistral", "ring")],
    ids=", ".join,
)
def test_pages_and_rings_have_the_bits_of_a_static_cache(
    where: tuple[str, str], kind: torch.dtype, tree: bool, folders: Callable[[str], Path]
) -> None:
    """The order of sums depends on positions, not on where keys and values are."""
    family, place = where
    model = loaded(folders(family))
    formats: list[tuple[int, Weights]] = [(1, "float32"), (3, "bfloat16")]
    for threads, weights in formats:
        fast = cpp.CppModel(model, weights, threads)
        expected = grown(fast, cache_of(fast, "static", kind), tree)
        cache = cache_of(fast, place, kind)
        for storage in (*cache.keys, *cache.values):  # what was not written is not read
            storage.values.fill_(99 if kind == torch.int8 else float("nan"))
        got = grown(fast, cache, tree)
        assert all(torch.equal(mine, other) for mine, other in zip(got, expected, strict=True))
        if place == "paged":
            assert cache.tables[0] != list(range(len(cache.tables[0])))


def test_ragged_rows_are_their_texts(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("qwen2"))
    fast = cpp.CppModel(model, "bfloat16", 2)
    cache = fast.new_cache(3, 64)
    texts = {2: tokens_of(9, 1), 0: tokens_of(4, 2)}
    fast.step(cache, list(texts.values()), rows=list(texts), wanted=[], logits=False)
    for row, text in texts.items():
        cache.keep(row, list(range(len(text))))
    logits = fast.step(cache, [[5, 6], [7]], rows=[0, 2]).logits
    assert logits is not None
    assert torch.equal(logits[0], one_by_one(fast, [*texts[0], 5, 6])[-1])
    assert torch.equal(logits[1], one_by_one(fast, [*texts[2], 7])[-1])


def test_taps_are_the_layers_outputs(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("llama"))
    fast = cpp.CppModel(model, "float32", 2)
    tokens = tokens_of(37)
    with torch.inference_mode():
        _, tapped = model.states(torch.tensor([tokens]), taps=(0, 1))
    got = fast.step(fast.new_cache(1, 64), [tokens], taps=(0, 1), wanted=[2, 35, 36], logits=False)
    assert tapped is not None
    assert got.tapped is not None
    assert got.logits is None
    close(got.tapped, tapped[0, [2, 35, 36]], 1e-5)


def test_nothing_unwritten_is_read(folders: Callable[[str], Path]) -> None:
    """Memory after the row's end is NaN, and is not read."""
    model = loaded(folders("mistral"))
    fast = cpp.CppModel(model, "float32", 2)
    tokens = tokens_of(19)
    for poison in (float("nan"), 1e30):
        cache = fast.new_cache(2, 64)
        for storage in (*cache.keys, *cache.values):
            storage.values.fill_(poison)
        logits = fast.step(cache, [tokens], rows=[1], wanted=range(19)).logits
        assert logits is not None
        assert torch.equal(logits, one_by_one(fast, tokens))


def test_quantised_models_keep_their_levels(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("llama"))
    quantize_model(model, Format("int4", 32, asymmetric=True))
    fast = cpp.CppModel(model, "float32", 2, exact_activations=True)
    tokens = tokens_of(12)
    _, logits = torch_step(model, fast.new_cache(1, 64), tokens)
    got = fast.step(fast.new_cache(1, 64), [tokens], wanted=range(12)).logits
    assert got is not None
    close(got, logits, 2e-5)


def test_matrices_can_be_released(folders: Callable[[str], Path]) -> None:
    model = loaded(folders("llama"))
    tokens = tokens_of(12)
    expected = cpp.CppModel(model, "float32", 2)
    released = cpp.CppModel(model, "float32", 2, release=True)
    assert all(
        module.weight.numel() == 0 for name, module in model.layers.named_modules() if name.endswith(("qkv", "down"))
    )
    a = expected.step(expected.new_cache(1, 32), [tokens]).logits
    b = released.step(released.new_cache(1, 32), [tokens]).logits
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)


def test_what_cannot_be_is_named(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folders("llama"))
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        cpp.CppModel(model, "float32", 0)
    fast = cpp.CppModel(model, "float32", 1)
    cache = fast.new_cache(1, 8)
    for tokens, message in (([320], "not in the vocabulary"), ([1] * 9, "no room")):
        with pytest.raises(ValueError, match=message):
            fast.step(cache, [tokens])
    with pytest.raises(ValueError, match="must come before it"):
        fast.step(cache, [[1, 2]], parents=[[1, -1]], positions=[[0, 1]])
    with pytest.raises(ValueError, match="no such row"):
        fast._engine.step([1], [0], [library().Row(fast.view(cache), [4], 0)], [1], [], [0], [], 0, 0, 0, 0)
    with pytest.raises(ValueError, match="tapped layer is not there"):
        fast.step(cache, [[1]], taps=(9,))
    monkeypatch.setenv("SPECDEC_CPU_ISA", "mmx")
    with pytest.raises(UserError, match="SPECDEC_CPU_ISA=mmx is unknown"):
        cpp.CppModel(model, "float32", 1)
    monkeypatch.delenv("SPECDEC_CPU_ISA")
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    assert "SPECDEC_FORCE_PY" in str(cpp.why_not())
    monkeypatch.delenv("SPECDEC_FORCE_PY")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in str(cpp.why_not())


def test_too_many_threads_are_noted(folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    cpp.CppModel(loaded(folders("llama")), "float32", (os.cpu_count() or 1) + 1)
    assert "will wait for one another" in capsys.readouterr().err


def test_other_caches_and_models_are_refused(folders: Callable[[str], Path]) -> None:
    from phase5.kv_cache import DynamicCache

    fast = cpp.CppModel(loaded(folders("llama")), "float32", 1)
    other = DynamicCache(fast.new_cache(1, 1).shape, 1, torch.float32, torch.float32, torch.device("cpu"))
    assert "use --kv static or paged" in str(fast.why_not_cache(other))
    with pytest.raises(UserError, match="caches of one tensor, and this is a DynamicCache"):
        fast.view(other)  # type: ignore[arg-type]
    odd = loaded(folders("opt"))
    object.__setattr__(
        odd.layers[0].ffn.down,  # type: ignore[union-attr]
        "in_features",
        50,
    )
    with pytest.raises(UserError, match="groups of 32 or 64"):
        cpp.CppModel(odd, "int4", 1)


def test_a_fork_is_noticed(folders: Callable[[str], Path]) -> None:
    """Threads do not survive a fork: in the child a step raises an error."""
    fast = cpp.CppModel(loaded(folders("llama")), "float32", 2)
    fast.step(fast.new_cache(1, 8), [[1]])
    child = os.fork()
    if child == 0:
        try:
            fast.step(fast.new_cache(1, 8), [[1]])
        except RuntimeError as error:
            os._exit(7 if "make it after a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
