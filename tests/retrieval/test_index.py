"""Indexes of real files in LanceDB: what is found in them, brought up to date, and never half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.retrieval import save_embedder, write_pdf
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.retrieval import index_updates
from fgpt.retrieval.embedder import Embedder, load_embedder
from fgpt.retrieval.index import Chunking, DocumentIndex, Passage, open_index
from fgpt.retrieval.index_updates import find_changes, write_index
from fgpt.retrieval.pages import read_pages
from fgpt.retrieval.ranking import fuse_rankings, nearest, search

pytest.importorskip("lancedb")
CHUNKING = Chunking(size=24, overlap=8)
ANIMALS = ("fox", "bear", "owl", "hare", "wolf", "lynx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts in two folders, a PDF, and files that are no documents."""
    folder = tmp_path / "documents"
    (folder / "deep").mkdir(parents=True)
    for i, animal in enumerate(ANIMALS):
        lines = [f"The {animal} of hill {i}{j} eats berry {j}." for j in range(8)]
        (folder / "deep" / f"{animal}.md").write_text("\n\n".join(lines))
    write_pdf(folder / "report.pdf", "Rain fell in March.", "Snow fell in April.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.md").write_text("Secret.")
    return folder


@pytest.fixture
def build(embedder: Embedder, folder: Path, tmp_path: Path) -> Callable[..., DocumentIndex]:
    def build(chunking: Chunking = CHUNKING, **options: Any) -> DocumentIndex:
        out = tmp_path / "index"
        changes = find_changes(folder, out, embedder=embedder, chunking=chunking)
        return write_index(folder, out, changes, embedder=embedder, chunking=chunking, **options)

    return build


def contents(index: DocumentIndex) -> dict[tuple[str, int, int], tuple[str, tuple[float, ...]]]:
    """Text and vector of each chunk."""
    return {
        (row["source"], row["page"], row["start"]): (row["text"], tuple(row["vector"]))
        for row in index.table.to_arrow().to_pylist()
    }


def test_each_chunk_stands_where_its_row_says(build: Callable[..., DocumentIndex], folder: Path, embedder: Embedder):
    index = build()
    rows = contents(index)
    assert len(rows) == index.num_chunks == sum(file.num_chunks for file in index.files.values())
    assert index.files.keys() == {f"deep/{animal}.md" for animal in ANIMALS} | {"report.pdf"}
    for (source, page, start), (text, vector) in rows.items():
        whole = {each.number: each.text for each in read_pages(folder / source)}[page]
        assert whole[start : start + len(text)] == text == text.strip()
        np.testing.assert_allclose(vector, embedder.embed([text])[0], atol=1e-5)
    for animal in ANIMALS:
        text = (folder / "deep" / f"{animal}.md").read_text()
        covered = {
            i for (source, _, at), (part, _) in rows.items() if animal in source for i in range(at, at + len(part))
        }
        assert not "".join(char for i, char in enumerate(text) if i not in covered).strip()
    assert {page for source, page, _ in rows if source == "report.pdf"} == {1, 2}


def test_dense_search_is_that_of_all_cosines(build: Callable[..., DocumentIndex], embedder: Embedder):
    index = build()
    rows = contents(index)
    query = embedder.embed(["the owl and the berry"])[0].numpy()
    order = sorted(rows, key=lambda at: -float(np.dot(rows[at][1], query)))
    passages = search(index, embedder, "the owl and the berry", count=5, method="dense")
    assert [(passage.source, passage.page, passage.start) for passage in passages] == order[:5]


def test_bm25_finds_the_rare_words(build: Callable[..., DocumentIndex], embedder: Embedder):
    index = build()
    (best, *_) = search(index, embedder, "which lynx is it on hill 53", count=3, method="bm25")
    assert best.source == "deep/lynx.md"
    assert "hill 53" in best.text
    (best, *_) = search(index, embedder, "Snowfall or snow?", count=3, method="bm25")
    assert best.where == "report.pdf, page 2"
    for question in ("", "the of", "?!", "zebra"):
        assert search(index, embedder, question, count=3, method="bm25") == []
        assert len(search(index, embedder, question, count=3)) == 3  # by the embedding
    assert search(index, embedder, 'a AND ("b" OR \ud800', count=1)


