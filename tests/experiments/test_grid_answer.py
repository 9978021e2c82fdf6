"""The answer at the head of a grid's report: ranks, ties and sentences, against numbers worked out by hand."""

from __future__ import annotations

import base64
import csv
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from delfast.experiments.grid import answer
from delfast.experiments.grid.answer import COLUMNS, Standing, sentences, short, standings
from delfast.experiments.grid.figures import plot_answer
from delfast.experiments.grid.report import _fold
from delfast.experiments.grid.sections import Section
from delfast.experiments.grid.summary import Mean, Row
from tests import ROOT

NUMBER = re.compile(r"-?\d+(\.\d*)?(e-?\d+)?")


def rows(
    method: str, gaps: Sequence[tuple[float, float, float]], strategy: str = "everything", **more: Any
) -> list[Row]:
    """A row for each seed: the gaps in forget accuracy, membership inference and test accuracy."""
    return [
        {
            **{"setting": "iid", "method": method, "strategy": strategy, "seed": seed, "forget": "iid"},
            **{"budget": None if strategy == "everything" else 0.3, "forget_ratio": 0.1, "seconds": 60.0},
            **dict(zip(answer.GAPS, each, strict=True)),
            **more,
        }
        for seed, each in enumerate(gaps)
    ]


ORIGINAL = rows("original", [(-60, 80, -1), (-61, 82, -2), (-59, 81, 0)])
NEAR = rows("del", [(4, -1, 2), (5, -1, 2), (6, -1, 2)], "del", relative_time=0.5)
LEVEL = rows("scrub", [(1, 9, 0), (1, 2, 0), (1, 7, 0)])  # its gaps are 9, 2 and 7
FAR = rows("finetune", [(-40, 50, 1), (-40, 51, 1), (-40, 52, 1)])


def test_the_largest_of_the_three_gaps_ranks_and_ties_are_found_seed_by_seed() -> None:
    ranked = standings([*ORIGINAL, *FAR, *LEVEL, *NEAR], 0.3)
    assert [each.label for each in ranked] == ["del (del mask)", "scrub", "finetune", "original"]
    assert [each.verdict for each in ranked] == ["nearest", "tie", "farther", "farther"]
    gap = ranked[0].gap
    assert gap.value == 5 and gap.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) s / sqrt(3)
    difference = ranked[1].difference
    assert difference is not None and difference.value == 1  # of 9 - 4, 2 - 5 and 7 - 6
    assert difference.half == pytest.approx(4.302653 * 4 / math.sqrt(3), rel=1e-6)
    assert ranked[0].cells() == [
        *("del (del mask)", "3", "5.00 ± 2.48", "5.00 ± 2.48", "-1.00 ± 0.00", "2.00 ± 0.00", "0.50 ± 0.00", "nearest")
    ]
    assert ranked[1].cells()[-2:] == ["-", "tie, +1.00 ± 9.94"] and len(COLUMNS) == len(ranked[0].cells()) == 8


def test_the_sentences_say_the_tie_the_cost_and_the_limits() -> None:
    ranked = standings([*ORIGINAL, *FAR, *LEVEL, *NEAR], 0.3)
    assert sentences(ranked) == [
        "del (del mask) has the smallest mean of the largest gap among methods with two seeds or more, 5.00 ± 2.48 "
        "points (3 seeds). The seeds do not separate del (del mask) from scrub; 1 method is farther.",
        "Without unlearning the largest gap is 81.00 ± 2.48 points. del (del mask) ends 2.00 ± 0.00 points below the "
        "oracle's test accuracy and takes 0.50 ± 0.00 times as long as retraining; seconds are "
        "wall-clock and include other work on the machine.",
        "Every method has two seeds or more; the 3 comparisons are at 95 % each, without a correction for their number"
        "; a method that was tried with more masks had more chances to come near.",
    ]
    assert short(ranked) == "del (del mask), largest gap 5.00 ± 2.48 points, in a tie with 1 more"


@pytest.mark.parametrize(
    ("times", "end"),
    [
        (
            (0.1, 0.2, 0.9),
            "; the time was not measured well enough to compare, since seconds are wall-clock and include ",
        ),
        ((0.5, 0.5, None), "; the time has no ratio, since another machine retrained for at least one seed."),
        ((0.5, 0.6, 0.5), " and takes 0.53 ± 0.14 times as long as retraining; seconds are wall-clock and include "),
    ],
)
def test_a_time_is_stated_if_its_interval_is_narrower_than_the_time(times: Sequence[float | None], end: str) -> None:
    timed = [
        row if time is None else {**row, "relative_time": time}
        for row, time in zip(rows("del", [(4, -1, 2), (5, -1, 2), (6, -1, 2)]), times, strict=True)
    ]
    ranked = standings(timed, 0.3)
    assert f"the oracle's test accuracy{end}" in sentences(ranked)[1]
    assert math.isnan(answer.cost(ranked[0])) == (times != (0.5, 0.6, 0.5))
    assert ranked[0].cells()[-2] == {None: "-", 0.9: "0.40 ± 1.08", 0.5: "0.53 ± 0.14"}[times[2]]


def test_a_separated_nearest_is_called_so() -> None:
    first = sentences(standings([*ORIGINAL, *FAR, *NEAR], 0.3))[0]
    assert first == (
        "del (del mask) is nearest to the oracle among methods with two seeds or more: largest gap 5.00 ± 2.48 points "
        "(3 seeds). The other method is farther."
    )


