"""Rows of a dataset on the hub that are read over the network as they are asked for: nothing of it is kept on disk."""

from collections.abc import Iterator, Sequence
from typing import Any

from fgpt.data.hub_repos import check_repo
from fgpt.data.records import Record
from fgpt.data.source_syntax import Source
from fgpt.data.splits import SplitPart
from fgpt.errors import InputError, one_line


def stream_records(
    source: Source, parts: Sequence[SplitPart], *, repo: str, split: str, files: str | None = None
) -> Iterator[Record]:
    """The records of the parts, one after the other, by the streaming of the library `datasets`.

    Args:
        source: What the user wrote, with configuration and revision.
        parts: Splits and slices. Bounds are counted from the beginning.
        repo: owner/name.
        split: The split of parts that name none.
        files: A pattern of the files to read; by default those of the configuration.

    Raises:
        InputError: at once, if the hub has no such dataset, configuration or split, or cannot be reached, and for
            bounds that need the number of rows; from the iterator, if the connection is lost.
    """
    for part in parts:
        if part.needs_count:
            raise InputError(
                f"{source}: a stream's rows are not counted: give bounds from its beginning, as in [:1000]"
            )
    check_repo(repo, source.revision)  # the library tries for half a minute
    tables = [_open(source, repo, part.name or split, files) for part in parts]
    return _records(source, tables, parts)


def _open(source: Source, repo: str, split: str, files: str | None) -> Any:
    import datasets  # imported here because it is slow to import

    try:
        return datasets.load_dataset(
            repo, source.config, data_files=files, split=split, revision=source.revision, streaming=True
        )
    except Exception as err:  # the library raises whatever its parts raise
        raise _error(source, err) from None


def _records(source: Source, tables: Sequence[Any], parts: Sequence[SplitPart]) -> Iterator[Record]:
    for table, part in zip(tables, parts, strict=True):
        rows = part.select(lambda table=table: enumerate(table, 1))
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                break
            except Exception as err:
                raise _error(source, err) from None
            yield f"row {number}", row


def _error(source: Source, err: Exception) -> InputError:
    return InputError(
        f"{source} cannot be streamed ({one_line(err)[:200]}): check name, configuration, split and connection"
    )
