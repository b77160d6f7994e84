"""What a tuning must multiply, worked by hand."""

from typing import Any

import pytest
import torch

import fgpt
from fgpt.adapters import trainable_leaves
from fgpt.cli.training import mfu

SIZES: Any = {"n_layer": 1, "n_head": 2, "d_model": 4, "n_ctx": 8, "vocab_size": 10, "d_mlp": 16}
SIZES |= {"biases": frozenset()}
"""40 in the table, 192 in the block, 12 in norms, 32 in the positions."""


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_parameters_count_four_and_trained_ones_six(tied: bool):
    base = fgpt.init(fgpt.Config(**SIZES, tie_word_embeddings=tied), fgpt.key(0))
    lora = fgpt.lora(base, fgpt.key(1), rank=1, target=r"blocks\..*\.q")
    assert mfu.tuning_flops(base, lora, 0.25) == 4 * (192 + 12 + 0.25 * 40) + 6 * 8
    norms = trainable_leaves(base, r"ln_f\..*")
    assert mfu.tuning_flops(base, norms, 0.25) == 4 * (192 + 12 + 0.25 * 40) + 2 * 4
    head = trainable_leaves(base, "wte.w" if tied else "head.w")
    assert mfu.tuning_flops(base, head, 0.25) == 4 * (192 + 12) + 6 * 0.25 * 40


@pytest.mark.parametrize("tied", [True, False])
def test_a_tuning_of_everything_counts_as_pretraining_does(tied: bool):
    base = fgpt.init(fgpt.Config(**SIZES, tie_word_embeddings=tied), fgpt.key(0))
    assert mfu.tuning_flops(base, trainable_leaves(base), 1.0) == mfu.flops(base, 0)


def test_parameters_in_parts_count_as_the_whole():
    base = fgpt.init(fgpt.Config(**SIZES), fgpt.key(0))
    part = fgpt.shard(base, world=fgpt.World(rank=1, size=3), target=".*")
    for target in (".*", r"blocks\..*\.q\.w", "wte.w"):
        whole, trained = fgpt.trainable_leaves(base, target), fgpt.trainable_leaves(part, target)
        assert mfu.tuning_flops(part, trained, 0.25) == mfu.tuning_flops(base, whole, 0.25)


def test_a_quantized_base_counts_as_its_parameters():
    sizes = SIZES | {"d_model": 64, "d_mlp": 64}
    base = fgpt.init(fgpt.Config(**sizes), fgpt.key(0))
    lora = fgpt.lora(base, fgpt.key(1), rank=1, target=r"blocks\..*\.q")
    assert mfu.tuning_flops(fgpt.quantize(base, "nf4"), lora, 0.5) == mfu.tuning_flops(base, lora, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_of_a_dtype(dtype: torch.dtype):
    assert 1e7 < mfu.peak(torch.device("cpu"), dtype) < 1e15
