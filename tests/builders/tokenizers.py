"""A small trained tokenizer, its GGUF metadata, and texts that are hard to tokenize."""

import json
import random
from typing import Any

from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from fgpt.tokenizers.huggingface import SPLITS
from fgpt.tokenizers.tokenizer_files import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was kostet das?\n  3 + 4 = {{x}} <b>&amp;</b>"},
    {"role": "assistant", "content": "7 €"},
    {"role": "user", "content": "Naïve 👋🏽"},
]
STRINGS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "it's we'LL don't I'Ve",
    "  two  spaces\n\n\ttabs\r\n ",
    "1234567890 3.14 x2 ²½ ٣٤",
    "déjà vu, Ærøskøbing, naïve",
    "日本語のテキスト 한국어 עברית العربية",
    "👋🏽 👩‍👩‍👧 🇩🇪",
    "def f(x):\n    return x ** 2  # squared\n",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width",
    "a" * 300,
    "<|endoftext|> <|im_start|>user<|im_end|> <s></s>",
    "\x00\x01\x7f",
]
ordinary_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text("ab 1'\n\t.Aé日", max_size=40),
    st.lists(st.sampled_from([*SPECIAL, " ", "a", "12", "\n"]), max_size=8).map("".join),
)


def training_corpus() -> list[str]:
    """Sentences of common and made-up words, in which merges are worth learning."""
    rng = random.Random(0)
    text = "the a of and to in he was it's you don't café naïve 日本 7 12 100 == def return 👋 Hello Was"
    ends = [".\n", "!\n\n", "  "]
    return [" ".join(rng.choices(text.split(), k=12)) + rng.choice(ends) for _ in range(400)] + STRINGS


def train_tokenizer(pre: str = "gpt-2") -> Library:
    """A small byte-level BPE that cuts text as the named one does, with a BOS by its post-processor."""
    tokenizer = Library(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = {"gpt-2": whole, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), whole])}
    tokenizer.pre_tokenizer = cut.get(pre) or pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[pre] or ""), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))]
    )
    return tokenizer


def gguf_metadata_of(tokenizer: Library, pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a GGUF file of this tokenizer, by key."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in merges],
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in (found | more).items() if value is not None}
    return {"general.architecture": "llama", "tokenizer.chat_template": CHATML} | found


def assert_same_tokens(ours: Tokenizer, reference: Any, text: str) -> None:
    tokens = reference.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ours.encode(text) == tokens, repr(text)
    assert ours.decode(tokens) == reference.decode(tokens, clean_up_tokenization_spaces=False)
