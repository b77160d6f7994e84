"""Our models in lm-eval are its own `hf` model: likelihoods, greedy flags, texts and metrics, whatever the batch."""

import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval
import pytest
import torch
from builders import tokens
from builders.tokenizers import CHATML, SPECIAL, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fgpt
from fgpt.cli.evaluation import lm_eval_model, lm_eval_tasks
from fgpt.cli.evaluation.lm_eval_model import Model, task_generation
from fgpt.cli.main import main
from fgpt.evaluation.likelihood import windows

FOLDERS = TemporaryDirectory()
CONTEXT = 48
KINDS = ("gpt2", "gpt2 with a bos", "llama")


@cache
def folder(kind: str) -> Path:
    """A tiny random model that transformers has saved, with a tokenizer of 500 tokens; two put a BOS before texts."""
    path = Path(FOLDERS.name) / kind
    path.mkdir()
    made = train_tokenizer()
    if kind == "gpt2":
        made.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    made.save(str(path / "tokenizer.json"))
    begin, end = ("<|endoftext|>",) * 2 if kind == "gpt2" else ("<|im_start|>", "<|im_end|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    config |= {"clean_up_tokenization_spaces": False, "chat_template": CHATML, "additional_special_tokens": SPECIAL}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    sizes: dict[str, Any] = {"vocab_size": made.get_vocab_size()}
    sizes |= {"bos_token_id": made.token_to_id(begin), "eos_token_id": made.token_to_id(end), "pad_token_id": None}
    if kind == "llama":
        llama = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        rest = {"intermediate_size": 40, "max_position_embeddings": CONTEXT}
        model: Any = LlamaForCausalLM(LlamaConfig(**llama, **rest, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=CONTEXT, **sizes))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            p.copy_(0.3 * torch.randn(p.shape, generator=rng) + gain)
    model.save_pretrained(path)
    return path


def hf(kind: str, rows: int = 1) -> HFLM:
    return HFLM(str(folder(kind)), device="cpu", dtype="float32", batch_size=rows)


def ours(kind: str, rows: int = 4) -> Model:
    return Model(fgpt.load(str(folder(kind))), fgpt.tokenizer(str(folder(kind))), rows)


def asked(kind: Any, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in args]


CONTEXTS = ["the a of", "Hello, world! ", "it's we'LL don't  ", "", "was kostet 12 日本\n", "the a of and to " * 20]
CONTEXTS += ["<|im_start|>user the<|im_end|>", "<|endoftext|>you don't"]
CONTINUATIONS = [" the", "a", " of and to in", "  was you", "<|im_end|> x", " café naïve 👋"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_hfs(kind: str):
    requests = asked("loglikelihood", [(a, b) for a in CONTEXTS for b in CONTINUATIONS])
    expected = hf(kind).loglikelihood(requests, disable_tqdm=True)
    for rows in (1, 3, 50):
        us = ours(kind, rows)
        got = us.loglikelihood(requests, disable_tqdm=True)
        assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-4)
        assert [flag for _, flag in got] == [flag for _, flag in expected]
        assert us.truncated.requests == len(CONTINUATIONS)  # one context is longer than the model's
        assert us.truncated.tokens > 54 * us.truncated.requests - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_flags_are_hfs(kind: str):
    """Of what greedy decoding writes, and of that with another last token."""
    us, them = ours(kind), hf(kind)
    prompts = [us.tok_encode(text) for text in CONTEXTS if text and len(us.tok_encode(text)) < CONTEXT - 8]
    written = [x.tokens for x in fgpt.generate(us.params, prompts, eos_token_id=-1, max_new_tokens=5)]
    requests = [(("", ""), a, b[:n]) for a, b in zip(prompts, written, strict=True) for n in range(1, 6)]
    requests += [(("", ""), a, [*b[:2], (b[2] + 1) % 400]) for a, b in zip(prompts, written, strict=True)]
    expected, got = (x._loglikelihood_tokens(requests, disable_tqdm=True) for x in (them, us))
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    assert [flag for _, flag in got] == [True] * 5 * len(prompts) + [False] * len(prompts)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in expected], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_likelihoods_are_hfs(kind: str):
    requests = asked("loglikelihood_rolling", [(text,) for text in [*CONTEXTS, "it's you don't naïve 日本 == " * 30]])
    expected = hf(kind, 2).loglikelihood_rolling(requests, disable_tqdm=True)
    for rows in (1, 5):
        got = ours(kind, rows).loglikelihood_rolling(requests, disable_tqdm=True)
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
    requests = asked("generate_until", [(text, how) for text in CONTEXTS if text])
    theirs = {**how, "until": [x for x in how["until"] if x]} if isinstance(how.get("until"), list) else how
    expected = hf(kind).generate_until(
        asked("generate_until", [(text, theirs) for text in CONTEXTS if text]), disable_tqdm=True
    )
    assert len(set(expected)) > 3
    for rows in (1, 3):
        us = ours(kind, rows)
        assert us.generate_until(requests, disable_tqdm=True) == expected
        assert us.truncated.requests > 0


@given(text=st.lists(st.integers(0, 9), max_size=50), width=st.integers(1, 12), data=st.data())
def test_our_windows_are_lm_evals(text: list[int], width: int, data: st.DataObject):
    """Its context_len is our width - stride + 1."""
    stride = data.draw(st.integers(1, width))
    found = utils.get_rolling_token_windows(text, 99, width, context_len=width - stride + 1)
    assert windows(text, 99, width=width, stride=stride) == [utils.make_disjoint_window(each) for each in found]


