"""What `test_compiled_blocks.py` runs in a process of its own: compiled blocks beside the blocks."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from builders import tiny, tokens, with_noise
from torch._dynamo.utils import counters
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.errors import CompileWarning
from fgpt.kernels import onednn_linear
from fgpt.kernels.attention import attention
from fgpt.kernels.compilation import compile_whole
from fgpt.kernels.dropout import dropout_mask
from fgpt.losses import nll
from fgpt.train_step import value_and_grad_once
from fgpt.tree import astype, leaves, tree_map

LINEARS = r"blocks\..*\.(q|k|v|o|up|down)"
BASES: dict[str, Callable[[fgpt.GPT], fgpt.GPT]] = {
    "fp64": lambda p: astype(p, torch.float64),
    "bf16": lambda p: astype(p, torch.bfloat16),
    "nf4": fgpt.quantize,
    "int8": lambda p: fgpt.quantize(p, "int8"),
    "blockwise8": lambda p: fgpt.quantize(p, "blockwise8"),
}
TOLERANCE = {"fp64": 1e-12, "bf16": 2e-2, "nf4": 1e-5, "int8": 1e-2, "blockwise8": 1e-5}
QV = r"blocks\..*\.(q|v)"
KINDS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "LoRA": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=LINEARS),
    "LoRA with dropout": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=QV, dropout=0.2),
    "DoRA": lambda p: fgpt.dora(p, fgpt.key(1), 4, target=QV),
    "IA3": fgpt.ia3,
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No program is left of another test; where torch cannot compile, the test fails."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        yield


@pytest.fixture
def traced() -> Iterator[None]:
    """Programs are traced, and their operations run as they are: seconds in place of minutes."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        yield


def base_params(n_layer: int = 3, **sizes: Any) -> fgpt.GPT:
    return tiny(**{"n_layer": n_layer, "d_model": 64, "d_mlp": 128, "n_ctx": 48} | sizes)


def with_embedding(adapters: Any, base: fgpt.GPT) -> Any:
    """Then the input of every block has a gradient, and all blocks that compute all positions are one program."""
    return adapters | fgpt.trainable_leaves(base, "wte.w")


