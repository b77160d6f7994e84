"""The index of a folder: made, and brought up to date.

A folder that is indexed again is compared by the hashes of its files. The new index is written beside the old one, with
the chunks of files that have not changed as they are, and takes its place when it is whole.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fgpt.errors import InputError
from fgpt.io.files import atomic_dir, remove_leftovers, write_json
from fgpt.retrieval.chunking import chunks
from fgpt.retrieval.embedder import Embedder
from fgpt.retrieval.index import (
    FIELDS,
    FORMAT,
    MANIFEST,
    TABLE,
    Chunking,
    DocumentIndex,
    IndexedFile,
    Passage,
    connect,
    open_index,
)
from fgpt.retrieval.pages import is_document, read_pages

if TYPE_CHECKING:
    import pyarrow

GROUP = 1024
"""Chunks that are embedded and written together."""
VECTOR_INDEX_FROM = 20_000
"""Chunks from which on vectors are searched by an index: comparing a question with all takes 1 us of CPU for each."""


class Changes(NamedTuple):
    """What of a folder is not as its index says."""

    hashes: dict[str, str]
    """Of all documents, by their path in the folder."""
    new: list[str]
    """Documents that are new, or have changed."""
    removed: list[str]
    ignored: Counter[str]
    """Other files, by the ends of their names."""
    old_index: DocumentIndex | None
    """The index, if its chunks can be kept."""

    @property
    def are_none(self) -> bool:
        return self.old_index is not None and not self.new and not self.removed


def find_changes(folder: Path, out: Path, *, embedder: Embedder, chunking: Chunking) -> Changes:
    """Compare a folder with its index, if there is one. One whose texts are cut otherwise is made anew.

    Raises:
        InputError: for a folder without documents, an index by another embedder, a place that is taken by something
            else, and chunks that the embedder cannot read as a whole.
    """
    if not 2 <= chunking.size <= embedder.max_tokens or not 0 <= chunking.overlap < chunking.size:
        raise InputError(
            f"chunk_size is {chunking.size} and chunk_overlap {chunking.overlap}: expected at most "
            f"{embedder.max_tokens} tokens, which {embedder.name} reads, and an overlap below the size"
        )
    if not folder.is_dir():
        problem = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {problem}; expected a folder of text, Markdown and PDF files")
    remove_leftovers(out.absolute().parent, out.name)
    index = _index_to_update(out, embedder, chunking)
    documents, ignored = _documents(folder, out)
    if not documents:
        raise InputError(f"{folder} holds no documents: expected .txt, .md, .rst or .pdf{_of_others(ignored)}")
    hashes = {name: _file_hash(folder / name) for name in documents}
    before = {} if index is None else index.files
    new = [name for name in documents if name not in before or before[name].hash != hashes[name]]
    return Changes(hashes, new, [name for name in before if name not in hashes], ignored, index)


def _index_to_update(out: Path, embedder: Embedder, chunking: Chunking) -> DocumentIndex | None:
    if (out / MANIFEST).is_file():
        index = open_index(out)
        index.check_embedder(embedder)
        return index if index.chunking == chunking else None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no index of documents: give another place")
    return None


def _documents(folder: Path, out: Path) -> tuple[list[str], Counter[str]]:
    """The paths of the documents in a folder, and the ends of the names of its other files. Hidden files, and indexes,
    are passed over.
    """
    names: list[str] = []
    ignored = Counter[str]()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file() or out.resolve() in path.resolve().parents:
            continue
        if is_document(path):
            names.append(inside.as_posix())
        else:
            ignored[path.suffix.lower() or path.name] += 1
    return names, ignored


def _of_others(ignored: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(3))
    return f"; there are {kinds}" if kinds else ""


def _file_hash(path: Path) -> str:
    """SHA-256; "" for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def write_index(
    folder: Path,
    out: Path,
    changes: Changes,
    *,
    embedder: Embedder,
    chunking: Chunking,
    advance: Callable[[int], None] = lambda n: None,
) -> DocumentIndex:
    """Write the index of a folder to `out`: as a whole, or if something fails, not at all.

    Args:
        folder: The folder.
        out: Where; an index there is replaced.
        changes: Those of `find_changes`.
        embedder: The embedder.
        chunking: How texts are cut.
        advance: Is called with the number of new files that were done since its last call.

    Raises:
        InputError: if no document has text, or the disk is full.
    """
    before = {} if changes.old_index is None else changes.old_index.files
    files = {name: file for name, file in before.items() if name in changes.hashes and name not in changes.new}
    with atomic_dir(out) as partial:
        table = connect(partial).create_table(TABLE, schema=schema(embedder.width))
        if changes.old_index is not None:
            for batch in _rows_of(changes.old_index, list(files)):
                table.add(batch)
        pending: list[Passage] = []
        for name in changes.new:
            try:
                passages, problem = _cut(folder, name, embedder, chunking), ""
            except InputError as err:
                passages, problem = [], str(err).removeprefix(f"{folder / name}: ")
            files[name] = IndexedFile(changes.hashes[name], len(passages), problem)
            pending += passages
            while len(pending) >= GROUP:
                table.add(_embed(pending[:GROUP], embedder))
                pending = pending[GROUP:]
            advance(1)
        if pending:
            table.add(_embed(pending, embedder))
        if not table.count_rows():
            reasons = "; ".join(f"{name}: {file.problem}" for name, file in list(files.items())[:3])
            raise InputError(f"{folder} holds no document with text: {reasons}")
        create_indexes(table)
        manifest = {
            "format": FORMAT,
            "embedder": embedder.name,
            "embedder_hash": embedder.hash,
            "chunking": asdict(chunking),
            "files": {name: files[name]._asdict() for name in sorted(files)},
        }
        write_json(partial / MANIFEST, manifest)
    return open_index(out)


