"""Train over a base in parts on several gloo processes, and print as JSON how far every result is from that over the
whole base; and what merging, saving and loading make of it.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/sharded_base.py FOLDER
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_report import gloo_report, worst_of_ranks
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.distributed import world
from fgpt.sharding import has_sharded, is_tensor_parallel
from fgpt.tree import leaves, nbytes, tree_map

VOCAB = 31
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 64, "n_ctx": 24, "vocab_size": VOCAB, "d_mlp": 64}
GPTJ: dict[str, Any] = {
    "biases": frozenset({"up", "down", "norm", "head"}),
    "parallel_residual": True,
    "n_norms": 1,
    "rotary_dim": 16,
    "interleaved": True,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = {
    "biases": frozenset(),
    "n_kv": 1,
    "activation": "silu",
    "norm_type": "rms",
    "gated_mlp": True,
    "rotary_dim": 32,
    "tie_word_embeddings": False,
}
FAMILIES = {"gpt2": {}, "gptj": GPTJ, "llama": LLAMA}
BASES: dict[str, Callable[[fgpt.GPT], fgpt.GPT]] = {
    "fp32": lambda p: p,
    "bf16": lambda p: tree_map(torch.Tensor.bfloat16, p),
    "nf4": lambda p: fgpt.quantize(p, "nf4"),
    "nf4 with plain scales": lambda p: fgpt.quantize(p, "nf4", double_quant=False),
    "int8": lambda p: fgpt.quantize(p, "int8"),
    "rotated int8": lambda p: fgpt.quantize(p, "int8", rotate=True),
    "blockwise8": lambda p: fgpt.quantize(p, "blockwise8"),
}

TRAINED = {
    "gpt2": ("fp32", "bf16", "nf4", "int8"),
    "gptj": ("fp32", "nf4 with plain scales"),
    "llama": ("rotated int8", "blockwise8"),
}
TRANSFORMED = {"gpt2": ("fp32", "bf16", "nf4"), "llama": ("rotated int8",)}
PARALLEL = {"gpt2": ("fp32", "bf16", "int8"), "gptj": ("nf4 with plain scales",), "llama": ("rotated int8",)}
LOADED: dict[str, dict[str, Any]] = {
    "gpt2": {"quantize": "nf4", "dtype": torch.bfloat16},
    "gptj": {"quantize": "int8", "rotate": True},
    "llama": {},
}


def base(family: str) -> fgpt.GPT:
    """Every leaf in play: no bias is zero, no norm is one."""
    rng = fgpt.key(0)
    params = fgpt.init(fgpt.Config(**SIZES | FAMILIES[family]), fgpt.key(1))
    return tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=rng), params)


def micro_batch(i: int) -> fgpt.Batch:
    rng = torch.Generator().manual_seed(i)
    tokens, targets = (torch.randint(VOCAB, (2, 9), generator=rng) for _ in range(2))
    return fgpt.Batch(tokens, targets, (torch.rand(2, 9, generator=rng) > 0.3).float())


def loss(adapters: Any, params: fgpt.GPT, batch: fgpt.Batch, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


def with_noise(tree: Any) -> Any:
    rng = fgpt.key(3)
    return tree_map(lambda x: x + 0.1 * torch.randn(x.shape, generator=rng), tree)


def results(params: fgpt.GPT, adapters: Any) -> dict[str, Any]:
    """A loss, its gradient under every composition of transforms, and remat's."""
    batch = micro_batch(99)

    def value(a: Any) -> Tensor:
        return loss(a, params, batch)[0]

    def of_row(a: Any, tokens: Tensor, targets: Tensor) -> Tensor:
        row = fgpt.Batch(tokens[None], targets[None], torch.ones(1, 9))
        return loss(a, params, row)[0]

    def rows(a: Any) -> Any:
        return vmap(of_row, in_dims=(None, 0, 0))(a, batch.tokens, batch.targets).sum()

    leaf = tree_map(lambda x: x.detach().requires_grad_(), adapters)
    rematerialized = fgpt.nll(fgpt.adapt(params, leaf), batch, remat=True)[0]
    return {
        "logits": fgpt.apply(fgpt.adapt(params, adapters), batch.tokens),
        "autograd": torch.autograd.grad(value(leaf), list(leaves(leaf).values())),
        "grad": grad(value)(adapters),
        "vmap(grad)": vmap(grad(of_row), in_dims=(None, 0, 0))(adapters, batch.tokens, batch.targets),
        "jvp(grad)": jvp(grad(value), (adapters,), (adapters,))[1],
        "jvp(grad) of vmap": jvp(grad(rows), (adapters,), (adapters,))[1],
        "remat": torch.autograd.grad(rematerialized, list(leaves(leaf).values())),
    }


def train(params: fgpt.GPT, adapters: Any, shares: bool = True) -> fgpt.State:
    """Two updates, each of two micro-batches on every rank, or of all of them if it shares none."""
    optimizer = fgpt.adamw(2e-2)
    step = fgpt.make_step(loss, optimizer, world=fgpt.world() if shares else fgpt.distributed.ALONE)
    state = fgpt.init_state(adapters, optimizer)
    count = 2 * world().size
    for i in range(2):
        batches = [micro_batch(count * i + j) for j in range(count)]
        state, _ = step(state, params, batches, fgpt.fold_in(fgpt.key(9), i))
    return state


