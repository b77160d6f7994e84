"""Few rows are shared between training and evaluation; one row cannot be."""

import pytest

from fgpt.cli.training.examples import num_heldout
from fgpt.errors import InputError


@pytest.mark.parametrize(
    ("count", "requested", "heldout"), [(60, 64, 6), (64, 64, 6), (127, 64, 12), (128, 64, 64), (2, 9, 1)]
)
def test_few_rows_are_shared(count: int, requested: int, heldout: int, capsys: pytest.CaptureFixture[str]):
    assert num_heldout(range(count), requested, "a.jsonl") == heldout
    message = " ".join(capsys.readouterr().err.split())
    hint = f"--num-heldout {requested} would be more than half"
    assert message == ("" if heldout == requested else f"held out {heldout} of {count} rows, a tenth: {hint}")


def test_one_row_cannot_be_shared():
    with pytest.raises(InputError, match=r"^a\.jsonl has 1 rows: expected 2 or more, one of them to be held out"):
        num_heldout(range(1), 1, "a.jsonl")
