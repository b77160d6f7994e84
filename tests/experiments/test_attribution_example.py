"""The measured example of attribution, in a small form."""

import pytest

from experiments.research.attribution import main


@pytest.mark.slow
def test_metagradients_predict_trainings_without_a_row(capsys: pytest.CaptureFixture[str]):
    sizes = ["--rows", "12", "--steps", "6", "--micro-batch-size", "4", "--queries", "2", "--subsets", "8"]
    scores = main([*sizes, "--quantize", "nf4"])
    assert scores["metagradient"] > 0.9
    assert scores.keys() == {"metagradient", "TracIn", "K-FAC influence", "gradient cosine"}
    assert "8 trainings without 1 rows" in capsys.readouterr().out
