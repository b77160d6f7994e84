"""LoRA steps at GPT-2 medium's shape: dtypes, batch sizes, activation checkpointing, compiled blocks and CUDA graphs.
Each comes with the times of its parts, its memory and its rate.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fgpt
from experiments.bench.gpu.measure import (
    DEVICE,
    FUSED_TARGET,
    LORA_TARGET,
    gpt2_medium,
    median_seconds,
    on,
    packed_batch,
    relative_error,
    synchronize,
)
from experiments.bench.gpu.report import Report
from fgpt.kernels import cross_entropy
from fgpt.kernels.cuda_graphs import record_cuda_graph, side_stream
from fgpt.losses import Batch, nll
from fgpt.optim import cosine_schedule
from fgpt.step_graphs import StepGraphs
from fgpt.train_step import value_and_grad_once
from fgpt.tree import astype, tree_leaves


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    base: fgpt.GPT
    batches: Sequence[Batch]
    target: str = LORA_TARGET
    remat: bool = False
    compile: bool = False
    seconds_needed: float = 0
    """Of the time limit; with less it is left out."""


def lora_steps(report: Report, tiny: bool) -> None:
    cfg, base = gpt2_medium(tiny)
    short = on(astype(base, torch.bfloat16))

    def batch(rows: int, documents: int = 8) -> Batch:
        return on(packed_batch(rows, cfg.n_ctx, cfg.vocab_size, documents))

    measure(report, Variant("fp32, 2 rows, twice", on(base), [batch(2), batch(2)], seconds_needed=200))
    measure(report, Variant("bf16, 2 rows, twice", short, [batch(2), batch(2)]))
    measure(report, Variant("bf16, 8 rows", short, [batch(8)]))
    measure(report, Variant("bf16, 8 rows of one document", short, [batch(8, 1)]))
    if DEVICE.type == "cuda" and report.seconds_left > 150:
        profile_gradient(report, short, batch(8))
    with mock.patch.object(cross_entropy, "CHUNK_BYTES", 2 << 30):
        measure(report, Variant("bf16, 8 rows, logits at once", short, [batch(8)]))
        measure(report, Variant("the same, q, k, v fused", fgpt.fuse_qkv(short), [batch(8)], FUSED_TARGET))
        measure(report, Variant("the same, remat", short, [batch(8)], remat=True, seconds_needed=120))
        measure(report, Variant("the same, blocks compiled", short, [batch(8)], compile=True, seconds_needed=120))
        compiled = Variant("blocks compiled, remat", short, [batch(8)], remat=True, compile=True, seconds_needed=150)
        measure(report, compiled)
        for compiled in (False, True):
            if report.seconds_left > 60:
                graphs(report, short, batch(8), compiled)
    step_replays(report, short, batch(2))


def loss(
    adapters: Any, params: Any, batch: Batch, seed: Tensor | None, remat: bool = False, compile: bool = False
) -> tuple[Tensor, Tensor]:
    return nll(fgpt.adapt(params, adapters, rng=seed), batch, remat, compile)


def lora_flops(cfg: fgpt.Config, tokens: int, loss_positions: int) -> float:
    """What a LoRA step must multiply: each frozen matrix twice, forward and for the gradient of its input, and the head
    where there is a loss. The adapters' own, and attention, are left out.
    """
    matrices = cfg.n_layer * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_mlp)
    return 4 * tokens * matrices + 4 * loss_positions * cfg.d_model * cfg.vocab_size


def measure(report: Report, variant: Variant) -> None:
    """A step, and its gradient, forward pass and update alone."""
    if report.seconds_left < variant.seconds_needed:
        report.add("LoRA step", variant.name, "left out: no time")
        return
    adapters = fgpt.lora(variant.base, fgpt.key(1), 8, 16, variant.target)
    optimizer = fgpt.adamw(cosine_schedule(3e-4, 1000, warmup_steps=20))
    variant_loss = partial(loss, remat=variant.remat, compile=variant.compile)
    step = fgpt.make_step(variant_loss, optimizer)
    state = fgpt.init_state(adapters, optimizer)
    arguments = adapters, variant.base, variant.batches[0], None
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(state, variant.base, variant.batches, None)
    synchronize()
    first = time.perf_counter() - start
    seconds = median_seconds(lambda: step(state, variant.base, variant.batches, None), 5)
    gradient, _ = value_and_grad_once(variant_loss, *arguments)
    parts: dict[str, Callable[[], object]] = {
        "gradient": lambda: value_and_grad_once(variant_loss, *arguments),
        "forward": lambda: torch.no_grad()(variant_loss)(*arguments),
        "update": lambda: optimizer.update(gradient, state.opt_state, adapters),
    }
    part_times = {name: round(1e3 * median_seconds(call, 5, 1), 1) for name, call in parts.items()}
    tokens = sum(batch.tokens.numel() for batch in variant.batches)
    positions = sum(int((batch.weights != 0).sum()) for batch in variant.batches)
    rate = lora_flops(variant.base.cfg, tokens, positions) / seconds / 1e12
    values: dict[str, Any] = {"ms": round(1e3 * seconds, 1), "tokens/s": round(tokens / seconds)}
    values |= {"TFLOP/s": round(rate, 2), "first call (s)": round(first, 1), "parts (ms)": part_times}
    if DEVICE.type == "cuda":
        values["peak (GB)"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    report.add("LoRA step", variant.name, values)


def profile_gradient(report: Report, base: fgpt.GPT, batch: Batch) -> None:
    """The kernels of one gradient: their number, their time, and the 25 that take longest."""
    from torch.profiler import ProfilerActivity, profile

    adapters = fgpt.lora(base, fgpt.key(1), 8, 16, LORA_TARGET)
    value_and_grad_once(loss, adapters, base, batch, None)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        value_and_grad_once(loss, adapters, base, batch, None)
        synchronize()
    kernels = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    milliseconds = sum(event.device_time_total for event in kernels) / 1e3
    report.add("LoRA step", "kernels of a gradient, and their time (ms)", (len(kernels), round(milliseconds, 1)))
    averages = profiler.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70), flush=True)


def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A function that computes `call()` again, from what its tensors hold then, and the result that it writes into. On
    CUDA it is a graph; on a CPU the same is done by a call and a copy.
    """
    if DEVICE.type != "cuda":
        result = call()
        return lambda: assign(result, call()), result
    with side_stream(DEVICE):
        for _ in range(3):
            call()
    replay = record_cuda_graph(call)
    return replay, replay()


