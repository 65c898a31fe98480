"""The table of a study against numbers computed by hand, in all its forms, and its figures."""

from __future__ import annotations

import base64
import csv
import json
import math
from html.parser import HTMLParser

import pytest

from framework.ablation import figure, tables, view
from framework.ablation.forms import as_csv, html, latex, markdown, write
from framework.ablation.state import Status, write_status
from framework.ablation.tables import Metric, Row, Table, collect, columns, short
from framework.errors import ConfigError

# none: mean .94, std .02; learned: mean .955, over seeds 0 and 1 above none by .03 and .02; odd|1_%: one seed, .02
# below; last: no seed, one of two failed
VALUES = {"none": [0.92, 0.94, 0.96], "learned": [0.95, 0.96], "odd|1_%": [0.9], "last": []}

PAPER = {"source": "TNT, table 6", "metric": "top-1", "rows": {"none": 80.5, "learned": 81}}
READ = (
    "Δ: mean difference to the baseline over the seeds that both have, with its 95 % t-interval. p flip: exact "
    "sign-flip test, p t: t-test, both paired by seed, two-sided, after Holm's correction over 2 comparisons."
)
REACH = (
    "With 2 paired seeds the sign-flip test cannot give a p below 2/2^2 = 0.5 (1 after Holm's correction over 2 "
    "comparisons), so by it no difference can be significant at 0.05, however large; it takes 6 seeds, and 7 after "
    "the correction."
)


