"""Our models in lm-eval are its own `hf` model: likelihoods, texts, chats."""

from typing import Any

import pytest
from builders.lm_eval import hf_lm, our_lm, requests_of
from builders.tokenizers import CHATML
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import utils

import fgpt
from fgpt.cli.evaluation import lm_eval_model
from fgpt.cli.evaluation.lm_eval_model import Model, task_generation
from fgpt.evaluation.likelihood import windows

CONTEXT = 48
KINDS = ("gpt2", "gpt2 with a bos", "llama")
CONTEXTS = ["the a of", "Hello, world! ", "it's we'LL don't  ", "", "was kostet 12 日本\n", "the a of and to " * 20]
CONTEXTS += ["<|im_start|>user the<|im_end|>", "<|endoftext|>you don't"]
CONTINUATIONS = [" the", "a", " of and to in", "  was you", "<|im_end|> x", " café naïve 👋"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_hfs(kind: str):
    requests = requests_of("loglikelihood", [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
    expected = hf_lm(kind).loglikelihood(requests, disable_tqdm=True)
    for rows in (1, 3, 50):
        us = our_lm(kind, rows)
        got = us.loglikelihood(requests, disable_tqdm=True)
        assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-4)
        assert [flag for _, flag in got] == [flag for _, flag in expected]
        assert us.truncated.requests == len(CONTINUATIONS)  # one context is longer than the model's
        assert us.truncated.tokens > 54 * us.truncated.requests - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_flags_are_hfs(kind: str):
    """Of what greedy decoding writes, and of that with another last token."""
    us, them = our_lm(kind), hf_lm(kind)
    prompts = [us.tok_encode(text) for text in CONTEXTS if text and len(us.tok_encode(text)) < CONTEXT - 8]
    generated = [x.tokens for x in fgpt.generate(us.params, prompts, eos_token_id=-1, max_new_tokens=5)]
    requests = [(("", ""), a, b[:n]) for a, b in zip(prompts, generated, strict=True) for n in range(1, 6)]
    requests += [(("", ""), a, [*b[:2], (b[2] + 1) % 400]) for a, b in zip(prompts, generated, strict=True)]
    expected, got = (x._loglikelihood_tokens(requests, disable_tqdm=True) for x in (them, us))
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    assert [flag for _, flag in got] == [True] * 5 * len(prompts) + [False] * len(prompts)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_likelihoods_are_hfs(kind: str):
    requests = requests_of(
        "loglikelihood_rolling", [(text,) for text in [*CONTEXTS, "it's you don't naïve 日本 == " * 30]]
    )
    expected = hf_lm(kind, 2).loglikelihood_rolling(requests, disable_tqdm=True)
    for rows in (1, 5):
        got = our_lm(kind, rows).loglikelihood_rolling(requests, disable_tqdm=True)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {"until": ["\n", "."], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 30, "do_sample": False, "temperature": 0.7},
        {"until": ["e", "<|endoftext|>", ""], "max_new_tokens": 16, "temperature": 0.0},
        {"until": " ", "max_gen_toks": 24, "num_beams": 1},
        {"max_gen_toks": CONTEXT - 1},
    ],
)
def test_greedy_texts_are_hfs(kind: str, how: dict[str, Any]):
    """Its own are taken one by one: in a batch it gives a second BOS to a text that spells one out, or not, as the
    batch's first text has one or not.
    """
    requests = requests_of("generate_until", [(text, how) for text in CONTEXTS if text])
    reference = {**how, "until": [x for x in how["until"] if x]} if isinstance(how.get("until"), list) else how
    expected = hf_lm(kind).generate_until(
        requests_of("generate_until", [(text, reference) for text in CONTEXTS if text]), disable_tqdm=True
    )
    assert len(set(expected)) > 3
    for rows in (1, 3):
        us = our_lm(kind, rows)
        assert us.generate_until(requests, disable_tqdm=True) == expected
        assert us.truncated.requests > 0


@given(text=st.lists(st.integers(0, 9), max_size=50), width=st.integers(1, 12), data=st.data())
def test_our_windows_are_lm_evals(text: list[int], width: int, data: st.DataObject):
    """Its context_len is our width - stride + 1."""
    stride = data.draw(st.integers(1, width))
    found = utils.get_rolling_token_windows(text, 99, width, context_len=width - stride + 1)
    assert windows(text, 99, width=width, stride=stride) == [utils.make_disjoint_window(each) for each in found]


@pytest.mark.slow
def test_sampled_texts_are_their_requests_alone():
    how = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 10}
    requests = requests_of("generate_until", [(text, how) for text in CONTEXTS if text])
    one, three = (our_lm("llama", rows).generate_until(requests, disable_tqdm=True) for rows in (1, 3))
    assert one == three
    assert len(set(one)) == len(one)


def test_what_a_task_asks_for():
    assert task_generation({"until": "\n"}) == (("\n",), lm_eval_model.MAX_NEW_TOKENS, fgpt.SamplingParams())
    sampled = task_generation({"do_sample": True, "top_p": 0.9, "max_tokens": 3, "until": None})
    assert sampled == ((), 3, fgpt.SamplingParams(1.0, top_p=0.9))
    assert task_generation({"temperature": 0.5}).sampling.temperature == 0.5
    with pytest.raises(fgpt.InputError, match="a task sets num_beams for generation: expected until, do_sample"):
        task_generation({"num_beams": 4})
    with pytest.raises(fgpt.InputError, match=f"256 new tokens, but the model's context is {CONTEXT}"):
        our_lm("gpt2").generate_until(requests_of("generate_until", [("the", {})]))


def test_chats_are_the_models_own():
    us, text = our_lm("llama"), "Was <b>?"
    output = us.apply_chat_template([{"role": "user", "content": text}])
    assert output == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert output == hf_lm("llama").apply_chat_template([{"role": "user", "content": text}])
    assert us.tok_encode(output) == hf_lm("llama").tok_encode(output)
    assert (us.chat_template(True), us.chat_template(False)) == (CHATML, None)
    with pytest.raises(fgpt.InputError, match="no chat template"):
        Model(fgpt.load("nano"), fgpt.tokenizer("nano")).apply_chat_template([])
