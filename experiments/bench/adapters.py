"""What an adapter, a quantized base or a transform adds to a step of a GPT-2 from random weights, on the CPU.

    dora       the step of a DoRA against that of a LoRA, ours and peft's: two ranks, on attention and on all matrices
    int8       a LoRA step over a base in 8 or 4 bits against fp32, and what the rounding does to loss and gradient
    remat      a LoRA step that keeps each block's input alone against one that keeps all: bytes and time
    examples   the gradients of 32 examples, each its own, against the gradient of their sum, and against a loop
    medium     the step of a LoRA over NF4, scales quantized too, at gpt2-medium's shape: ours and peft + bitsandbytes

Every pair is timed in alternating rounds on the same tokens, half of each row being prompt; for `dora`, each side in a
separate process.
"""

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import grad, vmap

from experiments.bench.baselines import (
    adapters_of,
    base_of,
    equal_rows,
    fgpt_batch,
    fgpt_step,
    hub_bytes,
    hub_model,
    peft_batch,
    peft_step,
    shape,
)
from experiments.bench.timing import (
    Result,
    console,
    hardware,
    in_separate_processes,
    peak_bytes,
    report,
    saved_bytes,
    time_interleaved,
    times,
)
from fgpt.adapter_dora import dora
from fgpt.adapter_lora import lora
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, merge
from fgpt.data import instruction_datasets
from fgpt.data.prompt_templates import PLAIN, encode
from fgpt.io.models import EMBEDDED, load, tokenizer
from fgpt.kernels.quantized_linear import Blockwise4bit, Format
from fgpt.losses import Batch, nll
from fgpt.model import GPT, Config, fuse_qkv, init
from fgpt.quantization import quantize
from fgpt.rng import fold_in, key
from fgpt.train_step import value_and_grad_once
from fgpt.tree import leaves, nbytes, tree_map, walk

CPU = torch.device("cpu")
FORMATS: tuple[Format, ...] = ("int8", "nf4", "blockwise8")
EXAMPLES, EXAMPLE = 32, 64
"""Rows of `examples`, and their tokens."""
HELDOUT_ROWS = 16
"""On which the loss and gradient of trained models are compared."""

Benchmark = Literal["dora", "int8", "remat", "examples", "medium"]
Sheet = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Bench:
    """What adapters, quantized bases and transforms cost: DoRA, int8, rematerialization, per-example gradients, NF4."""

    benchmarks: tuple[Benchmark, ...] = get_args(Benchmark)
    repeats: int = 5
    """Rounds of every pair; the median of their ratios is reported, and the quartiles."""
    layers: int = 12
    """12 is GPT-2 small, and medium has twice as many; fewer for a quick look."""
    vocab: int = 50257
    out: Path = Path("runs/bench")


def adapters(bench: Bench) -> None:
    """Run the benchmarks and write runs/bench/adapters.json and adapters.md. Raises InputError."""
    small = Config(bench.layers, 12, 768, 1024, bench.vocab, 3072)
    results: list[Result] = []
    sheets: list[Sheet] = []
    notes = [f"{hardware(CPU)}, fp32; {shape(small)}"]
    if "dora" in bench.benchmarks:
        results += magnitudes(small, bench.repeats)
        notes.append("DoRA: a process a side; peft's adapters lie on the fused q, k, v, ours on each of the three")
    if "int8" in bench.benchmarks:
        int8_results, sheet = quantized_steps(small, bench.repeats)
        results += int8_results
        sheets.append(sheet)
    if "remat" in bench.benchmarks:
        results += remat_cost(small, bench.repeats)
    if "examples" in bench.benchmarks:
        example_results, gap = per_example(small, bench.repeats)
        results += example_results
        notes.append(f"the sum of the examples' gradients differs from the batch's by {gap:.1e} of its norm")
    if "medium" in bench.benchmarks:
        medium = Config(2 * bench.layers, 16, 1024, 1024, bench.vocab, 4096)
        nf4_results, gap = four_bits(medium, bench.repeats)
        results += nf4_results
        notes.append(
            f"NF4: {shape(medium)}; the two sides' losses after {bench.repeats + 1} updates differ by {gap:.1e}"
        )
    report("adapters", ("this", "that"), results, notes, bench.out, sheets)


