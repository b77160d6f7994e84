"""A recorded decode step writes what the eager one does. The graph here is an imitation that runs on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import tiny, tokens
from builders.generation import WARM_SAMPLING, adapter_sets
from builders.graphs import imitate
from torch import Tensor

import fgpt
from fgpt.generation import loop, static_cache
from fgpt.generation.cuda_graph import GraphedStep


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decoding as on CUDA; and the number of recordings."""
    recorded: list[int] = []

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recorded.append(1)
        return imitate(run)

    def decode_step(at: torch.device, compile: bool) -> tuple[Callable[..., Tensor], bool]:
        return GraphedStep(static_cache.decode_step, record), True

    monkeypatch.setattr(loop, "_decode_step", decode_step)
    return recorded


def on_cpu(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_decode_step", lambda at, compile: (static_cache.decode_step, False))
        return fgpt.generate(*args, **options)


def test_the_same_texts(graphs: list[int], monkeypatch: pytest.MonkeyPatch):
    """Ragged, sampled, ending at different steps, with a second prefill where the context is full; in one recording for
    each cache.
    """
    params = tiny()
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5)]
    for rows in (1, 3):
        options: Any = {"eos_token_id": 0, "max_new_tokens": 14, "sampling": WARM_SAMPLING, "rng": fgpt.key(1)}
        expected = on_cpu(monkeypatch, params, prompts[:rows], **options)
        graphs.clear()
        assert fgpt.generate(params, prompts[:rows], **options) == expected
        assert len(graphs) == 1
    long = params.cfg.n_ctx
    expected = on_cpu(monkeypatch, params, prompts, eos_token_id=-1, max_new_tokens=long)
    graphs.clear()
    assert fgpt.generate(params, prompts, eos_token_id=-1, max_new_tokens=long) == expected
    assert len(graphs) > 1


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_over_few_bits(to: Any, graphs: list[int], monkeypatch: pytest.MonkeyPatch):
    params = fgpt.quantize(fgpt.init(fgpt.Config(2, 2, 64, 24, 31, 64), fgpt.key(5)), to, target=r"wte|blocks\..*")
    options: Any = {"eos_token_id": -1, "max_new_tokens": 9}
    expected = on_cpu(monkeypatch, params, [[1, 2, 3]], **options)
    assert fgpt.generate(params, [[1, 2, 3]], **options) == expected
    assert graphs


def test_with_an_adapter_a_row(monkeypatch: pytest.MonkeyPatch):
    """Each replay is a call here: the imitation does not see through vmap."""
    params = tiny(n_layer=1)
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5)]
    options: Any = {"eos_token_id": 0, "max_new_tokens": 9, "adapters": adapter_sets(params)}
    expected = on_cpu(monkeypatch, params, prompts, **options)
    step = GraphedStep(static_cache.decode_step, lambda run: run)
    monkeypatch.setattr(loop, "_decode_step", lambda at, compile: (step, True))
    assert fgpt.generate(params, prompts, **options) == expected


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly():
    """With one warning, and the same logits."""
    params = tiny(n_layer=1)
    text = tokens(31, 2, 5)

    def synchronizes(*args: Any) -> Tensor:
        return static_cache.decode_step(*args) * float(args[1][0].item() >= 0)

    caches = [static_cache.prefill(params, text, None, 5)[1] for _ in range(2)]
    step = GraphedStep(synchronizes, imitate)
    for i in range(4):
        token = tokens(31, 2, seed=i)
        expected = static_cache.decode_step(params, token, caches[0])
        if i == 1:
            with pytest.warns(UserWarning, match="decoding without a CUDA graph.*not permitted"):
                assert torch.equal(step(params, token, caches[1]), expected)
        else:
            assert torch.equal(step(params, token, caches[1]), expected)


def test_the_step_of_a_device():
    """Graphs are for CUDA; there the batch keeps its size."""
    assert loop._decode_step(torch.device("cpu"), False) == (static_cache.decode_step, False)
    step, fixed_batch = loop._decode_step(torch.device("cuda"), False)
    assert isinstance(step, GraphedStep)
    assert fixed_batch
