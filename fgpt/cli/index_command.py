"""`fgpt index FOLDER`: the texts and PDFs of a folder as an index, from which passages enter prompts.

An index of the same folder is brought up to date: files that have not changed are neither read nor embedded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fgpt.cli.console import console, show_progress
from fgpt.cli.devices import resolve_device
from fgpt.errors import InputError, printable
from fgpt.extras import require_extra
from fgpt.ranges import NonNegativeInt, Range
from fgpt.retrieval.embedder import MINILM, load_embedder
from fgpt.retrieval.index import Chunking, DocumentIndex
from fgpt.retrieval.index_updates import Changes, find_changes, write_index

PRINTED = 10
"""Files without text that are named."""


@dataclass(frozen=True)
class IndexOptions:
    """Index a folder of texts, Markdown and PDFs, for `--documents`."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """The folder; files are read at any depth, hidden ones not."""
    out: Path | None = None
    """Where the index is written; None takes FOLDER.index in the current folder."""
    embedder: str = MINILM
    """An encoder of BERT's with mean pooling: a name on the Hugging Face Hub, or a local folder."""
    chunk_size: Annotated[int, Range(least=16, most=2**16)] = Chunking.size
    """Tokens of the embedder in a chunk, at most."""
    chunk_overlap: NonNegativeInt = Chunking.overlap
    """Tokens that a chunk shares with the one before it, at most."""
    device: str = "auto"
    """Where texts are embedded: cpu, cuda, or auto."""


def run(options: IndexOptions) -> None:
    """Make the index of a folder, or bring it up to date, and print what was done.

    Raises InputError for bad input, before anything is embedded where that can be known.
    """
    require_extra("retrieval", "indexes of documents", "lancedb", "pypdf")
    if options.chunk_overlap >= options.chunk_size:
        raise InputError(
            f"--chunk-overlap is {options.chunk_overlap}: expected less than --chunk-size, {options.chunk_size}"
        )
    out = Path(f"{options.folder.resolve().name}.index") if options.out is None else options.out
    embedder = load_embedder(options.embedder, device=resolve_device(options.device))
    chunking = Chunking(options.chunk_size, options.chunk_overlap)
    changes = find_changes(options.folder, out, embedder=embedder, chunking=chunking)
    if changes.old_index is not None and changes.are_none:
        console.print(f"{out}: up to date, {_size(changes.old_index)}", soft_wrap=True)
        _report_problems(changes.old_index, changes)
        return
    with show_progress(f"indexing {options.folder}", len(changes.new)) as advance:
        index = write_index(options.folder, out, changes, embedder=embedder, chunking=chunking, advance=advance)
    console.print(f"{out}: {_size(index)}; {_describe(changes)}", soft_wrap=True)
    _report_problems(index, changes)
    console.print(f'its passages help to answer: fgpt generate RUN "QUESTION" --documents {out}', soft_wrap=True)


def _size(index: DocumentIndex) -> str:
    return f"{len(index.files):,} files, {index.num_chunks:,} chunks"


def _describe(changes: Changes) -> str:
    unchanged = len(changes.hashes) - len(changes.new)
    return f"{len(changes.new):,} read, {unchanged:,} unchanged, {len(changes.removed):,} removed"


def _report_problems(index: DocumentIndex, changes: Changes) -> None:
    """Print which files have no chunks, and what was passed over."""
    problems = {name: file.problem for name, file in index.files.items() if file.problem}
    if problems:
        console.print(f"not in the index: {len(problems):,} that could not be read or have no text")
        for name, problem in list(problems.items())[:PRINTED]:
            console.print(f"  {printable(name)}: {problem}", soft_wrap=True)
        if len(problems) > PRINTED:
            console.print(f"  and {len(problems) - PRINTED:,} more")
    if changes.ignored:
        kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in changes.ignored.most_common(5))
        console.print(f"passed over, of other kinds: {sum(changes.ignored.values()):,} ({kinds})", soft_wrap=True)
