"""New tokens: rows in a model, special tokens in its tokenizer, and files that both libraries read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, same, tiny
from builders.hf_models import hf_model
from builders.tokenizer_kinds import KINDS, TABLE_ROWS
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import fgpt
from fgpt.errors import InputError
from fgpt.tokenizers.tokenizer_files import of_folder
from fgpt.tree import astype, leaves
from fgpt.vocabulary import with_rows
from fgpt.weights import shape

NEW = ["<|user|>", "<|assistant|>"]
TEXT = "Once <|user|>upon a time<|assistant|> <|user|>."


def nano() -> tuple[fgpt.GPT, Any]:
    return fgpt.load("nano"), fgpt.tokenizer("nano")


def test_nano_with_new_tokens_is_read_by_both_libraries(tmp_path: Path):
    base, before = nano()
    params, tokenizer, ids = fgpt.add_tokens(base, before, NEW)
    assert (ids, params.cfg.vocab_size, tokenizer.n_vocab) == ((4096, 4097), 4098, 4098)
    params = fgpt.merge(
        fgpt.adapt(params, {p: x.__class__(x.rows + 0.1, x.ids) for p, x in fgpt.trainable_tokens(params, ids).items()})  # pyright: ignore
    )
    fgpt.save(params, tmp_path, like=tokenizer)
    reloaded, reference = fgpt.tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode_special(TEXT)
    assert [x for x in tokens if x in ids] == [4096, 4097, 4096]
    assert tokens == reloaded.encode_special(TEXT) == reference(TEXT)["input_ids"]
    assert tokenizer.decode(tokens) == reloaded.decode(tokens) == reference.decode(tokens) == TEXT
    assert tokenizer.decode_text(tokens) == reloaded.decode_text(tokens) == "Once upon a time ."
    assert reference.decode(tokens, skip_special_tokens=True) == "Once upon a time ."
    assert tokenizer.encode(TEXT) == before.encode(TEXT)
    assert (reloaded.eos_token_id, reloaded.n_vocab) == (before.eos_token_id, 4098)
    assert same(fgpt.load(str(tmp_path)), params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.tensor([tokens])
    with torch.no_grad():
        close(fgpt.apply(params, x), model(x).logits, 1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_tokenizer(name: str, folders: dict[str, Path], tmp_path: Path):
    before = of_folder(folders[name], TABLE_ROWS)
    tokenizer, again = before.with_tokens(NEW), before.with_tokens(NEW).with_tokens(NEW)
    ids = [tokenizer.encode_special(token, add_special_tokens=False) for token in NEW]
    assert ids == [[before.n_vocab], [before.n_vocab + 1]]
    assert tokenizer.n_vocab == again.n_vocab == before.n_vocab + 2
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    reloaded, reference = of_folder(tmp_path, TABLE_ROWS), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat<|user|>sat", " <|assistant|> a", "no new one", "<|user|><|user|>"):
        tokens = tokenizer.encode_special(text)
        assert tokens == reloaded.encode_special(text) == reference(text)["input_ids"], text
        assert tokenizer.decode(tokens) == reloaded.decode(tokens)
        assert tokenizer.decode_text(tokens) == reloaded.decode_text(tokens)
        assert "<|" not in tokenizer.decode_text(tokens)
        assert tokenizer.encode(text) == before.encode(text)
        in_text = before.with_tokens(NEW, in_text=True)
        assert in_text.encode_special(text) == tokens
        assert [x for x in in_text.encode(text) if [x] in ids] == [x for x in tokens if [x] in ids]
        assert in_text.decode_text(tokens) == tokenizer.decode_text(tokens)
        assert in_text.encode("a</s><|endoftext|>b") == before.encode("a</s><|endoftext|>b")
        assert json.loads(in_text.files()["tokenizer.json"]) == json.loads(tokenizer.files()["tokenizer.json"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_where_they_lack(tied: bool, dtype: torch.dtype):
    _, tokenizer = nano()
    base = astype(tiny(vocab_size=4097, tie_word_embeddings=tied), dtype)  # one row more than tokens
    params, larger, ids = fgpt.add_tokens(base, tokenizer, NEW)
    assert (ids, larger.n_vocab, params.cfg.vocab_size) == ((4096, 4097), 4098, 4098)
    assert (params.cfg.tie_word_embeddings, params.head is None) == (tied, tied)
    old, new = leaves(base), leaves(params)
    tables = {"wte.w"} | ({"head.w", "head.b"} & old.keys())
    for path, x in new.items():
        assert torch.equal(x[:4097] if path in tables else x, old[path])
        assert x.dtype == dtype
        if path in tables:
            close(x[4097], old[path].float().mean(0).to(dtype), 0.0)
    assert leaves(base).keys() == new.keys()
    assert base.cfg.vocab_size == 4097
    x = torch.tensor([[1, 2, 3]])
    close(fgpt.apply(params, x)[..., :4097], fgpt.apply(base, x), 1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.slow
@given(st.lists(st.sampled_from(["<a>", "<b>", "<c>", "<d>", "<|endoftext|>", "ab"]), min_size=1, unique=True))
def test_added_twice_is_added_once(tokens: list[str]):
    """A token that exists keeps its id, a rank of several letters too, and needs no row."""
    _, tokenizer = nano()
    once = fgpt.add_tokens(tiny(vocab_size=4096), tokenizer, tokens)
    twice = fgpt.add_tokens(once.params, once.tokenizer, tokens)
    ids = once.ids
    assert ids == twice.ids
    assert len(set(ids)) == len(tokens)
    assert same(once.params, twice.params)
    assert once.tokenizer.n_vocab == twice.tokenizer.n_vocab
    new = [x for x in tokens if x in ("<a>", "<b>", "<c>", "<d>")]
    assert once.params.cfg.vocab_size == 4096 + len(new)
    for token, number in zip(tokens, ids, strict=True):
        assert once.tokenizer.decode([number]) == token
        if token == "<|endoftext|>":
            assert number == tokenizer.eos_token_id
        elif token not in new:
            assert [number] == tokenizer.encode(token)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "llama, tied", "gptj"])
def test_the_rows_are_those_of_transformers(name: str, tmp_path: Path):
    """But for what transformers draws around the mean: 1e-9 of the covariance."""
    model = hf_model(name)
    model.save_pretrained(tmp_path / "old")
    model.resize_token_embeddings(34)
    model.save_pretrained(tmp_path / "new")
    ours = with_rows(fgpt.load(str(tmp_path / "old")), 34)
    close(ours, fgpt.load(str(tmp_path / "new")), 1e-3)
    assert ours.cfg == fgpt.load(str(tmp_path / "new")).cfg


def test_a_quantized_table_needs_no_new_rows_or_is_refused():
    _, tokenizer = nano()
    quantized = fgpt.quantize(tiny(d_model=64, d_mlp=64, vocab_size=4097), "int8", target="wte")
    assert fgpt.add_tokens(quantized, tokenizer, NEW[:1]).params is quantized
    with pytest.raises(InputError, match="wte is RowwiseInt8, with no row left for 1 new tokens"):
        fgpt.add_tokens(quantized, tokenizer, NEW)
    params = tiny(vocab_size=4096)
    adapted = fgpt.adapt(params, fgpt.trainable_tokens(params, [3]))
    with pytest.raises(InputError, match="wte is Adapted, with no row left for 2 new tokens"):
        fgpt.add_tokens(adapted, tokenizer, NEW)


def test_a_head_of_classes_stays():
    _, tokenizer = nano()
    base = fgpt.with_classification_head(tiny(vocab_size=4096), 3, fgpt.key(0))
    params = fgpt.add_tokens(base, tokenizer, NEW).params
    assert params.head is base.head
    assert shape(params.wte.w) == (4098, 16)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([], "expected a list of one token or more"),
        ("<|user|>", "expected a list of one token or more"),
        (["<a>", ""], "new token '' is empty or white space"),
        ([" \t"], r"is empty or white space"),
        (["<a>", "<b>", "<a>"], "new token '<a>' is given twice"),
        (["a\nb"], "do not print"),
        (["\ud800"], "do not print"),
    ],
)
def test_wrong_tokens(tokens: Any, error: str):
    with pytest.raises(InputError, match=error) as caught:
        fgpt.add_tokens(*nano(), tokens)
    assert "\n" not in str(caught.value)


def test_an_id_of_another_token_in_a_folder_is_refused(tmp_path: Path):
    params, tokenizer, _ = fgpt.add_tokens(*nano(), NEW)
    fgpt.save(params, tmp_path, like=tokenizer)
    config = (tmp_path / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace('"4096"', '"17"'))
    with pytest.raises(InputError, match=r"added token '<\|user\|>' has id 17, which is that of another token"):
        fgpt.tokenizer(str(tmp_path))
