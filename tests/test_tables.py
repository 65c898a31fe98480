"""The table of a study against numbers computed by hand."""

from __future__ import annotations

import csv
import math

import pytest

from framework.ablation import figure
from framework.ablation.forms import as_csv, html, latex, markdown, write
from framework.ablation.state import Status, write_status
from framework.ablation.tables import Metric, Row, Table, collect, columns, short
from framework.errors import ConfigError
from tests.measured import REACH, READ, study_with_a_failure, texts, write_study


@pytest.fixture
def folder(tmp_path):
    return study_with_a_failure(tmp_path)


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


def test_an_accuracy_beside_a_loss_that_diverged_does_not_count(tmp_path):
    values = {"none": [(0.5, 1.0)] * 2, "a": [(0.1, math.nan), (0.6, 1.0)], "b": [(0.1, math.inf), (0.6, 1.0)]}
    study = write_study(tmp_path, ["val/acc1", "val/loss"], values, seeds=[0, 1])
    table = collect(study)
    for head in ("val/acc1 (%)", "val/loss"):
        assert texts(table, head)[1:] == ["diverged: seed 0"] * 2
    assert texts(table, "Δ [95 % interval]") == ["baseline", "–", "–"]
    assert (
        next(csv.DictReader(as_csv(table).splitlines()[:1] + as_csv(table).splitlines()[2:]))["val/acc1 seed=0"] == ""
    )
    # The loss of one stage says nothing of another one.
    write_status(study / "word=1" / "seed=0", Status("finished", metrics={"val/acc1": 0.4, "test/loss": math.nan}))
    assert collect(study).rows[1].values["val/acc1"] == {0: 0.4, 1: 0.6}


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
