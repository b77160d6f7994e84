"""The text of documents: plain text, Markdown and PDF, page by page."""

import logging
from pathlib import Path
from typing import NamedTuple

from fgpt.data.text_files import file_format, open_text, read_errors
from fgpt.errors import InputError, one_line
from fgpt.extras import require_extra

TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
PDF = ".pdf"


class Page(NamedTuple):
    """A part of a document whose chunks are its own."""

    text: str
    number: int = 0
    """From 1; 0 if the document has no pages."""


def is_document(path: Path) -> bool:
    """Whether a file is read, by the end of its name; texts may be compressed.

    >>> is_document(Path("a.md")), is_document(Path("a.txt.gz")), is_document(Path("a.png"))
    (True, True, False)
    """
    return file_format(path) in TEXTS or path.suffix.lower() == PDF


def read_pages(path: Path) -> list[Page]:
    """The pages of a document that have text; of a text file one.

    Raises:
        InputError: if it cannot be read, is encrypted, or has no text.
    """
    if path.suffix.lower() == PDF:
        pages = _pdf_pages(path)
    else:
        with read_errors(path), open_text(path) as file:
            pages = [Page(file.read())]
    pages = [page for page in pages if page.text.strip()]
    if not pages:
        what = "no text (its pages may be pictures)" if path.suffix.lower() == PDF else "no text"
        raise InputError(f"{path}: it holds {what}: leave it out, or give its text as a file")
    return pages


def _pdf_pages(path: Path) -> list[Page]:
    require_extra("retrieval", "PDF files", "pypdf")
    import pypdf
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of each fault that it could repair
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{path}: it is encrypted: save a copy of it without a password")
        return [Page(page.extract_text(), number) for number, page in enumerate(reader.pages, 1)]
    except InputError:
        raise
    except DependencyError as err:
        raise InputError(f"{path}: it is encrypted ({one_line(err)}): save a copy of it without a password") from None
    except Exception as err:  # whatever a damaged file makes of the library
        raise InputError(f"{path}: not a PDF that can be read: {one_line(err)[:200]}") from None