def time_sides(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    return time_interleaved({name: [call] * repeats for name, call in sides.items()}, CPU)


def describe(name: str) -> None:
    console.print(f"{name} ..")


# ---------------------------------------------------------------------------------------------------------------- DoRA


def magnitudes(cfg: Config, repeats: int) -> list[Result]:
    """DoRA's step against LoRA's of the same rank and targets, on either side."""
    results = []
    attention = "q, k, v, o", r"blocks\..*\.attn\.(q|k|v|o)", r".*\.attn\.(c_attn|c_proj)"
    matrices = "all six block matrices", r"blocks\..*\.(q|k|v|o|up|down)", r".*\.(c_attn|c_proj|c_fc)"
    # One row is a hard case: what DoRA does once a step, however many tokens, weighs most there. Four are dora-nano's.
    for rank, (what, target, modules), rows in ((8, attention, 1), (16, matrices, 1), (16, matrices, 4)):
        describe(f"dora: rank {rank} on {what}, {rows} x 512 tokens")
        our = {f"our {kind}": partial(our_step, cfg, kind, rank, target, rows) for kind in ("LoRA", "DoRA")}
        their = {f"their {kind}": partial(their_step, cfg, kind, rank, modules, rows) for kind in ("LoRA", "DoRA")}
        seconds, where = in_separate_processes(our | their, repeats), f"r{rank} on {what}, {rows} x 512 tokens"
        results += [
            times(f"DoRA step / LoRA step, {where}", seconds["our DoRA"], seconds["our LoRA"], "<= 1.1"),
            times(f"the same, of peft, {where}", seconds["their DoRA"], seconds["their LoRA"]),
            times(f"DoRA step, ours / peft's, {where}", seconds["our DoRA"], seconds["their DoRA"]),
        ]
    return results


def our_step(cfg: Config, kind: Literal["LoRA", "DoRA"], rank: int, target: str, rows: int) -> Callable[[], object]:
    base, examples = init(cfg, key(0)), equal_rows(rows, 512, cfg.vocab_size)
    make = dora if kind == "DoRA" else lora
    return partial(fgpt_step(base, make(base, key(1), rank, target=target)), fgpt_batch([[x] for x in examples], CPU))


def their_step(cfg: Config, kind: Literal["LoRA", "DoRA"], rank: int, modules: str, rows: int) -> Callable[[], object]:
    model, examples = hub_model(cfg, fuse_qkv(init(cfg, key(0)))), equal_rows(rows, 512, cfg.vocab_size)
    step = peft_step(model, CPU, torch.float32, rank=rank, modules=modules, dora=kind == "DoRA")
    return partial(step, peft_batch(examples, CPU))


# ------------------------------------------------------------------------------------------------------------- 8 bits


def quantized_steps(cfg: Config, repeats: int) -> tuple[list[Result], Sheet]:
    """A LoRA step over each format against one over fp32; and loss and gradient, there and over the same numbers."""
    describe("int8: steps")
    base, (row,) = base_of(cfg, CPU, torch.float32), equal_rows(1, 512, cfg.vocab_size)
    batch = fgpt_batch([[row]], CPU)
    frozen = {"fp32": base} | {to: quantize(base, to) for to in FORMATS}
    seconds = time_sides({name: partial(fgpt_step(x, adapters_of(base)), batch) for name, x in frozen.items()}, repeats)
    results = [
        times(f"LoRA step over fp32 / over {to}, r8 on c_attn, 1 x 512 tokens", seconds["fp32"], seconds[to], target)
        for to, target in zip(FORMATS, (">= 1.3", "", ""), strict=True)
    ]
    describe("int8: errors")
    heads = ("weights", "base", "against", "loss", "its rel. error", "LoRA gradient: rel. error", "cosine")
    models = [row for name in ("nano", "smollm2") for row in errors(name, fuse_qkv(load(name)), heldout(name))]
    return results, (heads, [*errors("random", base, batch), *models])


def heldout(name: str) -> Batch:
    """The embedded model's held-out rows, as model `name` reads them."""
    rows = instruction_datasets.load_rows(EMBEDDED["nano"] / "heldout.jsonl", limit=HELDOUT_ROWS)
    return fgpt_batch([[encode(row, PLAIN, tokenizer(name))] for row in rows], CPU)


def errors(weights: str, base: GPT, batch: Batch) -> list[tuple[str, ...]]:
    """Each format against fp32. int8 quantizes activations too: its error is split into that of the weights alone (the
    dequantized base against fp32) and that of the activations alone (int8 against the dequantized base).
    """
    tuned = perturb(adapters_of(base))
    gradients = {"fp32": gradient(base, tuned, batch)}
    for to in FORMATS:
        quantized = quantize(base, to)
        gradients[to] = gradient(quantized, tuned, batch)
        if to == "int8":
            gradients["int8, dequantized"] = gradient(merge(quantized, base="dequantized"), tuned, batch)
    pairs = [("int8, dequantized", "fp32"), ("int8", "int8, dequantized"), *((to, "fp32") for to in FORMATS)]
    rows = []
    for name, other in pairs:
        (loss, g), (true, h) = gradients[name], gradients[other]
        off, size = abs(loss / true - 1), float((g - h).norm() / h.norm())
        cosine = float(torch.cosine_similarity(g, h, dim=0))
        rows.append((weights, name, other, f"{loss:.5f}", f"{off:.1e}", f"{size:.1e}", f"{cosine:.6f}"))
    return rows


def perturb(tuned: Adapters) -> Adapters:
    """`tuned` as after some training: while B is 0, A has no gradient."""
    noise = (torch.randn(x.shape, generator=fold_in(key(5), path)) for path, x in leaves(tuned).items())
    return tree_map(lambda x: x + 0.02 * next(noise), tuned)


def gradient(base: GPT, tuned: Adapters, batch: Batch) -> tuple[float, Tensor]:
    """(mean loss, its gradient by the adapters, in one row and in fp64)."""
    grads, (total, weight) = value_and_grad_once(lambda tuned: nll(adapt(base, tuned), batch), tuned)
    flat = torch.cat([g.double().flatten() for g in leaves(grads).values()])
    return (total / weight).item(), flat / weight.item()


# -------------------------------------------------------------------------------------------------- rematerialization


def remat_cost(cfg: Config, repeats: int) -> list[Result]:
    """What is saved for the backward, resident memory of a step in a separate process, and time."""
    describe("remat")
    base, (row,) = base_of(cfg, CPU, torch.float32), equal_rows(1, 1024, cfg.vocab_size)
    batch, trained = fgpt_batch([[row]], CPU), tree_map(lambda x: x.requires_grad_(), adapters_of(base))
    saved = [
        saved_bytes(lambda remat=remat: nll(adapt(base, trained), batch, remat), (base, trained, batch))
        for remat in (True, False)
    ]
    where = "remat / without, 1 x 1024 tokens"
    results = [
        Result(f"saved for backward, {where}", "MB", saved[0] / 1e6, saved[1] / 1e6, saved[0] / saved[1], "<= 0.35")
    ]
    if Path("/proc/self/clear_refs").exists():
        describe("remat: a fresh process a side")
        peaks = []
        for remat in (True, False):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peaks.append(process.submit(peak, remat, cfg).result())
        for what, a, b in zip(("of the process", "of the step, beyond the model"), *peaks, strict=True):
            results.append(Result(f"peak memory {what}, {where}", "MB", a / 1e6, b / 1e6, a / b))
    seconds = time_sides({str(remat): partial(fgpt_step(base, remat=remat), batch) for remat in (True, False)}, repeats)
    return [*results, times(f"LoRA step, {where}", seconds["True"], seconds["False"], "<= 1.4")]


def peak(remat: bool, cfg: Config) -> tuple[int, int]:
    """`peak_bytes` of three steps."""

    def build() -> Callable[[], object]:
        (row,) = equal_rows(1, 1024, cfg.vocab_size)
        return partial(fgpt_step(base_of(cfg, CPU, torch.float32), remat=remat), fgpt_batch([[row]], CPU))

    return peak_bytes(build, steps=3)


# ------------------------------------------------------------------------------------------------ per-example gradients


def per_example(cfg: Config, repeats: int) -> tuple[list[Result], float]:
    """Gradients of each example against that of their sum, and against a loop; and how far their sum is from it."""
    describe("examples")
    base, rows = base_of(cfg, CPU, torch.float32), equal_rows(EXAMPLES, EXAMPLE, cfg.vocab_size)
    tuned, whole, singles = (
        adapters_of(base),
        fgpt_batch([[row] for row in rows], CPU),
        [fgpt_batch([[row]], CPU) for row in rows],
    )
    stacked = tree_map(lambda *xs: torch.stack(xs), *singles)

    def total(tuned: Adapters, batch: Batch) -> tuple[Tensor, Tensor]:
        return nll(adapt(base, tuned), batch)

    each = vmap(grad(lambda tuned, batch: total(tuned, batch)[0]), in_dims=(None, 0))
    sides: dict[str, Callable[[], Any]] = {
        "each": lambda: each(tuned, stacked),
        "sum": lambda: value_and_grad_once(total, tuned, whole)[0],
        "loop": lambda: [value_and_grad_once(total, tuned, batch)[0] for batch in singles],
    }
    with warnings.catch_warnings(
        action="ignore"
    ):  # fused attention has no batching rule: what that costs is measured here
        seconds = time_sides(sides, repeats)
        parted = tree_map(lambda g: g.sum(0), sides["each"]())
    what = f"{EXAMPLES} gradients of {EXAMPLE} tokens, vmap(grad)"
    summed, true = (torch.cat([g.flatten() for g in leaves(tree).values()]) for tree in (parted, sides["sum"]()))
    return [
        times(f"{what} / one of their sum", seconds["each"], seconds["sum"], "<= 3"),
        times(f"{what} / a loop", seconds["each"], seconds["loop"]),
    ], float((summed - true).norm() / true.norm())


# --------------------------------------------------------------------------------------------------------------- 4 bits


def four_bits(cfg: Config, repeats: int) -> tuple[list[Result], float]:
    """Bytes held and the step, ours and peft + bitsandbytes; and the difference of their last losses."""
    describe("medium: quantizing")
    base, (row,) = base_of(cfg, CPU, torch.float32), equal_rows(1, 256, cfg.vocab_size)
    tuned, batch, inputs = adapters_of(base), fgpt_batch([[row]], CPU), peft_batch([row], CPU)
    quantized, model = quantize(base, "nf4"), hub_model(cfg, base, nf4=True)
    matrices = {path: x for path, x in walk(quantized) if isinstance(x, Blockwise4bit)}
    num_elements = sum(x.shape.numel() for x in matrices.values())
    (matrix_bytes, model_bytes), (peft_matrix_bytes, peft_model_bytes) = (
        (nbytes(matrices), nbytes(quantized)),
        hub_bytes(model),
    )
    describe("medium: steps")
    losses: dict[str, float] = {}
    steps: dict[str, Callable[[], float]] = {
        "ours": partial(fgpt_step(quantized, tuned), batch),
        "theirs": partial(peft_step(model, CPU, torch.float32, tuned), inputs),
    }

    def keep(name: str) -> None:
        losses[name] = steps[name]()

    seconds = time_sides({name: partial(keep, name) for name in steps}, repeats)
    where = "ours / peft + bitsandbytes"
    return [
        Result(
            f"NF4 matrices, per element, {where}",
            "bytes",
            matrix_bytes / num_elements,
            peft_matrix_bytes / num_elements,
            matrix_bytes / peft_matrix_bytes,
        ),
        Result(f"NF4 model, {where}", "MB", model_bytes / 1e6, peft_model_bytes / 1e6, model_bytes / peft_model_bytes),
        times(f"LoRA step over NF4, r8 on c_attn, 1 x 256 tokens, {where}", seconds["ours"], seconds["theirs"]),
    ], abs(losses["ours"] - losses["theirs"])
