"""Backends that look usable but are not: a compiler that fails, a GPU without nvcc."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import phase5
from common.errors import UserError
from phase5.kernels import TORCH, Kernels, ledger, registry
from phase5.kernels.build import BuildError
from phase5.kernels.cuda import library

CPU, CARD = torch.device("cpu"), torch.device("cuda")


def compiler(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, ends: str = "exit 1") -> None:
    """Put a compiler of this name on the PATH that fails with a message."""
    script = folder / name
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal: no room" >&2\n{ends}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("SPECDEC_BUILD_DIR", str(folder / "cache"))
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("SPECDEC_CUDA_ARCH", "90a")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("exit 1", r"failed \(status 1\)"),
        ("exit 0", "ended with status 0 and did not write"),
        ("kill -40 $$", r"was killed \(signal 40\)"),
    ],
)
def test_auto_goes_on_without_what_cannot_be_built(
    ends: str,
    said: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If the compiler fails, torch computes, and stderr and the stats say so."""
    pytest.importorskip("pybind11")
    compiler(tmp_path, "g++", monkeypatch, ends)
    monkeypatch.delenv("CXX", raising=False)
    cpp = importlib.import_module("phase5.kernels.cpp")
    monkeypatch.setattr(cpp, "library", cpp.library.__wrapped__)  # another test may have built it already
    options: dict[str, Any] = {"model": str(make_checkpoint("llama")), "device": "cpu", "draft": "none"}
    llm = phase5.LLM(phase5.Options(**options, max_tokens=3))
    with pytest.raises(BuildError, match=rf"g\+\+ {said}(.|\n)*fatal: no room"):
        phase5.LLM(phase5.Options(**options, kernels="cpp"))
    assert len(llm.generate(["x"])[0].tokens) == 3
    report = llm.backends.report
    assert set(report["ops"].values()) == {"torch"}
    assert report["step"] == "torch"
    assert "fatal: no room" in report["why_not"]["cpp"]
    assert "fatal: no room" in report["why_no_cpp_step"]
    assert json.loads(json.dumps(report)) == report
    assert "note: without kernels in C++ for the CPU: g++ " in capsys.readouterr().err


def test_only_what_is_broken_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def prepare(device: torch.device) -> None:
        built.append("cuda")
        raise BuildError("nvcc failed")

    def backend(*ops: str, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(ops=lambda: dict.fromkeys(ops, len), why_not=lambda device: None, **more)

    made = {"cuda": backend("linear", "rope", prepare=prepare), "cpp": backend("rope", prepare=lambda device: None)}
    monkeypatch.setattr(registry, "module_of", made.get)
    monkeypatch.setattr(ledger, "entry", lambda *which: {"device": "A Card"})
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    report = registry.chosen("auto", CARD).report
    assert (report["ops"]["linear"], report["ops"]["rope"]) == ("torch", "cpp")
    assert report["why_not"]["cuda"] == "nvcc failed"
    assert built == ["cuda"]  # once
    with pytest.raises(BuildError, match="nvcc failed"):
        registry.chosen("cuda", CARD)
    assert registry.chosen("torch", CARD).kernels == TORCH
    assert built == ["cuda", "cuda"]


def test_a_card_without_nvcc(card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SPECDEC_FORCE_PY", raising=False)
    with pytest.raises(UserError, match="--kernels cuda cannot run here: there is no nvcc on the PATH; it comes with"):
        registry.choose("cuda", CARD)
    assert "there is no nvcc" in registry.choose("auto", CARD).report["why_not"]["cuda"]


def test_an_nvcc_that_fails(card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    compiler(tmp_path, "nvcc", monkeypatch)
    assert library.why_not(CARD) is None  # known only after a build
    with pytest.raises(BuildError, match=r"nvcc failed \(status 1\) on .*sm_90a(.|\n)*fatal: no room"):
        registry.chosen("cuda", CARD)
    assert not list((tmp_path / "cache").glob("*.so"))
    monkeypatch.setenv("SPECDEC_CUDA_ARCH", "hopper")
    with pytest.raises(UserError, match="SPECDEC_CUDA_ARCH='hopper' names no architecture; use one like 80, 90a"):
        registry.chosen("cuda", CARD)


def test_interpreted_kernels_read_matrices_as_they_were_loaded(
    make_checkpoint: Callable[..., Path], interpreted: None
) -> None:
    """On CPUs with bfloat16 products torch stores matrices in its own format, which other backends cannot read."""
    options: dict[str, Any] = {
        "model": str(make_checkpoint("llama")),
        "device": "cpu",
        "dtype": "bfloat16",
        "max_tokens": 2,
    }
    llm = phase5.LLM(phase5.Options(**options, kernels="triton", draft="none"))
    assert llm.backends.report["ops"] == dict.fromkeys(Kernels._fields, "triton")
    assert len(llm.generate(["x"])[0].tokens) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to emulate CUDA with")
def test_what_a_kernel_cannot_read_is_one_line(
    emulate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    ops = registry.operations("cuda")
    x, weight = torch.zeros(2, 8), torch.ones(8)
    for op, arguments, wrong in (
        ("rms_norm", (x.double(), weight.double(), 1e-5), "x is float64; expected float32, bfloat16 or float16"),
        ("rms_norm", (x, torch.ones(7), 1e-5), r"weight has shape \[7\]; expected \[8\]"),
        ("add_rms_norm", (x, x[:1], weight, 1e-5), r"residual has shape \[1, 8\]; expected \[2, 8\]"),
        ("add_rms_norm", (x, x.half(), weight, 1e-5), "residual is torch.float16; expected torch.float32"),
        ("rms_norm", (x.to("meta"), weight.to("meta"), 1e-5), "x is on meta; expected a CUDA device"),
    ):
        with pytest.raises(UserError, match=f"^cuda {op}: {wrong}$") as told:
            ops[op](*arguments)
        assert "\n" not in str(told.value)