def batch(rows: int, width: int, seed: int = 0, documents: bool = True) -> fgpt.Batch:
    x, weights = tokens(31, rows, width, seed=seed), (tokens(5, rows, width, seed=seed + 1) > 1).float()
    segments = (torch.arange(width) * 3 // width + 1).expand(rows, width).contiguous() if documents else None
    return fgpt.Batch(x, x.roll(1), weights, segments, weights.flatten().nonzero().flatten())


def loss(adapters: Any, base: fgpt.GPT, batch: fgpt.Batch, seed: Any, **options: bool) -> Any:
    return nll(fgpt.adapt(base, adapters, rng=seed), batch, **options)


def gradient(adapters: Any, base: fgpt.GPT, batch: fgpt.Batch, seed: int = 0, **options: bool) -> Any:
    return value_and_grad_once(functools.partial(loss, **options), adapters, base, batch, torch.tensor(seed))


def relative_error(tree: Any, reference: Any) -> float:
    x, y = (torch.cat([leaf.double().flatten() for leaf in leaves({"": t}).values()]) for t in (tree, reference))
    return float((x - y).norm() / y.norm())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("kind", "on", "remat", "some"),
    [
        ("LoRA", "fp64", True, True),
        ("LoRA with dropout", "nf4", False, False),
        ("DoRA", "blockwise8", True, False),
        ("IA3", "int8", False, True),
        ("norms", "bf16", False, False),
    ],
)
def test_the_gradient_is_that_of_the_blocks(kind: str, on: str, remat: bool, some: bool):
    """Each kind of adapter on one base, in one block that computes `some` positions or in two that compute all: tracing
    takes seconds.
    """
    base, rows = BASES[on](base_params(1 if some else 2)), batch(2, 20, seed=3)
    rows = rows if some else replace(rows, loss_positions=None)
    adapters = with_noise(with_embedding(KINDS[kind](base), base), std=0.05)
    got, expected = (gradient(adapters, base, rows, remat=remat, compile=x) for x in (True, False))
    assert relative_error(got, expected) < TOLERANCE[on]
    assert counters["stats"]["unique_graphs"] == 1 + remat  # remat: one forward, one backward


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("trains_embedding", "programs"), [(False, 3), (True, 2)], ids=["frozen embedding", "trained embedding"]
)
def test_one_program_serves_all_layers(trains_embedding: bool, programs: int):
    """One more the first, whose input has no gradient if the embedding is frozen, and one the last, which computes some
    positions alone. More layers, other sizes and fresh seeds need no other program, and an equal result shows that none
    is right for its first batch alone.
    """
    for n_layer in (3, 4):
        base = base_params(n_layer)
        adapters = with_noise(fgpt.lora(base, fgpt.key(1), 4, target=r".*\.q", dropout=0.2), std=0.05)
        adapters = with_embedding(adapters, base) if trains_embedding else adapters
        for i, (rows, width) in enumerate([(3, 20), (2, 33), (4, 48)]):
            got, expected = (gradient(adapters, base, batch(rows, width, i), i, compile=x) for x in (True, False))
            assert relative_error(got, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == programs


@pytest.mark.usefixtures("traced")
def test_rows_of_one_document_and_rotated_models():
    llama = fgpt.Config(1, 4, 64, 48, 31, 96, n_kv=2, activation="silu", norm_type="rms", gated_mlp=True, rotary_dim=16)
    for base in (base_params(1), with_noise(fgpt.init(replace(llama, biases=frozenset()), fgpt.key(0)))):
        torch._dynamo.reset()
        adapters = with_noise(with_embedding(fgpt.lora(base, fgpt.key(1), 4), base), std=0.05)
        for rows in (batch(3, 20, documents=False), batch(2, 30, documents=False), batch(2, 30)):
            got, expected = (gradient(adapters, base, rows, compile=x) for x in (True, False))
            assert relative_error(got, expected) < 1e-5


@pytest.mark.usefixtures("traced")
def test_matrices_that_onednn_multiplies_elsewhere(monkeypatch: pytest.MonkeyPatch):
    """A block asks whether the CPU is one of AMD's: it reads no file for that, which would end its compilation."""
    monkeypatch.setattr(onednn_linear, "MIN_ELEMENTS", 0)
    base, rows = base_params(1), batch(2, 20)
    adapters = with_noise(fgpt.lora(base, fgpt.key(1), 4), std=0.05)
    got, expected = (gradient(adapters, base, rows, compile=x) for x in (True, False))
    assert relative_error(got, expected) < 1e-5
    assert counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("traced")
def test_models_of_other_heads_in_one_process():
    """A number of heads that has changed is a size that varies, and so is the answer whether keys have fewer heads."""
    program = compile_whole(lambda q, k, v: attention(q, k, v), "attention")
    for heads, kv_heads in ((4, 4), (6, 6), (6, 2), (8, 2)):
        q, k, v = (torch.randn(2, n, 9, 16, generator=fgpt.key(n)) for n in (heads, kv_heads, kv_heads))
        assert relative_error(program(q, k, v), attention(q, k, v)) < 1e-6


@pytest.mark.usefixtures("traced")
def test_under_transforms_it_is_the_block():
    base = base_params(1)
    adapters: Any = with_noise(fgpt.lora(base, fgpt.key(1), 4), std=0.05)
    rows = replace(batch(3, 20), loss_positions=None)
    for remat in (False, True):

        def value(a: Any, b: fgpt.Batch, compile: bool, remat: bool = remat) -> Any:
            return loss(a, base, b, None, remat=remat, compile=compile)[0]

        results: list[Any] = []
        for compiled in (True, False):
            f = functools.partial(value, compile=compiled)
            examples = vmap(grad(f), (None, 0))(adapters, rows)
            results.append([grad(f)(adapters, rows), examples])
            if not remat:
                results[-1].append(jvp(lambda a, f=f: grad(f)(a, rows), (adapters,), (adapters,))[1])
        assert relative_error(*results) < 1e-6
    assert counters["stats"]["unique_graphs"] <= 3  # what remat runs below the transforms


@pytest.mark.parametrize("remat", [False, True])
def test_its_backward_can_be_differentiated(remat: bool):
    """By the blocks themselves, as torch refuses to differentiate the backward of a compiled program."""
    base = astype(base_params(1), torch.float64)
    adapters: Any = with_embedding(with_noise(fgpt.lora(base, fgpt.key(1), 4), std=0.05), base)
    adapters = astype(adapters, torch.float64)
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        second = []
        for compiled in (True, False):
            inputs = tree_map(lambda x: x.detach().requires_grad_(), adapters)
            flat = list(leaves(inputs).values())
            value = loss(inputs, base, batch(2, 20), None, remat=remat, compile=compiled)[0]
            first = torch.autograd.grad(value, flat, create_graph=True)
            second.append(list(torch.autograd.grad(sum((g * g).sum() for g in first), flat)))
    assert relative_error(*second) < 1e-10


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_with_the_default_compiler(dropout: float):
    """C++ in place of torch's own operations: equal in doubles to rounding."""
    base = astype(base_params(2, d_model=16, d_mlp=32), torch.float64)
    target = LINEARS if dropout == 0 else r"blocks\..*\.q"
    adapters = astype(with_noise(fgpt.lora(base, fgpt.key(1), 2, target=target, dropout=dropout)), torch.float64)
    for i, (rows, width) in enumerate([(3, 20), (2, 33)]):
        got, expected = (gradient(adapters, base, batch(rows, width, i), i, compile=x) for x in (True, False))
        assert relative_error(got, expected) < 1e-12
    assert counters["stats"]["unique_graphs"] == 2


def test_dropout_draws_the_same_mask():
    """At every size: C++ may assume that a signed sum does not wrap."""
    compiled = torch.compile(lambda x, seed: dropout_mask(seed, x[..., 0].numel(), x.shape[-1], 0.1), fullgraph=True)
    for i in range(12):
        x, seed = torch.zeros(2 + i % 3, 5 + 7 * i, 32), torch.tensor(123456789012 * (i + 1))
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert torch.equal(compiled(x, seed), dropout_mask(seed, x[..., 0].numel(), 32, 0.1))


@pytest.mark.usefixtures("traced")
def test_the_checks_are_of_compiled_blocks():
    base = base_params(1)
    results = fgpt.run_checks(base, fgpt.lora(base, fgpt.key(1), 4, target=QV), batch(2, 20), compile=True)
    assert [x.check for x in results if x.holds is False] == []
    assert {x.check: x.error for x in results}["compilation"] < 1e-5
    assert counters["stats"]["unique_graphs"] == 2  # micro-batches of one row are a case of their own


# ---------------------------------------------------------------------------------------------- what cannot be compiled


def caught(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of a call, and the warnings about what was not compiled."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(x.message) for x in found if issubclass(x.category, CompileWarning)]


@pytest.mark.usefixtures("traced")
def test_an_unknown_operation_is_reported_once():
    def doubled(x: torch.Tensor) -> torch.Tensor:
        print(end="")
        return 2 * x

    program = compile_whole(doubled, "doubling")
    for expected in (1, 0):
        y, messages = caught(lambda: program(torch.ones(3)))
        assert y.tolist() == [2, 2, 2]
        assert len(messages) == expected
        assert all(x.startswith("doubling runs uncompiled: ") and "\n" not in x for x in messages)


@pytest.mark.usefixtures("traced")
def test_torchs_limit_of_programs_is_reported_once(monkeypatch: pytest.MonkeyPatch):
    program, logged = compile_whole(lambda x: 2 * x, "doubling"), []
    monkeypatch.setattr(logging.getLogger("torch._dynamo.convert_frame"), "callHandlers", logged.append)
    with torch._dynamo.config.patch(recompile_limit=2):
        results = [caught(lambda n=n: program(torch.ones((1,) * n))) for n in (1, 2, 3, 4, 1)]
    assert [y.sum().item() for y, _ in results] == [2] * 5
    assert [len(messages) for _, messages in results] == [0, 0, 1, 0, 0]
    assert "2 programs of it" in results[2][1][0]
    assert [x.getMessage() for x in logged if x.levelno >= logging.WARNING] == []  # torch says it at every call
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    assert program(torch.ones(1, 1, 1)).sum() == 2  # compiled again
    assert counters["stats"]["unique_graphs"] == 3


def test_a_missing_compiler_is_reported_once():
    program = compile_whole(lambda x: x.sin() + 1, "sines")
    settings = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True})
    with settings:
        y, messages = caught(lambda: program(torch.zeros(37)))
        assert y.sum() == 37
        assert len(messages) == 1
        assert "No working C++ compiler found" in messages[0]
        assert caught(lambda: program(torch.zeros(37)))[1] == []


@pytest.mark.usefixtures("traced")
def test_a_step_that_cannot_be_compiled_is_the_uncompiled_one():
    base, optimizer = base_params(1), fgpt.adamw(0.01)
    state = fgpt.init_state(fgpt.lora(base, fgpt.key(1), 2), optimizer)

    def untraceable(*args: Any) -> Any:
        print(end="")
        return loss(*args)

    expected = fgpt.make_step(untraceable, optimizer)(state, base, [batch(2, 20)], None)
    step = fgpt.make_step(untraceable, optimizer, compile=True)
    got, messages = caught(lambda: step(state, base, [batch(2, 20)], None))
    assert [x.partition(":")[0] for x in messages] == ["the gradient runs uncompiled"]
    assert all(torch.equal(x, y) for x, y in zip(leaves(got).values(), leaves(expected).values(), strict=True))
