"""Chunks cover their text, keep to their sizes, and end where sentences do."""

import re

import pytest
from builders.retrieval import character_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

import fgpt
from fgpt.retrieval.chunking import Chunk, chunks

TEXTS = st.text(st.sampled_from("abc .!?\n,。") | st.characters(exclude_categories=["Cs"]), max_size=300)
SIZES = st.integers(16, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


def cut(text: str, size: int, overlap: int) -> tuple[list[Chunk], list[tuple[int, int]]]:
    tokens = character_tokenizer().encode(text, add_special_tokens=False).offsets
    return chunks(text, tokens, size=size, overlap=overlap), tokens


def words(text: str, size: int, overlap: int = 0) -> list[str]:
    """The chunks of a text whose tokens are words and marks."""
    tokens = [(match.start(), match.end()) for match in re.finditer(r"\w+|[^\w\s]", text)]
    return [text[start:stop] for start, stop in chunks(text, tokens, size=size, overlap=overlap)]


@given(TEXTS, SIZES)
@example("가나다" * 20, (16, 15))  # a syllable is three tokens of one character
@example("a" * 90, (16, 3))
def test_the_chunks_without_their_overlaps_are_the_text(text: str, sizes: tuple[int, int]):
    parts, tokens = cut(text, *sizes)
    if not tokens:
        assert parts == []
        return
    assert parts[0].start == 0
    assert parts[-1].stop == len(text)
    rest = ""
    for (_, end), (start, stop) in zip([Chunk(0, 0), *parts], parts):
        assert start <= end < stop
        rest += text[end:stop]
    assert rest == text


@given(TEXTS, SIZES)
@example("가나다" * 20, (16, 15))
@example("a" * 90, (16, 3))
def test_chunks_and_overlaps_have_at_most_their_size(text: str, sizes: tuple[int, int]):
    size, overlap = sizes
    parts, tokens = cut(text, size, overlap)

    def count(start: int, stop: int) -> int:
        return sum(start <= first < stop for first, _ in tokens)

    for i, (start, stop) in enumerate(parts):
        assert 0 < count(start, stop) <= size
        if i:
            assert count(start, parts[i - 1].stop) <= overlap
            assert start > parts[i - 1].start


@given(st.lists(st.sampled_from(["fox", "bear.", "a", "12,", "Tom!"]), min_size=1, max_size=60), SIZES)
def test_a_chunk_of_whole_words_has_the_tokens_that_it_has_in_the_text(parts: list[str], sizes: tuple[int, int]):
    text = " ".join(parts)
    tokenizer = character_tokenizer()
    for start, stop in cut(text, *sizes)[0]:
        assert len(tokenizer.encode(text[start:stop], add_special_tokens=False)) <= sizes[0]


def test_a_chunk_ends_with_a_paragraph_before_a_sentence_before_a_word():
    text = "One two three four. Five six.\n\nSeven eight. Nine ten"
    assert words(text, size=11) == ["One two three four. Five six.\n\n", "Seven eight. Nine ten"]
    assert words("One two three four. Five six seven. Eight", size=8) == [
        "One two three four. ",
        "Five six seven. Eight",
    ]
    assert words("one two three four five", size=3) == ["one two three ", "four five"]
    assert words("一。二三。四", size=3) == ["一。", "二三。四"]
    assert words("He said: “Go.” Then he went away now", size=8)[0] == "He said: “Go.” "


def test_the_next_chunk_begins_with_a_shared_sentence_else_with_a_shared_word():
    assert words("a b c. d e. f g h i j", size=8, overlap=4)[1].startswith("d e. f")
    assert words("a b c d e f g h i", size=6, overlap=2) == ["a b c d e f ", "e f g h i"]


def test_sizes_that_make_no_chunks():
    for size, overlap in ((1, 0), (4, 4), (4, -1)):
        with pytest.raises(fgpt.InputError, match=f"chunks of {size} tokens that share {overlap}"):
            chunks("a b", [(0, 1), (2, 3)], size=size, overlap=overlap)
