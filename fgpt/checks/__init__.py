"""Checks that your own model, adapters and batch obey the laws that fine-tuning relies on.

finite loss         the loss is finite, at every weighted position
padding             changes nothing, right or left
packing             the documents of one example do not interact
batch composition   nor do the examples of one batch
batch size          nor does their number matter
cache               decoding equals one forward pass
merge               merged weights give the same logits
accumulation        micro-batches add up to their union
gradient flow       every trained leaf has a gradient
first step          and moves in the first update
determinism         the same step gives the same bits, or on a GPU the same up to rounding
compilation         compiled blocks give the gradient of the blocks, if training compiles them
save and load       files give back the same bits
frozen base         nothing is changed in place
"""

from collections.abc import Callable, Iterator

import torch

from fgpt.adapter_types import Adapters
from fgpt.checks import forward, persistence, training
from fgpt.checks.context import CheckResult, Context, context_of, not_applicable
from fgpt.losses import Batch
from fgpt.model import GPT

__all__ = ["CheckResult", "run_checks"]

Check = Callable[[Context], CheckResult]

FORWARD_CHECKS: dict[str, Check] = {
    "padding": forward.padding,
    "packing": forward.packing,
    "batch composition": forward.batch_composition,
    "batch size": forward.batch_size,
    "cache": forward.cache,
    "merge": forward.merged_forward,
}
TRAINING_CHECKS: dict[str, Check] = {
    "accumulation": training.accumulation,
    "gradient flow": training.gradient_flow,
    "first step": training.first_step,
    "determinism": training.determinism,
    "save and load": persistence.save_and_load,
}
COMPILED_CHECKS: dict[str, Check] = {"compilation": training.compilation}

NUM_CHECKS = 2 + len(FORWARD_CHECKS) + len(TRAINING_CHECKS)
"""With the finite loss and the frozen base, without those of compiled blocks."""


def run_checks(
    params: GPT, adapters: Adapters, batch: Batch, *, lr: float = 3e-4, compile: bool = False
) -> tuple[CheckResult, ...]:
    r"""The result of every check for `adapters` over `params` on `batch`.

    The adapters are perturbed first, because a fresh adapter is the identity and hides faults. Dropout is off, except
    in the first update. A few examples are enough: the checks take the time of some twenty forward passes, and all
    logits of an example are in memory at once. A check that does not apply says why, and its `holds` is None.

    Args:
        params: The base.
        adapters: What is trained; may be empty.
        batch: Examples as training has them.
        lr: Learning rate of the first update.
        compile: Check the gradients of compiled blocks, as `nll(.., compile=True)` trains.

    Raises:
        InputError: if adapters or batch do not fit the model.

    >>> import fgpt, torch
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    >>> batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 3))
    >>> results = fgpt.run_checks(params, fgpt.lora(params, fgpt.key(1), 2, target=r".*\.(q|v)"), batch)
    >>> [result.check for result in results if result.holds is False]
    []
    """
    return tuple(iter_checks(params, adapters, batch, lr=lr, compile=compile))


def iter_checks(
    params: GPT, adapters: Adapters, batch: Batch, *, lr: float = 3e-4, compile: bool = False
) -> Iterator[CheckResult]:
    """`run_checks`, one result at a time."""
    trees = {"base": params, "adapters": adapters, "batch": batch}
    # Not one no_grad around everything: it would stay in force for the caller between two results.
    with torch.no_grad():
        before = persistence.digest(trees)
        context = context_of(params, adapters, batch, lr, compile)
        finite_loss = forward.finite_loss(context)
    yield finite_loss
    of_training = TRAINING_CHECKS | (COMPILED_CHECKS if compile else {})
    for name, check in (FORWARD_CHECKS | of_training).items():
        if not finite_loss.holds:
            yield not_applicable(name, "there is no finite loss")
        elif name in of_training and not adapters:
            yield not_applicable(name, "no adapters")
        else:
            with torch.no_grad():
                result = check(context)
            yield result
    yield persistence.frozen_base(before, persistence.digest(trees))
