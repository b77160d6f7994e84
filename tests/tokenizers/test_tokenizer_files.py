"""Which of its files a folder's tokenizer is; GPT-2's ranks; metadata that are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT, SharedData
from builders.tokenizers import STRINGS, gguf_metadata_of, train_tokenizer

import fgpt
from fgpt.errors import InputError
from fgpt.tokenizers import tiktoken_bpe, tokenizer_files
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tiktoken_bpe import TiktokenTokenizer
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

NANO = Path(fgpt.__file__).parent / "nano"


def test_a_folder_has_the_first_of_its_kinds(folder: Path, tmp_path: Path):
    def of(**files: Any) -> Tokenizer:
        for old in tmp_path.iterdir():
            old.unlink()
        for name, data in files.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            (tmp_path / name.replace("_dot_", ".")).write_bytes(data)
        return of_folder(tmp_path, 5000)

    hub, original = (folder / "tokenizer.json").read_bytes(), (NANO / tiktoken_bpe.RANKS).read_bytes()
    nano = tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS)
    vocab = {_printable(nano.bpe.decode_single_token_bytes(i)): i for i in range(nano.n_vocab - 1)}
    ends: dict[str, Any] = {"config_dot_json": {"model_type": "llama", "eos_token_id": 0}}
    assert isinstance(of(ranks_dot_tiktoken=original, tokenizer_dot_json=hub), TiktokenTokenizer)
    got = of(tokenizer_dot_json=hub, vocab_dot_json=vocab, **ends)
    assert isinstance(got, HFTokenizer)
    assert got.eos_token_id == 0
    assert of(tokenizer_dot_json=hub, generation_config_dot_json={"eos_token_id": [2, 1]}, **ends).eos_token_id == 2
    got = of(vocab_dot_json=vocab | {"<|endoftext|>": len(vocab)}, config_dot_json={"model_type": "gptj"})
    assert isinstance(got, TiktokenTokenizer)
    assert got.encode("Once upon a time") == nano.encode("Once upon a time")
    with pytest.raises(InputError, match=r"no tokenizer\.json; expected it in the folder of a model of type 'llama'"):
        of(vocab_dot_json=vocab, **ends)
    with pytest.raises(InputError, match="which token ends a document"):
        of(tokenizer_dot_json=hub)
    with pytest.raises(InputError, match=r"which token ends a document.*got '<end>'"):
        of(tokenizer_dot_json=hub, tokenizer_config_dot_json={"eos_token": "<end>"})
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer that"):
        of(tokenizer_dot_json=hub[:-9], **ends)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        of(tokenizer_dot_json=hub, tokenizer_config_dot_json=b"{")
    of(tokenizer_dot_json=hub, **ends)
    few = of_folder(tmp_path, 400)  # more tokens than rows: no obstacle until a text holds one
    assert few.encode("the") == [token for token in of_folder(tmp_path, 501).encode("the") if token < 400]
    with pytest.raises(InputError, match=r"holds '<tool>', token 500, .*rows for 400 tokens: .*put the model's own"):
        few.encode("a <tool>")
    of(ranks_dot_tiktoken=original)
    with pytest.raises(InputError, match=r"has 4096 tokens, the model 4095; put the model's own"):
        of_folder(tmp_path, 4095)


def _printable(token: bytes) -> str:
    char_of = {byte: char for char, byte in tiktoken_bpe.BYTE_OF_CHAR.items()}
    return "".join(char_of[byte] for byte in token)


def test_gpt2s_own_ranks_by_either_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared_data: SharedData):
    bpe = shared_data("gpt2-bpe")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(bpe / "tiktoken_cache"))
    vocab = json.loads((bpe / "encoder.json").read_text())
    merges = (bpe / "vocab.bpe").read_text().split("\n")[1:-1]
    values = {
        "general.architecture": "gpt2",  # and no `pre`, as in old files
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * 50256 + [3],
        "tokenizer.ggml.eos_token_id": 50256,
    }
    hub = of_gguf(values, 50257)
    for name, text in hub.files().items():
        (tmp_path / name).write_text(text)
    several = [hub, of_folder(tmp_path, 50400), tiktoken_bpe.from_ranks(bpe / "gpt2.tiktoken"), tokenizer_files.gpt2()]
    for text in [*STRINGS, (ROOT / "README.md").read_text()]:
        assert len({tuple(each.encode(text)) for each in several}) == 1, repr(text)
    assert {(each.eos_token_id, each.n_vocab) for each in several} == {(50256, 50257)}


BAD = {
    "SentencePiece": ({"model": "llama"}, "model is 'llama'; expected 'gpt2'.*give the model's folder from the hub"),
    "none": ({"model": None}, "model is None"),
    "pre": ({"pre": "tekken"}, r"pre, the way to split text, is 'tekken'; expected one of gpt-2, smollm, llama-bpe"),
    "a list": ({"pre": ["smollm"]}, r"is \['smollm'\]; expected one of"),
    "no pre": ({"pre": None}, "is None; expected one of"),
    "default": ({"pre": "default"}, "is 'default'; expected one of"),
    "no tokens": ({"tokens": None}, r"ggml\.tokens: expected a list of str, got NoneType"),
    "tokens": ({"tokens": [1]}, r"ggml\.tokens: expected a list of str"),
    "merges": ({"merges": ["a b c"]}, r"ggml\.merges: expected pairs of tokens, got 'a b c'"),
    "merges of nothing": ({"merges": ["zzz y"]}, r"ggml\.merges: expected pairs of tokens that make tokens"),
    "types": ({"token_type": [1]}, "and 1 types"),
    "twice": ({"tokens": ["a", "a"], "token_type": [1, 1]}, "each once.*got 1 different"),
    "eos": ({"eos_token_id": 500}, "expected one of the 500 tokens, got 500"),
    "no eos": ({"eos_token_id": None}, "eos_token_id, the token that ends a document.*got None"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_metadata_are_refused(name: str):
    more, expected = BAD[name]
    with pytest.raises(InputError, match=expected) as caught:
        of_gguf(gguf_metadata_of(train_tokenizer("smollm"), **{"pre": "smollm"} | more), 600)
    assert "\n" not in str(caught.value)


def test_a_gguf_tokenizer_must_fit_its_model():
    few = of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm"), 499)
    assert few.encode("a") == of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm"), 500).encode("a")
    with pytest.raises(InputError, match=r"token 499, .*rows for 499 tokens"):
        few.encode(few.decode([499]))
    with pytest.raises(InputError, match="ends a document by token 2, the model has 2 rows"):
        of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm"), 2)


def test_importing_fgpt_stays_light():
    code = "import sys, fgpt; print([m for m in ('tokenizers', 'jinja2', 'gguf', 'transformers') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert process.stdout.strip() == "[]"
