"""Chooses a backend for every op: the fastest one that runs on the device, or the one asked for by name.

Every op has a function per backend. `auto` tries CUDA, Triton, C++, torch, in this order. A GPU kernel is used only if
ledger.py lists its source as checked on a GPU. The report says which backend runs each op, and why others do not. No
fallback is silent, and a backend that is asked for by name and cannot run is an error.

    python -c "from engine.kernels.registry import choose; import torch; print(choose('auto', torch.device('cpu'))[1])"
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from common.errors import UserError
from common.flags import flag

from . import TORCH, Kernels, ledger
from .build import BuildError
from .fused import PARTS

Backend = Literal["cuda", "triton", "cpp", "torch"]  # in the order in which `auto` tries them
Asked = Literal["auto", "torch", "triton", "cuda", "cpp"]
Report = dict[str, Any]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FOR_CARDS = ("cuda", "triton")
WHAT = {
    "cuda": "kernels in CUDA C++",
    "triton": "kernels in Triton",
    "cpp": "kernels in C++ for the CPU",
}


class Selection(NamedTuple):
    """A function for every op, and the report of the choice, which goes into `stats["kernels"]`."""

    kernels: Kernels
    report: Report


def module_of(backend: Backend) -> ModuleType | None:
    """Return the package of a backend, with ops() and why_not(device); None if this engine has no such package."""
    spec = importlib.util.find_spec(f".{backend}", __package__)
    return None if spec is None or spec.origin is None else importlib.import_module(f".{backend}", __package__)


def why_not(backend: Backend, device: torch.device) -> str | None:
    """Return why a backend cannot run on a device; None if it can. Builds nothing."""
    if backend == "torch":
        return None
    if flag("SPECDEC_FORCE_PY"):
        return "SPECDEC_FORCE_PY=1 asks for torch alone"
    module = module_of(backend)
    if module is None:
        return "is not part of this engine"
    reason: str | None = module.why_not(device)
    return reason


def functions(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Return the functions of an op that run on a device, by backend. UserError for an unknown op."""
    if op not in Kernels._fields:
        raise UserError(f"there is no op {op!r}; the ops are {', '.join(Kernels._fields)}")
    able = {backend: operations(backend) for backend in BACKENDS[:-1] if why_not(backend, device) is None}
    return {backend: ops[op] for backend, ops in able.items() if op in ops} | {"torch": getattr(TORCH, op)}


def operations(backend: Backend) -> dict[str, Callable[..., Any]]:
    """Import a backend that can run here, and return its functions by op. ValueError for unknown ops."""
    module = module_of(backend)
    ops: dict[str, Callable[..., Any]] = {} if module is None else module.ops()
    if unknown := sorted(set(ops) - set(Kernels._fields)):
        raise ValueError(f"{backend} has ops that nobody asks for: {', '.join(unknown)}")
    return ops


def choose(
    asked: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    book: Path | None = None,
    broken: Mapping[Backend, str] = MappingProxyType({}),
) -> Selection:
    """Choose a function of every op for a device (and a dtype, if given), and report why. Builds nothing.

    `book`: the ledger's file. `broken`: backends whose build failed, and why. UserError for an unknown backend, and for
    one that is asked for by name and cannot run here.
    """
    if asked not in ("auto", *BACKENDS):
        raise UserError(f"unknown kernels {asked!r}; use auto, {', '.join(reversed(BACKENDS))}")
    reasons: dict[str, dict[str, str]] = {}  # of each backend, by op; "" means all ops
    offers: dict[str, dict[str, Callable[..., Any]]] = {}
    for backend in (each for each in BACKENDS[:-1] if asked in ("auto", each)):
        reason = broken.get(backend) or why_not(backend, device)
        if reason is None and asked == "auto" and backend in FOR_CARDS and device.type != "cuda":
            reason = f"is for GPUs; on {device.type} it runs slowly, and only if it is asked for by name"
        if reason is not None:
            if asked != "auto":
                raise UserError(f"--kernels {asked} cannot run here: {reason}; auto chooses a backend that can")
            reasons[backend] = {"": reason}
            continue
        offers[backend], reasons[backend] = _offered(backend, asked, dtype, book)
    ran: dict[str, str] = {}
    chosen: dict[str, Callable[..., Any]] = {}
    for op in Kernels._fields:
        ran[op] = next((backend for backend in offers if op in offers[backend]), "torch")
        chosen[op] = getattr(TORCH, op) if ran[op] == "torch" else offers[ran[op]][op]
    report: Report = {"asked": asked, "device": device.type, "ops": ran, "why_not": _brief(reasons)}
    report["by_parts"] = {op: list(parts) for op, parts in PARTS.items() if ran[op] == "torch"}
    unlisted = [op for op in offers[asked] if ledger.entry(asked, op, book) is None] if asked in FOR_CARDS else []
    if unlisted:
        warning = f"{asked} kernels that were not checked on a GPU yet run because they were asked for: "
        report["warnings"] = [f"{warning}{', '.join(unlisted)}; `make gpu` checks and lists them"]
    return Selection(Kernels(**chosen), report)


