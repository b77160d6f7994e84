"""Scores of a comparison, worked out by hand."""

import math

import pytest
import torch

import fgpt
from fgpt.cli.evaluation.compare.results import Answer
from fgpt.cli.evaluation.compare.scores import rouge_scores
from fgpt.cli.evaluation.compare.scores import text_scores as of_texts
from fgpt.cli.evaluation.metrics import text as text_scores
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),  # no four words
        ("one two three four", 0.0),
        ("a b c d a b c d", 20.0),  # abcd bcda cdab dabc abcd: the last of 5 was there before
        ("la la la la la la la la", 80.0),  # 5 of one kind
        ("A b, c d. a B c; D!", 20.0),  # case and punctuation are no words
    ],
)
def test_repeated(text: str, share: float):
    assert text_scores.repeated_ngrams(text) == pytest.approx(share)


def test_distinct():
    texts = ["the cat sat", "the cat ran", ""]
    assert text_scores.distinct(texts, 1) == pytest.approx(100 * 4 / 6)  # the cat sat ran, of 6 words
    assert text_scores.distinct(texts, 2) == pytest.approx(100 * 3 / 4)  # the-cat twice; none from text to text
    assert text_scores.distinct(["one", ""], 2) == 0.0


def test_mean_and_perplexity():
    assert text_scores.mean([1.0, 2.0, 6.0]) == 3.0
    assert text_scores.perplexity(math.log(7)) == pytest.approx(7)
    assert text_scores.perplexity(1e4) == math.inf
    with pytest.raises(InputError, match="no values"):
        text_scores.mean([])


def test_nats_count_every_answer_token_alike():
    """Against plain log-softmax over each text alone."""
    params = fgpt.init(fgpt.Config(1, 1, 8, 16, 11, 16), fgpt.key(0))
    examples = [Example.completion((1, 2, 3, 4), 2), Example.completion((5, 6, 7, 8, 9, 10), 1)]
    each = []
    for e in examples:
        logp = fgpt.apply(params, torch.tensor([e.tokens]))[0].log_softmax(-1)
        each += [-float(logp[i - 1, e.tokens[i]]) for i in range(e.prompt_length, len(e.tokens))]
    assert len(each) == 7
    assert text_scores.nats(params, examples) == pytest.approx(sum(each) / 7, rel=1e-5)
    with pytest.raises(InputError, match="no answer token"):
        text_scores.nats(params, [Example.completion((1, 2), 2)])


def test_text_scores_of_a_side():
    """Perplexity under the base is what generation itself has seen, where the base has written the answers."""
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The sun", "Tim said")]
    generated = fgpt.generate(params, prompts, eos_token_id=tokenizer.eos_token_id, max_new_tokens=8, logprobs=True)
    found = [Answer(tokenizer.decode(x.tokens), tuple(x.tokens), x.finished) for x in generated]
    scores = of_texts(params, prompts, found, tokenizer.eos_token_id)
    logprobs = [p for x in generated for p in x.logprobs]
    assert scores["perplexity of the answers under the base"] == pytest.approx(
        math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4
    )
    by_hand = [Answer("a b c d a b c d", (1, 2, 3), True), Answer("a b", (4,), False)]
    scores = of_texts(params, prompts[:2], by_hand, tokenizer.eos_token_id)
    assert scores["answers finished with EOS (%)"] == 50
    assert scores["mean answer length (tokens)"] == 2
    assert scores["repeated 4-grams (%)"] == pytest.approx(10)  # of 20 and 0
    assert scores["distinct-1 (%)"] == pytest.approx(40)  # 4 of 10
    assert scores["distinct-2 (%)"] == pytest.approx(50)  # ab bc cd da, of 7 and 1
    empty = of_texts(
        params, prompts[:1], [Answer("", (), True)], tokenizer.eos_token_id
    )  # its end of text is what was written
    assert empty["perplexity of the answers under the base"] > 1


def test_rouge_l():
    # the cat the mat: 4 in order, of 6 words and of 5; F1 = 2 (4/5) (4/6) / (4/5 + 4/6) = 8/11
    one = text_scores.rouge_l(["The cat sat on the mat."], ["the cat lay, the mat"])
    assert one == pytest.approx(100 * 8 / 11)
    both = text_scores.rouge_l(["The cat sat on the mat.", "a b"], ["the cat lay, the mat", "c"])
    assert both == pytest.approx(100 * 4 / 11)
    rows = [InstructionRow("Say.", "", "a b"), InstructionRow("No answer known.")]
    got = rouge_scores(rows, [Answer("a b", (1,), True), Answer("x", (1,), True)])
    assert got == {"ROUGE-L F1 (0 to 100)": 100.0}  # the row without an answer does not count
    assert rouge_scores(rows[1:], [Answer("x", (1,), True)]) == {}
