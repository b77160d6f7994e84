"""Checks of the forward pass: the logits at a position depend only on its own document up to there, however the batch
is laid out and whichever code computes them.
"""

from math import inf, isfinite, nan

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from fgpt.checks.context import (
    CheckResult,
    Context,
    documents,
    max_or_nan,
    max_rel_diff,
    not_applicable,
    slice_batch,
    with_loss_positions,
)
from fgpt.generation import static_cache
from fgpt.losses import Batch, loss, nll
from fgpt.model import GPT, KVCache, forward_with_cache, hidden, logits
from fgpt.weights import shape

NUM_PADDING = 8
"""Columns of padding that are added."""
NUM_DECODED = 8
"""Tokens that are decoded one by one."""


def finite_loss(context: Context) -> CheckResult:
    """A finite loss over exactly the weighted positions: one that is missing in `batch.loss_positions` would be left
    out silently, one that is there twice would count double.
    """
    weighted = context.batch.weights.flatten().nonzero().flatten()
    mean_loss = float(loss(context.model, context.batch))
    positions = weighted if context.batch.loss_positions is None else context.batch.loss_positions
    error, note = 0.0, ""
    if not len(weighted):
        error, note = inf, "no position has a weight"
    elif not torch.equal(positions.sort().values, weighted):
        error, note = inf, "batch.loss_positions does not contain every weighted position once"
    elif not isfinite(mean_loss):
        error, note = nan, "the loss is not finite"
    compared = f"the loss, {mean_loss:.4f} nats, and its positions: {len(weighted)} with a weight"
    return CheckResult("finite loss", compared, error, note=note)


def padding(context: Context) -> CheckResult:
    """Padding on the right, as batches have it, and on the left, as prompts of different lengths have it."""
    n_ctx, model = context.params.cfg.n_ctx, context.model
    count = min(NUM_PADDING, n_ctx - 1)
    batch = slice_batch(context.batch, slice(None), slice(n_ctx - count))  # a full context leaves no room for padding
    width, is_text = batch.tokens.shape[1], context.is_text[:, : n_ctx - count]
    right, left = with_padding(batch, (0, count)), with_padding(batch, (count, 0))
    h = hidden(model, batch.tokens, batch.segments)
    h_right = hidden(model, right.tokens, right.segments)[:, :width]
    h_left = hidden(model, left.tokens, left.segments)[:, count:]
    logit_error = context.max_logit_diff([(h[is_text], h_right[is_text]), (h[is_text], h_left[is_text])])
    sums = torch.stack(nll(model, batch))  # not the mean: the slice may have no weighted position
    loss_error = max_or_nan(max_rel_diff(sums, torch.stack(nll(model, x))) for x in (right, left))
    compared = f"logits and loss with {count} more columns of padding, right and left"
    return CheckResult("padding", compared, max_or_nan([logit_error, loss_error]), context.tolerance)