def difference(a: Any, b: Any) -> float:
    """The largest of any leaf, in units of the largest; infinite where trees differ in form."""
    x, y = leaves({"": a}), leaves({"": b})
    if x.keys() != y.keys() or any(x[p].dtype != y[p].dtype or x[p].shape != y[p].shape for p in x):
        return float("inf")
    size = max(float(v.double().abs().max()) for v in y.values())
    assert size > 0, "nothing to compare"
    return max(float((x[p].double() - y[p].double()).abs().max()) for p in y) / size


def compare_training(report: dict[str, float]) -> None:
    """Of each format, and of each family. A Llama's embeddings and head are in parts too."""
    for family, names in TRAINED.items():
        for name in names:
            frozen = BASES[name](base(family))
            sharded = fgpt.shard(frozen, target=".*" if family == "llama" else r"blocks\..*")
            adapters = with_noise(fgpt.lora(frozen, fgpt.key(1), rank=4, dropout=0.1))
            report[f"train, {family}, {name}"] = difference(train(sharded, adapters), train(frozen, adapters))
            if name in TRANSFORMED.get(family, ()):
                adapters |= fgpt.dora(frozen, fgpt.key(2), rank=2, target=r".*\.(up|o)")
                adapters |= fgpt.trainable_leaves(frozen, r".*\.(ln_1|down)\.b" if family == "gpt2" else ".*ln_1.*")
                got, expected = results(sharded, adapters), results(frozen, adapters)
                report |= {f"{k}, {family}, {name}": difference(got[k], expected[k]) for k in expected}


def compare_tensor_parallel(report: dict[str, float]) -> None:
    """Products that gather outputs: near those of the whole, and to the bit the same on all ranks."""
    for family, names in PARALLEL.items():
        for name in names:
            frozen = BASES[name](base(family))
            parts = fgpt.tensor_parallel(frozen, target=".*" if family == "llama" else r"blocks\..*")
            adapters = with_noise(fgpt.lora(frozen, fgpt.key(1), rank=4))
            adapters |= fgpt.dora(frozen, fgpt.key(2), rank=2, target=r".*\.(up|o)")
            adapters |= fgpt.trainable_leaves(frozen, r".*\.ln_1\..*|.*\.down\.b")
            got, expected = results(parts, adapters), results(frozen, adapters)
            got["train"], expected["train"] = (train(p, adapters, shares=False).trainable for p in (parts, frozen))
            origin = None if name in ("fp32", "bf16") else "dequantized"
            merged = fgpt.merge(fgpt.adapt(parts, adapters), origin)
            assert is_tensor_parallel(merged)
            got["merge"], expected["merge"] = fgpt.unshard(merged), fgpt.merge(fgpt.adapt(frozen, adapters), origin)
            report |= {f"parallel {k}, {family}, {name}": difference(got[k], expected[k]) for k in expected}
            report[f"ranks, {family}, {name}"] = float(any(not is_of_all_ranks(x) for x in leaves({"": got}).values()))


def is_of_all_ranks(x: Tensor) -> bool:
    of_first = x.clone()
    dist.broadcast(of_first, 0)
    return torch.equal(of_first, x)


def compare_files(report: dict[str, float], folder: Path) -> None:
    """What each rank loads is its part of what one loads; what all save and merge is what one saves and merges."""
    for family in FAMILIES:
        source = folder / family
        if world().rank == 0:
            fgpt.save(base(family), source)
        dist.barrier()
        options = LOADED[family]
        whole, sharded = fgpt.load(source, **options), fgpt.load(source, **options, shard=True)
        report[f"load, {family}"] = difference(fgpt.unshard(sharded), whole)
        report[f"part, {family}"] = float(nbytes(sharded.blocks) > 0.75 * nbytes(whole.blocks))
        adapters = with_noise(fgpt.lora(whole, fgpt.key(1), rank=4))
        merged = [fgpt.merge(fgpt.adapt(x, adapters), "dequantized" if options else None) for x in (whole, sharded)]
        report[f"merge, {family}"] = difference(fgpt.unshard(merged[1]), merged[0])
        for name, (one, parts) in {"base": (whole, sharded), "merged": merged}.items():
            compare_saved(report, one, parts, folder / f"{family}, {name}")


def compare_saved(report: dict[str, float], whole: fgpt.GPT, sharded: fgpt.GPT, folder: Path) -> None:
    """The files of both are to have the same bytes."""
    assert has_sharded(sharded)
    fgpt.save(sharded, folder / "sharded")
    is_different = False
    if world().rank == 0:
        fgpt.save(whole, folder / "whole")
        contents = [{path.name: path.read_bytes() for path in (folder / x).iterdir()} for x in ("whole", "sharded")]
        is_different = contents[0] != contents[1]
    report[f"save, {folder.name}"] = float(is_different)


def main() -> None:
    with gloo_report() as report:
        compare_training(report)
        compare_tensor_parallel(report)
        compare_files(report, Path(sys.argv[1]))
        report.update(worst_of_ranks(report))


if __name__ == "__main__":
    main()
