"""The curvature of a trained LoRA on the embedded model: eigenvalues by Lanczos beside the dense Hessian, the Hessian
beside the Gauss-Newton matrix, over bases of every format, and what a product costs.

    python -m experiments.research.curvature                    # four minutes on one core
    python -m experiments.research.curvature --tiny             # one layer, fewer steps
    python -m experiments.research.curvature --base smollm2     # what 100 Lanczos steps cost over an NF4 base

Source: Ghorbani et al. 2019, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density".
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, linearize, vmap

import fgpt
from fgpt.cli.training.heap import keep_freed_memory
from fgpt.cli.training.nano_rows import STORY, read_tasks
from fgpt.kernels.quantized_linear import Format
from fgpt.transforms.curvature import ggn_operator, ggnvp, hessian, hessian_operator, hvp
from fgpt.transforms.spectrum import spectral_density, top_eigenpairs
from fgpt.tree import astype, ravel, tree_map

Tree = Any
FORMATS: tuple[Format, ...] = ("nf4", "int8")


class Size(NamedTuple):
    """How much is measured.

    Args:
        rank: Of the LoRAs.
        target: The layers that have one.
        rows: Stories of a batch.
        width: Tokens of a story.
        training_steps: Of AdamW, before the curvature is measured.
        k: Eigenvalues.
        steps: Of Lanczos, for them.
        positions: Whose Jacobians are written out: each takes the memory of a product of vocabulary and elements.
        rounds: Of each time.
    """

    rank: int
    target: str
    rows: int
    width: int
    training_steps: int
    k: int
    steps: int
    positions: int
    rounds: int


FULL = Size(2, r"blocks\.[23]\.attn\.q", rows=2, width=32, training_steps=60, k=20, steps=200, positions=4, rounds=5)
TINY = Size(1, r"blocks\.3\.attn\.q", rows=1, width=8, training_steps=3, k=3, steps=40, positions=1, rounds=1)


class Problem(NamedTuple):
    """A loss of adapters, over any base.

    Args:
        base: The model.
        adapters: Where the curvature is measured.
        batch: The text.
    """

    base: fgpt.GPT
    adapters: Tree
    batch: fgpt.Batch

    def loss(self, adapters: Tree) -> Float[Tensor, ""]:
        return fgpt.loss(fgpt.adapt(self.base, adapters), self.batch)

    def logits(self, adapters: Tree) -> Float[Tensor, "n vocab"]:
        return fgpt.apply(fgpt.adapt(self.base, adapters), self.batch.tokens).flatten(0, 1)

    def cross_entropy(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits, self.batch.targets.flatten())

    def in_fp64(self) -> "Problem":
        return self._replace(base=astype(self.base, torch.float64), adapters=astype(self.adapters, torch.float64))


def build(size: Size) -> Problem:
    """The embedded model, a batch of its stories, and a LoRA trained on them."""
    base, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    tasks = read_tasks(Path(fgpt.__file__).parent / "nano" / "tasks.jsonl")
    stories = [tokenizer.encode(task.output) for task in tasks if task.kind == STORY]
    long_enough = [story[: size.width + 1] for story in stories if len(story) > size.width]
    text = torch.tensor(long_enough[: size.rows])
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(text[:, 1:].shape))
    optimizer = fgpt.adamw(3e-3)
    step = fgpt.make_step(lambda adapters, base, batch, seed: fgpt.nll(fgpt.adapt(base, adapters), batch), optimizer)
    state = fgpt.init_state(fgpt.lora(base, fgpt.key(0), size.rank, target=size.target), optimizer)
    for _ in range(size.training_steps):
        state, _ = step(state, base, [batch], None)
    return Problem(base, state.trainable, batch)


def random_vector(like: Tree) -> Tree:
    vector, unravel = ravel(like)
    return unravel(torch.randn(vector.shape, generator=fgpt.key(1), dtype=vector.dtype))


def relative_error(x: Tree, expected: Tree) -> float:
    """‖x - y‖ / ‖y‖ over all leaves."""
    first, second = ravel(x)[0].double(), ravel(expected)[0].double()
    return float((first - second).norm() / second.norm())


# -------------------------------------------------------------------------------------------------------- against dense


def eigenvalue_errors(problem: Problem, size: Size) -> tuple[Float[Tensor, " k"], dict[str, float]]:
    """The k largest eigenvalues of the dense Hessian in fp64, and the largest relative error of Lanczos by dtype."""
    exact = problem.in_fp64()
    expected = torch.linalg.eigvalsh(hessian(exact.loss, exact.adapters, chunk_size=64)).flip(0)[: size.k]
    errors: dict[str, float] = {}
    for name, x in {"fp64": exact, "fp32": problem}.items():
        operator = hessian_operator(x.loss, x.adapters)
        values = top_eigenpairs(operator, x.adapters, fgpt.key(2), k=size.k, num_steps=size.steps).values
        errors[name] = float(((values - expected) / expected).abs().max())
    return expected, errors


def gauss_newton_error(problem: Problem, n: int) -> float:
    """Of a product for the last n positions, in fp64, beside Jᵀ H J v with J and H written out."""
    exact = problem.in_fp64()
    vector, unravel = ravel(exact.adapters)
    v = torch.randn(vector.shape, generator=fgpt.key(1), dtype=vector.dtype)

    def logits(adapters: Tree) -> Float[Tensor, "n vocab"]:
        return exact.logits(adapters)[-n:]

    def loss(z: Float[Tensor, "n vocab"]) -> Float[Tensor, ""]:
        return F.cross_entropy(z, exact.batch.targets.flatten()[-n:])

    def column(unit: Float[Tensor, " elements"]) -> Float[Tensor, "n vocab"]:
        return jvp(lambda x: logits(unravel(x)), (vector,), (unit,))[1]

    jacobian = vmap(column, out_dims=-1, chunk_size=64)(torch.eye(len(vector), dtype=vector.dtype))
    p = logits(exact.adapters).softmax(-1)
    output_hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    cotangent = torch.einsum("npq,nq->np", output_hessian, jacobian @ v) / n
    expected = torch.einsum("npi,np->i", jacobian, cotangent)
    return relative_error(ggnvp(logits, loss, exact.adapters, unravel(v)), unravel(expected))


# --------------------------------------------------------------------------------------------------------------- bases


class BaseResult(NamedTuple):
    """Of a base: the largest eigenvalues of H and of G, the smallest of H, and the relative errors of both products
    beside those over the same values, dequantized.
    """

    hessian: float
    gauss_newton: float
    smallest: float
    hessian_error: float
    gauss_newton_error: float


def over_base(problem: Problem, size: Size, format: Format | None) -> BaseResult:
    """In fp64, so that the errors are those of the format alone."""
    exact = problem.in_fp64()
    x = exact if format is None else exact._replace(base=fgpt.quantize(exact.base, format))
    dequantized = x._replace(base=fgpt.merge(x.base, base="dequantized"))
    v = random_vector(x.adapters)
    products = [hvp(y.loss, y.adapters, v) for y in (x, dequantized)]
    gauss_newton = [ggnvp(y.logits, y.cross_entropy, y.adapters, v) for y in (x, dequantized)]
    operator = hessian_operator(x.loss, x.adapters)

    def largest(operator: Callable[[Tree], Tree]) -> float:
        return float(top_eigenpairs(operator, x.adapters, fgpt.key(2), k=1, num_steps=size.steps // 4).values)

    return BaseResult(
        largest(operator),
        largest(ggn_operator(x.logits, x.cross_entropy, x.adapters)),
        -largest(lambda v: tree_map(torch.neg, operator(v))),
        relative_error(*products),
        relative_error(*gauss_newton),
    )


# ---------------------------------------------------------------------------------------------------------------- times


def clock(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def median_times(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, by turns; before that each is called once."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            seconds[name].append(clock(call)[1])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def product_times(problem: Problem, rounds: int) -> dict[str, float]:
    """Seconds of a product, and of what comes before many."""
    v = random_vector(problem.adapters)
    operator, seconds_once = clock(lambda: hessian_operator(problem.loss, problem.adapters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a compiler that linearize uses
        linear, linearize_once = clock(lambda: linearize(grad(problem.loss), problem.adapters)[1])
    gauss_newton = ggn_operator(problem.logits, problem.cross_entropy, problem.adapters)
    sides: dict[str, Callable[[], object]] = {
        "gradient": lambda: grad(problem.loss)(problem.adapters),
        "hvp": lambda: hvp(problem.loss, problem.adapters, v),
        "operator": lambda: operator(v),
        "linearize": lambda: linear(v),
        "ggnvp": lambda: ggnvp(problem.logits, problem.cross_entropy, problem.adapters, v),
        "ggn operator": lambda: gauss_newton(v),
    }
    once = {"operator, once": seconds_once, "linearize, once": linearize_once}
    return once | median_times(sides, rounds)


def large_base(name: str, rows: int = 8, width: int = 128) -> None:
    """Time one product over an NF4 base, and print what those of 100 Lanczos steps would take."""
    keep_freed_memory()  # as a training does
    base = fgpt.quantize(fgpt.load(name), "nf4")
    text = torch.randint(base.cfg.vocab_size, (rows, width + 1), generator=fgpt.key(0))
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(rows, width))
    problem = Problem(base, fgpt.lora(base, fgpt.key(1)), batch)
    v = random_vector(problem.adapters)
    operator, once = clock(lambda: hessian_operator(problem.loss, problem.adapters))
    operator(v)
    before = time.process_time()
    _, seconds = clock(lambda: operator(v))
    cpu = time.process_time() - before  # of all threads, which other programs do not lengthen as much
    print(f"{name} over nf4, {rows} x {width} tokens, {fgpt.num_trainable(problem.adapters):,} elements:")
    print(f"operator {once:.1f} s, product {seconds:.1f} s ({cpu:.1f} s of CPU)")
    print(f"100 products {100 * seconds / 60:.1f} minutes ({100 * cpu / 60:.1f} of CPU)")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one layer, fewer steps")
    parser.add_argument("--base", default="nano", help="another base: only time a product over it in NF4")
    options = parser.parse_args(arguments)
    if options.base != "nano":
        large_base(options.base)
        return
    size = TINY if options.tiny else FULL
    problem = build(size)
    print(f"{fgpt.num_trainable(problem.adapters):,} elements, loss {float(problem.loss(problem.adapters)):.3f}")
    expected, errors = eigenvalue_errors(problem, size)
    print(f"largest eigenvalues of the dense Hessian: {', '.join(f'{x:.3g}' for x in expected)}")
    print(f"Lanczos, {size.steps} steps, largest relative error of these: {_figures(errors)}")
    print(f"Gauss-Newton product, relative error: {gauss_newton_error(problem, size.positions):.1e}")
    for format in (None, *FORMATS):
        print(f"over {format or 'fp32'}: {_figures(over_base(problem, size, format)._asdict())}")
    density = spectral_density(
        hessian_operator(problem.loss, problem.adapters), problem.adapters, fgpt.key(3), num_steps=size.steps // 4
    )
    near_zero = (density.weights * (density.values.abs() < 0.01 * expected[0])).sum(-1).mean()
    negative = (density.weights * (density.values < -0.01 * expected[0])).sum(-1).mean()
    print(f"share of eigenvalues within 1 % of the largest from 0: {near_zero:.4f}; below that: {negative:.4f}")
    print(f"seconds: {_figures(product_times(problem, size.rounds))}")


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {x:.2g}" for name, x in values.items())


if __name__ == "__main__":
    main()