def test_sampled_texts_are_their_requests_alone():
    how = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 10}
    requests = asked("generate_until", [(text, how) for text in CONTEXTS if text])
    one, three = (ours("llama", rows).generate_until(requests, disable_tqdm=True) for rows in (1, 3))
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
        ours("gpt2").generate_until(asked("generate_until", [("the", {})]))


def test_chats_are_the_models_own():
    us, text = ours("llama"), "Was <b>?"
    said = us.apply_chat_template([{"role": "user", "content": text}])
    assert said == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert said == hf("llama").apply_chat_template([{"role": "user", "content": text}])
    assert us.tok_encode(said) == hf("llama").tok_encode(said)
    assert (us.chat_template(True), us.chat_template(False)) == (CHATML, None)
    with pytest.raises(fgpt.InputError, match="no chat template"):
        Model(fgpt.load("nano"), fgpt.tokenizer("nano")).apply_chat_template([])


# ---------------------------------------------------------------------------------------------------------- whole tasks


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over a file: multiple choice, perplexity and exact match."""
    path = tmp_path_factory.mktemp("tasks")
    choices, words = (
        [" and", " to in", " he was", " the"],
        ["the", "a", "of", "and", "to", "in", "he", "was", "it's", "you", "don't"],
    )
    rows = []
    for i in range(14):
        said = " ".join(words[int(j)] for j in tokens(len(words), 3 + 4 * i, seed=i))
        rows.append({"q": said, "choices": choices, "gold": i % 4, "page": f"{said} == {said}\n naïve", "say": "na"})
    (path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "rows.json")}}}
    data |= {"test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"}
    choice |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    choice |= {"fewshot_split": "test", "num_fewshot": 1}
    pages = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page"}
    pages |= {"metric_list": [{"metric": x} for x in ("word_perplexity", "byte_perplexity", "bits_per_byte")]}
    say = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "say"}
    say |= {"generation_kwargs": {"until": ["n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]}
    for name, fields in (("own_choice", choice), ("own_pages", pages), ("own_say", say)):
        (path / f"{name}.yaml").write_text(json.dumps({"task": name} | data | fields))
    (path / "far.yaml").write_text(json.dumps({"task": "far"} | say | {"dataset_path": "owner/nosuch"}))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whole_tasks_have_hfs_metrics(kind: str, local: Path):
    names = ["own_choice", "own_pages", "own_say"]
    manager = TaskManager(include_path=str(local), include_defaults=False)
    same: dict[str, Any] = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0, "log_samples": False}
    expected: Any = lm_eval.simple_evaluate(model=hf(kind), **same)
    for rows in (1, 5):
        got = lm_eval_tasks.run(lm_eval_tasks.find("own_*", local), *_loaded(kind), rows)
        for task in names:
            for metric, x in expected["results"][task].items():
                if isinstance(x, float):
                    assert got["results"][task][metric] == pytest.approx(x, rel=1e-5), (task, metric)
    assert {x["acc,none"] for x in (got["results"]["own_choice"], expected["results"]["own_choice"])} != {0.0}
    assert got["truncated"]["requests"] > 0


def _loaded(kind: str) -> tuple[fgpt.GPT, Any]:
    return fgpt.load(str(folder(kind))), fgpt.tokenizer(str(folder(kind)))


def test_eval_of_tasks(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--tasks", "own_pages", "--include-path", str(local), "--limit", "3", "--out", str(tmp_path)]
    assert main(["eval", "--base", str(folder("llama")), *options]) == 0
    assert "word_perplexity" in capsys.readouterr().err
    found = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert found["n-samples"]["own_pages"]["effective"] == 3
    pages = [json.loads(line)["page"] for line in (local / "rows.json").read_text().splitlines()[:3]]
    totals = ours("llama").loglikelihood_rolling(asked("loglikelihood_rolling", [(page,) for page in pages]))
    bits = -math.fsum(totals) / sum(len(page.encode()) for page in pages) / math.log(2)
    assert found["results"]["own_pages"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.slow
def test_bad_input_is_one_line(local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    at = ["eval", "--base", str(folder("llama")), "--tasks"]
    for args, says in (
        ([*at, "hellaswagg"], "no task 'hellaswagg'; did you mean hellaswag?"),
        ([*at, " , "], "--tasks is empty"),
        ([*at, "own_say", "--include-path", str(local / "none")], "no such folder; --include-path is a folder"),
        ([*at, "far", "--include-path", str(local)], "the data of far: Couldn't reach"),
    ):
        capsys.readouterr()
        assert main(args) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("error: ")
        assert says in said[-1]


@pytest.mark.slow
def test_tasks_as_chats_have_hfs_metrics(local: Path):
    manager = TaskManager(include_path=str(local), include_defaults=False)
    same: dict[str, Any] = {"tasks": ["own_choice"], "task_manager": manager, "bootstrap_iters": 0}
    expected: Any = lm_eval.simple_evaluate(model=hf("llama"), apply_chat_template=True, **same)
    got = lm_eval_tasks.run(lm_eval_tasks.find("own_choice", local), *_loaded("llama"), chat=True)
    for metric in ("acc,none", "acc_norm,none"):
        assert got["results"]["own_choice"][metric] == expected["results"]["own_choice"][metric]
    samples: Any = lm_eval.simple_evaluate(model=ours("llama"), apply_chat_template=True, **same)
    for a, b in zip(samples["samples"]["own_choice"], expected["samples"]["own_choice"], strict=True):
        assert a["arguments"] == b["arguments"]
        assert [x[0][0] for x in a["resps"]] == pytest.approx([x[0][0] for x in b["resps"]], abs=1e-4)
