"""No tensor is made on another device than the operands': everything runs on the meta device, where a CPU tensor that
meets the others raises, and so does whatever reads a value. A number in a CPU tensor may meet them, but a CUDA graph
would freeze it: a step is watched by `OneDevice`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from builders import tiny
from builders.checks import Patch
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fgpt
from fgpt.generation import static_cache
from fgpt.losses import Batch, nll
from fgpt.optim import cosine_schedule
from fgpt.tree import astype, leaves, tree_map

LINEARS = r"blocks\..*\.(q|k|v|o|up|down)"
BASES: dict[str, Callable[[fgpt.GPT], fgpt.GPT]] = {
    "fp32": lambda p: p,
    "bf16": lambda p: astype(p, torch.bfloat16),
    "nf4": fgpt.quantize,
    "nf4, plain scales": partial(fgpt.quantize, double_quant=False),
    "int8": partial(fgpt.quantize, format="int8"),
    "blockwise8": partial(fgpt.quantize, format="blockwise8"),
}
ADAPTERS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "LoRA": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=LINEARS),
    "LoRA with dropout": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=LINEARS, dropout=0.1),
    "DoRA": lambda p: fgpt.dora(p, fgpt.key(1), 4, target=LINEARS),
    "IA3": fgpt.ia3,
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "biases": lambda p: fgpt.trainable_leaves(p, r".*ln_.*\.b|blocks\..*\.(q|k|v|o|up|down)\.b"),
    "full": lambda p: fgpt.trainable_leaves(p, ".*"),
    "LoRA and the tied table": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=f"{LINEARS}|wte"),
}
OPTIMIZERS = {"adamw": fgpt.adamw, "adamw8bit": partial(fgpt.adamw8bit, min_8bit_size=64)}


def params_of(name: str) -> fgpt.GPT:
    return BASES[name](tiny(d_model=64, d_mlp=128, n_ctx=32))


def meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to("meta"), tree)


def batch(segments: bool = True) -> Batch:
    tokens = torch.arange(48).view(2, 24) % 31
    weights = (tokens % 3 == 0).float()
    documents = torch.tensor([[1] * 10 + [2] * 12 + [0] * 2] * 2) if segments else None
    return Batch(tokens, tokens.roll(1), weights, documents, weights.flatten().nonzero().flatten())


class OneDevice(TorchDispatchMode):
    """Raises if a tensor on the CPU meets one on another device or is copied there, and if a value is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError(f"{func}: {[(x.device.type, list(x.shape)) for x in tensors]}")
        return out


def is_on_meta(tree: Any) -> bool:
    return all(x.device.type == "meta" for x in leaves({"": tree}).values())


def test_a_tensor_on_another_device_is_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        fgpt.dense(fgpt.Adapted(torch.ones(2, 2, device="meta"), torch.ones(1, 2), torch.ones(2, 1)))


def test_a_number_on_another_device_is_noticed():
    leaf, cpu = torch.ones(2, device="meta"), torch.ones(())
    for mixed in (lambda: leaf * cpu, lambda: cpu.to("meta"), lambda: leaf.copy_(cpu), lambda: cpu.item()):
        with OneDevice(), pytest.raises(AssertionError):
            mixed()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_no_value(name: str, patch: Patch):
    """With values there: what the meta device would refuse. A CPU alone looks at loss positions."""
    patch("fgpt.losses", "_check_distinct", lambda check: lambda positions: None)
    params = params_of("fp32")
    optimizer = OPTIMIZERS[name](cosine_schedule(1e-3, 10))
    step = fgpt.make_step(lambda a, p, b, seed: nll(fgpt.adapt(p, a, rng=seed), b), optimizer)
    state = fgpt.init_state(ADAPTERS["LoRA with dropout"](params), optimizer)
    with OneDevice():
        step(state, params, [batch(), batch()], fgpt.seed_tensor(fgpt.key(3)))


