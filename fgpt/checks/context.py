"""What is checked, at which point, and what a law's answer looks like."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.adapters import Adapters, adapt, merge
from fgpt.kernels.quantized_linear import QUANTIZED, RowwiseInt8
from fgpt.losses import Batch, nll
from fgpt.model import GPT, hidden, logits
from fgpt.optim import Optimizer, adamw
from fgpt.rng import fold_in, key
from fgpt.train_step import State, init_state, make_step
from fgpt.tree import device, leaves, replace_at, tree_map, walk
from fgpt.weights import dtype

ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""What another order of summation may make of a logit, as a part of the largest: a product is cut into blocks by its
shape, and padding, neighbors and a cache all change shapes. A few hundred roundings in fp32, where a law that is
broken shows a thousandth at the least; in short dtypes each layer rounds its own result, so that a few are much."""


@dataclass(frozen=True)
class CheckResult:
    """What one law was found to be worth here."""

    check: str
    compared: str
    """With what, in words."""
    error: float | None
    """The worst difference: a part of the largest number compared, or how many leaves there are that differ. None where
    the law was not asked."""
    tolerance: float = 0.0
    """What the margin may be; 0 is to the bit."""
    note: str = ""
    """Which leaves they are, or why the law was not asked."""

    @property
    def holds(self) -> bool | None:
        """None where it was not asked. A margin that is no number does not hold."""
        return None if self.error is None else self.error <= self.tolerance


def objective(
    adapters: Adapters, params: GPT, batch: Batch, seed: Int[Tensor, ""] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What is trained: sums, as `make_step` takes them."""
    return nll(adapt(params, adapters, rng=seed), batch)


def not_applicable(law: str, why: str) -> CheckResult:
    return CheckResult(law, "", None, note=why)


@dataclass(frozen=True)
class Context:
    """A base, adapters and a batch of rows, and what several laws read of them."""

    params: GPT
    adapters: Adapters
    """A little away from where they were given: see `nearby`."""
    batch: Batch
    """[row seq]"""
    lr: float

    @cached_property
    def adapted_params(self) -> GPT:
        return adapt(self.params, self.adapters)

    @cached_property
    def h(self) -> Float[Tensor, "row seq d_model"]:
        """The last hidden states of the whole batch in one pass."""
        return hidden(self.adapted_params, self.batch.tokens, self.batch.segments)

    @cached_property
    def real(self) -> Bool[Tensor, "row seq"]:
        """Where the batch holds text: where it says nothing of it, up to each row's last weighted token."""
        if self.batch.segments is not None:
            return self.batch.segments > 0
        return (self.batch.weights != 0).flip(-1).cumsum(-1).flip(-1) > 0

    @cached_property
    def state_after_step(self) -> State:
        return self.step()

    def step(self) -> State:
        """The state after one update of AdamW, with dropout and clipping as in training."""
        optimizer = adamw(self.lr)
        step = make_step(objective, optimizer)
        return step(init_state(self.adapters, optimizer), self.params, [self.batch], key(0))[0]

    def gradient_of(self, batches: Sequence[Batch]) -> Adapters:
        """What a step is given of these micro-batches, without dropout or clipping."""
        bare = Optimizer(init=lambda params: (), update=lambda grads, state, params: (grads, state))
        return make_step(objective, bare, max_norm=None)(init_state(self.adapters, bare), self.params, batches, None)[
            0
        ].trainable

    @property
    def rows(self) -> int:
        return len(self.batch.tokens)

    @cached_property
    def quantized(self) -> bool:
        return any(isinstance(x, QUANTIZED) for _, x in walk(self.params))

    @cached_property
    def int8(self) -> bool:
        return any(isinstance(x, RowwiseInt8) for _, x in walk(self.params))

    @cached_property
    def rounding(self) -> float:
        """The limit of what is the same but for the order of summation.

        Over whole numbers it is twice what their rounding of activations makes of the base, if that is more. Each row
        has a scale of its own, so that neighbors do not matter; but a number between two of the 255 steps falls on
        either side by the last bit of fp32, and all of them together cannot matter more than the steps themselves do.
        """
        dtypes = {dtype(self.params.wte.w), *(x.dtype for x in leaves(self.adapters).values())}
        return max(2 * self.merging(self.params) if self.int8 else 0.0, *(ROUNDING.get(x, 0.0) for x in dtypes))

    def merging(self, before: GPT) -> float:
        """The worst difference of logits that merging makes; row by row, so that one row's are alive."""
        plain = merge(before, "dequantized" if self.quantized else None)
        segments = [None] * self.rows if self.batch.segments is None else self.batch.segments
        rows = zip(self.batch.tokens, segments, strict=True)
        return max_or_nan(
            max_rel_diff(logits(before, hidden(before, *row)), logits(plain, hidden(plain, *row))) for row in rows
        )

    def max_logit_diff(self, pairs: Iterable[tuple[Float[Tensor, "*n d_model"], Float[Tensor, "*n d_model"]]]) -> float:
        """The worst difference of logits between hidden states that should be the same."""
        return max_or_nan(
            max_rel_diff(logits(self.adapted_params, a), logits(self.adapted_params, b)) for a, b in pairs
        )


def context_of(params: GPT, adapters: Adapters, batch: Batch, lr: float) -> Context:
    at = device(params)
    batch = tree_map(lambda x: x.to(at), batch)
    tokens, targets, weights = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if batch.segments is None else batch.segments.reshape(tokens.shape)
    return Context(params, perturb(adapters), Batch(tokens, targets, weights, segments, batch.loss_positions), lr)


def perturb(adapters: Adapters) -> Adapters:
    """Adapters a little way from `adapters`, where nothing is special: at its start a LoRA is the identity whatever its
    strength, and A has no gradient since B is 0. A leaf moves by a twentieth of its size, one of zeros by 0.02.
    """

    def perturb_leaf(path: str, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=fold_in(key(0), path)).to(x)
        size = x.float().square().mean().sqrt()
        return x + noise * torch.where(size > 0, 0.05 * size, 0.02).to(x.dtype)

    return replace_at(adapters, {path: perturb_leaf(path, x) for path, x in leaves(adapters).items()})


def max_rel_diff(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> float:
    """max |a - b| / max |a|"""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))


def max_or_nan(margins: Iterable[float]) -> float:
    """The largest, and NaN where one is: `max` would pass over it."""
    return float(torch.tensor([0.0, *margins], dtype=torch.float64).max())


def slice_batch(batch: Batch, rows: slice, columns: slice = slice(None)) -> Batch:
    """Some rows, and of them some columns."""
    tokens, targets, weights = (x[rows, columns] for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if batch.segments is None else batch.segments[rows, columns]
    return with_loss_positions(Batch(tokens, targets, weights, segments), batch)


def with_loss_positions(batch: Batch, like: Batch) -> Batch:
    """`batch` with logits where they have a weight alone, if so it is in `like`: a classifier's targets are elsewhere
    tokens, of which it has no logit.
    """
    return (
        batch
        if like.loss_positions is None
        else replace(batch, loss_positions=batch.weights.flatten().nonzero().flatten())
    )


def documents(segments: Int[Tensor, "row seq"]) -> list[tuple[int, Int[Tensor, " length"]]]:
    """(row, positions) of every document; padding, which is segment 0, is none."""
    found = ((i, row, int(n)) for i, row in enumerate(segments) for n in row.unique() if n > 0)
    return [(i, (row == n).nonzero().flatten()) for i, row, n in found]
