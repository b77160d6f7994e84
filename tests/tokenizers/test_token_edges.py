"""Beginnings of prompts, labels as one token, tokens without a row, a million blanks."""

from pathlib import Path

import pytest
from builders.tokenizer_kinds import TABLE_ROWS, TWO, by_merges, byte_level, fast_tokenizer, sentencepiece
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

import fgpt
from fgpt.data import classification_prompts
from fgpt.data.prompt_templates import ALPACA, CHAT, InstructionRow, encode, encode_prompt
from fgpt.errors import InputError
from fgpt.tokenizers.tokenizer_files import of_folder

# ----------------------------------------------------------------------------------------------------------------- BOS


def test_a_prompt_begins_as_its_family_does(folders: dict[str, Path]):
    at = folders["Metaspace, <s> around, a chat template"]
    ours, reference = of_folder(at, TABLE_ROWS), AutoTokenizer.from_pretrained(at)
    row = InstructionRow("Say it.", "the cat", "Hello")
    prompt = encode_prompt(row, ALPACA, ours)
    assert list(prompt) == reference(ALPACA.prompt(row))["input_ids"]
    assert prompt[0] == 1
    assert encode(row, ALPACA, ours).tokens == (*prompt, *ours.encode("Hello"), 2)
    assert encode_prompt(row, CHAT, ours).count(1) == 1  # the template writes its own
    for name in ("nano", "vocab and merges, specials first"):
        other = fgpt.tokenizer("nano") if name == "nano" else of_folder(folders[name], TABLE_ROWS)
        assert other.prefix_tokens == ()
        assert encode_prompt(row, ALPACA, other) == tuple(other.encode(ALPACA.prompt(row)))


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
def test_a_label_is_one_token_behind_a_text(scheme: str, tmp_path: Path):
    tokenizer = sentencepiece()
    if scheme == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    ours = of_folder(fast_tokenizer(tmp_path, tokenizer, **TWO), TABLE_ROWS)
    got = classification_prompts.verbalizers(["yes", "no"], ours)
    assert got.output_ids == (tokenizer.token_to_id("▁yes"), tokenizer.token_to_id("▁no"))
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
    tokenizer = byte_level(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["[PAD]"])
    at = fast_tokenizer(tmp_path / "a", tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]", mask_token="[MASK]")
    merged = by_merges(tmp_path / "b", byte_level(["<|endoftext|>"]), added_tokens_DOT_json={"[PAD]": size})
    for folder in (at, merged):
        ours, reference = of_folder(folder, size), AutoTokenizer.from_pretrained(folder)
        assert ours.encode("the cat sat") == reference("the cat sat")["input_ids"]
        assert ours.eos_token_ids == (0,)
        with pytest.raises(InputError, match=rf"holds '\[PAD\]', token {size}, .*rows for {size} tokens") as caught:
            ours.encode_special("the cat [PAD] sat")
        assert "\n" not in str(caught.value)
        assert (
            of_folder(folder, TABLE_ROWS).encode_special("the cat [PAD] sat")
            == reference("the cat [PAD] sat")["input_ids"]
        )


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
