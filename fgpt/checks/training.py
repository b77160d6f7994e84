"""Checks of a training step: every leaf is trained, nothing else changes, and micro-batches add up."""

from dataclasses import replace

import torch

from fgpt.checks.context import CheckResult, Context, not_applicable, slice_batch
from fgpt.kernels.reproducibility import bitwise_reproducible
from fgpt.losses import Batch
from fgpt.optim import global_norm
from fgpt.tree import device, leaves, tree_map


def accumulation(context: Context) -> CheckResult:
    """Two micro-batches of different sizes and weights: the mean of their means would not be the mean of the union."""
    check = "accumulation"
    if context.num_examples < 2:
        return not_applicable(check, "the batch has one example")
    weights = torch.arange(1, context.num_examples + 1, device=context.batch.weights.device)[:, None]
    union = replace(context.batch, weights=context.batch.weights * weights)  # examples weigh 1, 2, 3, .. times as much
    split = (context.num_examples + 1) // 3 or 1
    micro_batches: list[Batch] = []
    for examples in (slice(split), slice(split, None)):
        columns = context.is_text[examples].any(0).nonzero()
        width = int(columns.max()) + 1 if len(columns) else 1
        micro_batches.append(slice_batch(union, examples, slice(width)))
    expected, total = context.gradient([union]), context.gradient(micro_batches)
    error = global_norm(tree_map(torch.sub, expected, total)) / global_norm(expected)
    sizes = " and ".join(str(list(x.tokens.shape)) for x in micro_batches)
    compared = f"gradient of the batch with that of micro-batches of {sizes}, relative to its norm"
    return CheckResult(check, compared, float(error), context.tolerance)


def gradient_flow(context: Context) -> CheckResult:
    """Every trained leaf has a finite gradient that is not zero."""
    gradients = leaves(context.gradient([context.batch]))
    failing: list[str] = []
    for path, g in gradients.items():
        if not (g.isfinite().all() and g.any()) and not has_zero_gradient(path, context):
            failing.append(path)
    compared = f"gradients of {len(gradients)} trained leaves: finite, and not all zero"
    return CheckResult("gradient flow", compared, float(len(failing)), note=summarize(failing, "has no gradient"))


def has_zero_gradient(path: str, context: Context) -> bool:
    """Whether this is a bias of keys that are neither rotated nor normed: a softmax removes what all keys have in
    common, so that its gradient is zero but for rounding.
    """
    cfg = context.params.cfg
    return path.endswith("attn.k.b") and not cfg.rotary_dim and not cfg.qk_norm


def first_step(context: Context) -> CheckResult:
    """Every leaf that has a gradient moves in the first update; `gradient_flow` reports the others."""
    before, after = leaves(context.adapters), leaves(context.state_after_step.trainable)
    moments = leaves(context.state_after_step.opt_state.mu)
    trained = [path for path, mu in moments.items() if mu.any() and not has_zero_gradient(path, context)]
    unchanged = [path for path in trained if torch.equal(before[path], after[path])]
    compared = f"{len(trained)} trained leaves before and after an update of AdamW at rate {context.lr:g}"
    note = summarize(unchanged, "does not move: the rate is lost in its dtype's rounding, or the leaf is frozen")
    return CheckResult("first step", compared, float(len(unchanged)), note=note)


def determinism(context: Context) -> CheckResult:
    """The same step twice gives the same bits; or where no device has them, the same gradients up to rounding."""
    if not bitwise_reproducible(device(context.params)):
        return repeated_gradient(context)
    first, second = leaves(context.state_after_step), leaves(context.step())
    different = [path for path, x in first.items() if not torch.equal(x, second[path])]
    compared = "params and moments after the same step twice, bit by bit"
    return CheckResult("determinism", compared, float(len(different)), note=summarize(different, "differs"))


def repeated_gradient(context: Context) -> CheckResult:
    """The first moments after the same step twice, which are the gradients: AdamW moves a parameter by the sign of its
    gradient, so that rounding of one near zero decides where the parameter goes.
    """
    first, second = context.state_after_step.opt_state.mu, context.step().opt_state.mu
    error = global_norm(tree_map(torch.sub, first, second)) / global_norm(first)
    compared = (
        "gradients of the same step twice, up to rounding: this device adds in any order unless torch's deterministic "
        "algorithms are in use"
    )
    return CheckResult("determinism", compared, float(error), context.tolerance)


def compilation(context: Context) -> CheckResult:
    """The gradient of compiled blocks is that of the blocks, up to rounding."""
    got, expected = (replace(context, compile=x).gradient([context.batch]) for x in (True, False))
    error = global_norm(tree_map(torch.sub, got, expected)) / global_norm(expected)
    compared = "gradient of compiled blocks with that of the blocks, relative to its norm"
    return CheckResult("compilation", compared, float(error), context.tolerance)


def summarize(paths: list[str], problem: str) -> str:
    """The first of `paths`, the number of the others, and what is wrong with them."""
    if not paths:
        return ""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return f"{', '.join(paths[:4])}{more}: {problem}"
