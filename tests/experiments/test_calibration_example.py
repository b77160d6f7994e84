"""The measured example of calibration, in a small form."""

from typing import Any

import pytest
import torch
from builders import tiny, with_noise

import fgpt
from experiments.research.calibration import Classifier, in_batches, main, make_rows


@pytest.mark.slow
def test_every_method_is_scored():
    scores = main(["--tiny", "--structures", "Kronecker", "last layer", "--members", "2"])
    structures = {"last layer by evidence", "Kronecker by evidence", "Kronecker by validation"}
    assert set(scores) == {"as trained", "temperature", "ensemble"} | structures
    assert all(0 <= x <= 1 for method in scores.values() for x in (method["accuracy"], method["ece"]))
    majority = 1 / 8
    assert all(method["accuracy"] > 2 * majority for method in scores.values())


def test_rows_are_classified_as_one_by_one_and_logits_are_linear_in_features():
    base = fgpt.with_classification_head(tiny(), 3, fgpt.key(0))
    head: Any = fgpt.trainable_leaves(base, r"head\..*")
    trained = with_noise(fgpt.lora(base, fgpt.key(1), rank=2), 0.1) | head
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    rows = make_rows(texts, [0, 1, 2])
    classifier = Classifier(base, trained, rows, rows, None)
    one_by_one = [fgpt.apply(fgpt.adapt(base, trained), torch.tensor(text))[-1] for text in texts]
    torch.testing.assert_close(classifier.all_logits(trained, rows), torch.stack(one_by_one), atol=1e-5, rtol=1e-5)
    assert sorted(i for indices, _ in in_batches(rows) for i in indices) == [0, 1, 2]
    features = classifier.features(rows)
    expected = torch.stack(one_by_one)
    torch.testing.assert_close(features @ head["head.w"].T, expected, atol=1e-5, rtol=1e-5)
