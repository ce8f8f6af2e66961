"""One HTML page from a results folder: claims with their intervals and null arms, charts, tables, environment.

    lab report phase-7-bench/results
    lab report sweeps/before --against sweeps/after --output report.html

The page needs no other file and no network. It is computed from the rows. Results of a dry run are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.lab.arguments import Parser
from common.lab.compare_results import Folder, compare, differences
from common.options import run_main
from common.results import Row, failures
from common.tables import AGAIN, HIDDEN, derive, notes, text_of
from common.terminal import cell_text

from . import charts
from .loads import SECTION as LATENCY
from .loads import summary
from .pictures import PANELS, number_axis, series
from .predict import COST, PREDICTION, SURVIVAL, compared

STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
MOST_DOTS = 40  # variants of one chart


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def settings(line: Mapping[str, Any]) -> str:
    """Return the cell of a derived line, in words."""
    names = list(line)
    return ", ".join(f"{name} {cell_text(line[name])}" for name in names[: names.index("variant")])


def varying(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the values of a line's cell that are not the same in all lines."""
    names = list(line)
    cell = names[: names.index("variant")]
    return [cell_text(line[name]) for name in cell if len({str(other.get(name)) for other in lines}) > 1]


def claims(sections: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """List what may be claimed, with the null arm beside it."""
    found = []
    for section, lines in sections.items():
        nulls = {settings(line): line for line in lines if str(line["variant"]).endswith(AGAIN)}
        for line in lines:
            if line.get("claimed"):
                null = nulls.get(settings(line))
                beside = text_of(null, "speedup") if null else "-"
                found.append(
                    (section, settings(line), line["variant"], text_of(line, "speedup"), beside, line["n_prompts"])
                )
    timed = sum("claimed" in line and line["claimed"] is not None for lines in sections.values() for line in lines)
    if not found:
        return f"<p>No difference may be claimed: {timed} comparisons, of which none passed.</p>"
    intro = (
        f"<p>{len(found)} of {timed} comparisons: significant after Holm's correction, with a null arm (the baseline "
        "timed against itself) that allows 1 and is narrower than the effect.</p>"
    )
    return intro + table(["section", "cell", "variant", "times as fast", "null arm", "prompts"], found)


def pictures(lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw a section: curves over a numeric option if there is one, else a dot per variant."""
    measured = [line for line in lines if not str(line["variant"]).endswith(AGAIN)]
    axis = number_axis(measured) if measured else None
    out = ""
    if axis is not None:
        for name, (column, label) in PANELS.items():
            curves = {
                group: [
                    (float(line[axis]), float(line[column]), line.get(f"{column}_low"), line.get(f"{column}_high"))
                    for line in members
                    if line.get(column) is not None
                ]
                for group, members in series(measured, axis).items()
            }
            out += charts.lines(name, axis, label, curves, 1.0 if column == "speedup" else None)
        if out:
            return f'<div class="charts">{out}</div>'
    dots = [
        (
            ", ".join(part for part in (*varying(line, lines), str(line["variant"])) if part),
            float(line["speedup"]), line.get("speedup_low"), line.get("speedup_high"),
            "null" if str(line["variant"]).endswith(AGAIN) else "claimed" if line.get("claimed") else "open",
        )
        for line in lines
        if line.get("speedup")
    ]  # fmt: skip
    out = charts.dots("times as fast as the baseline", "filled: claimed; hollow: not; grey: null arm", dots[:MOST_DOTS])
    return f'<div class="charts">{out}</div>' if out else ""


def predictions(lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw predicted against measured, where a section has both."""
    both = [line for line in lines if line.get("predicted") and line.get("measured")]
    if not both:
        return ""
    cells: dict[str, list[charts.Point]] = {}
    for line in both:
        ends = (float(line["predicted"]), float(line["measured"]), line.get("measured_low"), line.get("measured_high"))
        cells.setdefault(settings(line), []).append(ends)
    return charts.lines("measured against predicted", "predicted", "measured", cells, scattered=True)


def latency_section(rows: Sequence[Row], objectives: Mapping[str, float]) -> str:
    lines = summary(rows, dict(objectives))
    good = [line for line in lines if "tokens_per_s" in line]

    def curve(x: str, y: str) -> list[charts.Point]:
        return [
            (float(line[x]), float(line[y]), None, None)
            for line in good
            if line.get(x) is not None and line.get(y) is not None
        ]

    first = {name: curve("rate", f"ttft_{name}") for name in ("p50", "p90", "p99")}
    done = {"completed": curve("rate", "completed_per_s"), "within the objectives": curve("rate", "goodput")}
    out = charts.lines("throughput", "requests per second that arrive", "requests per second", done)
    out += charts.lines("time to the first token", "requests per second that arrive", "ms", first)
    users = {"": curve("tokens_per_s", "tokens_per_s_per_user")}
    out += charts.lines("one user against all", "tokens per second, all users", "tokens per second, one user", users)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    return f'<div class="charts">{out}</div>' + table(columns, [[line.get(name) for name in columns] for line in lines])


def section(name: str, every: Sequence[Row], definitions: Mapping[str, str], objectives: Mapping[str, float]) -> str:
    """Return one section of the page, from its own rows; predictions need those of the sweep as well."""
    rows = [row for row in every if row.section == name]
    words = f"<p>{escape(definitions[name])}.</p>" if name in definitions else ""
    out = f"<section><h2>{escape(name)}</h2>{words}"
    if name == LATENCY:
        return out + latency_section(rows, objectives) + "</section>"
    lines = compared(every) if name == PREDICTION else derive(rows)
    names = dict.fromkeys(name for line in lines for name in line)
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high")}  # shown beside the value
    columns = [name for name in names if name not in HIDDEN | ends]
    out += predictions(lines) if name == PREDICTION else "" if name in (SURVIVAL, COST) else pictures(lines)
    out += table(columns, [[text_of(line, column) for column in columns] for line in lines])
    out += "".join(f"<p class='note'>{escape(note)}</p>" for note in notes(lines))
    if bad := failures(rows):
        out += "<h3>Left out</h3><ul>" + "".join(f"<li>{escape(each)}</li>" for each in bad) + "</ul>"
    return out + "</section>"


def comparison(one: Folder, other: Folder) -> str:
    """Return what differs between two folders, beyond noise."""
    forbids, listed = differences(one, other)
    lines = compare(one, other)
    if not lines:
        raise UserError(f"{one.path} and {other.path} have no comparison in common")
    verdicts = {True: "differs", False: "within noise", None: "-"}
    dots = []
    for line in lines:
        if (ratio := line.get("speedup")) is not None:
            found = ratio.interval
            style = "claimed" if line["differs"] else "open"
            dots.append(
                (f"{line['section']}, {line['variant']}", ratio.value, found and found.low, found and found.high, style)
            )
    warning = "".join(f"<p class='warning'>{escape(each)}</p>" for each in forbids)
    small = "".join(f"<p class='note'>{escape(each)}</p>" for each in listed)
    rows = [
        [
            line["section"],
            line["cell"],
            line["variant"],
            line["speed"],
            str(line.get("speedup", "-")),
            verdicts[line["differs"]],
        ]
        for line in lines
    ]
    drawn = charts.dots("ratio of the speed-ups", "right of 1: faster", dots[:MOST_DOTS])
    return (
        f"<section><h2>{escape(str(other.path))} over {escape(str(one.path))}</h2>"
        "<p>The ratio of the two speed-ups, each over the baseline of its own run, with a 95% interval.</p>"
        f'{warning}{small}<div class="charts">{drawn}</div>'
        f"{table(['section', 'cell', 'variant', 'speed (not paired)', 'speed-up', ''], rows)}</section>"
    )


def page(folder: Path, against: Path | None = None) -> str:
    """Return the page of a folder, and of its comparison with another. UserError for a dry run, or no folder."""
    read = Folder.read(folder)
    rows = [row for each in read.cells.values() for row in each]
    names = sorted(dict.fromkeys(row.section for row in rows), key=lambda name: name in (SURVIVAL, COST))
    timed = [name for name in names if name not in (LATENCY, COST)]
    lines = {name: derive([row for row in rows if row.section == name]) for name in timed}
    options, where = read.last["options"], read.last["environment"]
    given = {f"{key}_ms": options.get(f"slo_{key}") for key in ("ttft", "tpot", "e2e")}
    objectives = {name: limit for name, limit in given.items() if limit is not None}
    runs = sum(row.kind == "run" and row.status == "ok" for row in rows)
    title = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    subtitle = (
        f"{where['device_name']}, {where['threads']} threads, {where['dtype']}; {where['timestamp']}; {runs} timed runs"
    )
    definitions = read.manifest["definitions"]
    body = f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
    body += comparison(read, Folder.read(against)) if against else ""
    body += f"<section><h2>Claims</h2>{claims(lines)}</section>" if runs else ""
    body += "".join(section(name, rows, definitions, objectives) for name in names)
    body += "<section><h2>Definitions</h2><dl>"
    body += (
        "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in definitions.items())
        + "</dl></section>"
    )
    for heading, values in (("Environment", where), ("Options", options)):
        body += f"<section><h2>{heading}</h2>{table(['', ''], [(n, shown(v)) for n, v in values.items()])}</section>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def shown(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def run(arguments: list[str]) -> int:
    parser = Parser("lab report", "Write one HTML page from a results folder.")
    parser.add_argument("folder", type=Path, help="a folder that a bench, a sweep or `lab latency` wrote")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another folder of the same bench, to compare")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; by default report.html in the folder")
    given = parser.parse_args(arguments)
    file = given.output or given.folder / "report.html"
    text = page(given.folder, given.against)
    file.write_text(text, encoding="utf-8", newline="\n")
    print(f"{file}: {len(text) // 1024} KiB")
    return 0


if __name__ == "__main__":
    run_main(run, sys.argv[1:])
