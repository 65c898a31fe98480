"""The table of a study against numbers computed by hand, in all its forms."""

from __future__ import annotations

import csv
import json
import math

import pytest

from framework.ablation import tables
from framework.ablation.state import Status, write_status
from framework.ablation.tables import Row, Table, as_csv, collect, columns, latex, markdown, short
from framework.errors import ConfigError

# none: mean .94, std .02; learned: mean .955, std .007071; both | odd_1: one seed; last: none, one of two failed
VALUES = {"none": [0.92, 0.94, 0.96], "learned": [0.95, 0.96], "odd|1_%": [0.9], "last": []}


def write_study(folder, metric="val/acc1", values=VALUES, published=True, **changes):
    data = {
        "name": "pos",
        "metric": metric,
        "axes": {"word": list(values)},
        "seeds": [0, 1, 2],
        "baseline": {"word": "none"},
        "published": {"source": "TNT, table 6", "metric": "top-1", "rows": {"none": 80.5, "learned": 81}}
        if published
        else None,
        "cells": [
            {"folder": f"word={place}", "choices": {"word": name}, "params": 23_760_000, "macs": 5_217_000_000}
            for place, name in enumerate(values)
        ],
        **changes,
    }
    for place, numbers in enumerate(values.values()):
        for seed, number in enumerate(numbers):
            run = folder / f"word={place}" / f"seed={seed}"
            run.mkdir(parents=True)
            write_status(run, Status("finished", metrics={metric: number}))
    (folder / "study.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def folder(tmp_path):
    study = write_study(tmp_path)
    broken = study / "word=3" / "seed=1"
    broken.mkdir(parents=True)
    write_status(broken, Status("failed", error="exit code 1: ValueError: shapes 4x8 and 16x32 do not fit"))
    return study


def test_the_numbers(folder):
    none, learned, odd, last = collect(folder).rows
    assert none.mean == pytest.approx(0.94)
    assert none.std == pytest.approx(0.02)
    assert learned.std == pytest.approx(math.sqrt(0.00005))
    assert collect(folder).difference(learned) == pytest.approx(0.015)
    assert odd.values == {0: 0.9}
    assert math.isnan(odd.std)
    assert math.isnan(last.mean)
    assert learned.published == 81
    assert math.isnan(odd.published)


def test_markdown(folder):
    assert markdown(collect(folder)) == (
        "**pos: val/acc1, mean ± std, seeds 0, 1, 2**\n"
        "\n"
        "| word | n | val/acc1 (%) | Δ vs baseline | params | MACs | paper (top-1) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| none | 3 | 94.0 ± 2.0 | baseline | 23.8M | 5.22G | 80.5 |\n"
        "| learned | 2 | **95.5 ± 0.7** | +1.5 | 23.8M | 5.22G | 81.0 |\n"
        "| odd\\|1_% | 1 | 90.0 ± – | -4.0 | 23.8M | 5.22G | – |\n"
        "| last | 0 | failed: exit code 1: ValueError: shapes 4x8 and… | – | 23.8M | 5.22G | – |\n"
        "\n"
        "paper: TNT, table 6\n"
        "\n"
        "- failed: word=3 seed=1: exit code 1: ValueError: shapes 4x8 and 16x32 do not fit "
        f"({folder}/word=3/seed=1/log.txt)\n"
    )


def test_latex(folder):
    assert latex(collect(folder)) == (
        "% failed: word=3 seed=1: exit code 1: ValueError: shapes 4x8 and 16x32 do not fit "
        f"({folder}/word=3/seed=1/log.txt)\n"
        "\\begin{table}\n"
        "  \\centering\n"
        "  \\caption{pos: val/acc1, mean $\\pm$ std, seeds 0, 1, 2. Paper: TNT, table 6}\n"
        "  \\begin{tabular}{lrrrrrr}\n"
        "    \\toprule\n"
        "    word & n & val/acc1 (\\%) & $\\Delta$ vs baseline & params & MACs & paper (top-1) \\\\\n"
        "    \\midrule\n"
        "    none & 3 & 94.0 $\\pm$ 2.0 & baseline & 23.8M & 5.22G & 80.5 \\\\\n"
        "    learned & 2 & \\textbf{95.5 $\\pm$ 0.7} & +1.5 & 23.8M & 5.22G & 81.0 \\\\\n"
        "    odd|1\\_\\% & 1 & 90.0 $\\pm$ -- & -4.0 & 23.8M & 5.22G & -- \\\\\n"
        "    last & 0 & failed: exit code 1: ValueError: shapes 4x8 and\\dots{} & -- & 23.8M & 5.22G & -- \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def test_csv(folder):
    rows = list(csv.DictReader(as_csv(collect(folder)).splitlines()))
    assert [row["word"] for row in rows] == list(VALUES)
    assert float(rows[0]["val/acc1"]) == pytest.approx(0.94)
    assert float(rows[1]["std"]) == pytest.approx(math.sqrt(0.00005))
    assert float(rows[1]["difference"]) == pytest.approx(0.015)
    assert (rows[1]["n"], rows[1]["params"], rows[1]["macs"], rows[1]["published"]) == (
        "2",
        "23760000",
        "5217000000",
        "81",
    )
    assert (rows[0]["difference"], rows[2]["std"], rows[3]["val/acc1"]) == ("", "", "")
    assert rows[3]["error"] == "exit code 1: ValueError: shapes 4x8 and 16x32 do not fit"


def test_the_terminal(folder, capsys):
    written = tables.write(folder)
    tables.show(folder)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "pos: val/acc1, mean ± std, seeds 0, 1, 2"
    texts = [[text.strip() for text in line.replace("┃", "│").strip("│").split("│")] for line in lines]
    assert ["word", "n", "val/acc1 (%)", "Δ vs baseline", "params", "MACs", "paper (top-1)"] in texts
    assert ["learned", "2", "95.5 ± 0.7", "+1.5", "23.8M", "5.22G", "81.0"] in texts
    assert ["odd|1_%", "1", "90.0 ± –", "-4.0", "23.8M", "5.22G", "–"] in texts
    assert "paper: TNT, table 6" in lines
    assert f"({folder}/word=3/seed=1/log.txt)" in out
    assert {path.name for path in written} == {"table.md", "table.csv", "table.tex", "figure.png"}
    assert all(str(path) in lines for path in written)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_there_has_no_column(tmp_path):
    study = write_study(tmp_path, "val/loss", {"a": [0.25], "b": [0.125]}, published=False, baseline={}, seeds=[0])
    table = collect(study)
    assert [column.head for column in columns(table)] == ["word", "val/loss", "params", "MACs"]
    assert columns(table)[1].texts == ["0.25 ± –", "0.125 ± –"]
    assert columns(table)[1].bold == {1}
    assert table.title == "pos: val/loss, mean ± std, seed 0"


def test_a_study_that_has_not_begun_has_a_table_too(tmp_path):
    study = write_study(tmp_path, values={"a": [], "b": []}, baseline={})
    assert columns(collect(study))[2].texts == ["–", "–"]
    tables.write(study)
    with pytest.raises(ConfigError, match="is not the folder of a study"):
        collect(tmp_path / "elsewhere")


def test_a_metric_that_no_run_has_is_a_failure(tmp_path):
    table = collect(write_study(tmp_path, metric="val/acc1", values={"a": [0.5]}, baseline={}))
    assert table.failures == []
    (tmp_path / "study.json").write_text((tmp_path / "study.json").read_text().replace("val/acc1", "val/acc"))
    assert "finished without 'val/acc'; did you mean 'val/acc1'?" in collect(tmp_path).failures[0]


def test_a_diverged_run_is_shown_and_never_the_best(tmp_path):
    table = collect(write_study(tmp_path, values={"none": [0.5, 0.5], "learned": [math.nan, 0.9]}))
    assert columns(table)[2].texts == ["50.0 ± 0.0", "nan ± nan"]
    assert columns(table)[2].bold == {0}


def test_a_baseline_of_one_axis_compares_like_with_like():
    choices = [{"a": a, "b": b} for a in "xy" for b in "12"]
    rows = [Row(each, "", 1, 1, values={0: 0.1 * place}) for place, each in enumerate(choices)]
    table = Table("t", "val/acc1", ["a", "b"], [0], {"a": "x"}, None, rows)
    assert columns(table)[3].texts == ["baseline", "baseline", "+20.0", "+20.0"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (81_000, "81.0K"),
        (999_949, "999.9K"),
        (999_950, "1.0M"),
        (3_100_000, "3.1M"),
        (23_760_000, "23.8M"),
        (999_999_999, "1.00G"),
        (5_217_000_000, "5.22G"),
    ],
)
def test_numbers_are_short(number, text):
    assert short(number) == text
