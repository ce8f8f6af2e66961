"""Derived tables against sums by hand, claims in words, the READMEs' marks, and comparing two folders."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.benchmark import BenchOptions, Outcome
from common.errors import UserError
from common.harness import Bench, Variant, open_results
from common.lab import compare_results, tables
from common.phases import ROOT
from common.prompts import Prompt
from common.results import Row, read_rows
from common.tables import AGAIN, derive, log_ratios, notes, print_section, text_of, write_csv

PROMPTS = [f"p{number}" for number in range(8)]


def rows(effect: float = 1.3, rounds: int = 6, noise: float = 0.01, null: float = 1.0, **fields: Any) -> list[Row]:
    """Make a baseline, its null arm, and a variant that is `effect` times as fast."""
    random, made = np.random.default_rng(3), []
    for round_ in range(rounds):
        for prompt in PROMPTS:
            for order, (name, speed) in enumerate({"plain": 1.0, "plain" + AGAIN: null, "fast": effect}.items()):
                seconds = float(2.0 / speed * math.exp(noise * random.normal()))
                base = None if name == "plain" else "plain"
                run = {"round": round_, "order": order, "seconds": seconds, "tokens": 10, "baseline": base}
                made.append(Row(kind="run", section="speed", variant=name, prompt=prompt, **(run | fields)))
    return made


def line_of(lines: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    return next(line for line in lines if line["variant"] == variant)


def test_a_table_has_the_ratio_its_intervals_and_the_claim() -> None:
    line = line_of(derive(rows()), "fast")
    assert line["speedup_low"] < 1.3 < line["speedup_high"]
    assert line["rounds_low"] < line["speedup"] < line["rounds_high"]
    assert line["claimed"] is True
    assert (line["n_prompts"], line["n_rounds"]) == (8, 6)
    assert line["spread"] == pytest.approx(0.014, abs=0.004)
    assert line["ms_per_token"] == pytest.approx(1000 / line["tokens_per_s"])
    assert text_of(line, "speedup") == f"{line['speedup']:.2f} [{line['speedup_low']:.2f}, {line['speedup_high']:.2f}]"
    assert line_of(derive(rows()), "plain" + AGAIN)["claimed"] is None


def test_nothing_is_claimed_from_few_rounds_or_beside_a_null_arm_that_differs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one_prompt = [row for row in rows(rounds=4) if row.prompt == "p0"]
    line = line_of(derive(one_prompt), "fast")
    assert (line["speedup_low"], line["claimed"]) == (None, False)
    assert text_of(line, "speedup") == f"{line['speedup']:.2f}"
    assert notes(derive(one_prompt)) == ["4 rounds: too few for an interval, and nothing is claimed."]
    differs = derive(rows(null=1.1))
    assert line_of(differs, "fast")["claimed"] is False
    print_section("Speed", rows(null=1.1))
    out = capsys.readouterr().out
    assert "the baseline differs from itself" in out
    assert "Not to be claimed as a difference: fast." in out


def test_pairs_of_which_a_run_failed_are_left_out() -> None:
    made = rows(rounds=2)
    made[2] = made[2].model_copy(update={"status": "failed", "reason": "no memory", "seconds": None})
    logs = log_ratios(made)["fast"]
    assert [len(logs[prompt]) for prompt in PROMPTS] == [1] + [2] * 7
    line = line_of(derive(made), "fast")
    assert (line["status"], line["reason"]) == ("failed", "no memory")


def test_another_baseline() -> None:
    assert line_of(derive(rows(), baseline="fast"), "plain")["speedup"] == pytest.approx(1 / 1.3, rel=0.02)


def test_outliers_are_kept_and_shown() -> None:
    made = rows()
    made[2] = made[2].model_copy(update={"seconds": 60.0})
    line = line_of(derive(made), "fast")
    assert line["outliers"] == 1
    assert line["speedup"] < line_of(derive(rows()), "fast")["speedup"]
    assert "Outliers (over five spreads), all kept: 1 paired runs." in " ".join(notes(derive(made)))


def test_ratios_are_quotients_of_sums_not_means_of_quotients() -> None:
    figures = [
        {"forwards": 2, "proposed": 4, "accepted": 1, "drafts": 1, "survived": [1], "nll_sum": 10.0, "kind": "x"},
        {"forwards": 8, "proposed": 4, "accepted": 4, "drafts": 3, "survived": [3, 1], "nll_sum": 20.0, "kind": "x"},
    ]
    made = [
        Row(kind="count", section="c", variant="v", prompt=str(n), tokens=10, figures=f) for n, f in enumerate(figures)
    ]
    (line,) = derive(made)
    assert (line["tokens_per_forward"], line["acceptance"], line["survival"]) == (2.0, 5 / 8, [1.0, 0.25])
    assert line["perplexity"] == pytest.approx(math.exp(1.5))
    assert line["kind"] == "x"
    assert "forwards" not in line


def test_the_csv_file_reads_like_the_rows(tmp_path: Path) -> None:
    write_csv(rows(), tmp_path / "tables.csv")
    with (tmp_path / "tables.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["variant"] for line in read] == ["plain", "plain" + AGAIN, "fast"]
    assert json.loads(read[2]["speedup"]) == line_of(derive(rows()), "fast")["speedup"]
    assert json.loads(read[2]["claimed"]) is True


def folder_of(path: Path, speed: float = 1.3, **options: Any) -> Path:
    """Make a results folder in which `fast` is `speed` times as fast as `plain`."""
    random = np.random.default_rng(list(path.name.encode()))

    def taking(seconds: float) -> Variant:
        return lambda prompt, round_: Outcome(10, seconds=seconds * math.exp(0.01 * random.normal()))

    chosen = BenchOptions(output=path, rounds=6, **options)
    prompts = [Prompt(name, "own", "test", "text", "", "") for name in PROMPTS]
    with open_results(chosen, {}, torch.device("cpu"), "float32", {"m": "1"}) as results:
        bench = Bench(chosen, results, torch.device("cpu"))
        bench.compare("speed", {"t": 1.0}, {"plain": taking(2.0), "fast": taking(2.0 / speed)}, prompts)
    return path


def test_a_readme_is_filled_from_the_rows_and_a_wrong_number_is_found(tmp_path: Path) -> None:
    folder_of(tmp_path / "results")
    readme = tmp_path / "README.md"
    columns = "variant (what), speedup (x plain, measured), claimed"
    mark = f"<!-- table: speed; columns: {columns}; where: t=1, variant=plain|fast -->"
    readme.write_text(f"before\n{mark}\n<!-- end -->\n")
    filled = tables.rewrite(readme)
    line = line_of(derive(read_rows(tmp_path / "results")), "fast")
    assert "| what  | x plain, measured | claimed |" in filled
    assert f"{line['speedup']:.2f} [{line['speedup_low']:.2f}, {line['speedup_high']:.2f}]" in filled
    assert AGAIN not in filled
    readme.write_text(filled)
    assert tables.rewrite(readme) == filled
    readme.write_text(filled.replace(f"{line['speedup']:.2f} [", "9.99 ["))
    assert tables.rewrite(readme) == filled
    readme.write_text(
        "<!-- table: other; columns: variant -->x<!-- end --> <!-- value: other; column: k -->x<!-- end -->"
    )
    assert tables.rewrite(readme).count("(not measured yet)") == 2
    value = "<!-- value: speed; column: speedup; where: variant=fast -->?<!-- end -->"
    readme.write_text(f"It is {value} times as fast.")
    assert f"-->{text_of(line, 'speedup')}<!-- end --> times" in tables.rewrite(readme)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("table: speed; colums: variant", "unknown field 'colums'"),
        ("table: speed; columns: variant; where: variant=slow", "no row of section 'speed' where variant=slow"),
        ("value: speed; column: speedup", "selects 3 lines, expected one"),
        ("table: speed; columns: a b c", "a column is written"),
    ],
)
def test_a_wrong_mark_is_one_line(tmp_path: Path, mark: str, message: str) -> None:
    folder_of(tmp_path / "results")
    (tmp_path / "README.md").write_text(f"<!-- {mark} --><!-- end -->")
    with pytest.raises(UserError, match=message):
        tables.rewrite(tmp_path / "README.md")


@pytest.mark.slow  # `make lint`, with which `make test` begins, runs the same check
def test_every_readme_has_the_numbers_of_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.run(["--check"]) == 0, capsys.readouterr().out
    assert sum(len(tables.MARK.findall(path.read_text(encoding="utf-8"))) for path in tables.readmes(ROOT)) > 20


def test_two_folders_are_compared_by_their_speed_ups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same = folder_of(tmp_path / "a"), folder_of(tmp_path / "b")
    other = folder_of(tmp_path / "c", 1.5)
    assert compare_results.run([str(one), str(same)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["comparisons"]
    assert [(line["variant"], line["differs"]) for line in found] == [("plain", None), ("fast", False)]
    compare_results.run([str(one), str(other)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["comparisons"]
    assert found[1]["differs"] is True
    assert found[1]["speed"] == pytest.approx(1.5 / 1.3, rel=0.02)


def test_different_machines_and_settings_are_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", max_tokens=8)
    with pytest.raises(UserError, match=r"cannot be compared: max_tokens: 48 and 8"):
        compare_results.run([str(one), str(other)])
    assert compare_results.run([str(one), str(other), "--anyway"]) == 0
    assert "differs: max_tokens: 48 and 8" in capsys.readouterr().err
    manifest = json.loads((one / "MANIFEST.json").read_text())
    manifest["invocations"][-1]["environment"]["cpu"] = "another"
    (one / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"cpu: another and"):
        compare_results.run([str(one), str(one.parent / "b")])
    with pytest.raises(UserError, match="not a results folder"):
        compare_results.run([str(tmp_path), str(one)])
