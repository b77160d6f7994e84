"""The second moments of layer inputs are those that K-FAC collects at each product, in every family."""

import re

import pytest
import torch
from builders.hf_models import hf_model, save_and_load

import fgpt
from fgpt.layer_inputs import input_moments
from fgpt.transforms.kronecker import kronecker_factors


@pytest.mark.parametrize("name", ["gptj", "neox", "llama", "qwen3"])
def test_the_moments_are_those_that_a_backward_pass_collects_at_each_product(name: str) -> None:
    check_against_backward(save_and_load(hf_model(name)))


@pytest.mark.parametrize("fuse", [False, True])
def test_also_of_gpt2_with_fused_qkv(fuse: bool) -> None:
    config = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=31, d_mlp=16)
    params = fgpt.init(config, fgpt.key(0))
    check_against_backward(fgpt.fuse_qkv(params) if fuse else params)


def check_against_backward(params: fgpt.GPT) -> None:
    tokens = torch.randint(0, params.cfg.vocab_size, (2, 7), generator=fgpt.key(0))
    batch = fgpt.Batch(tokens, tokens, torch.ones(2, 7))
    adapters = fgpt.lora(params, fgpt.key(1), rank=1)
    factors = kronecker_factors(lambda a: fgpt.nll(fgpt.adapt(params, a), batch)[0], adapters)
    moments = input_moments(params, [batch])
    assert moments.keys() == adapters.keys()
    for path, m in moments.items():
        assert m.num_positions == 14
        reads_the_same = re.sub(r"\.q$", ".k", path)  # q of a first token, which attends to itself, has no gradient
        reference = factors[reads_the_same].a.inputs
        torch.testing.assert_close(m.total / m.num_positions, reference, rtol=1e-4, atol=1e-6)


def test_padding_is_left_out_and_batches_add_up() -> None:
    config = fgpt.Config(n_layer=2, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    params = fgpt.init(config, fgpt.key(0))
    text = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    weights = torch.tensor([[0.0, 0, 0, 0, 1], [0, 0, 1, 0, 0]])
    together = input_moments(params, [fgpt.Batch(text, text, weights)])
    apart = input_moments(params, [fgpt.Batch(x[None], x[None], torch.ones(1, len(x))) for x in (text[0], text[1, :3])])
    for path, m in together.items():
        assert m.num_positions == apart[path].num_positions == 8
        torch.testing.assert_close(m.total, apart[path].total)


def test_layers_outside_the_blocks_and_no_text_are_refused() -> None:
    config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    params = fgpt.init(config, fgpt.key(0))
    with pytest.raises(fgpt.InputError, match="wte: expected a layer of the blocks"):
        input_moments(params, [], target="wte")
    with pytest.raises(fgpt.InputError, match="at least one batch with text"):
        input_moments(params, [])
