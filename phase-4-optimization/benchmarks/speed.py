"""The same loop, with its numbers stored and its operations run in other ways, against phase 3: plain and at its best.

What drafts best is chosen by time on prompts of the `calibrate` half, for every setting anew, because a setting changes
what a draft token and a verified one cost; it is then measured on the `test` half.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

import engine
from common.benchmark import median, progress
from common.errors import UserError
from engine.packing import PackedLinear

from .runs import Lab, Variant, with_texts

SPEED = {
    "setting": "dtype of the weights, and what else; beside quantised matrices the rest is float32",
    "mode": "plain decoding, or the drafter that was fastest on the calibrate half",
    "over_3": "phase 3's wall time per token over this one's, the same mode, float32, taking turns; median of the "
    "paired rounds with its bootstrap 95% interval",
    "over_plain": "the same setting's plain wall time per token over this one's",
    "tokens_per_s": "new tokens / wall time, median of the rounds",
    "tokens_per_forward": "new tokens / target forwards",
    "agreement": "share of tokens up to the first one that phase 3 does not write",
    "weights_mib": "the target's weights as they are kept, embedding and output matrix included",
    "graphs": "with --compile: graphs compiled for the target and what drafts, and those of them after the warm-up",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, compiled": {"compile": True},
    "float32, autocast": {"amp": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, compiled": {"dtype": "bfloat16", "compile": True},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "int8, bfloat16": {"quant": "int8", "dtype": "bfloat16"},
    "float32, int8 draft": {"draft_quant": "int8"},
}
QUICK = ("float32", "bfloat16")
SAME = ("float32", "float32, compiled", "float32, int8 draft")  # must write the tokens of phase 3
PLAIN: dict[str, Any] = {"draft": "none"}
CHOICES: dict[str, dict[str, Any]] = {
    "model, chain 4": {"k": 4},
    "model, chain 6": {"k": 6},
    "eagle, chain 4": {"drafter": "eagle", "k": 4},
    "eagle, chain 6": {"drafter": "eagle", "k": 6},
    "eagle, static 16": {"drafter": "eagle", "k": 5, "tree": "static", "tree_nodes": 16},
}


def weights_mib(model: torch.nn.Module) -> float:
    """What parameters, buffers and packed matrices take, each storage once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    packed = sum(sum(m.weight_bytes) for m in model.modules() if isinstance(m, PackedLinear))
    return (sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + packed) / 2**20


def candidates(lab: Lab, of: Any, setting: dict[str, Any], texts: list[str]) -> dict[str, Variant]:
    """The ways to draft that can run here."""
    wanted = {"draft model": CHOICES["model, chain 4"]} if lab.options.quick else CHOICES
    if setting.get("draft_quant"):  # what it changes is the draft model
        wanted = {name: choice for name, choice in wanted.items() if "drafter" not in choice}
    found = {}
    for name, choice in wanted.items():
        try:
            found[name] = lab.variant(name, texts, of, **setting, **choice)
        except UserError as error:
            print(f"note: {name} is left out: {error}", file=sys.stderr)
    return found


def best(lab: Lab, of: Any, title: str, setting: dict[str, Any]) -> tuple[str, Variant]:
    """The fastest way to draft, on the calibrate half."""
    found = candidates(lab, of, setting, lab.texts("calibrate"))
    times = lab.times(f"choosing, {title}", found, 2)
    name = min(found, key=lambda name: median(times[name]))
    return name, found[name]


def measure_speed(lab: Lab) -> None:
    try:
        before = importlib.import_module("phase3")
    except ModuleNotFoundError as error:
        print(f"note: the section `speed` is left out: {error}; `make install` installs the phases", file=sys.stderr)
        return
    names = [name for name in SETTINGS if not lab.options.quick or name in QUICK]
    if lab.done(kind="speed", setting=names[-1]):
        return
    texts = lab.texts()
    base = {"plain": lab.variant("phase 3, plain", texts, before, **PLAIN)}
    _, drafted = best(lab, before, "phase 3", {})
    label = drafted.name
    base["drafted"] = with_texts(drafted, texts, base["plain"])
    for name in names:
        if not lab.done(kind="speed", setting=name):
            measure_setting(lab, name, base, label)


def measure_setting(lab: Lab, name: str, base: dict[str, Variant], label: str) -> None:
    """One setting, plain and drafted, in turns with phase 3's two."""
    setting, texts = SETTINGS[name], base["plain"].texts
    try:
        alone = {option: value for option, value in setting.items() if option != "draft_quant"}
        plain = lab.variant(f"{name}, plain", texts, **alone, **PLAIN)
    except UserError as error:
        print(f"note: {name} is left out: {error}", file=sys.stderr)
        return
    how, drafted = best(lab, engine, name, setting)
    exact = name in SAME
    plain.same_as = base["plain"] if exact else None
    drafted = with_texts(drafted, texts, base["plain"] if exact else None)
    runs = {"3 plain": base["plain"], "3 drafted": base["drafted"], "plain": plain, "drafted": drafted}
    if not lab.options.dry_run:
        with progress(f"warm-up, {name}", len(runs)) as show:  # every length is met once before anything is timed
            for title, run in runs.items():
                run()
                show(title)
    warm = graphs(plain, drafted)
    times = lab.times(name, runs, lab.options.repeats)
    rates = {title: [t / (run.count or 1) for t in times[title]] for title, run in runs.items()}
    for mode, what, variant in (("plain", "plain", plain), ("drafted", how, drafted)):
        lab.add(
            kind="speed",
            setting=name,
            mode=mode,
            what=what,
            phase_3=label if mode == "drafted" else "plain",
            tokens_per_s=1 / median(rates[mode]),
            tokens_per_forward=variant.count / variant.forwards if variant.forwards else 1.0,
            **lab.ratio("over_3", rates[f"3 {mode}"], rates[mode]),
            **lab.ratio("over_plain", rates["plain"], rates[mode]),
            agreement=variant.agreement(base["plain"]) if variant.count else 1.0,
            weights_mib=weights_mib(variant.session.loaded.model) if variant.session else 1.0,
            graphs=warm,
            graphs_after=graphs(plain, drafted) - warm,
        )


def graphs(*variants: Variant) -> int:
    """How many graphs were compiled so far for these."""
    return sum(variant.session.compiled_graphs for variant in variants if variant.session)
