"""The E2E challenge's metrics, against other libraries and by hand."""

import math
import shutil
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
from builders import SharedData
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu
from nltk.translate.nist_score import corpus_nist as nltk_nist

from fgpt.cli.evaluation.data_to_text import load_references
from fgpt.cli.evaluation.metrics import reference_scores
from fgpt.cli.evaluation.metrics.caption_rouge import longest_common_subsequence, mean_rouge_l
from fgpt.cli.evaluation.metrics.cider import corpus_cider
from fgpt.cli.evaluation.metrics.meteor_jar import corpus_meteor
from fgpt.cli.evaluation.metrics.nist import corpus_nist
from fgpt.cli.evaluation.metrics.reference_scores import challenge_scores, corpus_bleu
from fgpt.cli.evaluation.metrics.reference_tokens import Tokens, caption_tokens, mteval_tokens
from fgpt.recipes import DataToTextRecipe, find

WORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9).map(tuple)
needs_coco = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs java")


@st.composite
def corpora(draw: st.DrawFn, most_references: int = 3) -> tuple[list[Tokens], list[list[Tokens]]]:
    texts = draw(st.lists(WORDS, min_size=2, max_size=5))
    references = [draw(st.lists(WORDS, min_size=1, max_size=most_references)) for _ in texts]
    return texts, references


def coco_words(texts: Sequence[Tokens]) -> dict[int, list[str]]:
    return {i: [" ".join(text)] for i, text in enumerate(texts)}


def coco_references(references: Sequence[Sequence[Tokens]]) -> dict[int, list[str]]:
    return {i: [" ".join(reference) for reference in each] for i, each in enumerate(references)}


@needs_coco
@given(corpora())
def test_cider_and_rouge_are_those_of_coco_caption(corpus: tuple[list[Tokens], list[list[Tokens]]]):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    texts, references = corpus
    words, reference_words = coco_words(texts), coco_references(references)
    assert corpus_cider(texts, references) == pytest.approx(Cider().compute_score(reference_words, words)[0])
    assert mean_rouge_l(texts, references) == pytest.approx(Rouge().compute_score(reference_words, words)[0])


@given(corpora())
def test_bleu_is_nltks(corpus: tuple[list[Tokens], list[list[Tokens]]]):
    """nltk counts n-grams of shorter texts as one, so that none is shorter than the longest n-gram; and one more text,
    that shares some of each n with its reference, keeps every precision above 0.
    """
    texts = [*(text * 4 for text in corpus[0]), tuple("abcdeabcde")]
    references = [*corpus[1], [tuple("abcdeabcdee")]]
    expected = 100 * nltk_bleu([[list(x) for x in each] for each in references], [list(text) for text in texts])
    lines = [" ".join(text) for text in texts]
    assert corpus_bleu(lines, [[" ".join(x) for x in each] for each in references]) == pytest.approx(expected)


@given(corpora(most_references=1))
def test_nist_of_single_references_is_nltks(corpus: tuple[list[Tokens], list[list[Tokens]]]):
    """nltk scores a text against its best reference alone. It counts n-grams as it does for BLEU."""
    texts = [text * 5 for text in corpus[0]]
    references = [[x * 5 for x in each] for each in corpus[1]]
    expected = nltk_nist([[list(x) for x in each] for each in references], [list(text) for text in texts], n=5)
    assert corpus_nist(texts, references) == pytest.approx(expected)


def test_nist_of_several_references_by_hand():
    """Of the texts' 3 tokens a is shared twice, once for each reference that has one at most, and b once.

    info(a) = log2(6 / 3) = 1, info(b) = log2(6 / 2); the bigram (a, b) has log2(3 / 2), and 2 bigrams are in the text.
    """
    texts = [("a", "b", "a")]
    references = [[("a", "b"), ("a", "a", "c", "b")]]
    unigrams = (2 * 1 + math.log2(6 / 2)) / 3
    bigrams = math.log2(3 / 1) / 2
    assert corpus_nist(texts, references) == pytest.approx(unigrams + bigrams)
    shorter = corpus_nist([("b",)], references)  # a third of the mean length
    assert shorter == pytest.approx(math.log2(3) * math.exp(math.log(0.5) * (math.log(1 / 3) / math.log(1.5)) ** 2))