def test_hybrid_search_is_the_fusion_of_both(build: Callable[..., DocumentIndex], embedder: Embedder):
    index = build()
    question = "owl on hill 25"
    rankings = [search(index, embedder, question, count=50, method=method) for method in ("dense", "bm25")]
    scores: dict[Passage, float] = {}
    for passage in {*rankings[0], *rankings[1]}:
        ranks = [ranking.index(passage) + 1 for ranking in rankings if passage in ranking]
        scores[passage] = sum(1 / (60 + rank) for rank in ranks)
    passages = search(index, embedder, question, count=6)
    assert len(passages) == 6
    assert [scores[passage] for passage in passages] == pytest.approx(sorted(scores.values(), reverse=True)[:6])


@given(st.permutations("abcdef"), st.permutations("abcdef"), st.integers(0, 6))
def test_the_fusion_keeps_what_both_rankings_agree_on(first: list[str], second: list[str], length: int):
    rankings = [[Passage(name, 0, 0, "") for name in names] for names in (first, second[:length])]
    names = [passage.source for passage in fuse_rankings(rankings)]
    assert sorted(names) == sorted(first)
    for a in first:
        for b in first:
            in_second = second[:length]
            before = a in in_second and (b not in in_second or in_second.index(a) < in_second.index(b))
            if first.index(a) < first.index(b) and before:
                assert names.index(a) < names.index(b)


def test_an_index_of_vectors_finds_what_all_comparisons_find(
    build: Callable[..., DocumentIndex], embedder: Embedder, monkeypatch: pytest.MonkeyPatch, folder: Path
):
    (folder / "many.txt").write_text(
        "\n\n".join(f"Note {i}: {ANIMALS[i % 6]} number {i * 7919 % 997}." for i in range(400))
    )
    monkeypatch.setattr(index_updates, "VECTOR_INDEX_FROM", 300)
    index = build()
    assert {each.index_type for each in index.table.list_indices()} == {"FTS", "IvfSq"}
    shared = 0
    for i in range(10):
        vector = embedder.embed([f"number {i} fox"])[0].tolist()
        exact = nearest(index.table, vector, 10, exact=True)
        shared += len({*exact} & {*nearest(index.table, vector, 10)})
    assert shared >= 90


