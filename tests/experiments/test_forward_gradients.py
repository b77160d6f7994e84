"""The example of training without a backward pass prints what it measures; only the gradient differs by method."""

import sys

import pytest

from experiments.research import forward_gradients as F

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


@pytest.mark.slow
@linux_only
def test_the_tiny_form_prints_memory_and_losses(capsys: pytest.CaptureFixture[str]):
    curves = F.main(["--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [x for name in F.METHODS for x in (name, f"{name}, seed 0")]
    assert len({curve.losses[0] for each in curves.values() for curve in each}) == 1  # all begin as the base
    (by_backpropagation,) = curves["backpropagation"]
    assert by_backpropagation.losses[-1] < by_backpropagation.losses[0]
    peaks = {line.split(":")[0]: float(line.split()[-2]) for line in lines[::2]}
    assert 0 < peaks["MeZO"] < peaks["backpropagation"]


def test_no_row_is_trained_and_held_out():
    rows = F.read_rows(F.TINY)
    train, test = ({tuple(row) for row in x.tokens.tolist()} for x in rows)
    assert len(test) == len(F.KINDS)
    assert not train & test
