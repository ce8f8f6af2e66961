"""The choice of backends, and its report: no fallback is silent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import phase5
from common.errors import UserError
from common.philox import Purpose
from phase5.kernels import TORCH, Kernels, ledger, registry
from phase5.policies import Rejection, SampleMatch
from tests.support.beside import beside

CPU, CARD = torch.device("cpu"), torch.device("cuda")
PHASE = Path(phase5.__file__).resolve().parents[1]


def nothing(*arguments: Any) -> Any:
    """A placeholder kernel."""


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace | None]:
    """Register the backends that a test names; others do not exist."""
    made: dict[str, SimpleNamespace | None] = {}
    monkeypatch.setattr(registry, "module_of", made.get)
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    return made


def backend(*ops: str, why_not: str | None = None, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(ops=lambda: dict.fromkeys(ops, nothing), why_not=lambda device: why_not, **more)


def listed(folder: Path, monkeypatch: pytest.MonkeyPatch, *kernels: tuple[str, str]) -> Path:
    """Write a ledger that lists these kernels, whatever their source."""
    monkeypatch.setattr(ledger, "fingerprint", lambda backend, op: f"{backend} {op}")
    book = folder / "verified.json"
    for of, op in kernels:
        beside(5, "checks.ledger").record(of, op, "A Card", ["a check"], book)
    return book


def test_without_anything_else_torch_does_everything(backends: dict[str, Any]) -> None:
    kernels, report = registry.choose("auto", CPU)
    assert kernels == TORCH
    assert set(report["ops"].values()) == {"torch"}
    assert set(report["why_not"]) == {"cuda", "triton", "cpp"}
    assert json.loads(json.dumps(report)) == report  # it goes into the stats


@pytest.mark.about("engine/kernels/registry.py, choose")
def test_auto_takes_the_first_that_has_the_op(
    backends: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends.update(cuda=backend("linear"), triton=backend("linear", "rope"), cpp=backend("rope", "rms_norm"))
    book = listed(tmp_path, monkeypatch, ("cuda", "linear"), ("triton", "linear"), ("triton", "rope"))
    kernels, report = registry.choose("auto", CARD, book=book)
    expected = {"linear": "cuda", "rope": "triton", "rms_norm": "cpp", "sample": "torch"}
    assert {op: report["ops"][op] for op in expected} == expected
    assert kernels.linear == nothing
    assert kernels.sample is TORCH.sample
    assert report["why_not"]["cuda"]["rope"] == "has no such kernel"


def test_auto_takes_no_kernel_that_no_card_has_seen(
    backends: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends.update(triton=backend("linear", "rope"))
    book = listed(tmp_path, monkeypatch, ("triton", "rope"))
    report = registry.choose("auto", CARD, book=book).report
    assert (report["ops"]["linear"], report["ops"]["rope"]) == ("torch", "triton")
    assert "not checked on a GPU" in report["why_not"]["triton"]["linear"]
    asked = registry.choose("triton", CARD, book=book).report
    assert asked["ops"]["linear"] == "triton"
    assert asked["warnings"][0].startswith("triton kernels that were not checked")
    assert "linear" in asked["warnings"][0]
    assert "rope" not in asked["warnings"][0]


def test_auto_interprets_nothing(backends: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` does not use GPU kernels on a CPU, where only tests run them."""
    backends.update(triton=backend("linear"))
    book = listed(tmp_path, monkeypatch, ("triton", "linear"))
    report = registry.choose("auto", CPU, book=book).report
    assert report["ops"]["linear"] == "torch"
    assert report["why_not"]["triton"].startswith("is for GPUs")
    assert registry.choose("triton", CPU, book=book).report["ops"]["linear"] == "triton"


def test_what_was_asked_for_runs_or_is_an_error(backends: dict[str, Any]) -> None:
    backends.update(cpp=backend(*Kernels._fields), cuda=backend("linear", why_not="there is no nvcc"))
    assert set(registry.choose("cpp", CPU).report["ops"].values()) == {"cpp"}
    assert registry.choose("torch", CPU).kernels == TORCH
    with pytest.raises(UserError, match="--kernels cuda cannot run here: there is no nvcc; auto chooses a backend"):
        registry.choose("cuda", CPU)
    with pytest.raises(UserError, match="--kernels triton cannot run here: is not part of this engine"):
        registry.choose("triton", CPU)
    with pytest.raises(UserError, match="unknown kernels 'tpu'; use auto, torch, cpp, triton, cuda"):
        registry.choose("tpu", CPU)


