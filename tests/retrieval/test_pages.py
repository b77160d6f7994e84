"""The text of documents, and files that have none."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from builders.retrieval import write_pdf

import fgpt
from fgpt.retrieval.pages import Page, is_document, read_pages

pypdf: Any = pytest.importorskip("pypdf")


def test_texts_are_one_page(tmp_path: Path):
    (tmp_path / "a.md").write_bytes("\ufeff# Über\n\nRain.".encode())
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress(b"Snow."))
    assert read_pages(tmp_path / "a.md") == [Page("# Über\n\nRain.", 0)]
    assert is_document(tmp_path / "b.TXT.gz")
    assert read_pages(tmp_path / "b.TXT.gz") == [Page("Snow.", 0)]


def test_the_pages_of_a_pdf_that_have_text_keep_their_numbers(tmp_path: Path):
    path = write_pdf(tmp_path / "a.PDF", "First page.", "", "Third page.")
    assert is_document(path)
    assert [(page.text.strip(), page.number) for page in read_pages(path)] == [("First page.", 1), ("Third page.", 3)]


def encrypted(path: Path, password: str, algorithm: str = "RC4-128") -> Path:
    writer = pypdf.PdfWriter(clone_from=write_pdf(path, "Secret."))
    writer.encrypt(password, owner_password="owner", algorithm=algorithm)
    writer.write(path)
    return path


def test_a_pdf_that_anybody_may_open_is_read(tmp_path: Path):
    (page,) = read_pages(encrypted(tmp_path / "a.pdf", ""))
    assert page.text.strip() == "Secret."


def test_files_without_a_text(tmp_path: Path):
    encrypted(tmp_path / "locked.pdf", "word")
    write_pdf(tmp_path / "blank.pdf", "", "")
    (tmp_path / "cut.pdf").write_bytes(write_pdf(tmp_path / "whole.pdf", "Text.").read_bytes()[:60])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "damaged.txt.gz").write_bytes(gzip.compress(b"Snow. " * 99)[:-9])
    messages = {
        "locked.pdf": "it is encrypted: save a copy of it without a password",
        "blank.pdf": r"it holds no text \(its pages may be pictures\)",
        "cut.pdf": "not a PDF that can be read",
        "latin.txt": "not UTF-8 text",
        "empty.md": "it holds no text: leave it out",
        "damaged.txt.gz": "damaged, or not compressed as its name says",
        "missing.txt": "cannot be read: No such file",
    }
    for name, message in messages.items():
        with pytest.raises(fgpt.InputError, match=f"{name}: {message}") as error:
            read_pages(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1