def test_what_has_not_changed_is_not_done_again(
    build: Callable[..., DocumentIndex],
    folder: Path,
    tmp_path: Path,
    embedder: Embedder,
    monkeypatch: pytest.MonkeyPatch,
):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    first = contents(build())
    changes = find_changes(folder, tmp_path / "index", embedder=embedder, chunking=CHUNKING)
    assert changes.are_none
    assert changes.ignored == {".png": 1}
    (folder / "deep" / "fox.md").write_text("The fox has moved to hill 99.")
    (folder / "deep" / "owl.md").unlink()
    (folder / "new.rst").write_text("A zebra came.")
    embedded: list[str] = []
    monkeypatch.setattr(
        Embedder, "embed", lambda self, texts, embed=Embedder.embed: (embedded.extend(texts), embed(self, texts))[1]
    )
    index = build()
    assert sorted(embedded) == ["A zebra came.", "The fox has moved to hill 99."]
    second = contents(index)
    assert {at: row for at, row in second.items() if at[0] not in ("deep/fox.md", "new.rst")} == {
        at: row for at, row in first.items() if at[0] not in ("deep/fox.md", "deep/owl.md")
    }
    assert search(index, embedder, "zebra", count=1, method="bm25")[0].source == "new.rst"
    assert search(index, embedder, "owl", count=1, method="bm25") == []
    assert "UTF-8" in index.files["latin.txt"].problem
    build(Chunking(size=30, overlap=0))  # is cut otherwise: made anew
    assert len(embedded) > 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_index_leaves_the_old_one(
    build: Callable[..., DocumentIndex], folder: Path, tmp_path: Path, embedder: Embedder, error: Any
):
    first = contents(build())
    (folder / "new.rst").write_text("A zebra came.")

    def fail(n: int) -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, fgpt.InputError)):
        build(advance=fail)
    assert contents(open_index(tmp_path / "index")) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents", "index"]
    shutil.rmtree(tmp_path / "index")
    with pytest.raises((KeyboardInterrupt, fgpt.InputError)):
        build(advance=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


def test_bad_input(build: Callable[..., DocumentIndex], folder: Path, tmp_path: Path, embedder: Embedder):
    out = tmp_path / "index"

    def refused(message: str, folder: Path, out: Path, embedder: Embedder, chunking: Chunking) -> None:
        with pytest.raises(fgpt.InputError, match=message) as error:
            find_changes(folder, out, embedder=embedder, chunking=chunking)
        assert len(str(error.value).splitlines()) == 1

    refused("expected at most 126 tokens", folder, out, embedder, Chunking(127, 0))
    refused("an overlap below the size", folder, out, embedder, Chunking(20, 20))
    refused("no such folder", tmp_path / "missing", out, embedder, CHUNKING)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    refused(
        "holds no documents: expected .txt, .md, .rst or .pdf; there are 1 .png",
        tmp_path / "pictures",
        out,
        embedder,
        CHUNKING,
    )
    refused("exists and is no index of documents", folder, tmp_path / "pictures", embedder, CHUNKING)
    (tmp_path / "pictures" / "blank.md").write_text("\n")
    changes = find_changes(tmp_path / "pictures", out, embedder=embedder, chunking=CHUNKING)
    with pytest.raises(fgpt.InputError, match=r"no document with text: blank.md: it holds no text"):
        write_index(tmp_path / "pictures", out, changes, embedder=embedder, chunking=CHUNKING)
    assert not out.exists()
    index = build()
    other = load_embedder(save_embedder(tmp_path / "other", num_hidden_layers=1))
    refused("was made by the embedder .* of which .*other is no copy", folder, out, other, CHUNKING)
    with pytest.raises(fgpt.InputError, match=r"of which .*other is no copy"):
        search(index, other, "fox", count=1)
    with pytest.raises(fgpt.InputError, match=r"no index of documents; expected a folder with index\.json"):
        open_index(folder)


def test_an_index_inside_its_folder_is_not_read(folder: Path, embedder: Embedder):
    out = folder / "index"
    write_index(
        folder,
        out,
        find_changes(folder, out, embedder=embedder, chunking=CHUNKING),
        embedder=embedder,
        chunking=CHUNKING,
    )
    (out / "notes.txt").write_text("Not a document.")
    assert find_changes(folder, out, embedder=embedder, chunking=CHUNKING).are_none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("files"), "index.json: damaged"),
        (lambda manifest: manifest.update(format=2), "is of format 2, not 1"),
        (lambda manifest: manifest.update(chunking={"size": 3, "holes": 1}), "index.json: damaged"),
    ],
)
def test_a_damaged_index_is_one_line(
    build: Callable[..., DocumentIndex], tmp_path: Path, change: Callable[[Any], Any], message: str
):
    build()
    path = tmp_path / "index" / "index.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(fgpt.InputError, match=message):
        open_index(tmp_path / "index")


def test_an_index_without_its_table_is_one_line(build: Callable[..., DocumentIndex], tmp_path: Path):
    build()
    shutil.rmtree(tmp_path / "index" / "chunks.lance")
    with pytest.raises(fgpt.InputError, match="damaged, make the index again") as error:
        open_index(tmp_path / "index")
    assert len(str(error.value).splitlines()) == 1
