"""Laws of the forward pass: what a position answers is a function of its own document up to it, however it is laid out
or computed.
"""

from collections.abc import Iterator
from math import isfinite

import torch
import torch.nn.functional as F
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

MORE, STEPS = 8, 8
"""Columns of padding that are added, and tokens that are read one by one."""


def finite(case: Context) -> CheckResult:
    """A number, of all positions with weight: one that `batch.at` forgets would be lost in silence, one that it names
    twice count double.
    """
    weighted, found = case.batch.weights.flatten().nonzero().flatten(), float(loss(case.adapted_params, case.batch))
    at = weighted if case.batch.loss_positions is None else case.batch.loss_positions
    margin, why = 0.0 if isfinite(found) else float("nan"), "the loss is no number"
    if not len(weighted):
        margin, why = float("inf"), "no position has a weight: nothing is asked"
    elif not torch.equal(at.sort().values, weighted):
        margin, why = float("inf"), "batch.at does not name every position with weight once"
    compared = f"the loss, {found:.4f} nats, and where it is taken: {len(weighted)} weighted positions"
    return CheckResult("finite loss", compared, margin, note="" if margin == 0 else why)


def padding(case: Context) -> CheckResult:
    """Padding on the right, as batches have it, and on the left, as ragged prompts have it."""
    context = case.params.cfg.n_ctx
    more = min(MORE, context - 1)
    cropped = slice_batch(
        case.batch, slice(None), slice(context - more)
    )  # where rows fill the context, there is no more room
    width, real = cropped.tokens.shape[1], case.real[:, : context - more]
    right, left = (with_padding(cropped, sides) for sides in ((0, more), (more, 0)))
    h = hidden(case.adapted_params, cropped.tokens, cropped.segments)
    found = [hidden(case.adapted_params, x.tokens, x.segments) for x in (right, left)]
    logit = case.max_logit_diff([(h[real], found[0][:, :width][real]), (h[real], found[1][:, more:][real])])
    sums = torch.stack(nll(case.adapted_params, cropped))  # not the mean: a cut may have left nothing weighted
    nats = max_or_nan(max_rel_diff(sums, torch.stack(nll(case.adapted_params, x))) for x in (right, left))
    compared = f"logits and loss with {more} columns of padding more, right and left"
    return CheckResult("padding", compared, max_or_nan([logit, nats]), case.rounding)


def with_padding(batch: Batch, sides: tuple[int, int]) -> Batch:
    """`batch` with columns of padding on its left and on its right; the causal mask alone keeps out what is right."""
    segments = batch.segments
    if segments is None and sides[0]:
        segments = torch.ones_like(batch.tokens)
    tokens, targets, weights = (F.pad(x, sides) for x in (batch.tokens, batch.targets, batch.weights))
    segments = None if segments is None else F.pad(segments, sides)
    return with_loss_positions(Batch(tokens, targets, weights, segments), batch)


def packing(case: Context) -> CheckResult:
    law, batch = "packing", case.batch
    texts = [] if batch.segments is None else documents(batch.segments)
    if len(texts) == len({row for row, _ in texts}):
        return not_applicable(law, "no row holds more than one document")
    sums: list[Tensor] = []

    def both() -> Iterator[tuple[Tensor, Tensor]]:
        for row, at in texts:
            alone = with_loss_positions(
                Batch(*(x[row, at][None] for x in (batch.tokens, batch.targets, batch.weights))), batch
            )
            sums.append(torch.stack(nll(case.adapted_params, alone)))
            yield hidden(case.adapted_params, alone.tokens)[0], case.h[row, at]

    logit = case.max_logit_diff(both())
    margin = max_or_nan([logit, max_rel_diff(torch.stack(sums).sum(0), torch.stack(nll(case.adapted_params, batch)))])
    return CheckResult(law, f"logits and loss of {len(texts)} documents, each alone", margin, case.rounding)


