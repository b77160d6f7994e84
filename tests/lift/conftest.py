"""transformers' GPT-2, to be lifted."""

import pytest
from builders import hf_gpt2
from torch import nn


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return hf_gpt2()
