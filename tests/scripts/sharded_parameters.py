"""Full tuning of parameters in parts on several gloo processes; prints as JSON how far every result is from that of
whole parameters in one process.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/sharded_parameters.py
"""

from collections.abc import Callable
from typing import Any

import torch
from gloo_report import gloo_report, worst_of_ranks
from sharded_base import FAMILIES, base, difference, loss, micro_batch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt import sharding
from fgpt.adapter_dora import with_norms
from fgpt.adapters import dora_norms
from fgpt.distributed import ALONE, sum_over_ranks, world
from fgpt.errors import InputError
from fgpt.sharding import gather_on_first, split_from_first, whole_on_meta
from fgpt.train_step import State
from fgpt.transforms.step_gradients import forward_gradient
from fgpt.tree import leaves, nbytes, tree_leaves, tree_map, unflatten_like

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
UPDATES = (4, 1, 3)
"""Micro-batches of each: of 1 only one process has one, of 3 they have unequal numbers."""


def in_parts(frozen: fgpt.GPT) -> fgpt.GPT:
    return fgpt.shard(frozen, target=".*")


def train(frozen: fgpt.GPT, trained: Any, here: fgpt.World, options: dict[str, Any]) -> tuple[State, list[Tensor]]:
    def of_options(a: Any, p: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return fgpt.nll(fgpt.adapt(p, a, rng=seed), batch, **options)

    optimizer = fgpt.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    step = fgpt.make_step(of_options, optimizer, max_norm=0.5, world=here)
    state, figures, begin = fgpt.init_state(trained, optimizer), [], 0
    for i, count in enumerate(UPDATES):
        batches = [micro_batch(begin + j) for j in range(count)]
        state, metrics = step(state, frozen, batches, fgpt.fold_in(fgpt.key(9), i))
        figures, begin = [*figures, metrics.loss, metrics.grad_norm, metrics.weight], begin + count
    return state, figures


def compare_training(report: dict[str, float]) -> None:
    for family in FAMILIES:
        for name, dtype in DTYPES.items():
            frozen = tree_map(lambda x, to=dtype: x.to(to), base(family))
            parts = in_parts(frozen)
            trained = fgpt.trainable_leaves(parts)
            assert fgpt.num_trainable(trained) == fgpt.num_trainable(fgpt.trainable_leaves(frozen))
            for options in ({}, {"remat": True}):
                state, figures = train(parts, trained, world(), options)
                expected, expected_figures = train(frozen, fgpt.trainable_leaves(frozen), ALONE, options)
                what = f"{family}, {name}{', remat' if options else ''}"
                report[f"train, {what}"] = difference(fgpt.unshard(state), expected)
                report[f"figures, {what}"] = difference(figures, expected_figures)
                share = nbytes(state) / nbytes(expected)
                report[f"share, {what}"] = float(share > 1.05 / world().size + 0.05)


def compare_compositions(report: dict[str, float]) -> None:
    """Low-rank adapters over what is trained in parts, whose row norms a step computes once; and the tuned model."""

    def prepare(trained: Any, frozen: fgpt.GPT) -> Any:
        return frozen, dora_norms(frozen, trained)

    def of_norms(trained: Any, constants: Any, batch: fgpt.Batch, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        frozen, norms = constants
        return loss(with_norms(trained, norms), frozen, batch, seed)

    frozen = tree_map(Tensor.double, base("gpt2"))
    optimizer, low_rank = fgpt.adamw(1e-2, eps=1e-4), fgpt.lora(frozen, fgpt.key(1), rank=2, target=".*(q|wte)")
    low_rank |= fgpt.dora(frozen, fgpt.key(2), rank=2, target=r".*\.(up|o)")
    merged: list[fgpt.GPT] = []
    for params, here in ((in_parts(frozen), world()), (frozen, ALONE)):
        state = fgpt.init_state(fgpt.trainable_leaves(params) | low_rank, optimizer)
        step = fgpt.make_step(of_norms, optimizer, prepare=prepare, world=here)
        for i in range(2):
            batches = [micro_batch(2 * i), micro_batch(2 * i + 1)]
            state, _ = step(state, params, batches, fgpt.fold_in(fgpt.key(9), i))
        merged.append(fgpt.merge(fgpt.adapt(params, state.trainable)))
    assert not isinstance(merged[0].wte.w, Tensor)  # in parts, as the adapters' base is
    report["train, adapters, fp64"] = difference(fgpt.unshard(merged[0]), merged[1])
    half = tree_map(Tensor.bfloat16, frozen)
    models = [fgpt.adapt(params, fgpt.trainable_leaves(params)) for params in (in_parts(half), half)]
    report["whole model"] = difference(fgpt.unshard(models[0]), models[1])


def compare_derivatives(report: dict[str, float]) -> None:
    """Of Σ over processes of the loss of each one's own batch."""
    for family in FAMILIES:
        frozen = tree_map(Tensor.double, base(family))
        parts = in_parts(frozen)
        trained, whole = fgpt.trainable_leaves(parts), fgpt.trainable_leaves(frozen)
        own, everyone = micro_batch(world().rank), [micro_batch(i) for i in range(world().size)]

        def of_parts(a: Any, parts: fgpt.GPT = parts, batch: fgpt.Batch = own) -> Tensor:
            return loss(a, parts, batch)[0]

        def of_whole(a: Any, frozen: fgpt.GPT = frozen, batches: list[fgpt.Batch] = everyone) -> Tensor:
            return torch.stack([loss(a, frozen, batch)[0] for batch in batches]).sum()

        direction, whole_direction = (tree_map(torch.sin, x) for x in (trained, whole))
        got = {
            "grad": grad(of_parts)(trained),
            "jvp": sum_over_ranks(jvp(of_parts, (trained,), (direction,))[1]),
            "jvp(grad)": jvp(grad(of_parts), (trained,), (direction,))[1],
            "jvp(jvp(grad))": third_derivative(of_parts, trained, direction),
            "grad of a squared grad": squared_gradient_slope(of_parts, trained),
        }
        expected = {
            "grad": grad(of_whole)(whole),
            "jvp": jvp(of_whole, (whole,), (whole_direction,))[1],
            "jvp(grad)": jvp(grad(of_whole), (whole,), (whole_direction,))[1],
            "jvp(jvp(grad))": third_derivative(of_whole, whole, whole_direction),
            "grad of a squared grad": squared_gradient_slope(of_whole, whole),
        }
        for name, value in got.items():
            # what every process holds whole has the derivative of its own loss alone
            summed = value if isinstance(value, Tensor) else fgpt.unshard(sum_of_whole_leaves(value))
            report[f"{name}, {family}"] = difference(summed, expected[name])


def third_derivative(fn: Callable[[Any], Tensor], at: Any, direction: Any) -> Any:
    def second(a: Any) -> Any:
        return jvp(grad(fn), (a,), (direction,))[1]

    return jvp(second, (at,), (direction,))[1]


def squared_gradient_slope(fn: Callable[[Any], Tensor], at: Any) -> Any:
    """Of matrices alone, by plain autograd twice: a leaf that every process holds whole needs a sum in between."""
    inputs = tree_map(lambda x: x.detach().requires_grad_(x.ndim > 1), at)
    matrices = [x for x in tree_leaves(inputs) if x.requires_grad]
    grads = torch.autograd.grad(fn(inputs), matrices, create_graph=True)
    slopes = iter(torch.autograd.grad(sum(x.square().sum() for x in grads), matrices))
    return unflatten_like(at, [next(slopes) if x.ndim > 1 else torch.zeros_like(x) for x in tree_leaves(at)])


def sum_of_whole_leaves(tree: Any) -> Any:
    return sharding.sum_grads_over_ranks(tree)


def compare_files(report: dict[str, float]) -> None:
    """A state is made whole for a file, and is in parts again, to the bit."""
    frozen = base("llama")
    optimizer = fgpt.adamw(1e-2)
    state = fgpt.init_state(tree_map(torch.sin, fgpt.trainable_leaves(in_parts(frozen))), optimizer)
    state = State(state.trainable, tree_map(lambda x: x + 1, state.opt_state), state.step + 5)
    expected = fgpt.init_state(tree_map(torch.sin, fgpt.trainable_leaves(frozen)), optimizer)
    whole, bare = gather_on_first(state), whole_on_meta(state)
    shapes = {path: (x.shape, x.dtype) for path, x in leaves(expected).items()}
    report["shapes"] = float({path: (x.shape, x.dtype) for path, x in leaves(bare).items()} != shapes)
    assert (whole is None) == (world().rank > 0)
    report["gather"] = difference(whole.trainable, expected.trainable) if whole is not None else 0.0
    again = split_from_first(whole, tree_map(torch.zeros_like, state))
    report["split"] = difference(fgpt.unshard(again), fgpt.unshard(state))


def refusals(report: dict[str, float]) -> None:
    parts = in_parts(base("gpt2"))
    trained, batch = fgpt.trainable_leaves(parts), micro_batch(0)

    def of_row(a: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        return loss(a, parts, fgpt.Batch(tokens[None], targets[None], torch.ones(1, 9)))[0]

    refused = {
        "vmap": lambda: vmap(grad(of_row), in_dims=(None, 0, 0))(trained, batch.tokens, batch.targets),
        "quantized": lambda: fgpt.trainable_leaves(fgpt.shard(fgpt.quantize(base("gpt2"), "nf4")), ".*up.*"),
        "outputs": lambda: fgpt.trainable_leaves(fgpt.tensor_parallel(base("gpt2"))),
        "elsewhere": lambda: fgpt.unshard(
            fgpt.trainable_leaves(fgpt.shard(base("gpt2"), world=fgpt.World(0, 7)), ".*up.*")
        ),
        "no world": lambda: train(parts, trained, ALONE, {}),
        "gradient": lambda: fgpt.make_step(loss, fgpt.adamw(1e-2), gradient=forward_gradient(), world=world())(
            fgpt.init_state(trained, fgpt.adamw(1e-2)), parts, [batch], fgpt.key(0)
        ),
        "muon": lambda: fgpt.init_state(trained, fgpt.muon(1e-2)),
    }
    for name, call in refused.items():
        try:
            call()
        except InputError as err:
            report[f"refused {name}"] = float(len(str(err)) < 20)
        else:
            report[f"refused {name}"] = 1.0


def main() -> None:
    with gloo_report() as report:
        compare_training(report)
        compare_compositions(report)
        compare_derivatives(report)
        compare_files(report)
        refusals(report)
        report.update(worst_of_ranks(report))


if __name__ == "__main__":
    main()
