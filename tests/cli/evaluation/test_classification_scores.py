"""Accuracy and F1 by hand and by scikit-learn."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fgpt.cli.evaluation.metrics.classes import majority, plot_confusion, scores


def test_scores_by_hand(tmp_path: Path):
    """Of 6 rows 3 are told right; F1 is 2·2/(2·2+1+1) for a, 2·1/(2·1+1+1) for b, and 0 for c."""
    truth, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 0]
    found = scores(truth, predicted, 3)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx([2 / 3, 1 / 2, 0])
    assert found["macro_f1"] == pytest.approx(7 / 18)
    assert found["confusion"] == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert majority([1, 1, 0, 2], truth, 3)["accuracy"] == pytest.approx(2 / 6)
    assert majority([0, 1], truth, 3)["confusion"] == [[3, 0, 0], [2, 0, 0], [1, 0, 0]]
    plot_confusion(found, ["a", "b", "c"], tmp_path / "c.png", "by hand")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_scores_are_scikit_learn_s(pairs: list[tuple[int, int]]):
    truth, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    found = scores(truth, predicted, 4)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert all(found["confusion"][a][b] == pairs.count((a, b)) for a in range(4) for b in range(4))
