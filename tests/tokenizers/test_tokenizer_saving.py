"""Each kind of tokenizer is saved for both libraries; GGUF files; merges of ranks."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from builders import SharedData
from builders.tokenizer_kinds import KINDS, TABLE_ROWS, TEXTS
from builders.tokenizers import CHATML, TALK, gguf_metadata_of, ordinary_text, train_tokenizer
from hypothesis import example, given, settings
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

import fgpt
from fgpt.io import models as io_models
from fgpt.io.gguf_header import read_header
from fgpt.tokenizers import merges, tiktoken_bpe
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

GGUFS = {"gpt-2": "gpt2", "llama-bpe": "llama"}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_saved_for_both(name: str, folders: dict[str, Path], tmp_path: Path):
    """As `fgpt.save` writes it beside a model: read by us and by transformers, its tokens are those of the original."""
    ours, before = of_folder(folders[name], TABLE_ROWS), AutoTokenizer.from_pretrained(folders[name])
    _, files = io_models._tokenizer(str(folders[name]), TABLE_ROWS)
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert (tmp_path / "tokenizer.json").is_file()
    reloaded, reference = of_folder(tmp_path, TABLE_ROWS), AutoTokenizer.from_pretrained(tmp_path)
    assert (reloaded.eos, reloaded.n_vocab, reloaded.eos_token_ids) == (ours.eos, ours.n_vocab, ours.eos_token_ids)
    for text in TEXTS:
        assert reloaded.encode(text) == ours.encode(text), repr(text)
        assert (
            reloaded.encode_special(text)
            == ours.encode_special(text)
            == reference(text)["input_ids"]
            == before(text)["input_ids"]
        )


@pytest.mark.parametrize("pre", GGUFS)
@pytest.mark.parametrize("flags", [{}, {"bos": True}, {"bos": False, "eos": True}, {"bos": True, "eos": True}])
def test_what_a_gguf_file_puts_around_a_text(pre: str, flags: dict[str, bool], tmp_path: Path):
    trained = train_tokenizer(pre)
    more = {f"add_{key}_token": value for key, value in flags.items()}
    values = gguf_metadata_of(trained, pre, **more) | {"general.architecture": GGUFS[pre]}
    ours = of_gguf(read_header(gguf_file(tmp_path / "t.gguf", values)).fields, TABLE_ROWS)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in ("the cat sat", "", "a <|im_end|> b", "it's 12"):
        assert ours.encode_special(text) == reference(text)["input_ids"], repr(text)
    assert ours.prefix_tokens == ((1,) if flags.get("bos") else ())
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert (
        of_folder(tmp_path, TABLE_ROWS).encode_special("a b")
        == AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]
    )
    assert of_folder(tmp_path, TABLE_ROWS).encode_special("a b") == ours.encode_special("a b")


def gguf_file(path: Path, values: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(str(path), values["general.architecture"])
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture" and not isinstance(value, bool):
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_merges_of_ranks_are_those_of_the_files(shared_data: SharedData):
    bpe = shared_data("gpt2-bpe")
    original = tiktoken_bpe.from_ranks(bpe / "gpt2.tiktoken").bpe
    trained = merges.merges_from_ranks([original.decode_single_token_bytes(rank) for rank in range(50256)])
    reference = [tuple(line.split(" ")) for line in (bpe / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]]
    assert [(tiktoken_bpe.printable(left), tiktoken_bpe.printable(right)) for left, right in trained] == reference


def test_a_token_that_no_merge_of_lower_ranks_makes():
    """Ranks 256 to 258: "abc" comes before "ab" and "cd". tiktoken joins whatever gives a token, the lowest first."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"abc", b"ab", b"cd", b"abcd"]
    assert merges.merges_from_ranks(tokens)[:2] == [(b"ab", b"c"), (b"a", b"b")]
    trained = tiktoken_bpe.TiktokenTokenizer(
        tiktoken_bpe.tiktoken.Encoding(
            "made",
            pat_str=tiktoken_bpe.GPT2_SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={tiktoken_bpe.END: len(tokens)},
        )
    )
    reference = Library.from_str(trained.files()["tokenizer.json"])
    for text in ("abc", "xabc", "abcd", "abcdabc", "xxabcabcdcd abc ab", "cdabab"):
        assert reference.encode(text).ids == trained.encode(text), text


@settings(max_examples=200, deadline=None)
@given(text=ordinary_text)
@example(text="<|endoftext|> the <|endoftext|>")
def test_nano_opens_in_transformers(nano_saved: tuple[Tokenizer, Any], text: str):
    ours, reference = nano_saved
    assert ours.encode(text) == reference.encode(text, split_special_tokens=True)
    assert ours.encode_special(text) == reference.encode(text)
    assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text))


@pytest.fixture(scope="module")
def nano_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    at = tmp_path_factory.mktemp("nano")
    fgpt.save(fgpt.load("nano"), at, like="nano")
    reloaded = fgpt.tokenizer(str(at))
    assert isinstance(reloaded, tiktoken_bpe.TiktokenTokenizer)
    reference = AutoTokenizer.from_pretrained(at)
    assert (reloaded.eos, reloaded.n_vocab) == (reference.eos_token_id, len(reference)) == (4095, 4096)
    return reloaded, reference


def test_a_model_saved_with_ranks_opens_in_transformers(tmp_path: Path):
    nano, params = tiktoken_bpe.from_ranks(io_models.resolve("nano") / tiktoken_bpe.RANKS), fgpt.load("nano")
    fgpt.save(params, tmp_path, like=nano.with_chat_template(ChatTemplate(CHATML, {})))
    ours, reference = fgpt.tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(TALK) == reference.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )
    assert ours.apply_chat_template(TALK) == nano.with_chat_template(ChatTemplate(CHATML, {})).apply_chat_template(TALK)
