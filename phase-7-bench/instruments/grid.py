"""A grid of options: axes with their values, and the comparisons (cells) that they span.

    k=1..8 drafter=model,eagle temperature=0,1 dtype=float32,bfloat16
    model+draft=stdlib-10m+stdlib-1m,stdlib-1m+none

An axis is an option of generate.py, or `phase`. `target` is another name for `model`, and `gamma` for `k`. `a+b` varies
two options together. Axes that concern drafting alone make the variants of a cell, which are compared with plain
decoding. All other axes make cells. Without an axis that concerns drafting, the first axis makes the variants, and its
first value is the baseline.

    python -c "from instruments.grid import *; print(cells(parse(['k=1..3', 'dtype=float32,bfloat16'])))"
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.phases import installed_phases, phase_of, phases
from engine.options import Options

ALIASES = {"target": "model", "gamma": "k"}
# Options that change nothing of plain decoding.
DRAFTING = {
    *("draft", "k", "drafter", "heads", "ngram_min", "ngram_max", "alpha", "policy", "tree", "tree_nodes", "tau"),
    *("agree_k", "epsilon", "delta", "controller", "min_k", "max_k", "target_acceptance", "confidence", "draft_quant"),
    *("parallel_streams", "sync_mode", "draft_parallel", "synthetic_acceptance"),
}
# Options of one command, which a comparison cannot vary.
NO_AXIS = {
    *("prompt", "prompt_file", "stop", "n", "beams", "length_penalty", "show", "show_tree", "explain", "record"),
    *("metrics_detailed", "profile", "profile_steps", "profile_stacks", "config", "as_json", "lossless"),
}
PLAIN = "plain"
OWN = phase_of(__file__)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """Options that vary together, with the values of each place on the axis."""

    names: tuple[str, ...]
    places: tuple[tuple[Any, ...], ...]

    @property
    def drafts(self) -> bool:
        return all(name in DRAFTING for name in self.names)


@dataclass(frozen=True)
class Cell:
    """One comparison: what all variants share, and what each of them adds; the first is the baseline."""

    settings: Settings
    variants: dict[str, Settings]

    @property
    def key(self) -> str:
        return json.dumps(self.settings)

    def __str__(self) -> str:
        return label(self.settings) or "the only cell"


def label(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in settings.items())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def known() -> list[str]:
    """List the names of axes."""
    return sorted(["phase", *ALIASES, *(Options.model_fields.keys() - NO_AXIS)])


def parse(lines: Sequence[str]) -> list[Axis]:
    """Parse `name=value,value` and `name=1..8`. UserError for what is unknown, empty or given twice."""
    axes = [_axis(line) for line in lines]
    if not axes:
        raise UserError("the grid is empty: give axes, such as --grid k=1..8 temperature=0,1")
    names = [name for axis in axes for name in axis.names]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"the grid has two axes for {twice}: give all its values in one")
    return axes


def _axis(line: str) -> Axis:
    head, equals, tail = line.partition("=")
    names = tuple(ALIASES.get(name, name) for name in head.strip().replace("-", "_").split("+"))
    for name in names:
        if name != "phase" and (name not in Options.model_fields or name in NO_AXIS):
            raise UserError(f"--grid: there is no axis {name!r}; the axes are {', '.join(known())}")
    words = [word for part in tail.split(",") for word in _range(part.strip()) if word]
    if not equals or not words:
        raise UserError(f"--grid {line}: the axis has no value; write for example {head or 'k'}=VALUE,VALUE")
    places = []
    for word in words:
        parts = word.split("+") if len(names) > 1 else [word]
        if len(parts) != len(names):
            raise UserError(
                f"--grid {line}: {word!r} has {len(parts)} values for the {len(names)} options of this axis"
            )
        places.append(tuple(_value(name, part) for name, part in zip(names, parts, strict=True)))
    if len(set(places)) < len(places):
        raise UserError(f"--grid {line}: a value is given twice")
    return Axis(names, tuple(places))


def _range(word: str) -> list[str]:
    """Return the integers of `1..8`, both ends included; any other word alone."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", word)
    return [str(number) for number in range(int(found[1]), int(found[2]) + 1)] if found else [word]


def _value(name: str, word: str) -> Any:
    if name == "phase":
        numbers = [phase.number for phase in phases() or installed_phases()]
        if not word.isdigit() or int(word) not in numbers:
            raise UserError(f"--grid: there is no phase {word}; the phases are {', '.join(map(str, numbers))}")
        return int(word)
    field = Options.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind).validate_python(word)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"--grid {name}: {message[0].lower()}{message[1:]}, got {word!r}") from None


def cells(axes: Sequence[Axis], baseline: bool = True) -> list[Cell]:
    """Return all cells. baseline: where axes concern drafting, plain decoding is the first variant of every cell."""
    inner = [axis for axis in axes if axis.drafts]
    drafts = bool(inner)
    inner = inner or [axes[0]]
    outer = [axis for axis in axes if axis not in inner]
    named = [axis for axis in inner if len(axis.places) > 1] or inner
    variants = {PLAIN: {"draft": "none"}} if drafts and baseline else {}
    for settings in _products(inner):
        name = label({key: value for key, value in settings.items() if any(key in axis.names for axis in named)})
        variants[name] = settings if drafts else {"draft": "none", **settings}
    return [Cell(settings, variants) for settings in _products(outer)]


def _products(axes: Sequence[Axis]) -> list[Settings]:
    found = []
    for places in itertools.product(*(axis.places for axis in axes)):
        pairs = zip(axes, places, strict=True)
        found.append({name: value for axis, place in pairs for name, value in zip(axis.names, place, strict=True)})
    return found
