"""End to end: this phase's best drafter against phase 2 at its best K, and both against phase 1.

What is best is chosen by time on prompts of the `calibrate` half, and then measured on the `test` half.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from common.phases import phase_of

from .drafters import shapes
from .runs import Lab, Variant

PHASES = {
    "phases": "over_1, over_2: that phase's wall time per token over this variant's, same prompts, taking turns; "
    "median of the paired rounds with its bootstrap 95% interval. Chosen on the calibrate half, measured on the other",
}
OWN = f"phase {phase_of(__file__)}"
Choice = dict[str, Any]  # options of generate.py


def choices(lab: Lab) -> dict[str, Choice]:
    """What may turn out to be this phase's best: chains of 4 and 6, trees of 16 nodes, and K by cost."""
    found: dict[str, Choice] = {}
    wanted = {"chain 4", "chain 6", "static 16", *(() if lab.options.quick else ("dynamic 16",))}
    for drafter in (name for name in lab.drafters if name != "extrapolate"):
        if not lab.options.quick:
            found[f"{drafter}, controller cost"] = {"drafter": drafter, "controller": "cost"}
        for shape in (shape for shape in shapes(lab, drafter) if shape.label in wanted):
            found[f"{drafter}, {shape.label}"] = {"drafter": drafter, **shape.options}
    return found


class Earlier(Variant):
    """A session of an earlier phase, whose steps tell less."""

    def figures(self) -> dict[str, Any]:
        return {"tokens_per_forward": sum(r.count for r in self.runs) / sum(r.forwards for r in self.runs)}


def earlier(lab: Lab, engine: Any, texts: list[str], temperature: float, **wanted: Any) -> Variant:
    """An earlier phase, with the same model, device, dtype and seed."""
    options = lab.session(temperature=temperature).options
    same = {name: getattr(options, name) for name in ("model", "max_tokens", "temperature", "seed", "device", "dtype")}
    return Earlier(engine.Session(engine.Options(**same, **wanted)), texts)


def fastest(lab: Lab, temperature: float, engines: dict[str, Any], found: dict[str, Choice]) -> tuple[int, str]:
    """Phase 2's best K, and the best choice of this phase, on the calibrate half."""
    texts, ks = lab.texts(half="calibrate"), [k for k in lab.grid.fixed if 2 < k < 7]
    first = earlier(lab, engines["phase 1"], texts, temperature)
    twos = {str(k): earlier(lab, engines["phase 2"], texts, temperature, k=k, draft=lab.draft) for k in ks}
    own = {label: lab.variant(texts, first, temperature=temperature, **choice) for label, choice in found.items()}
    rows, _ = lab.speed(f"choosing, temperature {temperature:g}", first, twos | own, repeats=2)
    for label in [*twos, *own]:
        name = label if label in own else f"phase 2, K = {label}"
        key = {"kind": "choice", "temperature": temperature, "label": name}
        if not lab.done(**key):
            lab.add(**key, **{column: rows[label][column] for column in ("speedup", "speedup_low", "speedup_high")})
    by_speed = sorted(rows, key=lambda label: -rows[label]["speedup"])
    return int(next(label for label in by_speed if label in twos)), next(label for label in by_speed if label in own)


def measure_phases(lab: Lab) -> None:
    try:
        engines = {name: importlib.import_module(name.replace(" ", "")) for name in ("phase 1", "phase 2")}
    except ModuleNotFoundError as error:
        print(f"note: the section `phases` is left out: {error}; `make install` installs the phases", file=sys.stderr)
        return
    for temperature in lab.grid.temperatures:
        if not lab.done(kind="phases", temperature=temperature, phase=OWN):
            compare(lab, engines, temperature)


def compare(lab: Lab, engines: dict[str, Any], temperature: float) -> None:
    found = choices(lab)
    k, label = fastest(lab, temperature, engines, found)
    texts = lab.texts()
    first = earlier(lab, engines["phase 1"], texts, temperature)
    second = earlier(lab, engines["phase 2"], texts, temperature, k=k, draft=lab.draft)
    own = lab.variant(texts, first, temperature=temperature, **found[label])
    rows, rates = lab.speed(
        f"phases, temperature {temperature:g}", first, {"phase 2": second, OWN: own}, 2 * lab.options.repeats
    )
    rows["phase 1"], rates["phase 1"] = rows["plain"], rates["plain"]
    for name, what in {"phase 1": "plain", "phase 2": f"K = {k}", OWN: label}.items():
        lab.add(
            kind="phases",
            temperature=temperature,
            phase=name,
            what=what,
            **{column: rows[name][column] for column in ("tokens_per_s", "tokens_per_forward")},
            **lab.ratio("over_1", rates["phase 1"], rates[name]),
            **lab.ratio("over_2", rates["phase 2"], rates[name]),
        )
