"""The figures of the bench, drawn from its rows."""

from __future__ import annotations

from pathlib import Path

from common.figures import figure

from .runs import Lab


def draw(lab: Lab, folder: Path) -> None:
    """Whatever the rows allow."""
    if lab.rows("length"):
        lengths(lab, folder / "lengths.png")
    if lab.rows("verification"):
        verification(lab, folder / "verification.png")


def lengths(lab: Lab, file: Path) -> None:
    """One more token behind a text of n: what it takes with and without a cache, and what the cache takes."""
    rows = lab.rows("length")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    with figure(file, len(shapes), 2, (5.6, 4.0), f"one more token behind a text{lab.mark}") as panels:
        for shape, (time, memory) in zip(shapes, zip(panels[::2], panels[1::2], strict=True), strict=True):
            of_shape = [row for row in rows if row["shape"] == shape]
            for name in dict.fromkeys(row["cache"] for row in of_shape):
                mine = [row for row in of_shape if row["cache"] == name]
                at = [row["length"] for row in mine]
                time.plot(at, [row["token_ms"] for row in mine], "o-", label=name)
                if name != "off":
                    memory.plot(at, [row["cache_mib"] for row in mine], "o-", label=name)
            time.set_yscale("log")
            time.set_ylabel("ms (logarithmic)")
            memory.set_ylabel("MiB of cache")
            for axes in (time, memory):
                axes.set_title(shape, fontsize="medium")
                axes.set_xlabel("tokens in the text")
                axes.legend(fontsize="small")


def verification(lab: Lab, file: Path) -> None:
    rows = lab.rows("verification")
    with figure(file, 1, 1, (7.2, 4.2), f"what verification costs{lab.mark}") as (axes,):
        for key in dict.fromkeys((row["cache"], row["length"]) for row in rows):
            mine = [row for row in rows if (row["cache"], row["length"]) == key]
            style = "o-" if key[0] != "off" else "s--"
            axes.plot(
                [r["new_tokens"] for r in mine], [r["over_one"] for r in mine], style, label=f"{key[0]}, {key[1]}"
            )
        axes.set_xlabel("new tokens in one forward")
        axes.set_ylabel("times as long as one")
        axes.legend(title="cache, tokens in the text", fontsize="small")