def assign(to: Any, new: Any) -> None:
    """Copy the leaves of a tree into those of another."""
    for x, y in zip(tree_leaves(to), tree_leaves(new), strict=True):
        x.copy_(y)


def graphs(report: Report, base: fgpt.GPT, batch: Batch, compile: bool) -> None:
    """The gradient, and the whole step, each captured as one CUDA graph and replayed: what launches cost. Without CUDA
    they are called alone, which tries the code. The step is captured at a constant rate.
    """
    adapters = fgpt.lora(base, fgpt.key(1), 8, 16, LORA_TARGET)
    optimizer = fgpt.adamw(3e-4)
    graph_loss = partial(loss, compile=compile)
    step, state = fgpt.make_step(graph_loss, optimizer), fgpt.init_state(adapters, optimizer)
    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: value_and_grad_once(graph_loss, adapters, base, batch, None)[0],
        "step": lambda: step(state, base, [batch], None)[0].trainable,
    }
    for name, call in calls.items():
        what = f"the {name} as a CUDA graph{', blocks compiled' if compile else ''}"
        try:
            report.add("LoRA step", what, graph_times(call))
        except Exception as err:  # the other one is measured
            report.add("LoRA step", what, f"not captured: {type(err).__name__}: {str(err).splitlines()[0][:120]}")


def graph_times(call: Callable[[], Any]) -> dict[str, Any]:
    """Of a call, launched kernel by kernel and replayed as a graph, and how far the two results differ."""
    values: dict[str, Any] = {"launched (ms)": round(1e3 * median_seconds(call), 1)}
    replay, captured = capture(call)
    values["replayed (ms)"] = round(1e3 * median_seconds(replay), 1)
    values["relative error"] = f"{relative_error(captured, call()):.1e}"
    return values


def step_replays(report: Report, base: fgpt.GPT, batch: Batch) -> None:
    """Whole steps as a CUDA graph, optimizer included, by the module that trains so: with a schedule and dropout they
    must train what steps launched kernel by kernel train. Without CUDA each replay is a call.
    """
    optimizer = fgpt.adamw(cosine_schedule(1e-3, 10, warmup_steps=5))
    step = fgpt.make_step(loss, optimizer)
    graphs = StepGraphs(step, record=None if DEVICE.type == "cuda" else lambda run: run)
    adapters = fgpt.lora(base, fgpt.key(1), 8, 16, LORA_TARGET, dropout=0.1)
    expected = graphed = repeated = fgpt.init_state(adapters, optimizer)
    for i in range(6):  # the second step is recorded
        key = fgpt.fold_in(fgpt.key(3), i)
        expected, _ = step(expected, base, [batch], key)
        graphed, _ = graphs(graphed, base, [batch], key)
        repeated, _ = graphs(repeated, base, [batch], fgpt.key(3))
    values: dict[str, Any] = {"steps": int(graphed.step)}
    values["relative error of the adapters"] = f"{relative_error(graphed.trainable, expected.trainable):.1e}"
    other_masks = relative_error(repeated.trainable, expected.trainable)
    values["the same with one dropout mask for all steps"] = f"{other_masks:.1e}"
    for name, run in {"launched (ms)": step, "replayed (ms)": graphs}.items():
        seconds = median_seconds(lambda run=run: run(graphed, base, [batch], fgpt.key(4)), 5)
        values[name] = round(1e3 * seconds, 1)
    report.add("LoRA step", "a step by StepGraphs", values)
