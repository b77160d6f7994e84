"""The laws that everything here rests on, asked of a model, adapters and a batch of your own.

finite loss         a number, at every position with weight        merge            merged weights answer as factored
padding             changes nothing, right or left                 accumulation     micro-batches add up to their union
packing             documents in a row are as if alone             gradient flow    every trained leaf has a gradient
batch composition   a row does not see its neighbors              first step       and moves in the first update
batch size          nor how many they are                          determinism      the same step gives the same bits
cache               token by token is one pass                     save and load    to the bit
frozen base         nothing is changed in place
"""

from collections.abc import Callable, Iterator

import torch

from fgpt.adapters import Adapters
from fgpt.checks import forward, persistence, training
from fgpt.checks.context import CheckResult, Context, context_of, not_applicable
from fgpt.losses import Batch
from fgpt.model import GPT

__all__ = ["CheckResult", "run_checks"]

Check = Callable[[Context], CheckResult]

FORWARD: dict[str, Check] = {
    "padding": forward.padding,
    "packing": forward.packing,
    "batch composition": forward.batch_composition,
    "batch size": forward.size,
    "cache": forward.cache,
    "merge": forward.merged_forward,
}
TRAINING: dict[str, Check] = {
    "accumulation": training.accumulation,
    "gradient flow": training.gradient_flow,
    "first step": training.first_step,
    "determinism": training.determinism,
    "save and load": persistence.files,
}


LAWS = 2 + len(FORWARD) + len(TRAINING)
"""How many findings there are: of a finite loss and the frozen base as well."""


def run_checks(params: GPT, adapters: Adapters, batch: Batch, lr: float = 3e-4) -> tuple[CheckResult, ...]:
    """What each law is found to be worth for `adapters` over `params` on `batch`, at a point a little away from where
    they are, since a fresh adapter is the identity and hides much. `lr` is the rate of the first update. Dropout is
    off, but in the first update.

    A few rows are enough: the passes take some twenty times the batch, and a row's logits are held whole. A law that
    has nothing to be asked of says why, and its `holds` is None.

    Raises InputError where adapters or batch do not fit the model.
    """
    return tuple(iter_checks(params, adapters, batch, lr=lr))


def iter_checks(params: GPT, adapters: Adapters, batch: Batch, lr: float = 3e-4) -> Iterator[CheckResult]:
    """What `check` gathers, each finding as it comes."""
    trees = {"base": params, "adapters": adapters, "batch": batch}
    # Not one no_grad around all of it: it would stay in force for whoever takes the findings.
    with torch.no_grad():
        before = persistence.digest(trees)
        case = context_of(params, adapters, batch, lr)
        finite = forward.finite(case)
    yield finite
    for name, law in (FORWARD | TRAINING).items():
        if not finite.holds:
            yield not_applicable(name, "there is no loss to speak of")
        elif name in TRAINING and not adapters:
            yield not_applicable(name, "no adapters")
        else:
            with torch.no_grad():
                finding = law(case)
            yield finding
    yield persistence.frozen_unchanged(before, persistence.digest(trees))
