"""The benchmark of retrieval: its questions, recall and exact match."""

import pytest
import torch

import fgpt
from experiments.bench.retrieval import Cloze, clozes, normalize_answer, recall, similar_vectors
from fgpt.retrieval.index import Passage

SENTENCE = "In the winter of that year the ship met Captain John Reed in {} harbors of the north and then sailed away ."
TEXTS = {f"{i}.txt": " ".join(SENTENCE.format(100 * i + j) for j in range(6)) for i in range(3)}


def test_a_question_has_a_gap_and_the_words_beside_it():
    questions = clozes(TEXTS, 6)
    assert [question.source for question in questions] == ["0.txt", "1.txt", "2.txt"] * 2
    for question in questions:
        text = TEXTS[question.source]
        assert text[question.offset : question.offset + len(question.answer)] == question.answer == "Captain John Reed"
        left, right = question.text.split(" ____ ")
        assert len(left.split()) == len(right.split()) == 6
        assert f"{left} {question.answer} {right}" in text
    with pytest.raises(fgpt.InputError, match="lower it"):
        clozes(TEXTS, 100)


def test_a_passage_is_right_if_it_covers_the_place_of_the_answer():
    question = Cloze("a ____ b", "Reed", "a.txt", 10)
    right, early, late = (Passage("a.txt", 0, start, "x" * 5) for start in (8, 5, 11))
    other = Passage("b.txt", 0, 8, "x" * 5)
    assert [question.is_in(passage) for passage in (right, early, late, other)] == [True, False, False, False]
    rankings = [[other, right, early], [early, late, other], [right]]
    assert [recall([question] * 3, rankings, depth) for depth in (1, 2)] == pytest.approx([1 / 3, 2 / 3])


def test_answers_are_compared_as_squad_does():
    assert normalize_answer(" The Red  Fox's, an owl.\n") == "red foxs owl"
    assert normalize_answer("Theban") == "theban"


def test_vectors_of_the_filler_are_near_real_ones():
    real = torch.nn.functional.normalize(torch.randn(50, 384, generator=fgpt.key(0)), dim=-1)
    vectors = similar_vectors(real, 200)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(200))
    nearest = (vectors @ real.T).amax(-1)
    assert nearest.min() > 0.6
    assert nearest.max() < 0.999