def test_the_key_of_a_captured_step_is_a_tensor_on_the_device(monkeypatch: pytest.MonkeyPatch):
    """A graph would repeat a Generator's mask, and 8-bit moments would be left out of it."""
    params = params_of("fp32")
    state = {name: fgpt.init_state(meta(ADAPTERS["LoRA"](params)), make(1e-3)) for name, make in OPTIMIZERS.items()}

    def step(name: str, rng: Any) -> Any:
        make = fgpt.make_step(lambda a, p, b, seed: nll(fgpt.adapt(p, a, rng=seed), b), OPTIMIZERS[name](1e-3))
        return make(state[name], meta(params), [meta(batch())], rng)

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(fgpt.InputError, match=r"a seed tensor on the device.*got a Generator"):
        step("adamw", fgpt.key(0))
    with pytest.raises(fgpt.InputError, match=r"a seed tensor on the device.*got a seed on cpu"):
        step("adamw", fgpt.seed_tensor(fgpt.key(0)))
    assert is_on_meta(step("adamw", meta(fgpt.seed_tensor(fgpt.key(0)))))
    with pytest.raises(fgpt.InputError, match="quantization to 8 bits in the capture of a CUDA graph"):
        step("adamw8bit", None)


def cases() -> Iterator[tuple[str, str, bool, str]]:
    """Every adapter over every base, with and without remat; 8-bit Adam where it sees leaves of its own kind."""
    for base in BASES:
        for kind in ADAPTERS:
            if kind in ("full", "biases") and base not in ("fp32", "bf16"):
                continue  # no leaf of a quantized matrix is trained
            for remat in (False, True):
                yield base, kind, remat, "adamw"
            if kind in ("LoRA", "full"):
                yield base, kind, False, "adamw8bit"


@pytest.mark.slow
@pytest.mark.parametrize(("base", "kind", "remat", "optimizer_name"), cases())
def test_steps(base: str, kind: str, remat: bool, optimizer_name: str):
    params = params_of(base)
    optimizer = OPTIMIZERS[optimizer_name](cosine_schedule(1e-3, 10, warmup_steps=2), weight_decay=0.01)
    step = fgpt.make_step(lambda a, p, b, seed: nll(fgpt.adapt(p, a, rng=seed), b, remat), optimizer)
    state = fgpt.init_state(meta(ADAPTERS[kind](params)), optimizer)
    frozen, micro_batches, seed = meta(params), [meta(batch()), meta(batch())], meta(fgpt.seed_tensor(fgpt.key(3)))
    assert is_on_meta(state)
    with OneDevice():
        for rng in (fgpt.key(3), fgpt.fold_in(seed, state.step), fgpt.fold_in(fgpt.key(3), state.step)):
            state, metrics = step(state, frozen, micro_batches, rng)
    assert is_on_meta(state)
    assert is_on_meta(metrics)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_transforms(kind: str):
    params = params_of("fp32")
    frozen, adapters, examples = meta(params), meta(ADAPTERS[kind](params)), meta(batch(segments=False))
    examples = Batch(examples.tokens, examples.targets, examples.weights)

    def loss(a: Any, b: Batch) -> torch.Tensor:
        return nll(fgpt.adapt(frozen, a, rng=fgpt.key(0)), b)[0]

    assert is_on_meta(grad(loss)(adapters, examples))
    assert is_on_meta(vmap(grad(loss), in_dims=(None, 0))(adapters, examples))
    assert is_on_meta(jvp(lambda a: grad(loss)(a, examples), (adapters,), (adapters,))[1])


@pytest.mark.parametrize("name", ["nf4", "int8", "blockwise8"])
def test_what_is_made_of_a_model_is_on_its_device(name: Any):
    params = meta(params_of("fp32"))
    for make in ADAPTERS.values():
        assert is_on_meta(make(params))
    adapted = fgpt.adapt(params, ADAPTERS["LoRA"](params))
    assert is_on_meta(fgpt.quantize(params, name))
    assert is_on_meta(fgpt.fuse_qkv(params))
    assert is_on_meta(fgpt.merge(adapted))
    assert is_on_meta(fgpt.with_classification_head(params, 6, fgpt.key(0)))
    assert is_on_meta(fgpt.stack_adapters([ADAPTERS["LoRA"](params)] * 2))


def test_decoding():
    params, prompts = meta(params_of("fp32")), meta(batch().tokens)
    stacked = fgpt.stack_adapters([ADAPTERS["LoRA"](params)] * 2)
    for adapters in (None, stacked):
        _, cache = static_cache.prefill(params, prompts, None, 5, adapters)
        assert is_on_meta(static_cache.decode_step(params, prompts[:, 0], cache, adapters))
