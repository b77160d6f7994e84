"""What the checks have in common: their result, the model and batch they run on, and how outputs are compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, merge
from fgpt.kernels.quantized_linear import RowwiseInt8
from fgpt.layers import has_quantized
from fgpt.losses import Batch, nll, text_positions
from fgpt.model import GPT, hidden, logits
from fgpt.optim import Optimizer, adamw
from fgpt.rng import fold_in, key
from fgpt.train_step import State, init_state, make_step
from fgpt.tree import device, leaves, replace_at, tree_map, walk
from fgpt.weights import dtype

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How much the order of summation may change a logit, relative to the largest: a matmul is divided into blocks by its
shape, and padding, other examples and a cache all change shapes. A few hundred roundings in fp32, in which a real fault
is a thousandth or more; in short dtypes each layer rounds its own result, so that a few roundings are much."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    >>> result = CheckResult("padding", "logits with and without padding", error=1e-6, tolerance=5e-5)
    >>> result.holds
    True
    """

    check: str
    compared: str
    """What was compared with what."""
    error: float | None
    """The largest difference relative to the largest value compared, or the number of leaves that differ. None if the
    check does not apply."""
    tolerance: float = 0.0
    """Largest error that is accepted; 0 is equality of all bits."""
    note: str = ""
    """Which leaves differ, or why the check does not apply."""

    @property
    def holds(self) -> bool | None:
        """None if the check does not apply. An error that is NaN does not hold."""
        return None if self.error is None else self.error <= self.tolerance