def _offered(
    backend: Backend, asked: str, dtype: torch.dtype | None, book: Path | None
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Return the ops that a backend offers, and the reason for every op that it does not offer."""
    ops, reasons = operations(backend), dict[str, str]()
    refuses = getattr(module_of(backend), "why_not_op", None)  # backends that support some dtypes only
    for op in Kernels._fields:
        if op not in ops:
            reasons[op] = "has no such kernel"
        elif refuses is not None and dtype is not None and (reason := refuses(op, dtype)) is not None:
            reasons[op] = reason
        elif asked == "auto" and backend in FOR_CARDS and ledger.entry(backend, op, book) is None:
            reasons[op] = f"not checked on a GPU in this version of its source; --kernels {backend} runs it anyway"
    return {op: function for op, function in ops.items() if op not in reasons}, reasons


def _brief(reasons: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return one reason per backend if it is the same for all ops, else one per op."""
    brief: dict[str, Any] = {}
    for backend, by_op in reasons.items():
        if "" in by_op:
            brief[backend] = by_op[""]
        elif by_op:
            same = len(set(by_op.values())) == 1 and len(by_op) == len(Kernels._fields)
            brief[backend] = next(iter(by_op.values())) if same else by_op
    return brief


def use(target: object, kernels: Kernels) -> None:
    """Make a model with all its modules, or a policy, call these functions."""
    for each in target.modules() if isinstance(target, nn.Module) else [target]:
        if hasattr(type(each), "kernels"):
            object.__setattr__(each, "kernels", kernels)  # policies are frozen


def examine(device: torch.device) -> list[tuple[str, str | None, str]]:
    """Return for `lab doctor` each backend's name, its ops (None: it cannot run), and its description or problem."""
    found: list[tuple[str, str | None, str]] = []
    for backend in BACKENDS[:-1]:
        reason = why_not(backend, device)
        if reason is not None:
            found.append((f"kernels {backend}", None, f"{WHAT[backend]}; {reason}"))
            continue
        ops = operations(backend)
        text = f"{len(ops)} of {len(Kernels._fields)} ops"
        if backend == "cpp":
            text = f"whole steps of a model; and the ops {', '.join(ops)}"
        if backend in FOR_CARDS:
            listed = {op: ledger.entry(backend, op) for op in ops}
            cards = sorted({entry["device"] for entry in listed.values() if entry is not None})
            checked = sum(entry is not None for entry in listed.values())
            text += f", {checked} checked" + (f" on {', '.join(cards)}" if cards else " on a GPU")
        found.append((f"kernels {backend}", text, WHAT[backend]))
    found.append(("kernels torch", f"{len(Kernels._fields)} of {len(Kernels._fields)} ops", "the reference"))
    return found


def chosen(asked: str, device: torch.device, dtype: torch.dtype | None = None) -> Selection:
    """Choose as `choose` does, and compile the chosen backends.

    If a build fails, `auto` goes on without that backend, with a note on stderr and in the report. BuildError for a
    backend that was asked for by name.
    """
    broken: dict[Backend, str] = {}
    while True:
        selection = choose(asked, device, dtype, broken=broken)
        for backend in BACKENDS:
            if backend not in selection.report["ops"].values():
                continue
            build = getattr(module_of(backend), "prepare", None)
            try:
                if build is not None:
                    build(device)
            except BuildError as error:
                if asked != "auto":
                    raise
                broken[backend] = str(error)
                print(f"note: without {WHAT[backend]}: {error}", file=sys.stderr)
                break
        else:
            return selection


def prepare(device: torch.device) -> list[str]:
    """Compile all backends that can run on the device; return their names. BuildError if one fails."""
    ready: list[str] = []
    for backend in BACKENDS:
        build = getattr(module_of(backend), "prepare", None) if backend != "torch" else None
        if build is not None and why_not(backend, device) is None:
            build(device)
            ready.append(backend)
    return ready
