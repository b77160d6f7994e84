"""Each kind of tokenizer file is read as transformers reads it, saved so that it reads the same, and never by a guess.

The kinds are made here, small: a folder of files as the hub has them, for each the model type that it lies beside.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
from builders import SharedData
from builders.tokenizers import CHATML, STRINGS, TALK, gguf_metadata_of, ordinary_text, train_tokenizer, training_corpus
from hypothesis import example, given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

import fgpt
from fgpt import families
from fgpt.data import classification_prompts
from fgpt.data.packing import filter_by_length
from fgpt.data.prompt_templates import ALPACA, CHAT, InstructionRow, encode, encode_prompt
from fgpt.errors import InputError
from fgpt.generation.beam import beam_search
from fgpt.generation.prompt_lookup import prompt_lookup_decode
from fgpt.io import models as io_models
from fgpt.io.gguf_header import read_header
from fgpt.model import init
from fgpt.tokenizers import merges, tiktoken_bpe
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

ROOM = 2000
"""Rows of the models' tables: more than any of the vocabularies has tokens."""
TEXTS = [
    *STRINGS,
    "the cat sat on the mat.",
    "a<s>b</s> c <pad>d<unk> <mask>  <mask> ",
    "<s> the </s>the<|endoftext|>the <|endoftext|> the",
    " <tool>x <tool> <TOOL> a<Word>b <Word> Cafe<Word>",
    "<|im_start|>user\nHello<|im_end|>\n",
    "\n\n  \n x\t\t y \r\n\r\nz   ",
    "  leading and trailing  ",
    "don't you'll WE'RE 2024-01-02 \u2028 \ufeffx ① ﬁ Å",
]
BPE = "PreTrainedTokenizerFast"


def put(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("_DOT_", ".")).write_text(text, encoding="utf-8")
    return folder


def byte_level(special: list[str], size: int = 480) -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(training_corpus(), trainer)
    return made


