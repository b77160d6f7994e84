"""The measured example of an audit, in a small form."""

import math

import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("opake.auditing")

from experiments.research.privacy_audit import main


@pytest.mark.slow
def test_no_more_is_proven_than_was_spent():
    """And without noise the same attack proves more than that budget: it would tell if there were none."""
    proven = main(["--tiny", "--epsilon", "2"])
    assert proven[2.0] <= 2.0 < proven[math.inf]
