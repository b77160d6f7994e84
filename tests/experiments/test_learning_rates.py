"""The measured example of a learned schedule, in a small form."""

import pytest
import torch

from experiments.research import learning_rates
from experiments.research.learning_rates import main, schedules


@pytest.mark.slow
def test_the_learned_schedule_improves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning_rates, "PEAKS", (1e-4, 1e-4))  # so that only learning helps
    sizes = ["--steps", "5", "--micro-batch-size", "3", "--rounds", "4", "--heldout", "4"]
    losses = main(sizes)
    assert losses["learned validation"] < losses["best validation"]
    assert capsys.readouterr().out.count("round ") == 4


def test_eight_schedules():
    rates = schedules(20)
    assert len(rates) == 8
    assert torch.equal(rates["constant 0.01"], torch.full((20,), 0.01))
    assert rates["linear 0.01"].argmax() in (1, 2, 3)
    assert float(rates["linear 0.01"].max()) == pytest.approx(0.01, rel=0.2)
    assert float(rates["linear 0.01"][-1]) < 0.002