def by_merges(folder: Path, made: Library, extra: Mapping[str, int] | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.model.save(str(folder))
    if extra:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        put(folder, vocab_DOT_json=vocab | dict(extra))
    return put(folder, **{"config_DOT_json": {"model_type": "gpt2"}} | files)


def sentencepiece() -> Library:
    """As tokenizer.json of Llama 2: a space before every text, <s> around, bytes for what has no token."""
    made = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = [word for text in training_corpus() for word in text.split()] + ["yes", "no", "true", "false"] * 60
    made.train_from_iterator(words, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def unigram() -> Library:
    made = Library(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(training_corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def wordpiece() -> Library:
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        training_corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def whole_first() -> Library:
    """As Llama 3's: a piece that is a token is not merged."""
    made = train_tokenizer("llama-bpe")
    made.model.ignore_merges = True
    return made


def flagged() -> Library:
    """Added tokens that take the blanks about them, stand alone, or are looked for after normalizing."""
    made = byte_level(["<|endoftext|>"])
    made.normalizer = normalizers.Lowercase()
    made.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<s>", rstrip=True)])
    made.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<Word>", single_word=True, normalized=False)])
    return made


def shuffled(made: Library) -> tuple[dict[str, int], str]:
    """Its vocabulary with ids in another order than its merges."""
    vocab = made.get_vocab(with_added_tokens=False)
    numbers = list(range(len(vocab)))
    random.Random(1).shuffle(numbers)
    pairs = json.loads(made.to_str())["model"]["merges"]
    return {token: numbers[i] for token, i in vocab.items()}, "#version: 0.2\n" + "".join(
        f"{a} {b}\n" for a, b in pairs
    )


def library(folder: Path, made: Library, kind: str = "llama", template: str | None = None, **names: Any) -> Path:
    config = {"tokenizer_class": BPE, "clean_up_tokenization_spaces": False, **names}
    config |= {"chat_template": template} if template else {}
    return put(
        folder, tokenizer_DOT_json=made.to_str(), tokenizer_config_DOT_json=config, config_DOT_json={"model_type": kind}
    )


def specials_first(at: Path) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": {"content": "<pad>", "__type": "AddedToken"},
    }
    return by_merges(at, byte_level(special), tokenizer_config_DOT_json={"tokenizer_class": "GPT2Tokenizer", **names})


def specials_within(at: Path) -> Path:
    """A few among ordinary tokens, and ids in another order than the merges."""
    vocab, pairs = shuffled(byte_level(["<s>", "</s>"]))
    return put(
        at,
        vocab_DOT_json=vocab,
        merges_DOT_txt=pairs,
        config_DOT_json={"model_type": "gpt2"},
        special_tokens_map_DOT_json={"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True}},
    )


def plain_gpt2(at: Path) -> Path:
    made = byte_level([])
    return by_merges(at, made, {"<|endoftext|>": made.get_vocab_size()})


def with_added_tokens(at: Path) -> Path:
    made = byte_level(["<|endoftext|>"])
    size = made.get_vocab_size()
    return by_merges(
        at,
        made,
        added_tokens_DOT_json={"<tool>": size + 1, "<|im_start|>": size, "<|im_end|>": size + 2},
        special_tokens_map_DOT_json={
            "eos_token": "<|im_end|>",
            "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
        tokenizer_config_DOT_json={
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": True,
            "chat_template": CHATML,
        },
    )


def added_by_id(at: Path) -> Path:
    made = byte_level(["<|endoftext|>"])
    size = made.get_vocab_size()
    decoder = {
        str(size): {"content": "<mask>", "lstrip": True, "special": True, "normalized": False},
        "0": {"content": "<|endoftext|>", "special": True, "normalized": False},
        str(size + 1): {"content": "<tool>", "special": False, "normalized": True},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, "add_eos_token": True}
    return by_merges(at, made, tokenizer_config_DOT_json=config | {"unk_token": None, "mask_token": "<mask>"})


def mapped(at: Path) -> Path:
    """Special tokens without names, as older files call them, in special_tokens_map.json alone."""
    folder = library(at, byte_level(["<|endoftext|>"]))
    size = byte_level(["<|endoftext|>"]).get_vocab_size()
    names = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<tool>", "<mask>", "</s>"]}
    return put(folder, special_tokens_map_DOT_json=names, added_tokens_DOT_json={"<mask>": size})


def prefixed(at: Path) -> Path:
    made = byte_level(["<|endoftext|>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return library(at, made, eos_token="<|endoftext|>", sep_token="<sep>")


def specials_last() -> Library:
    made = byte_level([])
    made.add_special_tokens(["<s>", "<|endoftext|>"])
    return made


def named_by_class(at: Path) -> Path:
    """GPT2Tokenizer: its config, not its tokenizer.json, says whether a space stands before every text."""
    made = byte_level(["<|endoftext|>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return library(at, made, "gpt2", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")


LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
TWO = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "vocab and merges, specials first": specials_first,
    "vocab and merges, ids in another order": specials_within,
    "vocab and merges, GPT-2's layout": plain_gpt2,
    "vocab and merges, added_tokens.json": with_added_tokens,
    "vocab and merges, added_tokens_decoder": added_by_id,
    "byte-level, specials last": lambda at: library(
        at, specials_last(), eos_token="<|endoftext|>", pad_token="<pad>", extra_special_tokens=["</s>", "<unk>"]
    ),
    "byte-level, a space before": prefixed,
    "byte-level, GPT2Tokenizer": named_by_class,
    "byte-level, special_tokens_map.json": mapped,
    "Metaspace, <s> around, a chat template": lambda at: library(at, sentencepiece(), template=LLAMA2_CHAT, **TWO),
    "Unigram, </s> around": lambda at: library(at, unigram(), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"),
    "WordPiece": lambda at: library(at, wordpiece(), eos_token="[SEP]", bos_token="[CLS]", unk_token="[UNK]"),
    "added tokens with flags": lambda at: library(at, flagged(), eos_token="<|endoftext|>", mask_token="<mask>"),
    "Llama 3, whole pieces first": lambda at: library(
        at, whole_first(), template=CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>"
    ),
}
GGUFS = {"gpt-2": "gpt2", "llama-bpe": "llama"}


def battery(ours: Tokenizer, theirs: Any) -> None:
    """Every way of reading, on every text."""
    for text in TEXTS:
        sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        split = theirs(sound, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == split, repr(text)
        bare = theirs(sound, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert ours.encode_special(text, add_special_tokens=False) == bare, repr(text)
        whole = theirs(sound, split_special_tokens=False)["input_ids"]
        assert ours.encode_special(text) == whole, repr(text)
        assert ours.decode(whole) == theirs.decode(whole, clean_up_tokenization_spaces=False)
        assert ours.decode_text(whole) == theirs.decode(
            whole, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    if theirs.chat_template:
        for answer in (True, False):
            talk = TALK[1:]
            expected = theirs.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
            assert ours.apply_chat_template(talk, answer) == expected


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: make(root / f"{i}") for i, (name, make) in enumerate(KINDS.items())}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_transformers(name: str, folders: dict[str, Path]):
    ours, theirs = of_folder(folders[name], ROOM), AutoTokenizer.from_pretrained(folders[name])
    assert ours.eos == theirs.eos_token_id
    assert ours.n_vocab == len(theirs)
    battery(ours, theirs)
    empty = theirs("")["input_ids"]
    assert ours.prefix_tokens == tuple(
        empty[: theirs("a")["input_ids"].index(theirs("a", add_special_tokens=False)["input_ids"][0])]
    )


FILES_OF_KINDS = {
    "vocab and merges, ids in another order": ["vocab.json", "merges.txt", "special_tokens_map.json"],
    "vocab and merges, GPT-2's layout": ["vocab.json", "merges.txt", "config.json"],
    "vocab and merges, added_tokens.json": ["added_tokens.json", "tokenizer_config.json"],
    "Metaspace, <s> around, a chat template": ["tokenizer.json", "chat_template.jinja"],
}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES_OF_KINDS.items() for file in files])
def test_a_byte_order_mark_is_no_part_of_a_file(name: str, file: str, tmp_path: Path):
    folder = KINDS[name](tmp_path)
    if file == "chat_template.jinja":
        (folder / file).write_text(LLAMA2_CHAT, encoding="utf-8")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')

    def reads(ours: Tokenizer) -> Any:
        chat = ours.apply_chat_template(TALK[1:]) if ours.end_of_turn != (ours.eos,) else []
        return [ours.encode_special(text) for text in TEXTS], ours.eos_token_ids, chat

    expected = reads(of_folder(folder, ROOM))
    for path in (folder / file, folder / "generation_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert reads(of_folder(folder, ROOM)) == expected


def test_a_byte_order_mark_before_ranks_and_a_config(tmp_path: Path):
    fgpt.save(fgpt.load("nano"), tmp_path, like="nano")
    for path in (tmp_path / "config.json", tmp_path / tiktoken_bpe.RANKS):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert fgpt.tokenizer(tmp_path).encode("so it is") == fgpt.tokenizer("nano").encode("so it is")


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_saved_for_both(name: str, folders: dict[str, Path], tmp_path: Path):
    """As `fgpt.save` writes it beside a model: read by us and by transformers, its tokens are those of the original."""
    ours, before = of_folder(folders[name], ROOM), AutoTokenizer.from_pretrained(folders[name])
    _, files = io_models._tokenizer(str(folders[name]), ROOM)
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    for file, content in files.items():
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert (tmp_path / "tokenizer.json").is_file()
    again, theirs = of_folder(tmp_path, ROOM), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.eos, again.n_vocab, again.eos_token_ids) == (ours.eos, ours.n_vocab, ours.eos_token_ids)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text), repr(text)
        assert (
            again.encode_special(text)
            == ours.encode_special(text)
            == theirs(text)["input_ids"]
            == before(text)["input_ids"]
        )


@pytest.mark.parametrize("pre", GGUFS)
@pytest.mark.parametrize("flags", [{}, {"bos": True}, {"bos": False, "eos": True}, {"bos": True, "eos": True}])
def test_what_a_gguf_file_puts_around_a_text(pre: str, flags: dict[str, bool], tmp_path: Path):
    made = train_tokenizer(pre)
    more = {f"add_{key}_token": value for key, value in flags.items()}
    values = gguf_metadata_of(made, pre, **more) | {"general.architecture": GGUFS[pre]}
    ours = of_gguf(read_header(gguf_file(tmp_path / "t.gguf", values)).fields, ROOM)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in ("the cat sat", "", "a <|im_end|> b", "it's 12"):
        assert ours.encode_special(text) == theirs(text)["input_ids"], repr(text)
    assert ours.prefix_tokens == ((1,) if flags.get("bos") else ())
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert (
        of_folder(tmp_path, ROOM).encode_special("a b") == AutoTokenizer.from_pretrained(tmp_path)("a b")["input_ids"]
    )
    assert of_folder(tmp_path, ROOM).encode_special("a b") == ours.encode_special("a b")


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


# ------------------------------------------------------------------------------------------------ merges out of ranks


def test_merges_of_ranks_are_those_of_the_files(shared_data: SharedData):
    bpe = shared_data("gpt2-bpe")
    own = tiktoken_bpe.from_ranks(bpe / "gpt2.tiktoken").bpe
    made = merges.of_ranks([own.decode_single_token_bytes(rank) for rank in range(50256)])
    theirs = [tuple(line.split(" ")) for line in (bpe / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]]
    assert [(tiktoken_bpe.printable(left), tiktoken_bpe.printable(right)) for left, right in made] == theirs


def test_a_token_that_no_merge_of_lower_ranks_makes():
    """Ranks 256 to 258: "abc" comes before "ab" and "cd". tiktoken joins whatever gives a token, the lowest first."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"abc", b"ab", b"cd", b"abcd"]
    assert merges.of_ranks(tokens)[:2] == [(b"ab", b"c"), (b"a", b"b")]
    made = tiktoken_bpe.TiktokenTokenizer(
        tiktoken_bpe.tiktoken.Encoding(
            "made",
            pat_str=tiktoken_bpe.GPT2_SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={tiktoken_bpe.END: len(tokens)},
        )
    )
    theirs = Library.from_str(made.files()["tokenizer.json"])
    for text in ("abc", "xabc", "abcd", "abcdabc", "xxabcabcdcd abc ab", "cdabab"):
        assert theirs.encode(text).ids == made.encode(text), text


@settings(max_examples=200, deadline=None)
@given(text=ordinary_text)
@example(text="<|endoftext|> the <|endoftext|>")
def test_nano_opens_in_transformers(nano_saved: tuple[Tokenizer, Any], text: str):
    ours, theirs = nano_saved
    assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert ours.encode_special(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


@pytest.fixture(scope="module")
def nano_saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    at = tmp_path_factory.mktemp("nano")
    fgpt.save(fgpt.load("nano"), at, like="nano")
    again = fgpt.tokenizer(str(at))
    assert isinstance(again, tiktoken_bpe.TiktokenTokenizer)
    theirs = AutoTokenizer.from_pretrained(at)
    assert (again.eos, again.n_vocab) == (theirs.eos_token_id, len(theirs)) == (4095, 4096)
    return again, theirs


def test_a_model_saved_with_ranks_opens_in_transformers(tmp_path: Path):
    nano, params = tiktoken_bpe.from_ranks(io_models.resolve("nano") / tiktoken_bpe.RANKS), fgpt.load("nano")
    fgpt.save(params, tmp_path, like=nano.with_chat_template(ChatTemplate(CHATML, {})))
    ours, theirs = fgpt.tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(TALK) == theirs.apply_chat_template(
        TALK, add_generation_prompt=True, return_dict=False
    )
    assert ours.apply_chat_template(TALK) == nano.with_chat_template(ChatTemplate(CHATML, {})).apply_chat_template(TALK)


# -------------------------------------------------------------------------------------------------- what ends a text

ENDS = [
    ({"eos_token_id": 3}, {}, (2, 3)),
    ({"eos_token_id": [3, 1]}, {}, (2, 3, 1)),
    ({}, {"eos_token_id": [3, 2]}, (2, 3)),
    ({"eos_token_id": [0]}, {"eos_token_id": [3]}, (2, 0)),  # generation_config.json comes before config.json
    ({"eos_token_id": [99999, -4, "x", None, True, 3]}, {}, (2, 3)),
    ({}, {}, (2,)),
]


@pytest.mark.parametrize(("generation", "config", "expected"), ENDS)
def test_every_end_that_the_configs_name(
    generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
):
    at = library(tmp_path, train_tokenizer(), eos_token="<|im_end|>")
    put(at, generation_config_DOT_json=generation, config_DOT_json={"model_type": "llama"} | config)
    assert of_folder(at, ROOM).eos_token_ids == expected
    assert of_folder(at, ROOM).eos == 2


def test_further_ends_of_a_gguf_file():
    ours = of_gguf(gguf_metadata_of(train_tokenizer("smollm"), "smollm", eot_token_id=7, eom_token_id=9), ROOM)
    assert ours.eos_token_ids == (2, 7, 9)
    assert json.loads(ours.files()["generation_config.json"]) == {"eos_token_id": [2, 7, 9]}


def test_any_of_several_ends_a_text():
    cfg = families.family_from_config(LLAMA).config_from_hf(LLAMA)
    params = init(cfg, fgpt.key(3))
    free = fgpt.generate(params, [[1, 2], [3], [4, 5, 6]], eos_token_id=-1, max_new_tokens=12)
    ends = {free[0].tokens[4], free[1].tokens[7]}
    assert -1 not in ends
    for got, whole in zip(
        fgpt.generate(params, [[1, 2], [3], [4, 5, 6]], eos_token_id=ends, max_new_tokens=12), free, strict=True
    ):
        first = next((i for i, token in enumerate(whole.tokens) if token in ends), None)
        assert got.tokens == whole.tokens[:first]
        assert got.finished == (first is not None)
    for prompt in ([1, 2], [3]):
        [expected] = fgpt.generate(params, [prompt], eos_token_id=ends, max_new_tokens=12)
        assert expected.finished
        assert prompt_lookup_decode(params, prompt, eos_token_id=tuple(ends), max_new_tokens=12) == expected
        [alone] = beam_search(params, prompt, eos_token_id=ends, max_new_tokens=12, num_beams=1)
        assert (alone.tokens, alone.finished) == (expected.tokens, True)
        assert fgpt.generate(params, [prompt], eos_token_id=[], max_new_tokens=12) == fgpt.generate(
            params, [prompt], eos_token_id=-1, max_new_tokens=12
        )
    with pytest.raises(InputError, match="eos_token_id is 64: expected 0 to 63"):
        fgpt.generate(params, [[1]], eos_token_id=[2, 64], max_new_tokens=1)
    with pytest.raises(InputError, match="eos_token_id is 64"):
        beam_search(params, [1], eos_token_id=[2, 64], max_new_tokens=1)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def test_what_ends_a_turn(tmp_path: Path):
    """A model tuned on ChatML whose end of text is another token: answers close as the template closes them."""
    made = train_tokenizer()
    at = library(tmp_path, made, template=CHATML, eos_token="<|endoftext|>")
    ours = of_folder(at, ROOM)
    assert (ours.eos, ours.end_of_turn, ours.eos_token_ids) == (0, (2,), (0, 2))
    row = InstructionRow("Say it.", output="Hello")
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Hello"}]
    whole = encode(row, CHAT, ours)
    expected = AutoTokenizer.from_pretrained(at).apply_chat_template(talk, return_dict=False)
    assert [*whole.tokens, *ours.encode("\n")] == expected
    assert whole.tokens[: whole.prompt_length] == encode_prompt(row, CHAT, ours)
    assert encode(row, ALPACA, ours).tokens[-1] == 0


def test_a_turn_that_ends_by_more_than_one_token(folders: dict[str, Path]):
    """Llama 2 writes a space and then </s>."""
    ours = of_folder(folders["Metaspace, <s> around, a chat template"], ROOM)
    blank = ours.encode_special("x </s>", add_special_tokens=False)[1]
    assert ours.end_of_turn == (blank, 2)
    row = InstructionRow("Say it.", output="Hello")
    talk = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Hello"}]
    assert list(encode(row, CHAT, ours).tokens) == ours.apply_chat_template(talk, add_generation_prompt=False)
    _, dropped = filter_by_length(
        [encode(row, CHAT, ours), encode(InstructionRow("Say it."), CHAT, ours)], 100, drop=True
    )
    assert dropped.empty == 1


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}", "{{ messages[1].content }}\n", "{{ raise_exception('no') }}", "{% for %}", "ANSWER"],
)
def test_a_template_that_ends_no_turn(template: str, tmp_path: Path):
    ours = of_folder(library(tmp_path, train_tokenizer(), template=template, eos_token="<|im_end|>"), ROOM)
    assert (ours.end_of_turn, ours.eos_token_ids) == ((2,), (2,))


# ----------------------------------------------------------------------------------------------------------------- BOS


def test_a_prompt_begins_as_its_family_does(folders: dict[str, Path]):
    at = folders["Metaspace, <s> around, a chat template"]
    ours, theirs = of_folder(at, ROOM), AutoTokenizer.from_pretrained(at)
    row = InstructionRow("Say it.", "the cat", "Hello")
    prompt = encode_prompt(row, ALPACA, ours)
    assert list(prompt) == theirs(ALPACA.prompt(row))["input_ids"]
    assert prompt[0] == 1
    assert encode(row, ALPACA, ours).tokens == (*prompt, *ours.encode("Hello"), 2)
    assert encode_prompt(row, CHAT, ours).count(1) == 1  # the template writes its own
    for name in ("nano", "vocab and merges, specials first"):
        other = fgpt.tokenizer("nano") if name == "nano" else of_folder(folders[name], ROOM)
        assert other.prefix_tokens == ()
        assert encode_prompt(row, ALPACA, other) == tuple(other.encode(ALPACA.prompt(row)))


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_a_label_is_one_token_behind_a_text(scheme: str, tmp_path: Path):
    made = sentencepiece()
    if scheme == "prepend":
        made.pre_tokenizer = None
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    ours = of_folder(library(tmp_path, made, **TWO), ROOM)
    got = classification_prompts.verbalizers(["yes", "no"], ours)
    assert got.output_ids == (made.token_to_id("▁yes"), made.token_to_id("▁no"))
    behind = ours.encode("Answer: yes")
    assert behind[-1] == got.output_ids[0]
    around = classification_prompts.prompt_frame(
        classification_prompts.PromptWording("Tell.", "\n", "\nAnswer:"),
        got.names,
        ours,
        False,
        [classification_prompts.LabeledText("a", label="no")],
    )
    assert around.before[0] == 1
    assert got.output_ids[1] in around.before
    with pytest.raises(InputError, match=r"label 'elephant' is \d+ tokens"):
        classification_prompts.verbalizers(["yes", "elephant"], ours)


# ------------------------------------------------------------------------------------- tokens that the model has not


def test_a_token_without_a_row_is_no_obstacle_until_a_text_holds_it(tmp_path: Path):
    made = byte_level(["<|endoftext|>"])
    size = made.get_vocab_size()
    made.add_special_tokens(["[PAD]"])
    at = library(tmp_path / "a", made, eos_token="<|endoftext|>", pad_token="[PAD]", mask_token="[MASK]")
    merged = by_merges(tmp_path / "b", byte_level(["<|endoftext|>"]), added_tokens_DOT_json={"[PAD]": size})
    for folder in (at, merged):
        ours, theirs = of_folder(folder, size), AutoTokenizer.from_pretrained(folder)
        assert ours.encode("the cat sat") == theirs("the cat sat")["input_ids"]
        assert ours.eos_token_ids == (0,)
        with pytest.raises(InputError, match=rf"holds '\[PAD\]', token {size}, .*rows for {size} tokens") as caught:
            ours.encode_special("the cat [PAD] sat")
        assert "\n" not in str(caught.value)
        assert of_folder(folder, ROOM).encode_special("the cat [PAD] sat") == theirs("the cat [PAD] sat")["input_ids"]


# ------------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize("blank", [" ", "\n", "\u00a0", " \n", "\r\n", "\t"])
def test_a_million_blanks(blank: str):
    nano, many = fgpt.tokenizer("nano"), 1_200_000 // len(blank)
    for before, after in (("", "x"), ("Sum up:\n", "x y"), ("a", "<|endoftext|>"), ("a", "")):
        text = before + blank * many + after
        assert nano.bpe.decode(nano.encode(text)) == text
        assert nano.bpe.decode(nano.encode_special(text)) == text
        few = before + blank * (10_100 // len(blank)) + after
        assert nano.encode(few) == nano.bpe.encode_ordinary(few)
        assert nano.encode_special(few) == nano.bpe.encode(few, allowed_special="all")
