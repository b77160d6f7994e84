"""Laws of a training step: every leaf is trained, nothing else is touched, and batches add up."""

from dataclasses import replace

import torch

from fgpt.checks.context import CheckResult, Context, not_applicable, slice_batch
from fgpt.losses import Batch
from fgpt.optim import global_norm
from fgpt.tree import leaves, tree_map


def accumulation(case: Context) -> CheckResult:
    """Two micro-batches of other sizes and weights: a mean of their means would not be the mean of their union."""
    law = "accumulation"
    if case.rows < 2:
        return not_applicable(law, "the batch has one row")
    order = torch.arange(1, case.rows + 1, device=case.batch.weights.device)[:, None]
    whole = replace(case.batch, weights=case.batch.weights * order)  # rows count 1, 2, 3, .. times as much
    cut = (case.rows + 1) // 3 or 1
    micro: list[Batch] = []
    for rows in (slice(cut), slice(cut, None)):
        text = case.real[rows].any(0).nonzero()
        micro.append(slice_batch(whole, rows, slice(int(text.max()) + 1 if len(text) else 1)))
    union, added = case.gradient_of([whole]), case.gradient_of(micro)
    difference = global_norm(tree_map(torch.sub, union, added)) / global_norm(union)
    sizes = " and ".join(str(list(x.tokens.shape)) for x in micro)
    compared = f"gradient of the batch with that of micro-batches of {sizes}, as a part of its norm"
    return CheckResult(law, compared, float(difference), case.rounding)


def gradient_flow(case: Context) -> CheckResult:
    found = leaves(case.gradient_of([case.batch]))
    silent = [
        path for path, g in found.items() if not (g.isfinite().all() and g.any()) and not is_shift_invariant(path, case)
    ]
    compared = f"gradients of {len(found)} trained leaves: finite, and not all zero"
    return CheckResult("gradient flow", compared, float(len(silent)), note=summarize(silent, "has no gradient"))


def is_shift_invariant(path: str, case: Context) -> bool:
    """Whether this is a bias of keys as they are: a softmax takes off what all keys have in common, and the gradient is
    zero but for rounding. Where keys are rotated or normed it is not.
    """
    cfg = case.params.cfg
    return path.endswith("attn.k.b") and not cfg.rotary_dim and not cfg.qk_norm


def first_step(case: Context) -> CheckResult:
    """Asked of leaves that have a gradient: `flow` tells of the others."""
    before, after = leaves(case.adapters), leaves(case.state_after_step.trainable)
    trained_paths = [
        path
        for path, mean in leaves(case.state_after_step.opt_state.mu).items()
        if mean.any() and not is_shift_invariant(path, case)
    ]
    still = [path for path in trained_paths if torch.equal(before[path], after[path])]
    compared = f"{len(trained_paths)} trained leaves before and after an update of AdamW at rate {case.lr:g}"
    note = summarize(still, "does not move: the rate is lost in its dtype's rounding, or the leaf is frozen")
    return CheckResult("first step", compared, float(len(still)), note=note)


def determinism(case: Context) -> CheckResult:
    one, two = leaves(case.state_after_step), leaves(case.step())
    differ = [path for path, x in one.items() if not torch.equal(x, two[path])]
    compared = "params and moments after the same step twice, bit by bit"
    return CheckResult("determinism", compared, float(len(differ)), note=summarize(differ, "differs"))


def summarize(paths: list[str], what: str) -> str:
    """The first of `paths`, and how many more there are."""
    if not paths:
        return ""
    return f"{', '.join(paths[:4])}{f' and {len(paths) - 4} more' if len(paths) > 4 else ''}: {what}"
