"""A recorded training step is the step. The graph here is an imitation that runs on a CPU, and freezes what Python
computes, as a graph does.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import same, tiny, tokens, with_noise
from builders.graphs import imitate
from torch import Tensor

import fgpt
from fgpt.errors import CompileWarning
from fgpt.kernels import blockwise_8bit, linear
from fgpt.kernels.cuda_graphs import Record
from fgpt.kernels.documents import Documents
from fgpt.optim import cosine_schedule
from fgpt.step_graphs import StepGraphs
from fgpt.tree import leaves, tree_map

BASE = tiny()
SCHEDULE = cosine_schedule(1e-2, 12, warmup_steps=4)
KINDS: dict[str, Callable[[], Any]] = {
    "LoRA with dropout": lambda: fgpt.lora(BASE, fgpt.key(1), 4, dropout=0.3),
    "DoRA": lambda: fgpt.dora(BASE, fgpt.key(1), 2),
    "norms": lambda: fgpt.trainable_leaves(BASE, ".*ln_.*"),
}
OPTIMIZERS: dict[str, Callable[[], fgpt.Optimizer]] = {
    "adamw": lambda: fgpt.adamw(SCHEDULE, weight_decay=0.1),
    "muon": lambda: fgpt.muon(SCHEDULE),
    "schedule_free_adamw": lambda: fgpt.schedule_free_adamw(SCHEDULE),
}


def loss(adapters: Any, params: Any, batch: fgpt.Batch, seed: Any) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


def batch(rows: int, seed: int) -> fgpt.Batch:
    x, weights = tokens(31, rows, 9, seed=seed), (tokens(4, rows, 9, seed=seed + 1) > 1).float()
    segments = (torch.arange(9) // 4 + 1).expand(rows, 9)
    return fgpt.Batch(x, x.roll(-1), weights, segments)


def updates(count: int) -> list[list[fgpt.Batch]]:
    """Of two micro-batches each, in two shapes."""
    return [[batch(2 + (i % 3 == 2), 10 * i + j) for j in range(2)] for i in range(count)]


def train(step: Any, optimizer: fgpt.Optimizer, adapters: Any, all_batches: list[list[fgpt.Batch]]) -> list[Any]:
    """State and metrics after each step, copied at the end: a step that overwrote them would be seen."""
    state, results = fgpt.init_state(adapters, optimizer), []
    for i, batches in enumerate(all_batches):
        state, metrics = step(state, BASE, batches, fgpt.fold_in(fgpt.key(3), i))
        results.append((state, metrics))
    return results


def counted(record: Record, recordings: list[int]) -> Record:
    def call(run: Callable[[], Any]) -> Callable[[], Any]:
        recordings.append(1)
        return record(run)

    return call


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "adamw") for kind in KINDS), *(("LoRA with dropout", name) for name in OPTIMIZERS)]
)
def test_replayed_steps_are_the_steps(kind: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """Rate, dropout, bias correction and two shapes in turn, to the bit; a graph for each shape."""
    monkeypatch.setattr(linear, "can_reconstruct", lambda row: False)  # as on CUDA, where one may not look
    optimizer, recordings = OPTIMIZERS[name](), list[int]()
    adapters = with_noise(KINDS[kind](), std=0.05)
    step = fgpt.make_step(loss, optimizer)
    expected = train(step, optimizer, adapters, updates(10))
    got = train(StepGraphs(step, record=counted(imitate, recordings)), optimizer, adapters, updates(10))
    assert len(recordings) == 2
    assert all(same(x, y) for x, y in zip(got, expected, strict=True))


class Frozen:
    """A recorded step that was given something as Python had it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run, self._replay, self._inputs = run, None, None

    def __call__(self, state: Any, frozen: Any, batches: Any, rng: Any) -> Any:
        if self._replay is None:
            self._inputs = tree_map(torch.clone, (state, batches))
            self._replay = imitate(lambda: self._run(*self._inputs, rng))
        for x, new in zip(leaves(self._inputs).values(), leaves((state, batches)).values(), strict=True):
            x.copy_(new)
        return tree_map(torch.clone, self._replay())


@pytest.mark.parametrize("what", ["nothing", "seed", "rate"])
def test_the_imitation_freezes_what_python_computes(what: str):
    """A key that is a generator, or a rate that is a number, is that of the recorded step for ever."""
    steps = [0]

    def rate(step: Tensor) -> Any:
        steps[0] += 1
        return 1e-3 * steps[0] if what == "rate" else SCHEDULE(step)

    optimizer = fgpt.adamw(rate)
    adapters = with_noise(KINDS["LoRA with dropout" if what == "seed" else "norms"](), std=0.05)
    step = fgpt.make_step(loss, optimizer)
    same_shapes = [[batch(2, i)] for i in range(4)]
    expected = train(step, optimizer, adapters, same_shapes)
    steps[0] = 0
    got = train(Frozen(lambda state, batches, rng: step(state, BASE, batches, rng)), optimizer, adapters, same_shapes)
    assert same(got[0], expected[0])
    assert same(got[-1], expected[-1]) == (what == "nothing")