def objective(
    adapters: Adapters, params: GPT, batch: Batch, seed: Int[Tensor, ""] | None, compile: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of training: sums, as `make_step` takes them."""
    return nll(adapt(params, adapters, rng=seed), batch, compile=compile)


def not_applicable(check: str, reason: str) -> CheckResult:
    """The result of a check that does not apply."""
    return CheckResult(check, "", None, note=reason)


@dataclass(frozen=True)
class Context:
    """A base, adapters and a batch, and what several checks compute from them."""

    params: GPT
    adapters: Adapters
    """Perturbed, see `perturb`."""
    batch: Batch
    """[example seq]"""
    lr: float
    compile: bool = False
    """Whether training compiles its blocks: then the gradients of the checks are those of the compiled blocks."""

    @cached_property
    def model(self) -> GPT:
        """The base with its adapters."""
        return adapt(self.params, self.adapters)

    @cached_property
    def h(self) -> Float[Tensor, "example seq d_model"]:
        """The last hidden states of the whole batch in one forward pass."""
        return hidden(self.model, self.batch.tokens, self.batch.segments)

    @cached_property
    def is_text(self) -> Bool[Tensor, "example seq"]:
        return text_positions(self.batch)

    @cached_property
    def state_after_step(self) -> State:
        return self.step()

    def step(self) -> State:
        """The state after one update of AdamW, with dropout and clipping as in training."""
        optimizer = adamw(self.lr)
        step = make_step(partial(objective, compile=self.compile), optimizer)
        state, _ = step(init_state(self.adapters, optimizer), self.params, [self.batch], key(0))
        return state

    def gradient(self, batches: Sequence[Batch]) -> Adapters:
        """The gradient that a step computes from these micro-batches, without dropout or clipping."""
        gradient_only = Optimizer(init=lambda params: (), update=lambda grads, state, params: (grads, state))
        step = make_step(partial(objective, compile=self.compile), gradient_only, max_norm=None)
        state, _ = step(init_state(self.adapters, gradient_only), self.params, batches, None)
        return state.trainable

    @property
    def num_examples(self) -> int:
        return len(self.batch.tokens)

    @cached_property
    def is_quantized(self) -> bool:
        return has_quantized(self.params)

    @cached_property
    def has_int8(self) -> bool:
        return any(isinstance(x, RowwiseInt8) for _, x in walk(self.params))

    @cached_property
    def tolerance(self) -> float:
        """Largest error of outputs that differ in the order of summation alone.

        With int8 weights it is at least twice the error that merging makes on the base. Each row has its own scale, so
        that the other rows do not matter; but an activation halfway between two of the 255 steps is rounded up or down
        by the last bit of fp32, and all such roundings together matter no more than the steps themselves.
        """
        dtypes = {dtype(self.params.wte.w), *(x.dtype for x in leaves(self.adapters).values())}
        int8_error = 2 * self.merge_error(self.params) if self.has_int8 else 0.0
        return max(int8_error, *(TOLERANCE.get(x, 0.0) for x in dtypes))

    def merge_error(self, params: GPT) -> float:
        """The largest difference of logits before and after merging; example by example, which limits memory."""
        merged = merge(params, "dequantized" if self.is_quantized else None)
        segments = [None] * self.num_examples if self.batch.segments is None else self.batch.segments
        errors: list[float] = []
        for tokens, segment in zip(self.batch.tokens, segments, strict=True):
            before = logits(params, hidden(params, tokens, segment))
            errors.append(max_rel_diff(before, logits(merged, hidden(merged, tokens, segment))))
        return max_or_nan(errors)

    def max_logit_diff(self, pairs: Iterable[tuple[Float[Tensor, "*n d_model"], Float[Tensor, "*n d_model"]]]) -> float:
        """The largest difference of logits between hidden states that should be the same."""
        return max_or_nan(max_rel_diff(logits(self.model, a), logits(self.model, b)) for a, b in pairs)


def context_of(params: GPT, adapters: Adapters, batch: Batch, lr: float, compile: bool = False) -> Context:
    """The context of the checks, with the batch on the device of `params` and one axis of examples."""
    target = device(params)
    batch = tree_map(lambda x: x.to(target), batch)
    tokens, targets, weights = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if batch.segments is None else batch.segments.reshape(tokens.shape)
    cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.reshape(len(tokens), -1)
    examples = Batch(tokens, targets, weights, segments, batch.loss_positions, cu_seqlens)
    return Context(params, perturb(adapters), examples, lr, compile)


def perturb(adapters: Adapters) -> Adapters:
    """`adapters` plus noise, because a fresh adapter is a special case: a new LoRA is the identity whatever its scale,
    and A has no gradient since B is 0. The noise is a twentieth of a leaf's root mean square, or 0.02 if it is 0.
    """

    def add_noise(path: str, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=fold_in(key(0), path)).to(x)
        rms = x.float().square().mean().sqrt()
        return x + noise * torch.where(rms > 0, 0.05 * rms, 0.02).to(x.dtype)

    return replace_at(adapters, {path: add_noise(path, x) for path, x in leaves(adapters).items()})


def max_rel_diff(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> float:
    """max |a - b| / max |a|"""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))


def max_or_nan(errors: Iterable[float]) -> float:
    """The largest, or NaN if one is NaN, which `max` would ignore."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


def slice_batch(batch: Batch, examples: slice, columns: slice = slice(None)) -> Batch:
    """Some examples of the batch, and some of their columns."""
    tokens, targets, weights = (x[examples, columns] for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if batch.segments is None else batch.segments[examples, columns]
    return with_loss_positions(Batch(tokens, targets, weights, segments), batch)


def with_loss_positions(batch: Batch, like: Batch) -> Batch:
    """`batch` with loss positions if `like` has them: a classifier has no logits for the targets elsewhere, which are
    tokens.
    """
    if like.loss_positions is None:
        return batch
    return replace(batch, loss_positions=batch.weights.flatten().nonzero().flatten())


def documents(segments: Int[Tensor, "example seq"]) -> list[tuple[int, Int[Tensor, " length"]]]:
    """(example, positions) of every document. Segment 0 is padding and not a document."""
    result: list[tuple[int, Int[Tensor, " length"]]] = []
    for i, row in enumerate(segments):
        for n in row.unique().tolist():
            if n > 0:
                result.append((i, (row == n).nonzero().flatten()))
    return result