def batch_composition(case: Context) -> CheckResult:
    """Other rows of the same shape: the same products, so that what is a row's own stays to the bit. This is what finds
    a scale that rows share where activations are rounded, which is not much larger than the rounding.
    """
    law, batch = "batch composition", case.batch
    if case.rows < 2:
        return not_applicable(law, "the batch has one row")
    others = (batch.tokens + 1) % shape(case.params.wte.w)[0]
    first = torch.arange(case.rows, device=others.device)[:, None] == 0
    margins: list[float] = []
    for selected in (first, ~first):
        h = hidden(case.adapted_params, torch.where(selected, batch.tokens, others), batch.segments)
        margins.append(case.max_logit_diff([(case.h[selected[:, 0]], h[selected[:, 0]])]))
    return CheckResult(law, "logits of each row with those beside other rows, bit by bit", max_or_nan(margins))


def size(case: Context) -> CheckResult:
    law, batch = "batch size", case.batch
    if case.rows < 2:
        return not_applicable(law, "the batch has one row")
    each = (slice_batch(batch, slice(i, i + 1)) for i in range(case.rows))
    pairs = ((hidden(case.adapted_params, x.tokens, x.segments)[0], h) for x, h in zip(each, case.h, strict=True))
    return CheckResult(law, f"logits of {case.rows} rows, each alone", case.max_logit_diff(pairs), case.rounding)


def cache(case: Context) -> CheckResult:
    """The batch in chunks of `extend`, and its longest document written as `generate` does, in a room of slots."""
    law, batch, params = "cache", case.batch, case.adapted_params
    seq = int(case.real.sum(-1).max())
    if seq < 2:
        return not_applicable(law, "no row has two tokens")
    first = max(1, seq - STEPS)
    h, kv_cache = forward_with_cache(params, batch.tokens[:, :first], KVCache(), _columns(batch.segments, 0, first))
    chunks = [h]
    for i in range(first, seq):
        h, kv_cache = forward_with_cache(
            params, batch.tokens[:, i : i + 1], kv_cache, _columns(batch.segments, i, i + 1)
        )
        chunks.append(h)
    pairs = zip(case.h[:, :seq], torch.cat(chunks, 1), strict=True)
    margin = max_or_nan([case.max_logit_diff(pairs), generated_tokens(params, longest(case))])
    return CheckResult(law, f"logits of one pass with {seq - first} tokens read one by one", margin, case.rounding)


def _columns(x: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if x is None else x[:, start:end]


def longest(case: Context) -> Tensor:
    """The tokens of the longest document, [1 length]."""
    ids = case.real.long() if case.batch.segments is None else case.batch.segments
    row, at = max(documents(ids), key=lambda x: len(x[1]))
    return case.batch.tokens[row, at][None]


def generated_tokens(params: GPT, tokens: Tensor) -> float:
    """The worst difference between logits of one pass over [1 seq] and of `static_cache.step`, token by token."""
    seq = tokens.shape[1]
    first = max(1, seq - STEPS)
    scores, room = static_cache.prefill(params, tokens[:, :first], None, seq - first)
    steps = [scores, *(static_cache.decode_step(params, tokens[:, i], room) for i in range(first, seq))]
    return max_rel_diff(logits(params, hidden(params, tokens)[0, first - 1 :]), torch.cat(steps))


def merged_forward(case: Context) -> CheckResult:
    """Over whole numbers the limit is twice what expanding the base alone changes: a merged matrix multiplies what it
    is given, they round it, and that is no fault of merging.
    """
    law = "merge"
    if all(isinstance(x, Tensor) for x in case.adapters.values()):
        return not_applicable(
            law, "adapters replace leaves, and none lies over a matrix" if case.adapters else "no adapters"
        )
    onto = ', onto "dequantized"' if case.quantized else ""
    compared = f"logits of the factored reading with those of the merged one{onto}"
    return CheckResult(law, compared, case.merging(case.adapted_params), case.rounding)
