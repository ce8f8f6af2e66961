"""Host traffic of a step on GPU kernels: one upload and one read, counted on emulated CUDA and interpreted Triton.

There is no card here, so a mode tells host tensors from device tensors: those made from Python numbers without a device
are the host's, and what is computed from them; all others count as the device's. Any copy between the two fails, except
in the two functions of engine/transfers.py, which are counted.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import phase5
from phase5 import speculative, transfers
from phase5.controllers import Bounds, ConfidenceController, FixedController
from phase5.device_runner import DeviceRunner
from phase5.drafters.model_device import DeviceModelDrafter
from phase5.kernels import Kernels, registry
from phase5.kv_cache import CacheShape, DynamicCache, RingCache, StaticCache
from phase5.kv_cache.manager import CacheManager

CPU = torch.device("cpu")
PROMPTS = ["import os", "def f(left, right):\n    return", "class A:"]
READS = {
    *("tolist", "item", "numpy", "cpu", "nonzero", "equal", "unique", "masked_select", "is_nonzero", "allclose"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
}
FROM_NUMBERS = {"tensor", "as_tensor", "from_numpy", "frombuffer", "new_tensor", "scalar_tensor"}


class Copied(Exception):
    """A copy between host and device outside of the two counted functions."""


class Watch(TorchFunctionMode):
    """Fails at copies between host and device, while `strict`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.inside = Counter[str](), False  # inside: of a counted function, or of a kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.inside:
            return func(*args, **kwargs)
        given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_host = [getattr(each, "on_host", False) for each in given]
        if name in READS and given and not all(on_host):
            raise Copied(f"the host reads the device: {name}")
        if name in FROM_NUMBERS and kwargs.get("device") is not None:
            raise Copied(f"an upload of its own: {name}")
        if name in ("__getitem__", "__setitem__") and given and not on_host[0]:
            for index in pytree.tree_leaves(args[1], is_leaf=lambda each: isinstance(each, list)):
                if isinstance(index, list) or (isinstance(index, Tensor) and index.dtype == torch.bool):
                    raise Copied(f"an index that is a list, or a mask: {name}")
        if name == "to" and any(on_host) and len(args) > 1 and isinstance(args[1], torch.device):
            raise Copied("an upload of its own: to")
        if any(on_host) and not all(on_host) and name not in ("__get__",):
            raise Copied(f"an operation on host and device: {name}")
        found = func(*args, **kwargs)
        if (given and all(on_host)) or (not given and kwargs.get("device") is None):
            for each in pytree.tree_leaves(found):
                if isinstance(each, Tensor):
                    each.on_host = True  # type: ignore[attr-defined]
        return found

    def within(self, function: Callable[..., Any], count: str | None = None) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if count is not None:
                self.counts[count] += 1
            before, self.inside = self.inside, True
            try:
                return function(*arguments, **more)
            finally:
                self.inside = before

        return call


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(transfers.Upload, "copied", watch.within(transfers.Upload.copied, "uploads"))
    monkeypatch.setattr(speculative, "read", watch.within(transfers.read, "reads"))
    return watch


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.slow)])
def kernels(
    request: pytest.FixtureRequest,
    emulate: Callable[[pytest.MonkeyPatch], None],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> Kernels:
    """Kernels of a backend; what the interpreter copies for itself does not count."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        for name in ("attention", "inputs", "linear", "norm", "prefix", "rope", "sample", "verify"):
            module = importlib.import_module(f"phase5.kernels.triton.{name}")
            monkeypatch.setattr(module, "launch", watch.within(module.launch))
    else:
        emulate(monkeypatch)
        loader = importlib.import_module("phase5.load")
        monkeypatch.setattr(loader, "reserve", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    return registry.choose(request.param, CPU).kernels


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> str:
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1}
    return str(make_checkpoint("llama", num_hidden_layers=1, **narrow))


def traffic(llm: Any, prompts: list[str], watch: Watch) -> Iterator[tuple[Any, Counter[str]]]:
    """Decode, and yield every step with its copies. The first step, which prefills the prompts, is not watched."""
    steps = llm.run(llm.sequences(prompts))
    yield next(steps), Counter()
    while True:
        watch.counts.clear()
        try:
            with watch:
                step = next(steps)
        except StopIteration:
            return
        yield step, Counter(watch.counts)


DRAFTING: dict[str, dict[str, Any]] = {
    "plain": {"draft": "none"},
    "ngram": {"drafter": "ngram", "k": 3},
    "model": {"k": 3},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("kv", ["static", "paged"])
@pytest.mark.parametrize("how", list(DRAFTING))
@pytest.mark.parametrize(
    "wanted",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "policy": "coupled"},
    ],
    ids=["greedy", "rejection", "coupled"],
)
def test_a_step_has_one_upload_and_one_read(
    how: str, kv: str, wanted: dict[str, Any], kernels: Kernels, folder: str, llm_on: Callable[..., Any], watch: Watch
) -> None:
    options = {
        "model": folder,
        "device": "cpu",
        "dtype": "float32",
        "kv": kv,
        "max_tokens": 8,
        **wanted,
        **DRAFTING[how],
    }
    if how == "model":
        options |= {"draft": folder, "draft_quant": "int8"}
    llm = llm_on(kernels, **options)
    drafted, accepted = 0, 0
    for number, (step, counts) in enumerate(traffic(llm, PROMPTS, watch)):
        drafted += sum(len(tree.tokens) for tree in step.trees)
        accepted += sum(len(path.nodes) for path in step.paths)
        if number:
            assert counts == {"uploads": 1, "reads": 1}, number
    if how == "model":
        assert drafted >= accepted > 0


@pytest.mark.covering(1)
@pytest.mark.parametrize("kv", ["static", "paged"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_device_draws_what_the_host_draws(
    temperature: float,
    kv: str,
    kernels: Kernels,
    folder: str,
    llm_on: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chains of different widths: prompts of different lengths and limits, so rows end one after the other."""
    options = {"model": folder, "device": "cpu", "dtype": "float32", "kv": kv, "temperature": temperature}
    llm = llm_on(kernels, **options, draft=folder, draft_quant="int8", k=4, max_tokens=12)
    params = [phase5.SamplingParams(temperature=temperature, max_new_tokens=n, seed=n) for n in (1, 12, 8)]
    found = []
    for able in (True, False):
        if not able:
            monkeypatch.setattr(DeviceModelDrafter, "able", lambda *_: False)
        sequences = llm.sequences(PROMPTS, params)
        steps = [(step.trees, [path.nodes for path in step.paths]) for step in llm.run(sequences)]
        found.append((steps, [sequence.tokens for sequence in sequences]))
    assert found[0] == found[1]
    assert {len(tree.tokens) for trees, _ in found[0][0] for tree in trees} >= {0, 4}


def test_what_the_device_cannot_draw_the_host_draws() -> None:
    shape, how = CacheShape(1, 1, 4), (torch.float32, torch.float32, CPU)
    static, ring, dynamic = StaticCache(shape, 1, 64, *how), RingCache(shape, 1, 8, *how), DynamicCache(shape, 1, *how)

    def able(
        cache: Any, width: int = 4, length: int = 10, source: Any = None, controller: Any = None, **params: Any
    ) -> bool:
        runner = object.__new__(DeviceRunner)
        runner.manager = CacheManager(cache, 1)
        runner.model = cast(Any, SimpleNamespace(config=SimpleNamespace(context=64)))
        sequence = phase5.Sequence(
            [1] * length, phase5.SamplingParams(temperature=1.0, **params), phase5.sequence.Ending()
        )
        sequence.controller = controller or FixedController(4)
        return DeviceModelDrafter(runner, source or phase5.KeyedSource()).able(runner, [sequence], [width])

    assert able(static)
    assert able(ring, 16)
    assert not able(ring, 17)  # more than a ring takes at once
    assert not able(dynamic)
    assert not able(static, presence_penalty=1.0)  # which follows from the tokens of the draft
    assert able(static, 4, 61)
    assert not able(static, 5, 61)  # the window would jump
    assert not able(static, source=object())
    assert not able(static, controller=ConfidenceController(Bounds(1, 4)))  # which looks at each distribution
    assert not able(static, 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: torch.tensor([1], device=x.device),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1, 2]),
        lambda x: torch.tensor([1, 2]).to(x.device),
    ],
)
def test_other_copies_are_caught(copy: Callable[[Tensor], Any], watch: Watch) -> None:
    x = torch.arange(2, device=CPU)
    with watch, pytest.raises(Copied):
        copy(x)


