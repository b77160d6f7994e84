"""The measured example of forgetting, in a small form."""

import pytest

from experiments.research.forgetting import main


@pytest.mark.slow
def test_a_forgotten_set_is_one_that_was_never_there():
    assert main(["--sets", "1", "--rows", "300", "--steps", "4"]) == 1.0
