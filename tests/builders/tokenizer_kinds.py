"""Folders of tokenizers of every kind that models on the hub have."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from builders.tokenizers import CHATML, STRINGS, train_tokenizer, training_corpus

TABLE_ROWS = 2000
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


def write_tokenizer_folder(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("_DOT_", ".")).write_text(text, encoding="utf-8")
    return folder


def byte_level(special: list[str], size: int = 480) -> Library:
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_corpus(), trainer)
    return tokenizer


def by_merges(folder: Path, tokenizer: Library, extra: Mapping[str, int] | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    if extra:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        write_tokenizer_folder(folder, vocab_DOT_json=vocab | dict(extra))
    return write_tokenizer_folder(folder, **{"config_DOT_json": {"model_type": "gpt2"}} | files)


def sentencepiece() -> Library:
    """As tokenizer.json of Llama 2: a space before every text, <s> around, bytes for what has no token."""
    tokenizer = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = [word for text in training_corpus() for word in text.split()] + ["yes", "no", "true", "false"] * 60
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Library:
    tokenizer = Library(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(training_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def wordpiece() -> Library:
    tokenizer = Library(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        training_corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def whole_first() -> Library:
    """As Llama 3's: a piece that is a token is not merged."""
    tokenizer = train_tokenizer("llama-bpe")
    tokenizer.model.ignore_merges = True
    return tokenizer


def with_token_flags() -> Library:
    """Added tokens that take the blanks about them, stand alone, or are looked for after normalizing."""
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<s>", rstrip=True)])
    tokenizer.add_tokens(
        [AddedToken("<tool>", normalized=True), AddedToken("<Word>", single_word=True, normalized=False)]
    )
    return tokenizer


def shuffle_ids(tokenizer: Library) -> tuple[dict[str, int], str]:
    """Its vocabulary with ids in another order than its merges."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    numbers = list(range(len(vocab)))
    random.Random(1).shuffle(numbers)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return {token: numbers[i] for token, i in vocab.items()}, "#version: 0.2\n" + "".join(
        f"{a} {b}\n" for a, b in pairs
    )


def fast_tokenizer(
    folder: Path, tokenizer: Library, kind: str = "llama", template: str | None = None, **names: Any
) -> Path:
    config = {"tokenizer_class": BPE, "clean_up_tokenization_spaces": False, **names}
    config |= {"chat_template": template} if template else {}
    return write_tokenizer_folder(
        folder,
        tokenizer_DOT_json=tokenizer.to_str(),
        tokenizer_config_DOT_json=config,
        config_DOT_json={"model_type": kind},
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
    vocab, pairs = shuffle_ids(byte_level(["<s>", "</s>"]))
    return write_tokenizer_folder(
        at,
        vocab_DOT_json=vocab,
        merges_DOT_txt=pairs,
        config_DOT_json={"model_type": "gpt2"},
        special_tokens_map_DOT_json={"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": True}},
    )


def plain_gpt2(at: Path) -> Path:
    tokenizer = byte_level([])
    return by_merges(at, tokenizer, {"<|endoftext|>": tokenizer.get_vocab_size()})


def with_added_tokens(at: Path) -> Path:
    tokenizer = byte_level(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    return by_merges(
        at,
        tokenizer,
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
    tokenizer = byte_level(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    decoder = {
        str(size): {"content": "<mask>", "lstrip": True, "special": True, "normalized": False},
        "0": {"content": "<|endoftext|>", "special": True, "normalized": False},
        str(size + 1): {"content": "<tool>", "special": False, "normalized": True},
    }
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, "add_eos_token": True}
    return by_merges(at, tokenizer, tokenizer_config_DOT_json=config | {"unk_token": None, "mask_token": "<mask>"})


def with_special_tokens_map(at: Path) -> Path:
    """Special tokens without names, as older files call them, in special_tokens_map.json alone."""
    folder = fast_tokenizer(at, byte_level(["<|endoftext|>"]))
    size = byte_level(["<|endoftext|>"]).get_vocab_size()
    names = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<tool>", "<mask>", "</s>"]}
    return write_tokenizer_folder(folder, special_tokens_map_DOT_json=names, added_tokens_DOT_json={"<mask>": size})


def with_prefix_space(at: Path) -> Path:
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return fast_tokenizer(at, tokenizer, eos_token="<|endoftext|>", sep_token="<sep>")


def specials_last() -> Library:
    tokenizer = byte_level([])
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>"])
    return tokenizer


def named_by_class(at: Path) -> Path:
    """GPT2Tokenizer: its config, not its tokenizer.json, says whether a space stands before every text."""
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return fast_tokenizer(at, tokenizer, "gpt2", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")


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
    "byte-level, specials last": lambda at: fast_tokenizer(
        at, specials_last(), eos_token="<|endoftext|>", pad_token="<pad>", extra_special_tokens=["</s>", "<unk>"]
    ),
    "byte-level, a space before": with_prefix_space,
    "byte-level, GPT2Tokenizer": named_by_class,
    "byte-level, special_tokens_map.json": with_special_tokens_map,
    "Metaspace, <s> around, a chat template": lambda at: fast_tokenizer(
        at, sentencepiece(), template=LLAMA2_CHAT, **TWO
    ),
    "Unigram, </s> around": lambda at: fast_tokenizer(
        at, unigram(), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ),
    "WordPiece": lambda at: fast_tokenizer(at, wordpiece(), eos_token="[SEP]", bos_token="[CLS]", unk_token="[UNK]"),
    "added tokens with flags": lambda at: fast_tokenizer(
        at, with_token_flags(), eos_token="<|endoftext|>", mask_token="<mask>"
    ),
    "Llama 3, whole pieces first": lambda at: fast_tokenizer(
        at, whole_first(), template=CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>"
    ),
}
