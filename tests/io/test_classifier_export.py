"""A classifier's head in the hub's layout: transformers' sequence classification reads ours, and we read theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import close, same, tiny, tokens, with_noise
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file

import fgpt
from fgpt.cli.inference.classifiers import load_classifier
from fgpt.cli.main import main
from fgpt.io import models

SIZES = {"vocab_size": 31, "num_labels": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SIZES | {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24}
LLAMA = SIZES | {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 24}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
THEIRS: dict[str, dict[str, Any]] = {
    "GPT2": GPT2,
    "GPTJ": GPT2 | {"rotary_dim": 4},
    "GPTNeoX": {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA | {"tie_word_embeddings": True},
    "Qwen3": LLAMA | {"head_dim": 8},
}


def classes(params: fgpt.GPT, row: torch.Tensor) -> torch.Tensor:
    """Logits of the classes at the last token of one text."""
    return fgpt.apply(params, row)[-1]


@pytest.mark.parametrize("family", THEIRS)
def test_theirs_is_read_and_ours_is_read_by_them(family: str, tmp_path: Path):
    config = getattr(transformers, f"{family}Config")(**THEIRS[family])
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.save_pretrained(tmp_path / "theirs")
    params, row = fgpt.load(tmp_path / "theirs"), tokens(31, 12)
    expected = model(row[None]).logits[0].detach()
    assert expected.shape == (3,)
    close(classes(params, row), expected, atol=1e-5)

    fgpt.save(params, tmp_path / "ours", labels=["a", "b", "c"])
    assert same(fgpt.load(tmp_path / "ours"), params)
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(reloaded) is type(model)
    assert reloaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert reloaded.config.label2id == {"a": 0, "b": 1, "c": 2}
    close(reloaded.eval()(row[None]).logits[0].detach(), expected, atol=1e-5)


def test_texts_of_several_lengths(tmp_path: Path):
    """Padded by the token that the saved tokenizer names, each is read at its own last token, which ends a document."""
    nano = fgpt.load("nano")
    params = with_noise(fgpt.with_classification_head(nano, 4, fgpt.key(0)), 0.02)
    fgpt.save(params, tmp_path, like="nano")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.id2label[3] == "LABEL_3"
    texts = ["Once upon a time.", "A fox.", "The little girl went out to play with her dog."]
    batch = tokenizer([f"{text}{tokenizer.eos_token}" for text in texts], padding=True, return_tensors="pt")
    found, ours = model(**batch).logits.detach(), fgpt.tokenizer("nano")
    for text, logits in zip(texts, found, strict=True):
        close(logits, classes(params, torch.tensor([*ours.encode(text), ours.eos_token_id])), atol=1e-4)
    saved = fgpt.tokenizer(str(tmp_path))
    assert [saved.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    assert saved.eos_token_ids == ours.eos_token_ids


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["a", "b"], "a head of 3 classes: expected as many labels, each once, got a, b"), (["a", "b", "a"], "each once")],
)
def test_labels_that_do_not_fit(labels: list[str], expected: str, tmp_path: Path):
    with pytest.raises(fgpt.InputError, match=expected):
        fgpt.save(fgpt.with_classification_head(tiny(), 3, fgpt.key(0)), tmp_path / "a", labels=labels)
    assert not (tmp_path / "a").exists()


def test_a_quantized_classifier_is_to_be_merged_first(tmp_path: Path):
    params = fgpt.quantize(fgpt.with_classification_head(tiny(), 3, fgpt.key(0)), "int8")
    with pytest.raises(fgpt.InputError, match="a classifier over quantized weights has no such format: merge"):
        fgpt.save(params, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("score", [torch.zeros(3, 15), torch.zeros(0, 16), torch.zeros(16), torch.zeros(3, 16).int()])
def test_a_head_that_is_none(score: torch.Tensor, tmp_path: Path):
    fgpt.save(fgpt.with_classification_head(tiny(), 3, fgpt.key(0)), tmp_path)
    save_file(load_file(tmp_path / models.WEIGHTS) | {"score.weight": score}, tmp_path / models.WEIGHTS)
    with pytest.raises(fgpt.InputError, match=r"tensor score\.weight: expected"):
        fgpt.load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [["--adapter.kind", "lora"], ["--adapter.kind", "full"], ["--quantize", "nf4"], ["--head", "lm"]],
    ids=["lora", "full", "nf4", "lm"],
)
def test_a_run_that_classifies_is_merged(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "rows.txt").write_text("I am happy;joy\nI am sad;fear\n" * 8)
    run = [
        "--base",
        "nano",
        "--train",
        str(tmp_path / "rows.txt"),
        "--num-heldout",
        "4",
        "--steps",
        "2",
        "--max-seq-len",
        "32",
    ]
    run += ["--labels", "joy=love", "fear", "--out", str(tmp_path)]
    assert main(["train", "emotion-small", *run, *options]) == 0
    out = tmp_path / "emotion-small"
    nf4 = "--quantize" in options
    assert main(["merge", str(out), *(["--merge-base", "dequantized"] if nf4 else [])]) == 0
    merged = out / ("merged-dequantized" if nf4 else "merged")
    trained, ours = load_classifier(out), fgpt.tokenizer("nano")
    row = torch.tensor([*ours.encode("I am very happy today"), ours.eos_token_id])
    expected = fgpt.apply(trained.params, row)[-1]
    change = json.loads((merged / "merge.json").read_text())["read back"]
    assert change["logit"] < (2e-2 if nf4 else 1e-3)
    if "lm" in options:
        close(fgpt.apply(fgpt.load(merged), row)[-1], expected, atol=1e-3)
        return
    assert main(["train", "emotion-small", *run, "--base", str(merged)]) == 2
    assert "is a classifier of 2 classes: expected a language model" in capsys.readouterr().err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    assert model.config.id2label == {0: "love", 1: "fear"}
    close(model(row[None]).logits[0].detach(), expected, atol=1e-3)


def test_the_adapter_of_a_classifier_is_peft_s(tmp_path: Path):
    """Its base is a folder here, which its config does not name in full."""
    base, run = tmp_path / "base", tmp_path / "runs"
    fgpt.save(fgpt.load("nano"), base, like="nano")
    (tmp_path / "rows.txt").write_text("I am happy;joy\nI am sad;fear\n" * 8)
    options = [
        "--train",
        str(tmp_path / "rows.txt"),
        "--num-heldout",
        "4",
        "--steps",
        "3",
        "--max-seq-len",
        "32",
        "--micro-batch-size",
        "1",
    ]
    assert main(["train", "emotion-small", "--base", str(base), *options, "--out", str(run)]) == 0
    at = run / "emotion-small" / "adapter"
    config = json.loads((at / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert str(tmp_path) not in json.dumps(config)
    (at / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    reference = AutoPeftModelForSequenceClassification.from_pretrained(at, num_labels=2).eval()
    trained, ours = load_classifier(run / "emotion-small"), fgpt.tokenizer("nano")
    row = torch.tensor([*ours.encode("I am very happy today"), ours.eos_token_id])
    close(reference(row[None]).logits[0].detach(), fgpt.apply(trained.params, row)[-1].detach(), atol=1e-4)