def test_a_backend_may_take_some_dtypes_only(backends: dict[str, Any]) -> None:
    backends.update(
        cpp=backend("linear", "rope", why_not_op=lambda op, dtype: "takes float32 alone" if op == "rope" else None)
    )
    report = registry.choose("auto", CPU, torch.bfloat16).report
    assert (report["ops"]["linear"], report["ops"]["rope"]) == ("cpp", "torch")
    assert report["why_not"]["cpp"]["rope"] == "takes float32 alone"


def test_functions_of_an_op(backends: dict[str, Any]) -> None:
    backends.update(cpp=backend("linear"), triton=backend("linear", why_not="no GPU"))
    assert registry.functions("linear", CPU) == {"cpp": nothing, "torch": TORCH.linear}
    with pytest.raises(UserError, match="there is no op 'convolve'; the ops are linear, "):
        registry.functions("convolve", CPU)
    backends.update(cpp=backend("convolve"))
    with pytest.raises(ValueError, match="cpp has ops that nobody asks for: convolve"):
        registry.choose("cpp", CPU)


def test_plain_torch_can_be_forced(backends: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backends.update(cpp=backend(*Kernels._fields))
    monkeypatch.setenv("SPECDEC_FORCE_PY", "1")
    kernels, report = registry.choose("auto", CPU)
    assert kernels == TORCH
    assert report["why_not"]["cpp"] == "SPECDEC_FORCE_PY=1 asks for torch alone"
    with pytest.raises(UserError, match="SPECDEC_FORCE_PY=1"):
        registry.choose("cpp", CPU)
    for word in ("0", "false", "off", ""):
        monkeypatch.setenv("SPECDEC_FORCE_PY", word)
        assert registry.choose("cpp", CPU).kernels.linear == nothing
    monkeypatch.setenv("SPECDEC_FORCE_PY", "perhaps")
    with pytest.raises(UserError, match="SPECDEC_FORCE_PY: expected 1 or 0"):
        registry.choose("auto", CPU)


def test_a_model_and_a_policy_use_what_was_chosen(make_checkpoint: Any) -> None:
    model = phase5.load(str(make_checkpoint("qwen3")), torch.float32, CPU).model
    kernels = TORCH._replace(linear=nothing)
    policies = Rejection(), SampleMatch(Purpose.DRAFT)
    for target in (model, *policies):
        registry.use(target, kernels)
        registry.use(target, kernels)  # twice is once
    using: list[Any] = [module for module in model.modules() if hasattr(type(module), "kernels")]
    assert len(using) > 8
    assert all(each.kernels is kernels for each in [*using, *policies])
    assert Rejection().kernels is TORCH


def test_the_doctor_sees_every_backend() -> None:
    found = registry.examine(CPU)
    assert [name for name, _, _ in found] == [f"kernels {backend}" for backend in registry.BACKENDS]
    by_name = {name: (there, what) for name, there, what in found}
    assert by_name["kernels torch"][0] == f"{len(Kernels._fields)} of {len(Kernels._fields)} ops"
    assert by_name["kernels cuda"][0] is None or torch.cuda.is_available()


def test_the_doctor_says_that_whole_steps_run_in_cpp(backends: dict[str, Any]) -> None:
    backends.update(cpp=backend("linear", "rope"))
    (text,) = (there for name, there, _ in registry.examine(CPU) if name == "kernels cpp")
    assert text == "whole steps of a model; and the ops linear, rope"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SPECDEC_FORCE_PY")}
    root = str(PHASE.parent)
    clean["PYTHONPATH"] = os.pathsep.join([str(PHASE), root, clean.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        cwd=root,
        check=False,
    )


def test_without_triton_all_runs_on_torch_and_says_so() -> None:
    """A backend is not imported before it is asked for."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'triton' else find(name, package)\n"
        "import torch, engine; from engine.kernels import registry\n"
        "print(registry.choose('auto', torch.device('cuda')).report['why_not']['triton'])\n"
        "registry.choose('triton', torch.device('cuda'))"
    )
    done = run(code)
    assert done.stdout == "triton is not installed\n"
    assert "UserError: --kernels triton cannot run here: triton is not installed" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_choosing_imports_triton_only_where_it_can_run() -> None:
    code = (
        "import sys, torch; from engine.kernels import registry\n"
        "report = registry.choose('auto', torch.device('cpu')).report\n"
        "print('triton' in sys.modules, '|', report['why_not']['triton'])"
    )
    done = run(code)
    assert done.stderr == ""
    assert done.stdout.startswith("False | triton needs a CUDA device, and this is cpu")
