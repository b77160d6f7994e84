"""Training a classifier: by a head, by a token, of pairs."""

import json
from pathlib import Path

import pytest
import torch

import fgpt
from experiments.bench.load import SHAPE
from fgpt.cli.inference.classifiers import (
    load_classifier,
    predict,
    with_head,
)
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.tasks.classification import build_trainable
from fgpt.data.classification_datasets import load_labeled_texts
from fgpt.data.classification_prompts import (
    LabeledText,
)
from fgpt.errors import InputError
from fgpt.model import Config, abstract_params
from fgpt.recipes import RECIPES, ClassificationRecipe, find

GLAD = ("happy", "glad", "proud", "kind")
SAD = ("sad", "scared", "lost", "mean")
NEW = ("a dog", "Tim", "the bird", "Sue", "a fox", "her mom", "the cat", "Ben")


@pytest.fixture(scope="module")
def feelings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a task that a small model can learn: is somebody glad or not?"""
    path = tmp_path_factory.mktemp("feelings")
    labeled_texts = [
        (f"One day, {who} was {how}.", "joy" if how in GLAD else "fear") for who in NEW for how in GLAD + SAD
    ]
    (path / "test.txt").write_text("\n".join(f"{text};{label}" for text, label in labeled_texts[:16]))
    (path / "train.txt").write_text("\n".join(f"{text};{label}" for text, label in labeled_texts[16:]))
    return ["--base", "nano", "--train", str(path / "train.txt"), "--test", str(path / "test.txt")]


SHORT = [
    "--steps",
    "25",
    "--micro-batch-size",
    "1",
    "--max-seq-len",
    "256",
    "--warmup-steps",
    "3",
    "--lr",
    "6e-3",
    "--adapter.kind",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_head_of_classes_learns(kind: str, feelings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rate = ["--lr", "1e-3"] if kind == "full" else []
    assert main(["train", "emotion-small", *feelings, *SHORT, kind, *rate, "--out", str(tmp_path)]) == 0
    out = tmp_path / "emotion-small"
    assert {p.name for p in out.iterdir()} == {
        *("run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard", "loss.png"),
        *("checkpoints", "adapter", "metrics.json", "confusion.png", "local.json"),
    }
    assert len(read_metrics(out / "metrics.jsonl")) == 25
    found = json.loads((out / "metrics.json").read_text())
    assert found["labels"] == ["fear", "joy"]
    assert found["scores"]["tuned"]["accuracy"] > 0.9
    assert found["scores"]["majority-class baseline"]["accuracy"] == 0.5
    trained = load_classifier(out)  # from its files alone
    assert isinstance(trained.recipe, ClassificationRecipe)
    test = load_labeled_texts(feelings[-1])
    predicted = predict(trained, [LabeledText(row.text) for row in test]).argmax
    assert sum(a == b.label for a, b in zip(predicted, test, strict=True)) / 16 == found["scores"]["tuned"]["accuracy"]
    with pytest.raises(InputError, match="has a head of its own labels, fear, joy: leave"):
        predict(trained, test, ["yes", "no"])
    assert main(["generate", str(out), "hi"]) == 2
    assert "is not an instruction-tuned run: it classifies: fgpt classify" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_label_as_the_next_token_learns(feelings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wording = ["--prompt.instruction", "One of {labels}.\n", "--prompt.suffix", " It was"]
    labels = ["--labels", "joy=love", "fear"]
    run = ["emotion-small", "--head", "lm", "--num-fewshot", "4", *feelings, *wording, *labels]
    assert main(["train", *run, *SHORT, "lora", "--out", str(tmp_path)]) == 0
    out = tmp_path / "emotion-small"
    assert "base: accuracy" in capsys.readouterr().err
    found = json.loads((out / "metrics.json").read_text())
    assert found["labels"] == ["love", "fear"]
    assert found["scores"].keys() == {"majority-class baseline", "base", "base, 4 shots", "tuned"}
    assert found["scores"]["tuned"]["accuracy"] > 0.9 > found["scores"]["base"]["accuracy"]
    assert (out / "adapter" / "adapter_config.json").exists()  # PEFT's
    trained = load_classifier(out)
    texts = [LabeledText("One day, the king was happy."), LabeledText("One day, the king was scared.")]
    assert predict(trained, texts).argmax == ["love", "fear"]
    others = predict(trained, texts, ["yes", "no"])  # labels that it has not been trained on
    assert others.names == ("yes", "no")
    assert torch.allclose(others.probabilities.sum(-1), torch.ones(2))
    with pytest.raises(InputError, match="label 'hate' is 2 tokens"):
        predict(trained, texts, ["hate", "no"])


@pytest.mark.slow
def test_pairs_train_over_a_quantized_base(tmp_path: Path):
    entails = [(f"{a} saw {b}.", f"{c} saw {b}.", "yes" if a == c else "no") for a in NEW for b in NEW[:2] for c in NEW]
    lines = ["sentence1\tsentence2\tlabel", *("\t".join(row) for row in entails)]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    options = ["--base", "nano", "--train", str(tmp_path / "a.tsv"), "--test", str(tmp_path / "a.tsv")]
    options += [
        "--labels",
        "yes",
        "no",
        "--quantize",
        "nf4",
        "--steps",
        "3",
        "--max-seq-len",
        "24",
        "--micro-batch-size",
        "4",
    ]
    assert main(["train", "rte-small-lora", *options, "--out", str(tmp_path / "out")]) == 0
    base = fgpt.with_classification_head(fgpt.load("nano"), 2, fgpt.key(0))
    assert "head.w" in fgpt.load_peft(tmp_path / "out" / "rte-small-lora" / "adapter", base)


GPT2 = Config(12, 12, 768, 1024, 50257, 3072)


@pytest.mark.parametrize(
    ("name", "cfg", "classes", "trained"),
    [
        ("emotion-small", GPT2, 6, 589_824 + 6 * 768),
        ("rte-small-lora", GPT2, 2, 589_824 + 2 * 768),
        ("hate-gptj-ln", SHAPE, 3, 861_408),
        ("hate-gptj-lora", SHAPE, 3, 2_696_416),
        ("hate-gptj-all", SHAPE, 3, 5_208_160),
    ],
)
def test_what_the_runs_train(name: str, cfg: Config, classes: int, trained: int):
    run = find(name)
    assert isinstance(run, ClassificationRecipe)
    assert fgpt.num_trainable(build_trainable(run, with_head(run, abstract_params(cfg), ["x"] * classes))) == trained
    assert f"{trained:,}" in (RECIPES[name].__doc__ or "")
