"""Each row by its own adapters; adapters that do not stack."""

from typing import Any

import pytest
import torch
from builders import close, tiny, tokens
from builders.generation import WARM_SAMPLING, adapter_sets

import fgpt
from fgpt.generation.sampling import SamplingParams
from fgpt.tree import leaves, tree_map


@pytest.mark.slow
@pytest.mark.parametrize("to", [None, "int8", "nf4"])
def test_a_row_is_written_by_its_own_adapters(to: Any):
    """In one batch, ragged and sampled, equal to each alone; and to the same with no cache."""
    torch.manual_seed(0)
    params = fgpt.init(fgpt.Config(2, 2, 64, 24, 31, 64), fgpt.key(5))
    params = params if to is None else fgpt.quantize(params, to)
    by_name = adapter_sets(params)
    which = [1, 0, 2, 1, 0]
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5, 3, 1)]
    for sampling in (SamplingParams(), WARM_SAMPLING):
        together = fgpt.generate(
            params,
            prompts,
            eos_token_id=0,
            max_new_tokens=12,
            sampling=sampling,
            rng=fgpt.key(0),
            adapters=[by_name[i] for i in which],
        )
        for row, i in enumerate(which):
            tuned, beside = (
                fgpt.adapt(params, by_name[i]),
                [prompts[row]] * (row + 1),
            )  # a row's key is that of its place
            assert (
                fgpt.generate(tuned, beside, eos_token_id=0, max_new_tokens=12, sampling=sampling, rng=fgpt.key(0))[row]
                == together[row]
            )
        assert len({tuple(x.tokens) for x in together}) > 2


def test_stacked_adapters_are_differentiable():
    params = tiny()
    many, which, rows = adapter_sets(params), [2, 0, 0, 1], tokens(31, 4, 7)

    def together(sets: list[fgpt.Adapters]) -> torch.Tensor:
        stacked = fgpt.stack_adapters([sets[i] for i in which])
        return torch.func.vmap(lambda a, x: fgpt.apply(fgpt.adapt(params, a), x))(stacked, rows).square().sum()

    def adapt_separately(sets: list[fgpt.Adapters]) -> torch.Tensor:
        return sum(fgpt.apply(fgpt.adapt(params, sets[i]), x).square().sum() for i, x in zip(which, rows))  # pyright: ignore

    got, expected = torch.func.grad(together)(many), torch.func.grad(adapt_separately)(many)
    assert leaves(got).keys() == leaves(expected).keys()
    assert len(leaves(got)) > 8
    for path, x in leaves(expected).items():
        close(leaves(got)[path], x, 1e-4)


def test_any_kind_of_adapters_stacks_with_its_own():
    params, rows = tiny(), tokens(31, 2, 7)
    for make in (
        lambda seed: fgpt.dora(params, fgpt.key(seed), 2),
        lambda seed: fgpt.ia3(params),
        lambda seed: fgpt.trainable_leaves(params, r".*ln_.*|head\..*|wte\.w"),
    ):
        moved = [tree_map(lambda x: x + 0.1 * torch.randn_like(x), make(seed)) for seed in (0, 1)]
        got = torch.func.vmap(lambda a, x: fgpt.apply(fgpt.adapt(params, a), x))(fgpt.stack_adapters(moved), rows)
        for y, a, x in zip(got, moved, rows, strict=True):
            close(y, fgpt.apply(fgpt.adapt(params, a), x), 1e-5)
        generated = fgpt.generate(params, rows.tolist(), eos_token_id=0, max_new_tokens=5, adapters=moved)
        for y, a, x in zip(generated, moved, rows.tolist(), strict=True):
            assert [y] == fgpt.generate(fgpt.adapt(params, a), [x], eos_token_id=0, max_new_tokens=5)


def test_adapters_that_do_not_stack():
    params = tiny()
    dora, ia3, ln = fgpt.dora(params, fgpt.key(0), 2), fgpt.ia3(params), fgpt.trainable_leaves(params, r"ln_f\.w")
    for sets, message in (
        ([], "no adapters to stack"),
        ([dora, {}], "adapters 1 have nothing at .* where others have a DoRA"),
        ([dora, fgpt.dora(params, fgpt.key(0), 2, dropout=0.5)], "have dropouts of 0.0 and 0.5"),
        ([dora, ia3], "are of different kinds|have nothing at"),
        ([ln, {"ln_f.w": torch.ones(3)}], "different shapes"),
    ):
        with pytest.raises(fgpt.InputError, match=message):
            fgpt.stack_adapters(sets)
    with pytest.raises(fgpt.InputError, match="2 sets of adapters for 1 prompts: expected one for each"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=1, adapters=[ln, ln])
