"""A forward pass, a packing or a cache that is broken: the doctor says which law fails."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.checks import CHECKS, METHODS, PACKED, PLAIN, Patch, doctor_model, failed_checks, faulty_checks

import fgpt


def test_loss_nothing_weighted():
    unweighted = replace(PACKED, weights=torch.zeros_like(PACKED.weights), loss_positions=None)
    params = doctor_model()
    broken, unasked = failed_checks(params, METHODS["lora"](params), unweighted)
    assert (broken, unasked) == ({"finite loss"}, set(CHECKS[1:-1]))


def test_loss_is_no_number():
    params = fgpt.adapt(doctor_model(), {"ln_f.b": torch.full([64], torch.inf)})
    assert failed_checks(params, METHODS["lora"](params), PACKED)[0] == {"finite loss"}


def test_loss_a_forgotten_position():
    assert PACKED.loss_positions is not None
    assert faulty_checks(replace(PACKED, loss_positions=PACKED.loss_positions[1:])) == {"finite loss"}
    twice = torch.cat([PACKED.loss_positions, PACKED.loss_positions[:1]])
    with pytest.raises(fgpt.InputError, match="expected distinct loss_positions"):
        faulty_checks(replace(PACKED, loss_positions=twice))


def test_padding_that_counts_as_positions(patch: Patch):
    def counting(through: Any) -> Any:
        def wrong(params: Any, tokens: Any, positions: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            there = positions if mask is None else torch.arange(tokens.shape[-1]).expand_as(tokens)
            return through(params, tokens, there, mask, *rest, **options)

        return wrong

    patch("fgpt.model.forward", "transformer_layers", counting)
    assert faulty_checks(PLAIN) == {"padding"}
    assert "packing" in faulty_checks(PACKED)


def test_padding_that_counts_in_the_mean(patch: Patch):
    def per_position(nll: Any) -> Any:
        return lambda params, batch, *_: (nll(params, batch)[0], torch.tensor(float(batch.tokens.numel())))

    patch("fgpt.checks.forward", "nll", per_position)
    assert faulty_checks(PLAIN) == {"padding"}


def test_packing_documents_that_see_one_another(patch: Patch):
    def join(forward: Any) -> Any:
        def wrong(params: Any, tokens: Any, segments: Any, *rest: Any, **_: Any) -> Any:
            joined = None if segments is None else segments.clamp(max=1)
            positions = {"output_positions": rest[3]} if len(rest) > 3 else {}
            return forward(params, tokens, joined, *rest[:2], **positions)  # and without the bounds that follow

        return wrong

    patch("fgpt.model.forward", "_forward", join)
    for base in ("fp32", "bf16"):
        assert faulty_checks(PACKED, base) == {"packing"}


def test_rows_that_share_the_scale_of_activations(patch: Patch):
    def share(round_rows: Any) -> Any:
        def wrong(x: Any) -> Any:
            if x.ndim < 3:
                return round_rows(x)
            absmax = x.abs().amax((0, 2), keepdim=True).expand(*x.shape[:-1], 1)
            return (x * (127 / absmax)).round().to(torch.int8), absmax

        return wrong

    patch("fgpt.kernels.quantized_linear", "_round", share)
    assert faulty_checks(PACKED, "int8", "lora") == {"batch composition"}


def test_rows_whose_number_matters(patch: Patch):
    def count_rows(forward: Any) -> Any:
        def wrong(params: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
            h, cache = forward(params, tokens, *rest, **options)
            rows = len(tokens) - 1 if tokens.ndim > 1 and not torch.is_grad_enabled() else 0
            bump = torch.linspace(0, 0.01 * rows, h.shape[-1])
            return h + bump, cache

        return wrong

    patch("fgpt.model.forward", "_forward", count_rows)
    assert faulty_checks(PLAIN) == {"batch size"}


def test_a_cache_that_forgets_the_newest_token(patch: Patch):
    def forgetful(forward_with_cache: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            h, cache = forward_with_cache(*arguments)
            segments = None if cache.segments is None else cache.segments[..., :-1]
            return h, fgpt.KVCache(tuple((k[..., :-1, :], v[..., :-1, :]) for k, v in cache.kv), segments)

        return wrong

    patch("fgpt.checks.forward", "forward_with_cache", forgetful)
    assert faulty_checks(PLAIN) == faulty_checks(PACKED) == {"cache"}


def test_a_room_whose_positions_are_off_by_one(patch: Patch):
    def late(prefill: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            scores, cache = prefill(*arguments)
            return scores, replace(cache, next_position=cache.next_position - 1)

        return wrong

    patch("fgpt.generation.static_cache", "prefill", late)
    assert faulty_checks() == {"cache"}