def test_one_seed_is_neither_first_nor_left_out() -> None:
    single = rows("ssd", [(1, 1, 1)])
    ranked = standings([*ORIGINAL, *single, *NEAR], 0.3)
    assert [(each.label, each.verdict) for each in ranked][::2] == [("del (del mask)", "nearest"), ("ssd", "one seed")]
    first, _, last = sentences(ranked)
    assert first.endswith(" Smaller, but of one seed and without an interval: ssd 1.00.")
    assert last.startswith("1 of 2 methods has too few seeds to be compared; the comparison is at 95 %")
    assert short(ranked).endswith("smaller with one seed: ssd 1.00")
    alone = sentences(standings(single, 0.3))
    assert alone[0] == (
        "ssd has the smallest largest gap, 1.00 points (1 seed), but without a second seed no method can be called "
        "nearer to the oracle than another."
    )


def test_each_method_stands_with_its_nearest_mask_and_other_ties_are_named() -> None:
    masks = [*rows("del", [(6, 0, 0), (5, 0, 0), (6, 0, 0)], "random"), *rows("del", [(50, 0, 0)] * 3, "salloc")]
    ranked = standings([*ORIGINAL, *masks, *NEAR, *rows("del", [(0, 0, 0)] * 3, "other", budget=0.1)], 0.3)
    assert [each.label for each in ranked] == ["del (del mask)", "original"]
    assert ranked[0].tied_masks == ("del (random mask)",)
    assert "1 other mask of these methods, del (random mask), ties with it too" in sentences(ranked)[2]


def test_a_method_that_is_nearer_on_the_common_seeds_is_not_called_farther() -> None:
    first = rows("del", [(10, 0, 0), (10, 0, 0), (1, 0, 0), (1, 0, 0)])
    other = rows("ssd", [(8, 0, 0), (8, 0, 0)])
    ranked = standings([*first, *other], 0.3)
    assert [(each.label, each.verdict) for each in ranked] == [("del", "nearest"), ("ssd", answer.NEARER)]
    assert "The seeds do not separate del from ssd." in sentences(ranked)[0]


def test_no_result_has_no_answer() -> None:
    assert sentences(standings(ORIGINAL, 0.3)) == [] and short(standings(ORIGINAL, 0.3)) == "no method has a result"


def boxes_of_labels(ranked: Sequence[Standing]) -> list[Bbox]:
    """Draw the plot and return the boxes of its labels, in pixels, after a check that each is inside the axes."""
    figure = plot_answer(ranked)
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame, boxes = axes.get_window_extent(), []
    for text in axes.texts:
        text.update_positions(renderer)
        boxes.append(box := Text.get_window_extent(text, renderer))  # without the line that leads to a label
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 2
    return boxes


def overlapping(boxes: Sequence[Bbox]) -> int:
    return sum(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_points_that_are_close_share_a_label_inside_the_axes() -> None:
    same = [{**row, "method": name} for name in ("relabel", "influence") for row in ORIGINAL]
    ranked = standings([*ORIGINAL, *same, *NEAR, *FAR], 0.3)
    assert [text.get_text() for text in plot_answer(ranked).axes[0].texts] == ["1", "2", "3, 4, 5"]
    assert overlapping(boxes_of_labels(ranked)) == 0


def test_no_two_labels_of_the_kept_grid_overlap() -> None:
    path = ROOT / "experiments/results/cifar10-small/results.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        kept = [
            {"budget": None}
            | {name: float(value) if NUMBER.fullmatch(value) else value for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]
    for setting in dict.fromkeys(row["setting"] for row in kept):
        ranked = standings([row for row in kept if row["setting"] == setting], 0.3)
        boxes = boxes_of_labels(ranked)
        assert len(boxes) >= 2 and overlapping(boxes) == 0, setting


def test_many_crowded_labels_do_not_overlap() -> None:
    crowd = [row for k in range(25) for row in rows(f"m{k}", [(20 + 3 * (k % 5), 0, 4 * (k // 5))] * 2)]
    boxes = boxes_of_labels(standings([*ORIGINAL, *crowd], 0.3))
    assert len(boxes) > 5 and overlapping(boxes) == 0


def test_a_table_is_given_as_csv_with_intervals_of_their_own() -> None:
    section = Section(
        "Means",
        columns=("name", "gap"),
        rows=[["a,b\n", Mean(1.5, 0.25, 2)], ["c", Mean(2.0, math.nan, 1)], ["d", None]],
    )
    folded = _fold(section)
    text = base64.b64decode(folded.csv.removeprefix("data:text/csv;base64,")).decode()
    assert list(csv.reader(text.splitlines())) == [
        *(["name", "gap", "gap ±"], ["a,b\\n", "1.5", "0.25"], ["c", "2.0", ""], ["d", "", ""])
    ]
    assert section.cells == [["a,b\\n", "1.50 ± 0.25"], ["c", "2.00"], ["d", ""]]


def test_the_kept_results_open_with_their_answer() -> None:
    text = (ROOT / "experiments/results/cifar10-small/report.md").read_text(encoding="utf-8")
    first = text.split("## All tables and figures")[0]
    assert first.count("## Setting ") == 4 and first.count("-answer.png)") == 4
    for line in first.splitlines():
        assert not line.startswith("| ---") or line.count("|") == len(COLUMNS) + 1