def test_it_is_a_function_of_its_arguments():
    """An earlier state gives the step after it again: nothing is kept but what the arguments say."""
    optimizer, adapters = fgpt.adamw(SCHEDULE), with_noise(KINDS["LoRA with dropout"]())
    step = StepGraphs(fgpt.make_step(loss, optimizer), record=imitate)
    all_batches = [[batch(2, i)] for i in range(5)]
    results = train(step, optimizer, adapters, all_batches)
    again = step(results[1][0], BASE, all_batches[2], fgpt.fold_in(fgpt.key(3), 2))
    assert same(again, results[2])


def test_another_base_is_recorded_anew():
    recordings: list[int] = []
    optimizer, adapters = fgpt.adamw(SCHEDULE), with_noise(KINDS["norms"]())
    plain = fgpt.make_step(loss, optimizer)
    step = StepGraphs(plain, record=counted(imitate, recordings))
    state = fgpt.init_state(adapters, optimizer)
    for base in (BASE, with_noise(BASE, seed=5)):
        for i in range(3):
            assert same(step(state, base, [batch(2, i)]), plain(state, base, [batch(2, i)], None))
    assert len(recordings) == 2


def caught(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(x.message) for x in found if issubclass(x.category, CompileWarning)]


UNRECORDABLE: dict[str, tuple[Callable[[], fgpt.Optimizer], str]] = {
    "a rate that is read": (lambda: fgpt.adamw(lambda step: float(step) * 1e-3), "operation not permitted"),
    "bitsandbytes": (lambda: fgpt.adamw8bit(SCHEDULE, min_8bit_size=16), "quantization to 8 bits in the capture"),
}


@pytest.mark.parametrize("name", UNRECORDABLE)
def test_what_cannot_be_recorded_runs_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch):
    """With one warning, whether torch refuses it or our own code does."""
    make, reason = UNRECORDABLE[name]
    optimizer, adapters = make(), KINDS["norms"]()
    step = fgpt.make_step(loss, optimizer)
    expected = train(step, optimizer, adapters, updates(6))
    capturing = [False]

    def record(run: Callable[[], Any]) -> Callable[[], Any]:
        capturing[0] = True
        try:
            return imitate(run)
        finally:
            capturing[0] = False

    monkeypatch.setattr(blockwise_8bit, "is_capturing", lambda: capturing[0])
    got, messages = caught(lambda: train(StepGraphs(step, record=record), optimizer, adapters, updates(6)))
    assert all(same(x, y) for x, y in zip(got, expected, strict=True))
    assert len(messages) == 1
    assert messages[0].startswith(f"training without a CUDA graph, as the step cannot be recorded: {reason}")


def test_many_shapes_are_said_once():
    recordings: list[int] = []
    optimizer, adapters = fgpt.adamw(SCHEDULE), KINDS["norms"]()
    step = fgpt.make_step(loss, optimizer)
    all_batches = [[batch(1 + i % 4, i)] for i in range(12)]
    graphs = StepGraphs(step, record=counted(imitate, recordings), max_graphs=2)
    got, messages = caught(lambda: train(graphs, optimizer, adapters, all_batches))
    assert same(got[-1], train(step, optimizer, adapters, all_batches)[-1])
    assert len(recordings) == 2
    assert len(messages) == 1
    assert "another shape than the first 2" in messages[0]


def test_structure_belongs_to_the_shape(monkeypatch: pytest.MonkeyPatch):
    """Documents as segments, and as bounds in a tensor of the same shape."""
    monkeypatch.setattr(Documents, "check", lambda self, tokens: None)  # as on CUDA, where one may not look
    recordings: list[int] = []
    optimizer, adapters = fgpt.adamw(SCHEDULE), with_noise(KINDS["norms"]())
    step = fgpt.make_step(loss, optimizer)
    bounds = torch.tensor([0, 2, 5, *[9] * 6]).expand(2, 9)
    all_batches = [[batch(2, i)] for i in range(6)]
    for i in (1, 3, 5):
        all_batches[i] = [replace(all_batches[i][0], segments=None, cu_seqlens=bounds)]
    got = train(StepGraphs(step, record=counted(imitate, recordings)), optimizer, adapters, all_batches)
    assert same(got[-1], train(step, optimizer, adapters, all_batches)[-1])
    assert len(recordings) == 2