def with_padding(batch: Batch, columns: tuple[int, int]) -> Batch:
    """`batch` with (left, right) columns of padding. Right padding needs no segments, only the causal mask."""
    segments = batch.segments
    if segments is None and columns[0]:
        segments = torch.ones_like(batch.tokens)
    tokens, targets, weights = (F.pad(x, columns) for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if segments is None else F.pad(segments, columns)
    return with_loss_positions(Batch(tokens, targets, weights, segments), batch)


def packing(context: Context) -> CheckResult:
    """The documents of a packed example have the logits and the loss that each has alone."""
    check, batch = "packing", context.batch
    texts = [] if batch.segments is None else documents(batch.segments)
    if len(texts) == len({example for example, _ in texts}):
        return not_applicable(check, "no example contains more than one document")
    sums: list[Tensor] = []
    errors: list[float] = []
    for example, positions in texts:
        tokens, targets, weights = (x[example, positions][None] for x in (batch.tokens, batch.targets, batch.weights))
        document = with_loss_positions(Batch(tokens, targets, weights), batch)
        sums.append(torch.stack(nll(context.model, document)))
        h = hidden(context.model, document.tokens)[0]
        errors.append(context.max_logit_diff([(h, context.h[example, positions])]))
    errors.append(max_rel_diff(torch.stack(sums).sum(0), torch.stack(nll(context.model, batch))))
    compared = f"logits and loss of {len(texts)} documents, each alone"
    return CheckResult(check, compared, max_or_nan(errors), context.tolerance)


def batch_composition(context: Context) -> CheckResult:
    """Other examples of the same shape in the batch: the same matmuls, so that nothing may change by a bit. Only this
    finds a quantization scale that examples share, whose effect is not much larger than rounding.
    """
    check, batch = "batch composition", context.batch
    if context.num_examples < 2:
        return not_applicable(check, "the batch has one example")
    other_tokens = (batch.tokens + 1) % shape(context.params.wte.w)[0]
    is_first = torch.arange(context.num_examples, device=other_tokens.device) == 0
    errors: list[float] = []
    for unchanged in (is_first, ~is_first):
        tokens = torch.where(unchanged[:, None], batch.tokens, other_tokens)
        h = hidden(context.model, tokens, batch.segments)
        errors.append(context.max_logit_diff([(context.h[unchanged], h[unchanged])]))
    return CheckResult(check, "logits of each example with those in a batch of other ones", max_or_nan(errors))


def batch_size(context: Context) -> CheckResult:
    """Each example alone."""
    check, batch = "batch size", context.batch
    if context.num_examples < 2:
        return not_applicable(check, "the batch has one example")
    errors: list[float] = []
    for i in range(context.num_examples):
        example = slice_batch(batch, slice(i, i + 1))
        h = hidden(context.model, example.tokens, example.segments)[0]
        errors.append(context.max_logit_diff([(h, context.h[i])]))
    compared = f"logits of {context.num_examples} examples, each alone"
    return CheckResult(check, compared, max_or_nan(errors), context.tolerance)


def cache(context: Context) -> CheckResult:
    """The batch in chunks of `forward_with_cache`, and its longest document through the static cache of `generate`."""
    check, batch, model = "cache", context.batch, context.model
    seq = int(context.is_text.sum(-1).max())
    if seq < 2:
        return not_applicable(check, "no example has two tokens")
    first = max(1, seq - NUM_DECODED)
    h, kv = forward_with_cache(model, batch.tokens[:, :first], KVCache(), _columns(batch.segments, 0, first))
    chunks = [h]
    for i in range(first, seq):
        h, kv = forward_with_cache(model, batch.tokens[:, i : i + 1], kv, _columns(batch.segments, i, i + 1))
        chunks.append(h)
    growing_error = context.max_logit_diff(zip(context.h[:, :seq], torch.cat(chunks, 1), strict=True))
    error = max_or_nan([growing_error, static_cache_error(model, longest_document(context))])
    compared = f"logits of one pass with those of {seq - first} tokens decoded one by one"
    return CheckResult(check, compared, error, context.tolerance)


def _columns(x: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if x is None else x[:, start:end]


def longest_document(context: Context) -> Int[Tensor, "1 length"]:
    """Its tokens."""
    segments = context.is_text.long() if context.batch.segments is None else context.batch.segments
    example, positions = max(documents(segments), key=lambda document: len(document[1]))
    return context.batch.tokens[example, positions][None]


def static_cache_error(model: GPT, tokens: Int[Tensor, "1 seq"]) -> float:
    """The largest difference of logits between one forward pass and `static_cache.decode_step`, token by token."""
    seq = tokens.shape[1]
    first = max(1, seq - NUM_DECODED)
    scores, state = static_cache.prefill(model, tokens[:, :first], None, seq - first)
    steps = [scores]
    for i in range(first, seq):
        steps.append(static_cache.decode_step(model, tokens[:, i], state))
    expected = logits(model, hidden(model, tokens)[0, first - 1 :])
    return max_rel_diff(expected, torch.cat(steps))


def merged_forward(context: Context) -> CheckResult:
    """Merged weights give the logits of factored ones. Over int8 weights the tolerance is twice the error that merging
    makes on the base alone: a merged matrix multiplies exact activations, an int8 matmul rounds them.
    """
    check = "merge"
    if not context.adapters:
        return not_applicable(check, "no adapters")
    if all(isinstance(x, Tensor) for x in context.adapters.values()):
        return not_applicable(check, "adapters replace leaves, and none adapts a matrix")
    base = ', base="dequantized"' if context.is_quantized else ""
    compared = f"logits of factored weights with those of merged ones{base}"
    return CheckResult(check, compared, context.merge_error(context.model), context.tolerance)
