"""Both sides of the benchmark of log-likelihoods compute the same."""

import pytest
import torch
from builders import tiny
from torch.testing import assert_close

from experiments.bench.likelihood import CHOICES, Shape, of_whole_rows, requests_of
from fgpt.evaluation.likelihood import loglikelihood


@pytest.mark.parametrize("shape", [Shape(0, 6, 3), Shape(12, 6, 2)])
def test_whole_rows_have_the_same_sums(shape: Shape):
    params = tiny()
    requests = requests_of(shape, 3, params.cfg.vocab_size)
    assert len(requests) == 3 * CHOICES
    expected = torch.tensor([sum(x.logprobs) for x in loglikelihood(params, requests)])
    assert_close(of_whole_rows(params, requests, batch_size=5), expected, rtol=1e-4, atol=1e-4)
