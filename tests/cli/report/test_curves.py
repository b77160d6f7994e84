"""The course of a training: what is drawn of its metrics, and the numbers that sum it up."""

import pytest

from fgpt.cli.report import curves

LINES = [{"step": i, "loss": 3.0 - i / 10, "lr": 1e-3 * min(i, 3), "tokens": 100 * i} for i in range(1, 11)]
for step, heldout, news in ((4, 2.5, 7.0), (8, 2.25, 7.5)):
    LINES[step - 1] |= {"heldout_loss": heldout, "eval_news_loss": news}


def test_tokens_per_second_are_each_step_s_own():
    lines = [{"step": i, "tokens": t, "seconds": s} for i, (t, s) in enumerate([(10, 1.0), (30, 2.0), (8, 2.0)], 1)]
    assert curves.tokens_per_second(lines) == [
        (1, 10.0),
        (2, 20.0),
        (3, 4.0),
    ]  # the counters began anew before the last
    assert curves.tokens_per_second([{"step": 1, "loss": 2.0}]) == []


def test_smoothing_owes_nothing_to_its_beginning():
    assert [y for _, y in curves.smooth([(1, 3.0), (2, 3.0), (3, 3.0)])] == pytest.approx([3.0, 3.0, 3.0])


def test_values_that_are_no_numbers_are_left_out():
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    assert curves.values(lines, "loss") == [(2, 2.0)]
    (chart,) = curves.curves(lines, "token")
    assert "nan" not in chart.svg


def test_every_evaluation_set_is_named_and_its_best_step_marked():
    loss, news, *_ = curves.curves(LINES, "token")
    assert [name for name, _ in loss.legend] == ["each step", "smoothed", "held-out, best 2.25 at step 8"]
    assert news.title == "news loss"
    assert [name for name, _ in news.legend] == ["news, best 7 at step 4"]


def test_the_numbers_of_a_training():
    numbers = {name: (value, note) for name, value, note in curves.key_numbers(LINES, {"optimizer": "muon"})}
    assert numbers["held-out loss"] == ("2.250", "last; best 2.250 at step 8")
    assert numbers["news loss"] == ("7.500", "last; best 7.000 at step 4")
    assert numbers["peak learning rate"] == ("0.003", "at step 3; muon")
    assert numbers["tokens seen"] == ("1,000", "padding included")
    assert "trainable" not in numbers
    numbers = {name: value for name, value, _ in curves.key_numbers(LINES, {}, {"trained": 3, "total": 400})}
    assert numbers["trainable"] == "0.8 %"


@pytest.mark.parametrize("parameters", [None, 3, {}, {"trained": "3", "total": 4}, {"trained": 3, "total": 0}])
def test_a_share_that_is_not_recorded_is_none(parameters: object):
    assert curves.trained_share(parameters) is None


def test_the_table_of_evaluations():
    table = curves.evaluation_table(LINES)
    assert table is not None
    heads = [column.name for column in table.columns]
    assert heads == ["step", "tokens seen", "training, smoothed", "held-out", "news"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["4", "400", f"{curves.smooth(curves.values(LINES, 'loss'))[3][1]:.4f}", "2.5000", "7.0000"],
        ["8", "800", f"{curves.smooth(curves.values(LINES, 'loss'))[7][1]:.4f}", "2.2500", "7.5000"],
    ]
    assert [[cell.is_best for cell in row[3:]] for row in table.rows] == [[False, True], [True, False]]
    assert curves.evaluation_table(LINES[:3]) is None


def test_runs_over_each_other():
    loss, heldout = curves.overlay([(f"run-{i}", LINES) for i in range(12)])
    assert [series.name for series in loss.series] == [series.name for series in heldout.series]
    styles = [(series.color, series.dashed) for series in loss.series]
    assert styles[::5] == [("c1", False), ("c1", True), ("raw", False)]
    assert loss.series[0].points == curves.smooth(curves.values(LINES, "loss"))
    assert heldout.series[0].points == [(4, 2.5), (8, 2.25)]
    (loss,) = curves.overlay([("a", LINES[:3]), ("b", [])])  # nothing is drawn of a run without steps
    assert [series.name for series in loss.series] == ["a"]
