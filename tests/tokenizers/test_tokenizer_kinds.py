"""Each kind of tokenizer file is read as transformers reads it."""

from pathlib import Path
from typing import Any

import pytest
from builders.tokenizer_kinds import KINDS, LLAMA2_CHAT, TABLE_ROWS, TEXTS
from builders.tokenizers import TALK
from transformers import AutoTokenizer

import fgpt
from fgpt.tokenizers import tiktoken_bpe
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder


def battery(ours: Tokenizer, reference: Any) -> None:
    """Every way of reading, on every text."""
    for text in TEXTS:
        sound = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        split = reference(sound, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == split, repr(text)
        bare = reference(sound, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        assert ours.encode_special(text, add_special_tokens=False) == bare, repr(text)
        whole = reference(sound, split_special_tokens=False)["input_ids"]
        assert ours.encode_special(text) == whole, repr(text)
        assert ours.decode(whole) == reference.decode(whole, clean_up_tokenization_spaces=False)
        assert ours.decode_text(whole) == reference.decode(
            whole, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    if reference.chat_template:
        for answer in (True, False):
            talk = TALK[1:]
            expected = reference.apply_chat_template(talk, add_generation_prompt=answer, return_dict=False)
            assert ours.apply_chat_template(talk, answer) == expected


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_transformers(name: str, folders: dict[str, Path]):
    ours, reference = of_folder(folders[name], TABLE_ROWS), AutoTokenizer.from_pretrained(folders[name])
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.n_vocab == len(reference)
    battery(ours, reference)
    empty = reference("")["input_ids"]
    assert ours.prefix_tokens == tuple(
        empty[: reference("a")["input_ids"].index(reference("a", add_special_tokens=False)["input_ids"][0])]
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
        chat = ours.apply_chat_template(TALK[1:]) if ours.end_of_turn != (ours.eos_token_id,) else []
        return [ours.encode_special(text) for text in TEXTS], ours.eos_token_ids, chat

    expected = reads(of_folder(folder, TABLE_ROWS))
    for path in (folder / file, folder / "generation_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert reads(of_folder(folder, TABLE_ROWS)) == expected


def test_a_byte_order_mark_before_ranks_and_a_config(tmp_path: Path):
    fgpt.save(fgpt.load("nano"), tmp_path, like="nano")
    for path in (tmp_path / "config.json", tmp_path / tiktoken_bpe.RANKS):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert fgpt.tokenizer(tmp_path).encode("so it is") == fgpt.tokenizer("nano").encode("so it is")
