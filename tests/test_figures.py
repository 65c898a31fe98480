"""The figures of a study."""

from __future__ import annotations

import json
import math

import pytest
from matplotlib.text import Text

from framework.ablation import figure
from framework.ablation.forms import write
from framework.ablation.state import Status, write_status
from framework.ablation.tables import Metric, Row, Table, collect, short
from framework.errors import ConfigError
from tests.measured import study_with_a_failure, write_study


@pytest.fixture
def folder(tmp_path):
    return study_with_a_failure(tmp_path)


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
    boxes = [Text.get_window_extent(text) for text in drawn.axes[0].texts]  # without the lines to their points
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize(
    "points",
    [
        [("none", 1_000_000, 0.9), ("rope", 1_002_000, 0.9001)],
        [("none", 1_000_000, 0.9), ("rope", 1_000_000, 0.9001), ("far", 1_200_000, 0.95)],
        [(f"a long name {i}", 1_000_000 + 40_000 * (i % 4), 0.9 + 0.002 * (i // 4)) for i in range(12)],
    ],
)
def test_a_name_stands_by_its_own_point_or_a_line_leads_there(points):
    drawn = scatter(points)
    drawn.canvas.draw()
    axes = drawn.axes[0]
    assert len(axes.texts) == len(points)

    def distance(box, point):
        x, y = axes.transData.transform(point)
        return math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))

    places = [text.xy for text in axes.texts]
    for text in axes.texts:
        box = Text.get_window_extent(text)
        nearest = min(distance(box, place) for place in places if place != text.xy)
        assert text.arrow_patch or distance(box, text.xy) < nearest, text.get_text()


def test_of_many_points_only_the_best_for_their_cost_are_named():
    points = [(f"net {i}", 1000 * (1 + i % 10), 0.5 + 0.01 * (i % 10) - 0.001 * (i // 10)) for i in range(60)]
    named = {text.get_text() for text in scatter(points).axes[0].texts}
    assert named == {f"net {i}" for i in range(10)}


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (b"epoch,val/acc1\n0,0.5\n1,half\n", ", line 3: is damaged: must hold an epoch and numbers; delete it"),
        (b"epoch,val/acc1\nx,0.5\n", ", line 2: is damaged: must hold"),
        (b"val/acc1\n0.5\n", ", line 2: is damaged: must hold"),
        (b"epoch,val/acc1\n0,0.5,0.6\n", ", line 2: is damaged: must hold"),
        (b"epoch,val/acc1\n0,\xff\n", ": is damaged: no text in UTF-8; delete it"),
    ],
)
def test_damaged_curves_are_named(tmp_path, damaged, where):
    study = write_study(tmp_path)
    path = study / "word=0" / "seed=0" / "curves.csv"
    path.write_bytes(damaged)
    with pytest.raises(ConfigError) as caught:
        figure.curves(study, collect(study))
    assert str(caught.value).startswith(f"{path}{where}")


def test_curves_are_means_over_seeds_and_the_best_cells(tmp_path):
    study = write_study(tmp_path, ["val/acc1", "val/loss"], {"none": [(0.8, 0.2)], "a": [(0.9, 0.1)] * 2})
    write_curves(study)
    other = study / "word=1" / "seed=1" / "curves.csv"
    other.write_text(other.read_text().replace("5,0.75,", "5,0.95,"))
    one, two = figure.curves(study, collect(study)).axes
    assert [line.get_label() for line in one.lines] == ["none (baseline)", "a"]
    assert list(one.lines[1].get_ydata())[-2:] == pytest.approx([70, 85])
    assert list(two.lines[0].get_ydata())[:2] == [1, 0.5]
    diverged = study / "word=0" / "seed=0" / "curves.csv"
    diverged.write_text(diverged.read_text().replace("4,0.7,0.2,", "4,0.1,nan,"))
    shown = figure.curves(study, collect(study)).axes[0].lines[0].get_ydata()
    assert [math.isnan(value) for value in shown] == [False] * 4 + [True, False]
    values = {f"{i:02}": [0.5 + i / 100] for i in range(14)}
    study = write_study(tmp_path / "many", values=values, baseline={"word": "00"})
    write_curves(study)
    drawn = figure.curves(study, collect(study))
    shown = [line.get_label() for line in drawn.axes[0].lines]
    assert shown == ["00 (baseline)", *(f"{i:02}" for i in range(5, 14))]
    assert "the best 10 of 14 cells" in drawn.get_suptitle()
