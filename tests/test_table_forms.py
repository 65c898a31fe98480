"""The table of a study in all its forms, in the terminal, and while it is watched."""

from __future__ import annotations

import base64
import csv
import math
from html.parser import HTMLParser

import pytest

from framework.ablation import tables, view
from framework.ablation.forms import as_csv, html, latex, markdown, write
from framework.ablation.state import Status, write_status
from framework.ablation.tables import collect, columns
from tests.measured import REACH, READ, VALUES, study_with_a_failure, write_study


@pytest.fixture
def folder(tmp_path):
    return study_with_a_failure(tmp_path)


# Written forms


def test_markdown(folder):
    path = str(folder).replace("_", "\\_")
    assert markdown(collect(folder)) == (
        "**pos: val/acc1, mean ± std, seeds 0, 1, 2**\n"
        "\n"
        "| word | n | val/acc1 (%) | 95 % interval | Δ [95 % interval] | p flip | p t | params | MACs "
        "| paper (top-1) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| none | 3 | 94.0 ± 2.0 | [89.0, 99.0] | baseline | – | – | 23.8M | 5.22G | 80.5 |\n"
        "| learned | 2 | **95.5 ± 0.7** | [89.1, 101.9] | +2.5 [-3.9, +8.9] | 1.000 | 0.126 | 23.8M | 5.22G | 81.0 |\n"
        "| odd\\|1\\_% | 1 | 90.0 ± – | – | -2.0 | 1.000 | – | 23.8M | 5.22G | – |\n"
        "| last | 0 | failed | – | – | – | – | 23.8M | 5.22G | – |\n"
        "\n"
        f"{READ}\n"
        "\n"
        f"{REACH}\n"
        "\n"
        "paper: TNT, table 6\n"
        "\n"
        "- failed: word=3 seed=1: exit code 1: ValueError: shapes 4x8 and 16x32 do not fit "
        f"({path}/word=3/seed=1/log.txt)\n"
    )


def test_markdown_shows_names_as_they_are(tmp_path):
    names = ["none", "<i>t</i>", "__init__", "a|b", "*x*", "`c`", "\\d"]
    axes = {"ax|is_1%": names}
    cells = [
        {"folder": f"word={place}", "choices": {"ax|is_1%": name}, "params": 1, "macs": 1}
        for place, name in enumerate(names)
    ]
    study = write_study(
        tmp_path, values={name: [0.5 + place / 100] * 12 for place, name in enumerate(names)}, seeds=list(range(12)),
        axes=axes, cells=cells, baseline={"ax|is_1%": "none"}, name="a_b_c", published=None,
    )  # fmt: skip
    for place in range(1, 7):  # small differences that are not all the same, so that a p is below .001
        for seed in range(12):
            metrics = {"val/acc1": 0.5 + place / 100 + seed / 10_000}
            write_status(study / f"word={place}" / f"seed={seed}", Status("finished", metrics=metrics))
    title, head, _, *rows = [line for line in markdown(collect(study)).splitlines() if line]
    assert title.startswith("**a\\_b\\_c: val/acc1, mean ± std, ")
    assert head.startswith("| ax\\|is\\_1% | val/acc1 (%) | 95 % interval |")
    shown = [row.split(" | ")[0] for row in rows[:7]]
    assert shown == [
        "| none", r"| \<i>t\</i>", r"| \_\_init\_\_", r"| a\|b", r"| \*x\*", r"| \`c\`", r"| \\d"
    ]  # fmt: skip
    assert all(" | <0.001 | " in row and " ± " in row for row in rows[1:7])


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


def test_progress_shows_a_diverged_run_as_one(tmp_path):
    study, (run, _) = waiting_study(tmp_path)
    write_status(run, Status("finished", 3, 3, {"val/acc1": 0.1, "val/loss": math.inf}))
    progress = view.Progress(view.runs_of(study, lambda choices: True), "val/acc1")
    assert progress.line(next(iter(progress.statuses))) == "[1/2] word=0 seed=0  val/acc1 nan"
    assert "nan" in str(next(iter(progress.lines().columns[1].cells)))


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