@pytest.mark.about("engine/transfers.py, Upload.send")
def test_an_upload_is_one_copy_of_all_that_waits() -> None:
    upload, sent = transfers.Upload(CPU), list[Tensor]()
    upload.put([7], 1)
    upload.begin()  # what was not used is forgotten
    arrays = upload.put([1, -2, 3], 3), upload.put_rows([[4], [], [5, 6]], 2), upload.put_longs([2**40, -1], 2)
    floats = upload.put_floats([0.1, 1e300], 1, 2)
    copied = upload.copied
    upload.copied = lambda host: sent.append(host) or copied(host)  # type: ignore[func-returns-value, method-assign]
    assert [each.tensor.tolist() for each in arrays] == [[1, -2, 3], [[4, 0], [0, 0], [5, 6]], [2**40, -1]]
    assert floats.tensor.tolist() == [[0.1, 1e300]]
    assert len(sent) == 1
    assert all(each.tensor.data_ptr() % 16 == arrays[0].tensor.data_ptr() % 16 for each in (*arrays, floats))
    assert upload.put([], 0, 3).tensor.shape == (0, 3)
    with pytest.raises(OverflowError):
        upload.put([2**31], 1)


def test_a_read_is_one_copy_back() -> None:
    found = transfers.read(torch.tensor([[1, 2], [3, 4]]), torch.tensor([], dtype=torch.int32), torch.tensor(True))
    assert found == [[1, 2, 3, 4], [], [1]]