def _cut(folder: Path, name: str, embedder: Embedder, chunking: Chunking) -> list[Passage]:
    """The passages of a document, without white space around them."""
    pages = read_pages(folder / name)
    passages: list[Passage] = []
    for page, tokens in zip(pages, embedder.token_offsets([page.text for page in pages]), strict=True):
        for start, stop in chunks(page.text, tokens, size=chunking.size, overlap=chunking.overlap):
            text = page.text[start:stop]
            passages.append(Passage(name, page.number, start + len(text) - len(text.lstrip()), text.strip()))
    return passages


def schema(width: int) -> "pyarrow.Schema":
    """The columns of a table of chunks, whose vectors have `width` elements."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("source", pa.string()),
            pa.field("page", pa.int32()),
            pa.field("start", pa.int64()),
            pa.field("text", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), width)),
        ]
    )


def rows(passages: Sequence[Passage], vectors: Float[Tensor, "passage d"]) -> "pyarrow.Table":
    """Passages with their vectors, as they are in the table of an index."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: [getattr(passage, name) for passage in passages] for name in FIELDS}
    width = vectors.shape[1]
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), width)
    return pa.table(columns, schema=schema(width))


def _embed(passages: Sequence[Passage], embedder: Embedder) -> "pyarrow.Table":
    return rows(passages, embedder.embed([passage.text for passage in passages]))


def _rows_of(index: DocumentIndex, names: Sequence[str]) -> "Iterator[pyarrow.Table]":
    """The rows of some files of an index, as they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in index.table.search().select([*FIELDS, "vector"]).to_batches(batch_size=GROUP):
        table = pa.Table.from_batches([batch])
        unchanged = table.filter(pc.is_in(table["source"], pa.array(names, pa.string())))  # pyright: ignore
        if len(unchanged):
            yield unchanged


def create_indexes(table: Any) -> None:
    """Make the full-text index, and of many chunks one of the vectors."""
    from lancedb.index import FTS, IvfSq

    table.create_index("text", config=FTS())
    if table.count_rows() >= VECTOR_INDEX_FROM:
        table.create_index("vector", config=IvfSq(distance_type="cosine"))
