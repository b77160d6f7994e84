"""Requests for log-likelihoods as batches of rows, in which what several requests begin with is read once.

one input begins another          one row serves both: choices of one token, the turns of one conversation
inputs have a common beginning    a group of rows after it: choices of several tokens, examples before a question
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fgpt.errors import InputError
from fgpt.model import Config

Request: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""(context, continuation): the tokens before, one at least, and the tokens to score after them."""
Input: TypeAlias = tuple[int, ...]
"""The tokens that a model reads for a request: context and continuation without its last token, cut to n_ctx."""


@dataclass
class Row:
    """A row of a batch."""

    tokens: Input
    served: list[tuple[int, int]]
    """The requests that it serves: index, and length of the input."""
    first_scored: int
    """The first position with a hidden state that a request reads."""


@dataclass
class Group:
    """Rows that begin alike."""

    rows: list[Row]
    shared: int = 0
    """Tokens that they begin with, and that are read once; 0 of a row by itself."""

    @property
    def longest_end(self) -> int:
        """Tokens of the longest row after the shared ones."""
        return max(len(row.tokens) for row in self.rows) - self.shared


def request_batches(requests: Sequence[Request], batch_size: int, cfg: Config) -> list[list[Group]]:
    """Batches of rows by themselves, and batches of groups or parts of them, each kind with its longest first and the
    parts of a group one after the other. In a batch of groups the longest beginning and the longest end fit into the
    context together.

    Args:
        requests: Pairs of token ids (context, continuation).
        batch_size: Rows in a batch.
        cfg: The model's config.

    Raises:
        InputError: for an empty context, and a continuation that is empty or longer than the model's context.

    >>> choices = [([*range(20)], [choice, 1]) for choice in (5, 6)]
    >>> cfg = Config(n_layer=1, n_head=1, d_model=8, n_ctx=64, vocab_size=30, d_mlp=8)
    >>> [[group]] = request_batches(choices, 8, cfg)
    >>> group.shared, [row.tokens[group.shared :] for row in group.rows]
    (19, [(19, 6), (19, 5)])
    """
    rows = _share_rows(_requests_by_input(requests, cfg.n_ctx), requests)
    alone: list[Group] = []
    shared: list[Group] = []
    for group in _share_beginnings(rows):
        if group.shared and _width(group) <= cfg.cached_context:
            shared.append(group)
        else:
            alone += [Group([row]) for row in group.rows]
    batches = [_batches(shared, batch_size, cfg.cached_context), _batches(alone, batch_size, cfg.n_ctx)]
    batches.sort(key=lambda part: max((_width(group) for group in itertools.chain(*part)), default=0), reverse=True)
    return [batch for part in batches for batch in part]


def _requests_by_input(requests: Sequence[Request], n_ctx: int) -> dict[Input, list[int]]:
    """The indices of requests by model input."""
    by_input: dict[Input, list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= n_ctx:
            raise InputError(
                f"request {i} has {len(context)} tokens of context and {len(continuation)} to score: expected 1 or "
                f"more of context (the beginning-of-sequence token, if nothing else), and 1 to {n_ctx} to score, the "
                "model's context"
            )
        tokens = (*context, *continuation)[:-1][-n_ctx:]
        by_input.setdefault(tokens, []).append(i)
    return by_input


def _share_rows(by_input: dict[Input, list[int]], requests: Sequence[Request]) -> list[Row]:
    """The rows that serve all inputs, in reverse lexicographic order, in which an input comes after those that begin
    with it: it has no row of its own.
    """
    rows: list[Row] = []
    for tokens in sorted(by_input, reverse=True):
        if not rows or rows[-1].tokens[: len(tokens)] != tokens:
            rows.append(Row(tokens, [], len(tokens)))
        row = rows[-1]
        for i in by_input[tokens]:
            row.served.append((i, len(tokens)))
            row.first_scored = min(row.first_scored, len(tokens) - len(requests[i][1]))
    return rows


LEAST_SHARED = 16
"""Tokens that rows begin with, to be read once: for fewer, the call is not worth it."""


def _share_beginnings(rows: Sequence[Row]) -> list[Group]:
    """Rows in lexicographic order as groups of neighbors that begin alike. A row joins the group before it if fewer
    tokens are read then than by itself, a quarter of its own or more. All that is scored is in the ends.
    """
    groups: list[Group] = []
    for row in rows:
        if groups:
            group = groups[-1]
            before = group.shared or group.rows[0].first_scored
            shared = min(before, row.first_scored, _length_of_common(group.rows[0].tokens, row.tokens))
            saved = shared - (len(group.rows) - 1) * (before - shared)
            if shared >= LEAST_SHARED and 4 * saved >= len(row.tokens):
                group.rows.append(row)
                group.shared = shared
                continue
        groups.append(Group([row]))
    return groups


def _length_of_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _batches(groups: Sequence[Group], batch_size: int, context: int) -> list[list[Group]]:
    """Rows in batches, the longest first; those of a group follow one another."""
    batches: list[list[Group]] = []
    last, count = None, batch_size
    for group in sorted(groups, key=_width, reverse=True):
        for row in sorted(group.rows, key=lambda row: len(row.tokens), reverse=True):
            one = Group([row], group.shared)
            if count == batch_size or not _fits_beside(one, batches[-1], context):
                batches.append([])
                last, count = None, 0
            if group is last:
                batches[-1][-1].rows.append(row)
            else:
                batches[-1].append(one)
            last, count = group, count + 1
    return batches


def _width(group: Group) -> int:
    """Tokens of the longest row."""
    return group.shared + group.longest_end


def _fits_beside(group: Group, batch: Sequence[Group], context: int) -> bool:
    """Whether the padded rows of a batch have room for those of a group."""
    together = [*batch, group]
    return max(x.shared for x in together) + max(x.longest_end for x in together) <= context