def test_rouge_takes_precision_and_recall_of_different_references():
    """P = 2/2 of the first, R = 1/1 of the second."""
    assert mean_rouge_l([("a", "b")], [[("a", "c", "b", "d"), ("a",)]]) == pytest.approx(1.0)
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert mean_rouge_l([("a", "x", "b")], [[("a", "c", "b", "d")]]) == pytest.approx(expected)
    assert longest_common_subsequence((), ("a",)) == 0


def test_cider_prefers_rare_ngrams_and_the_right_length():
    references = [[("the", "red", "fox")], [("the", "old", "dog")], [("the", "wet", "cat")]]
    right = [("the", "red", "fox"), ("the", "old", "dog"), ("the", "wet", "cat")]
    assert corpus_cider(right, references) == pytest.approx(10 * 3 / 4)  # no text has a 4-gram
    common, rare = ("the", "x", "y"), ("x", "red", "y")
    assert corpus_cider([common, *right[1:]], references) < corpus_cider([rare, *right[1:]], references)
    longer = ("the", "red", "fox", *("the",) * 9)
    assert corpus_cider([longer, *right[1:]], references) < corpus_cider(right, references) - 1


def test_scores_of_references_themselves_and_of_empty_texts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference_scores, "missing_for_meteor", lambda: ["java"])
    references = [["The Mill is a cheap pub.", "A pub, The Mill, is cheap."], ["Zizzi sells sushi by the river."]]
    best = challenge_scores(["the mill is a CHEAP pub.", references[1][0]], references)
    assert best["BLEU"] == pytest.approx(100)
    assert best["ROUGE-L"] == pytest.approx(100)
    assert best["CIDEr"] > 7
    worst = challenge_scores(["", ""], references)
    assert worst == {"BLEU": 0.0, "NIST": 0.0, "ROUGE-L": 0.0, "CIDEr": 0.0}


def test_a_meteor_that_fails_costs_no_other_score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(*_: object) -> float:
        return float("")  # what pycocoevalcap does with no answer

    monkeypatch.setattr(reference_scores, "missing_for_meteor", list)
    monkeypatch.setattr(reference_scores, "corpus_meteor", fail)
    assert challenge_scores(["a b"], [["a b"]]).keys() == {"BLEU", "NIST", "ROUGE-L", "CIDEr"}
    assert "METEOR is left out: its Java program failed" in capsys.readouterr().err


def test_tokens():
    assert " ".join(mteval_tokens("It's £20-25, isn't it?")) == "it's £20 - 25 , isn't it ?"
    assert " ".join(caption_tokens("It's £20-25, isn't it? They'll say o'clock.")) == (
        "it 's £ 20-25 is n't it they 'll say o'clock"
    )
    assert caption_tokens("A family-friendly (cheap) pub.") == ("a", "family-friendly", "cheap", "pub")


@pytest.mark.slow
@needs_coco
@needs_java
def test_meteor_is_that_of_the_challenge():
    """By hand: the first text is one of its references, so that nothing is taken off for its chunks; the second is
    empty. Of the tokens of the texts all match, of those of the references half: P = 1, R = 1/2, and METEOR is
    P R / (0.85 P + 0.15 R).

    Source: Denkowski & Lavie 2014, with the parameters of METEOR 1.5 for English.
    """
    sentence = caption_tokens("Zizzi sells cheap sushi near the river.")
    score = corpus_meteor([sentence, ()], [[caption_tokens("Qqq."), sentence], [sentence]])
    assert score == pytest.approx(0.5 / (0.85 + 0.15 * 0.5))


def test_the_challenges_test_set_has_630_inputs(shared_data: SharedData):
    recipe = find("e2e-nano")
    assert isinstance(recipe, DataToTextRecipe)
    test = load_references(str(shared_data("e2e/testset_w_refs.csv")), recipe)
    assert (len(test.rows), sum(map(len, test.references))) == (630, 4693)
    limited = load_references(str(shared_data("e2e/testset_w_refs.csv")), recipe, 2)
    assert limited.references == test.references[:2]
