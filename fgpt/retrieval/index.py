"""An index of documents: a folder with a LanceDB table of chunks and a manifest.

INDEX/index.json       the embedder, how texts are cut, and the SHA-256 of each file
INDEX/chunks.lance     of each chunk its file, page, first character, text and vector, and their indexes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fgpt._typing import StrPath
from fgpt.errors import InputError, one_line, short_repr
from fgpt.extras import require_extra
from fgpt.io.files import read_json
from fgpt.library_errors import call
from fgpt.retrieval.embedder import Embedder

MANIFEST, TABLE = "index.json", "chunks"
FORMAT = 1
FIELDS = ("source", "page", "start", "text")
"""What a row has besides its vector."""


@dataclass(frozen=True)
class Chunking:
    """How texts are cut."""

    size: int = 200
    """Tokens of the embedder in a chunk, at most."""
    overlap: int = 40
    """Tokens that neighbors share, at most."""


@dataclass(frozen=True)
class Passage:
    """A chunk of a document."""

    source: str
    """The file, relative to the folder that was indexed."""
    page: int
    """From 1; 0 if the file has no pages."""
    start: int
    """Its first character in the page."""
    text: str

    @property
    def where(self) -> str:
        """The file, and the page if it has pages.

        >>> Passage("report.pdf", 3, 0, "Rain.").where
        'report.pdf, page 3'
        """
        return f"{self.source}, page {self.page}" if self.page else self.source


class IndexedFile(NamedTuple):
    """What the manifest says of a file."""

    hash: str
    num_chunks: int
    problem: str = ""
    """Why it has no chunks."""


@dataclass(frozen=True)
class DocumentIndex:
    """An index that is open."""

    folder: Path
    embedder: str
    embedder_hash: str
    chunking: Chunking
    files: dict[str, IndexedFile]
    table: Any

    @property
    def num_chunks(self) -> int:
        return sum(file.num_chunks for file in self.files.values())

    def check_embedder(self, embedder: Embedder) -> None:
        """Raises InputError if the vectors are those of another embedder."""
        if embedder.hash != self.embedder_hash:
            raise InputError(
                f"{self.folder} was made by the embedder {self.embedder}, of which {embedder.name} is no copy: use "
                "that one, or make another index"
            )


def open_index(folder: StrPath) -> DocumentIndex:
    """Open an index.

    Raises:
        InputError: if there is none, or it is damaged, or of another version.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no index of documents; expected a folder with {MANIFEST} and {TABLE}.lance")
    manifest = read_json(folder / MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder} is of format {short_repr(manifest['format'])}, not {FORMAT}: make it again")
        files = {name: IndexedFile(**file) for name, file in manifest["files"].items()}
        table = call(f"{folder}: damaged, make the index again", lambda: connect(folder).open_table(TABLE))
        chunking = Chunking(**manifest["chunking"])
        return DocumentIndex(folder, manifest["embedder"], manifest["embedder_hash"], chunking, files, table)
    except (KeyError, TypeError, AttributeError) as err:
        raise InputError(f"{folder / MANIFEST}: damaged ({one_line(repr(err))}): make the index again") from None


def connect(folder: Path) -> Any:
    """The LanceDB database of a folder. Raises InputError if LanceDB is not installed."""
    require_extra("retrieval", "indexes of documents", "lancedb")
    import lancedb

    return lancedb.connect(str(folder))
