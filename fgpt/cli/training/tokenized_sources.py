"""Sources as tokens: from the cache, or read and tokenized by several processes and put there."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fgpt.cli.cache import cache_folder, lock, remove_unused
from fgpt.cli.console import console, show_progress
from fgpt.cli.training.row_passages import RowPassages
from fgpt.cli.training.token_cache import TokenizedSource, cache_key, read_cached, write_cached
from fgpt.data.example_store import StoredRows
from fgpt.data.instruction_datasets import Columns, LocatedSource, RowStream, locate_source
from fgpt.data.rows import InstructionRow
from fgpt.data.tokenization import Encoding, RowChunk, Tokenized
from fgpt.data.tokenization_pool import MAX_PROCESSES, num_cores, tokenize_in_order
from fgpt.errors import InputError

MIN_BYTES = 4_000_000
"""Bytes of a source from which on it is tokenized by several processes and cached: one second of work in one."""
TOKENS = "tokens"
"""The kind of what is cached."""
CHUNK_ROWS = 1000
"""Rows that are handed to a process at a time."""


def cache_place(
    source: str, files: Sequence[Path], columns: Columns | None, encoding: Encoding, tokenizer: Sequence[str | bytes]
) -> tuple[Path, str] | None:
    """The folder and the key of a source's tokens; None if it is too small for a cache.

    Args: as for `cache_key`.
    """
    if sum(path.stat().st_size for path in files) < MIN_BYTES:
        return None
    key = cache_key(source, files, columns, encoding, tokenizer)
    return cache_folder(TOKENS) / key, key


def tokenized_source(
    source: str,
    columns: Columns | None,
    encoding: Encoding,
    tokenizer: Sequence[str | bytes],
    passages: RowPassages | None = None,
) -> TokenizedSource:
    """The tokens and rows of a source. Of a large one it is printed how they were made, or that they were cached.

    Args: as for `cache_key`; `passages` are put into the rows, and what they follow from is in `tokenizer`.

    Raises:
        InputError: as `RowStream` and `tokenize` do.
    """
    located = locate_source(source)
    place = cache_place(source, located.files.files, columns, encoding, tokenizer)
    if place is None:
        return _Work(source, located, columns, encoding, 0, passages).in_memory()
    folder, key = place
    processes = num_cores() if num_cores() > 1 else 0
    work = _Work(source, located, columns, encoding, min(processes, MAX_PROCESSES), passages)
    try:
        with lock(folder):
            if (cached := read_cached(folder, key, encoding.max_seq_len)) is not None:
                rows, tokens = _count(cached)
                console.print(f"{source}: {rows:,} rows, {tokens:,} tokens from the cache", soft_wrap=True)
                return cached
            tokenized = write_cached(folder, key, work.results(), work.stream, encoding.max_seq_len)
        remove_unused(TOKENS)
    except (InputError, OSError) as err:
        if err is work.failure:
            raise
        console.print(f"tokens are not cached, but kept in memory: {err}", soft_wrap=True)
        work = _Work(source, located, columns, encoding, work.num_processes, passages)
        tokenized = work.in_memory()
    rows, tokens = _count(tokenized)
    speed = f"{work.num_bytes / 1e6 / work.seconds:.1f} MB of text per second"
    console.print(f"{source}: tokenized {rows:,} rows, {tokens:,} tokens, {speed}", soft_wrap=True)
    return tokenized


class RowSource(NamedTuple):
    """The rows of a source, its format, and what of it is not trained on."""

    rows: Sequence[InstructionRow]
    format: str
    left_out: Counter[str]


def stored_rows(
    source: str,
    columns: Columns | None,
    encoding: Encoding,
    tokenizer: Sequence[str | bytes],
    passages: RowPassages | None = None,
) -> RowSource:
    """The rows of a source, from the cache if they are there. Else they are read and not tokenized, and pages of FinQA
    are complete.

    Args: as for `tokenized_source`.

    Raises:
        InputError: as `RowStream` does.
    """
    located = locate_source(source)
    place = cache_place(source, located.files.files, columns, encoding, tokenizer)
    if place is not None and (cached := read_cached(*place, encoding.max_seq_len)) is not None:
        return RowSource(StoredRows(cached.rows), cached.format, cached.left_out)
    stream = RowStream(source, columns, located=located)
    rows = list(stream)
    rows = rows if passages is None else passages(rows)
    return RowSource(rows, stream.format, +stream.left_out)


def _count(source: TokenizedSource) -> tuple[int, int]:
    """Rows and tokens."""
    tokens = sum(len(batch["tokens"].values) for batch in source.examples)
    return sum(batch.num_rows for batch in source.rows), tokens


class _Work:
    """The reading and tokenization of one source."""

    def __init__(
        self,
        source: str,
        located: LocatedSource,
        columns: Columns | None,
        encoding: Encoding,
        num_processes: int,
        passages: RowPassages | None,
    ) -> None:
        self.source, self.encoding, self.num_processes, self.passages = source, encoding, num_processes, passages
        self.stream = RowStream(source, columns, located=located)
        self.num_bytes, self.seconds = 0, 0.0
        self.failure: Exception | None = None
        """The error of a row, and not of the place where tokens are put."""

    def results(self) -> Iterator[Tokenized]:
        """What is made of the rows, in their order."""
        begin = time.perf_counter()
        try:
            with show_progress(f"tokenizing {self.source}"):
                for result in tokenize_in_order(self.chunks(), self.encoding, self.num_processes):
                    self.num_bytes += result.num_bytes
                    yield result
        except Exception as err:
            self.failure = err
            raise
        self.seconds = time.perf_counter() - begin

    def in_memory(self) -> TokenizedSource:
        source = TokenizedSource()
        for result in self.results():
            source.examples.append(result.examples)
            source.rows.append(result.rows)
            source.counts += result.counts
        source.left_out, source.format = +self.stream.left_out, self.stream.format
        return source

    def chunks(self) -> Iterator[RowChunk]:
        """The rows, read."""
        rows: list[InstructionRow] = []
        first = 0
        for row in self.stream:
            if len(rows) == CHUNK_ROWS:
                yield self.chunk(first, rows)
                first, rows = first + len(rows), []
            rows.append(row)
        yield self.chunk(first, rows)

    def chunk(self, first: int, rows: list[InstructionRow]) -> RowChunk:
        """Rows from number `first` on, with their passages."""
        return RowChunk(first, rows if self.passages is None else self.passages(rows))