def write_study(folder, metric="val/acc1", values=VALUES, published=PAPER, measures=(), **changes):
    data = {
        "name": "pos",
        "metric": metric,
        "axes": {"word": list(values)},
        "seeds": [0, 1, 2],
        "baseline": {"word": "none"},
        "published": published,
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
            metrics = {metric: number} if isinstance(metric, str) else dict(zip(metric, number, strict=True))
            write_status(run, Status("finished", metrics=metrics, measures=dict(measures)))
    (folder / "study.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def folder(tmp_path):
    study = write_study(tmp_path)
    broken = study / "word=3" / "seed=1"
    broken.mkdir(parents=True)
    write_status(broken, Status("failed", error="exit code 1: ValueError: shapes 4x8 and 16x32 do not fit"))
    return study


def texts(table, head):
    return next(column.texts for column in columns(table) if column.head == head)


# Numbers


def test_the_numbers(folder):
    table = collect(folder)
    none, learned, odd, last = table.results["val/acc1"]
    assert none.sample.mean == pytest.approx(0.94)
    assert none.sample.std == pytest.approx(0.02)
    # over the seeds that both have, and not the difference of the means, which is .015
    assert learned.comparison.difference.mean == pytest.approx(0.025)
    assert learned.comparison.difference.high == pytest.approx(0.025 + 12.706 * 0.005, rel=1e-3)
    assert none.comparison.difference.n == 0
    assert odd.comparison.difference.mean == pytest.approx(-0.02)
    assert math.isnan(odd.sample.std)
    assert math.isnan(last.sample.mean)
    # p .5 and 1: .5 × 2, and 1
    assert (learned.comparison.sign_flip, learned.sign_flip, odd.sign_flip) == (0.5, 1, 1)
    # t = .025 / .005 = 5 with 1 degree of freedom: p = 1 − 2/π · arctan 5; alone among the t-tests
    assert learned.t_test == learned.comparison.t_test == pytest.approx(1 - 2 / math.pi * math.atan(5))
    assert [row.published for row in table.rows[:2]] == [80.5, 81]
    assert math.isnan(table.rows[2].published)
    assert table.notes == [READ, REACH, "paper: TNT, table 6"]


def test_holm_counts_the_cells_of_the_table(tmp_path):
    values = {
        name: [0.5 + step * seed + up for seed in range(7)]
        for name, up, step in (("none", 0, 0), ("a", 0.1, 0.01), ("b", 0.2, 0.02))
    }
    table = collect(write_study(tmp_path, values=values, seeds=list(range(7))))
    # all of seven differences have one sign: 2/2⁷, times two comparisons
    assert [result.sign_flip for result in table.results["val/acc1"][1:]] == [4 / 128, 4 / 128]
    assert len(table.notes) == 2  # nothing is out of reach


def test_a_baseline_of_one_axis_compares_like_with_like():
    choices = [{"a": a, "b": b} for a in "xy" for b in "12"]
    rows = [Row(each, "", 1, 1, values={"val/acc1": {0: 0.1 * place}}) for place, each in enumerate(choices)]
    table = Table("t", [Metric("val/acc1")], {"a": ["x", "y"], "b": ["1", "2"]}, [0], {"a": "x"}, {}, None, rows)
    assert texts(table, "Δ [95 % interval]") == ["baseline", "baseline", "+20.0", "+20.0"]


def test_cells_without_a_conditional_axis_are_compared_and_shown(tmp_path):
    choices = [{"gate": "none"}, {"gate": "tanh", "ratio": "4"}, {"gate": "tanh", "ratio": "16"}]
    table = collect(
        write_study(
            tmp_path,
            values={"0": [0.5], "1": [0.6], "2": [0.7]},
            seeds=[0],
            axes={"gate": ["none", "tanh"], "ratio": ["4", "16"]},
            when={"ratio": {"gate": ["tanh"]}},
            # the ratio of the baseline does not apply beside its own gate
            baseline={"gate": "none", "ratio": "4"},
            published={"source": "x", "rows": {"tanh/16": 70.0}},
            cells=[
                {"folder": f"word={place}", "choices": each, "params": 1, "macs": 1}
                for place, each in enumerate(choices)
            ],
        )
    )
    assert texts(table, "ratio") == ["–", "4", "16"]
    assert texts(table, "Δ [95 % interval]") == ["baseline", "+10.0", "+20.0"]
    assert texts(table, "paper") == ["–", "–", "70.0"]


def test_a_diverged_run_is_named_and_never_the_best(tmp_path):
    table = collect(write_study(tmp_path, values={"none": [0.5, 0.5], "a": [math.nan, 0.9], "b": [math.inf, 0.9]}))
    assert texts(table, "val/acc1 (%)") == ["50.0 ± 0.0", "diverged: seed 0", "diverged: seed 0"]
    assert columns(table)[2].bold == {0}
    assert texts(table, "Δ [95 % interval]") == ["baseline", "–", "–"]
    assert "nan" not in markdown(table) + latex(table) + html(table, [])
    assert figure.draw(tmp_path, table) == [tmp_path / "figure.png"]


def test_equal_values_leave_no_nan(tmp_path):
    table = collect(write_study(tmp_path, values={"none": [0.5] * 3, "a": [0.75] * 3, "b": [0.5] * 3}))
    made = {column.head: column.texts for column in columns(table)}
    assert made["val/acc1 (%)"] == ["50.0 ± 0.0", "75.0 ± 0.0", "50.0 ± 0.0"]
    assert made["Δ [95 % interval]"] == ["baseline", "+25.0 [+25.0, +25.0]", "+0.0 [+0.0, +0.0]"]
    assert made["p flip"] == ["–", "0.500", "1.000"]
    assert made["p t"] == ["–", "–", "–"]
    for text in (markdown(table), latex(table), html(table, []), as_csv(table)):
        assert "nan" not in text


def test_of_a_loss_the_lowest_is_the_best(tmp_path):
    table = collect(
        write_study(tmp_path, "val/loss", {"a": [0.25], "b": [0.125]}, published=None, baseline={}, seeds=[0])
    )
    assert [column.head for column in columns(table)] == ["word", "val/loss", "params", "MACs"]
    assert columns(table)[1].texts == ["0.25 ± –", "0.125 ± –"]
    assert columns(table)[1].bold == {1}
    assert table.title == "pos: val/loss, mean ± std, seed 0"
    assert table.notes == []


def test_several_metrics_and_each_has_its_best(tmp_path):
    values = {"none": [(0.9, 0.5), (0.92, 0.4)], "learned": [(0.95, 0.6), (0.96, 0.61)]}
    table = collect(write_study(tmp_path, ["val/acc1", "val/loss"], values, published=None, seeds=[0, 1]))
    first, second = (column for column in columns(table) if column.head.startswith("val/"))
    assert (first.head, first.bold) == ("val/acc1 (%)", {1})
    assert (second.head, second.bold) == ("val/loss", {0})
    assert second.texts == ["0.45 ± 0.071", "0.605 ± 0.0071"]
    line = list(csv.DictReader(as_csv(table).splitlines()))[1]
    assert float(line["val/loss difference"]) == pytest.approx(0.155)
    assert float(line["val/loss seed=1"]) == 0.61
    assert table.title == "pos: val/acc1, val/loss, mean ± std, seeds 0, 1"


def test_measures_are_joined_where_runs_have_them(tmp_path):
    measures = {"train_images_per_s": 1234.5, "peak_mib": 600, "seconds": 12.34, "params": 3}
    study = write_study(tmp_path, measures=measures)
    other = study / "word=1" / "seed=1"
    write_status(
        other, Status("finished", metrics={"val/acc1": 0.96}, measures={**measures, "peak_mib": 700, "seconds": 14})
    )
    table = collect(study)
    assert texts(table, "train img/s") == ["1234", "1234", "1234", "–"]
    assert texts(table, "peak MiB") == ["600", "700", "600", "–"]
    assert texts(table, "time (s)") == ["12.3", "13.2", "12.3", "–"]
    assert not any(column.head == "eval img/s" for column in columns(table))


def test_a_metric_that_no_run_has_is_a_failure(tmp_path):
    table = collect(write_study(tmp_path, metric="val/acc1", values={"a": [0.5]}, baseline={}))
    assert table.failures == []
    (tmp_path / "study.json").write_text((tmp_path / "study.json").read_text().replace("val/acc1", "val/acc"))
    assert "finished without 'val/acc'; did you mean 'val/acc1'?" in collect(tmp_path).failures[0]


def test_a_study_that_has_not_begun_has_a_table_too(tmp_path):
    study = write_study(tmp_path, values={"a": [], "b": []}, baseline={})
    assert columns(collect(study))[2].texts == ["–", "–"]
    write(study, collect(study))
    with pytest.raises(ConfigError, match="is not the folder of a study"):
        collect(tmp_path / "elsewhere")


# Written forms


def test_markdown(folder):
    assert markdown(collect(folder)) == (
        "**pos: val/acc1, mean ± std, seeds 0, 1, 2**\n"
        "\n"
        "| word | n | val/acc1 (%) | 95 % interval | Δ [95 % interval] | p flip | p t | params | MACs "
        "| paper (top-1) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| none | 3 | 94.0 ± 2.0 | [89.0, 99.0] | baseline | – | – | 23.8M | 5.22G | 80.5 |\n"
        "| learned | 2 | **95.5 ± 0.7** | [89.1, 101.9] | +2.5 [-3.9, +8.9] | 1.000 | 0.126 | 23.8M | 5.22G | 81.0 |\n"
        "| odd\\|1_% | 1 | 90.0 ± – | – | -2.0 | 1.000 | – | 23.8M | 5.22G | – |\n"
        "| last | 0 | failed | – | – | – | – | 23.8M | 5.22G | – |\n"
        "\n"
        f"{READ}\n"
        "\n"
        f"{REACH}\n"
        "\n"
        "paper: TNT, table 6\n"
        "\n"
        "- failed: word=3 seed=1: exit code 1: ValueError: shapes 4x8 and 16x32 do not fit "
        f"({folder}/word=3/seed=1/log.txt)\n"
    )


def test_latex(folder):
    caption = f"pos: val/acc1, mean ± std, seeds 0, 1, 2. {READ} {REACH} Paper: TNT, table 6."
    for sign, tex in (("%", "\\%"), ("Δ", "$\\Delta$"), ("±", "$\\pm$"), ("^", "\\textasciicircum{}")):
        caption = caption.replace(sign, tex)
    assert latex(collect(folder)) == (
        "% failed: word=3 seed=1: exit code 1: ValueError: shapes 4x8 and 16x32 do not fit "
        f"({folder}/word=3/seed=1/log.txt)\n"
        "\\begin{table}\n"
        "  \\centering\n"
        f"  \\caption{{{caption}}}\n"
        "  \\begin{tabular}{lrrrrrrrrr}\n"
        "    \\toprule\n"
        "    word & n & val/acc1 (\\%) & 95 \\% interval & $\\Delta$ {[}95 \\% interval{]} & p flip & p t & params "
        "& MACs & paper (top-1) \\\\\n"
        "    \\midrule\n"
        "    none & 3 & 94.0 $\\pm$ 2.0 & {[}89.0, 99.0{]} & baseline & -- & -- & 23.8M & 5.22G & 80.5 \\\\\n"
        "    learned & 2 & \\textbf{95.5 $\\pm$ 0.7} & {[}89.1, 101.9{]} & +2.5 {[}-3.9, +8.9{]} & 1.000 & 0.126 "
        "& 23.8M & 5.22G & 81.0 \\\\\n"
        "    odd\\textbar{}1\\_\\% & 1 & 90.0 $\\pm$ -- & -- & -2.0 & 1.000 & -- & 23.8M & 5.22G & -- \\\\\n"
        "    last & 0 & failed & -- & -- & -- & -- & 23.8M & 5.22G & -- \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )


def test_csv_has_every_number(folder):
    rows = list(csv.DictReader(as_csv(collect(folder)).splitlines()))
    none, learned, odd, last = rows
    assert [row["word"] for row in rows] == list(VALUES)
    assert [none[f"val/acc1 seed={seed}"] for seed in (0, 1, 2)] == ["0.92", "0.94", "0.96"]
    assert [learned[f"val/acc1 seed={seed}"] for seed in (0, 1, 2)] == ["0.95", "0.96", ""]
    numbers = {
        "n": 2,
        "mean": 0.955,
        "std": math.sqrt(0.00005),
        "low": 0.955 - 12.706 * 0.005,
        "high": 0.955 + 12.706 * 0.005,
        "pairs": 2,
        "difference": 0.025,
        "difference std": math.sqrt(0.00005),
        "difference low": 0.025 - 12.706 * 0.005,
        "p sign-flip": 0.5,
        "p sign-flip Holm": 1.0,
        "p t-test": 0.125666,
        "p t-test Holm": 0.125666,
    }
    for name, number in numbers.items():
        assert float(learned[f"val/acc1 {name}"]) == pytest.approx(number, rel=1e-3), name
    assert (learned["params"], learned["macs"], learned["published"]) == ("23760000", "5217000000", "81")
    assert (none["val/acc1 difference"], odd["val/acc1 std"], last["val/acc1 mean"]) == ("", "", "")
    assert last["error"] == "exit code 1: ValueError: shapes 4x8 and 16x32 do not fit"


class Page(HTMLParser):
    """The texts of the cells, and what comes from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.links, self.open = [[]], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1].append(data)


def test_html_is_one_file_with_everything_in_it(folder):
    table = collect(folder)
    paths = write(folder, table)
    text = (folder / "table.html").read_text()
    page = Page(text)
    assert page.cells[1][:3] == ["word", "n", "val/acc1 (%)"]
    assert page.cells[-2][:3] == ["odd|1_%", "1", "90.0 ± –"]
    images = [path for path in paths if path.suffix == ".png"]
    assert [base64.b64decode(link.partition("base64,")[2]) for link in page.links] == [p.read_bytes() for p in images]
    assert "<b>95.5 ± 0.7</b>" in text
    assert REACH in text.replace("&#x27;", "'")
    assert "paper: TNT, table 6" in text
    assert "&lt;img" in html(collect(write_study(folder / "evil", values={"<img>": [0.5]}, baseline={})), [])


# The terminal


def at(monkeypatch, width, terminal=True):
    from rich.console import Console

    monkeypatch.setattr(
        tables,
        "console",
        lambda: Console(width=width, force_terminal=terminal, color_system=None, legacy_windows=False),
    )


def cells_of(out):
    lines = (line.replace("┃", "│").strip("│").split("│") for line in out.splitlines() if "│" in line or "┃" in line)
    return [[text.strip() for text in line] for line in lines]


def test_the_terminal(folder, capsys):
    table = collect(folder)
    written = write(folder, table)
    view.show(folder, table)
    out = capsys.readouterr().out
    assert out.startswith("pos: val/acc1, mean ± std, seeds 0, 1, 2\n")
    head, *lines = cells_of(out)
    assert head == [column.head for column in columns(table)]
    assert lines[1][:6] == ["learned", "2", "95.5 ± 0.7", "[89.1, 101.9]", "+2.5 [-3.9, +8.9]", "1.000"]
    assert "paper: TNT, table 6" in out
    assert f"({folder}/word=3/seed=1/log.txt)" in out
    assert {path.name for path in written} == {"table.md", "table.csv", "table.tex", "table.html", "figure.png"}
    assert all(f"{path}\n" in out for path in written)


def test_a_narrow_terminal_shows_what_matters_most(folder, capsys, monkeypatch):
    at(monkeypatch, 80)
    view.show(folder, collect(folder))
    out = capsys.readouterr().out
    head, *lines = cells_of(out)
    assert head == ["word", "n", "val/acc1 (%)", "Δ [95 % interval]", "p flip", "paper (top-1)"]
    assert len(lines) == 4
    assert "no room for 95 % interval, p t, params, MACs: see table.html" in out
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 80


def test_some_cells_are_shown_with_the_statistics_of_all(folder, capsys):
    table = collect(folder)
    view.show(folder, table, lambda choices: choices["word"] == "learned")
    out = capsys.readouterr().out
    assert [line[0] for line in cells_of(out)] == ["word", "learned"]
    assert "1 of the 4 cells that the study has and the statistics are of" in out
    assert "over 2 comparisons" in " ".join(out.split())


def waiting_study(root):
    study = write_study(root, values={"none": [0.5], "learned": [0.6]}, published=None, seeds=[0])
    runs = [study / f"word={place}" / "seed=0" for place in (0, 1)]
    for run in runs:
        write_status(run, Status("waiting"))
    return study, runs


def test_watching_a_log_prints_a_line_for_each_change(tmp_path, capsys, monkeypatch):
    study, (one, two) = waiting_study(tmp_path)
    now = iter(
        [
            lambda: write_status(one, Status("running", 1, 3)),
            lambda: None,
            lambda: write_status(one, Status("finished", 3, 3, {"val/acc1": 0.75})),
            lambda: write_status(two, Status("failed", error="ValueError: no")),
        ]
    )
    monkeypatch.setattr(view.time, "sleep", lambda seconds: next(now)())
    view.watch(study, lambda choices: True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "2 waiting",
        "word=0 seed=0  running",
        "[1/2] word=0 seed=0  val/acc1 0.75",
        f"[2/2] word=1 seed=0  failed: ValueError: no  {two}/log.txt",
    ]
    assert lines[4].startswith("pos: val/acc1")
    assert (study / "table.html").exists()


def test_watching_in_a_terminal_draws_the_table_again(tmp_path, capsys, monkeypatch):
    at(monkeypatch, 100)
    study, (one, two) = waiting_study(tmp_path)

    def interrupted(seconds):
        if capsys.readouterr().out.count("1 running, 1 finished"):
            raise KeyboardInterrupt
        write_status(one, Status("finished", 3, 3, {"val/acc1": 0.75}))
        write_status(two, Status("running", 1, 3))

    monkeypatch.setattr(view.time, "sleep", interrupted)
    view.watch(study, lambda choices: True)
    out = capsys.readouterr().out
    assert "75.0 ± –" in out.rpartition("pos: val/acc1")[2]  # printed for good, after Ctrl-C
    assert str(study / "table.html") in out


# Figures


def write_curves(study, epochs=6):
    for run in study.glob("word=*/seed=*"):
        lines = [f"{epoch},{0.5 + epoch / 20},{1 / (epoch + 1)},{'' if epoch else 1}" for epoch in range(epochs)]
        (run / "curves.csv").write_text("\n".join(["epoch,val/acc1,val/loss,lr", *lines]) + "\n")


def test_figures_are_drawn_where_there_is_data_and_taken_away_where_there_is_none(tmp_path):
    study = write_study(tmp_path)
    assert [path.name for path in write(study, collect(study)) if path.suffix == ".png"] == ["figure.png"]
    about = json.loads((study / "study.json").read_text())
    for place, cell in enumerate(about["cells"]):
        cell["macs"] *= 1 + place
    (study / "study.json").write_text(json.dumps(about))
    for place, run in enumerate(study.glob("word=*/seed=*")):
        write_status(run, Status("finished", metrics={"val/acc1": 0.9}, measures={"images_per_s": 100 + place}))
    write_curves(study)
    all_four = ["figure.png", "figure_macs.png", "figure_throughput.png", "figure_curves.png"]
    assert [path.name for path in figure.draw(study, collect(study))] == all_four
    assert all((study / name).read_bytes().startswith(b"\x89PNG") for name in all_four)
    write_study(tmp_path / "again")
    (tmp_path / "again" / "figure_macs.png").touch()
    assert [path.name for path in figure.draw(tmp_path / "again", collect(tmp_path / "again"))] == ["figure.png"]
    assert not (tmp_path / "again" / "figure_macs.png").exists()


def test_the_figure_of_cells_shows_interval_and_seeds(folder):
    axes, paper = figure.cells(collect(folder)).axes
    seeds = next(line for line in axes.lines if line.get_label() == "one seed")
    assert sorted(seeds.get_xdata()) == pytest.approx([90, 92, 94, 95, 96, 96])
    assert [container.get_label() for container in axes.containers] == ["mean, 95 % interval"]
    (bars,) = axes.containers[0].lines[2]
    ends = [(segment[0][0], segment[1][0]) for segment in bars.get_segments()]
    half = 4.303 * 2 / math.sqrt(3)
    assert ends[0] == pytest.approx((94 - half, 94 + half), rel=1e-3)
    assert ends[2] == pytest.approx((90, 90))
    assert list(paper.lines[0].get_xdata())[:2] == [80.5, 81]


def scatter(points):
    """A figure of accuracy against MACs: `points` are names, MACs and values of two seeds."""
    rows = [
        Row({"net": name}, "", 1, macs, values={"val/acc1": {0: value, 1: value + 0.002}})
        for name, macs, value in points
    ]
    axes = {"net": [name for name, _, _ in points]}
    table = Table("t", [Metric("val/acc1")], axes, [0, 1], {"net": points[0][0]}, {}, None, rows)
    return figure.against(table, "MACs", lambda row: row.macs, short)


def test_names_in_a_scatter_do_not_overlap():
    drawn = scatter([(f"a long name {i}", 1_000_000 + 40_000 * (i % 4), 0.9 + 0.002 * (i // 4)) for i in range(12)])
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.axes[0].texts]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_of_many_points_only_the_best_for_their_cost_are_named():
    points = [(f"net {i}", 1000 * (1 + i % 10), 0.5 + 0.01 * (i % 10) - 0.001 * (i // 10)) for i in range(60)]
    named = {text.get_text() for text in scatter(points).axes[0].texts}
    assert named == {f"net {i}" for i in range(10)}


def test_curves_are_means_over_seeds_and_the_best_cells(tmp_path):
    study = write_study(tmp_path, ["val/acc1", "val/loss"], {"none": [(0.8, 0.2)], "a": [(0.9, 0.1)] * 2})
    write_curves(study)
    other = study / "word=1" / "seed=1" / "curves.csv"
    other.write_text(other.read_text().replace("5,0.75,", "5,0.95,"))
    one, two = figure.curves(study, collect(study)).axes
    assert [line.get_label() for line in one.lines] == ["none (baseline)", "a"]
    assert list(one.lines[1].get_ydata())[-2:] == pytest.approx([70, 85])
    assert list(two.lines[0].get_ydata())[:2] == [1, 0.5]
    values = {f"{i:02}": [0.5 + i / 100] for i in range(14)}
    study = write_study(tmp_path / "many", values=values, baseline={"word": "00"})
    write_curves(study)
    drawn = figure.curves(study, collect(study))
    shown = [line.get_label() for line in drawn.axes[0].lines]
    assert shown == ["00 (baseline)", *(f"{i:02}" for i in range(5, 14))]
    assert "the best 10 of 14 cells" in drawn.get_suptitle()


def test_thousands_of_runs_are_reported(tmp_path):
    values = {f"{i:03}": [0.5 + i / 1000 + seed / 100 for seed in range(5)] for i in range(400)}
    study = write_study(tmp_path, values=values, seeds=list(range(5)), baseline={"word": "000"})
    table = collect(study)
    assert len(columns(table)[0].texts) == 400


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
