"""Models of the hub: what the cache lacks is fetched, what cannot be fetched is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import same
from builders.hub import PARAMS, FakeHub, cache_of, fake_model, hub_is_away
from huggingface_hub import constants

import fgpt
from fgpt.tokenizers.tokenizer_files import FILES

PARTS: dict[str, tuple[int, Callable[[str], bool]]] = {
    "the config": (1, lambda name: name == "config.json"),
    "the tokenizer": (1, lambda name: name in FILES),
    "the weights": (1, lambda name: name == "model.safetensors"),
    "one shard": (3, lambda name: name in ("config.json", "model-00002-of-00003.safetensors")),
    "the index": (3, lambda name: not name.startswith("model-")),
    "two of three shards": (3, lambda name: "00002" not in name),
    "all but the tokenizer": (1, lambda name: name not in FILES),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_the_cache_lacks_is_fetched(part: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    shards, has = PARTS[part]
    fake.files = fake_model(tmp_path / "model", shards)
    cache_of(tmp_path, {name: data for name, data in fake.files.items() if has(name)})
    expected = fgpt.tokenizer("nano").encode("so it is")
    assert fgpt.tokenizer("me/it").encode("so it is") == expected
    assert same(fgpt.load("me/it"), PARAMS)
    fetched = {path.rpartition("/")[2] for path in fake.asked if "/resolve/" in path}
    assert not [name for name in fetched & fake.files.keys() if has(name)]  # what was there is not fetched again
    fake.asked.clear()
    hub_is_away(monkeypatch)
    assert same(fgpt.load("me/it"), PARAMS)
    assert fgpt.tokenizer("me/it").encode("so it is") == expected
    assert not fake.asked


LACKING = {
    "the config": r"without model\.safetensors,",
    "the tokenizer": r"without config\.json, model\.safetensors,",
    "the weights": r"without config\.json,",
    "one shard": r"without model\.safetensors,",
    "the index": r"without (model-0000\d-of-00003\.safetensors(, )?){3},",
    "two of three shards": r"without model-00002-of-00003\.safetensors,",
}


@pytest.mark.parametrize("part", LACKING)
def test_what_cannot_be_fetched_is_named(part: str, tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    shards, has = PARTS[part]
    cache_of(tmp_path, {name: data for name, data in fake_model(tmp_path / "model", shards).items() if has(name)})
    hub_is_away(monkeypatch)
    with pytest.raises(fgpt.InputError, match=LACKING[part]) as caught:
        fgpt.load("me/it")
    assert "holds only a part of the model 'me/it'" in str(caught.value)
    assert "the hub cannot be reached (ConnectError)" in str(caught.value)
    assert "pickled" not in str(caught.value)


def test_a_tokenizer_is_not_needed_for_the_weights(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch):
    """Nor is it guessed: GPT-2's own would do for a model of its size, and may be another than the repository's."""
    files = fake_model(tmp_path / "model")
    cache_of(tmp_path, {name: data for name, data in files.items() if name not in FILES})
    hub_is_away(monkeypatch)
    assert same(fgpt.load("me/it"), PARAMS)
    with pytest.raises(fgpt.InputError, match=r"only a part .* without tokenizer\.json, .* cannot be reached"):
        fgpt.tokenizer("me/it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert same(fgpt.load("me/it"), PARAMS)


def test_a_repository_without_a_tokenizer_is_asked_once(tmp_path: Path, fake: FakeHub):
    fake.files = {name: data for name, data in fake_model(tmp_path / "model").items() if name not in FILES}
    fgpt.load("me/it")
    fake.asked.clear()
    fgpt.load("me/it")
    assert not fake.asked


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("pytorch_model.bin", "pickled weights may run any code and are not read: convert them"),
        ("model.Q4_0.gguf", "GGUF files: download one of them"),
        ("training_args.bin", "nor other weights that are read here"),
    ],
)
def test_a_repository_without_safetensors(other: str, says: str, tmp_path: Path, fake: FakeHub):
    """Pickles are spoken of where there are some."""
    files = fake_model(tmp_path / "model")
    fake.files = {"config.json": files["config.json"], other: b"x"}
    with pytest.raises(fgpt.InputError, match=rf"the hub's me/it has no model\.safetensors.*{says}"):
        fgpt.load("me/it")
    assert not [path for path in fake.asked if path.endswith(other)]
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").write_bytes(files["config.json"])
    with pytest.raises(fgpt.InputError, match=r"local has no model\.safetensors, nor other weights"):
        fgpt.load(str(local))


def test_a_link_into_nothing_is_fetched_again(tmp_path: Path, fake: FakeHub):
    """A cache whose blob was deleted to make room."""
    fake.files = fake_model(tmp_path / "model")
    folder = cache_of(tmp_path, fake.files)
    (folder / "model.safetensors").resolve().unlink()
    assert same(fgpt.load("me/it"), PARAMS)
