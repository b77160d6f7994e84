"""`fgpt classify`: the labels of texts by a trained run; and `fgpt eval` of it on rows and labels not its own."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

import fgpt
from fgpt.cli.inference.classifiers import load_classifier, predict
from fgpt.cli.main import main
from fgpt.data.classification_datasets import Columns, load_labeled_texts

GLAD, SAD = ("happy", "glad", "proud", "kind"), ("sad", "scared", "lost", "mean")
SAID = [(f"{who} was {how}.", "joy" if how in GLAD else "fear") for who in ("Tim", "Sue") for how in GLAD + SAD]
SHORT = ["--steps", "8", "--micro-batch-size", "1", "--warmup-steps", "1", "--lr", "6e-3", "--max-seq-len", "64"]


def train_classifier(at: Path, *options: str) -> Path:
    (at / "train.txt").write_text("\n".join(f"{text};{label}" for text, label in SAID))
    data = ["--base", "nano", "--train", str(at / "train.txt"), "--test", str(at / "train.txt"), "--out", str(at)]
    assert main(["train", "emotion-small", *data, *SHORT, *options]) == 0
    return at / "emotion-small"


@pytest.fixture(scope="module")
def token_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose labels are words that it writes."""
    return train_classifier(
        tmp_path_factory.mktemp("worded"), "--head", "lm", "--labels", "joy=love", "fear", "--prompt.suffix", " It"
    )


@pytest.fixture(scope="module")
def head_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_classifier(tmp_path_factory.mktemp("headed"))


def lines(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines()]


@pytest.mark.slow
def test_a_label_is_the_likeliest_next_word(token_classifier: Path, capsys: pytest.CaptureFixture[str]):
    """Against logits of the model that was trained, read by hand."""
    texts = ["Tim was happy.", "Sue was [lost]."]
    (token_classifier / "texts").write_text("\n".join(texts))
    capsys.readouterr()
    assert main(["classify", str(token_classifier), "--file", str(token_classifier / "texts")]) == 0
    predictions, classifier = lines(capsys.readouterr().out), load_classifier(token_classifier)
    encode = classifier.tokenizer.encode
    for (label, p, text), requested in zip(predictions, texts, strict=True):
        logits = fgpt.apply(classifier.params, torch.tensor([encode(requested) + encode(" It")]))[0, -1]
        both = logits[[encode(" love")[0], encode(" fear")[0]]].softmax(-1)
        assert (label, text) == (("love", "fear")[int(both.argmax())], requested)
        assert float(p) == pytest.approx(float(both.max()), abs=1e-4)


def test_a_table_has_each_label(head_classifier: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["classify", str(head_classifier), "Tim was happy.", "Sue was [lost]."]) == 0
    heading, *output = [
        line.split() for line in capsys.readouterr().out.splitlines() if "was" in line or "text" in line
    ]
    assert [x for x in heading if x.isalpha()] == ["text", "fear", "joy"]
    for words, text in zip(output, ("Tim was happy.", "Sue was [lost]."), strict=True):
        assert text in " ".join(words)
        assert sum(float(x) for x in words if x[0].isdigit()) == pytest.approx(1, abs=2e-3)


def test_what_is_piped_in(head_classifier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tim was happy.\r\nSue was sad.\n")))
    capsys.readouterr()
    assert main(["classify", str(head_classifier), "--file", "-"]) == 0
    assert [text for _, _, text in lines(capsys.readouterr().out)] == ["Tim was happy.", "Sue was sad."]


def test_labels_it_was_not_trained_on(token_classifier: Path, capsys: pytest.CaptureFixture[str]):
    (token_classifier / "texts").write_text("Tim was happy.\n")
    capsys.readouterr()
    assert (
        main(["classify", str(token_classifier), "--file", str(token_classifier / "texts"), "--labels", "good", "bad"])
        == 0
    )
    assert lines(capsys.readouterr().out)[0][0] in ("good", "bad")


@pytest.mark.slow
def test_pairs_have_a_tab(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = ["sentence1\tsentence2\tlabel", "Tim ran.\tHe ran.\tyes", "Tim ran.\tHe sat.\tno"]
    (tmp_path / "a.tsv").write_text("\n".join(table))
    data = ["--base", "nano", "--train", str(tmp_path / "a.tsv"), "--test", str(tmp_path / "a.tsv")]
    options = [*data, "--labels", "yes", "no", "--out", str(tmp_path), *SHORT[:4]]
    assert main(["train", "rte-small-lora", *options]) == 0
    capsys.readouterr()
    assert main(["classify", str(tmp_path / "rte-small-lora"), "Tim ran.\tHe sat."]) == 0
    assert "Tim ran. / He sat." in capsys.readouterr().out
    assert (
        main(["eval", "run", str(tmp_path / "rte-small-lora"), "--test", str(tmp_path / "a.tsv")]) == 0
    )  # its own columns
    capsys.readouterr()
    assert main(["classify", str(tmp_path / "rte-small-lora"), "Tim ran."]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: text 1: the run classifies pairs: expected two texts with a tab between them"
    )


def test_eval_on_other_rows(head_classifier: Path, tmp_path: Path):
    """As `predict` tells them."""
    (tmp_path / "other.csv").write_text("said,what\nAnn was happy.,joy\nAnn was lost.,joy\nAnn was mean.,fear\n")
    columns = ["--columns.text", "said", "--columns.label", "what"]
    assert (
        main(
            [
                "eval",
                "run",
                str(head_classifier),
                "--test",
                str(tmp_path / "other.csv"),
                *columns,
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    heldout = load_labeled_texts(str(tmp_path / "other.csv"), "test", Columns("said", label="what"))
    right = [
        a == row.label
        for a, row in zip(predict(load_classifier(head_classifier), heldout).argmax, heldout, strict=True)
    ]
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["test rows"]["accuracy"] == pytest.approx(sum(right) / 3)
    assert "test rows, untuned" not in found


def test_eval_on_other_labels_has_the_base_beside_it(token_classifier: Path, tmp_path: Path):
    (tmp_path / "other.txt").write_text("Ann was happy.;1\nAnn was lost.;0\n")
    labels = ["--labels", "1=good", "0=bad"]
    assert (
        main(
            [
                "eval",
                "run",
                str(token_classifier),
                "--test",
                str(tmp_path / "other.txt"),
                *labels,
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    found = json.loads((tmp_path / "eval.json").read_text())
    classifier, total = fgpt.tokenizer("nano"), 0.0
    base = fgpt.load("nano")
    for text, label in (("Ann was happy.", 0), ("Ann was lost.", 1)):
        logits = fgpt.apply(base, torch.tensor([classifier.encode(text) + classifier.encode(" It")]))[0, -1]
        total -= float(logits[[classifier.encode(" good")[0], classifier.encode(" bad")[0]]].log_softmax(-1)[label])
    assert found["test rows, untuned"]["loss (nats per row)"] == pytest.approx(total / 2, rel=1e-4)
    assert found["test rows"]["loss (nats per row)"] != found["test rows, untuned"]["loss (nats per row)"]


def test_bad_input_is_one_line(
    head_classifier: Path, token_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "gap").write_text("a\n\nb\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "odd.txt").write_text("Ann was lost.;rage\n")
    capsys.readouterr()
    for args, says in (
        (["classify", str(head_classifier)], "which texts? expected one of"),
        (["classify", str(head_classifier), "a", "--file", "b"], "which texts? expected one of"),
        (["classify", str(head_classifier), ""], "text 1: the text is empty"),
        (
            ["classify", str(head_classifier), "--file", str(tmp_path / "gone")],
            "gone: No such file or directory; expected a",
        ),
        (
            ["classify", str(head_classifier), "--file", str(tmp_path / "empty")],
            "empty is empty: expected a text",
        ),
        (["classify", str(head_classifier), "--file", "rows.csv"], "one text per line, and .csv has columns"),
        (["classify", str(head_classifier), "--file", str(tmp_path / "gap")], "gap, line 2: the text is empty"),
        (["classify", str(head_classifier), "--file", str(tmp_path / "latin")], "not a text in UTF-8 (byte 3)"),
        (["classify", str(head_classifier), "a", "--labels", "x", "y"], "has a head of its own labels, fear, joy"),
        (
            ["classify", str(token_classifier), "a", "--labels", "good", "x=good"],
            "labels good, x=good: one is there twice",
        ),
        (["classify", str(token_classifier), "a", "--labels", "good"], "labels are good: expected at least two"),
        (["classify", "nobody", "a"], "no trained run 'nobody'"),
        (
            ["eval", "run", str(head_classifier), "--labels", "x", "y"],
            "has a head of its own labels, fear, joy: leave",
        ),
        (
            ["eval", "run", str(head_classifier), "--test", str(tmp_path / "odd.txt")],
            "label 'rage', expected one of fear, joy",
        ),
        (["eval", "text", "x", "--base", "nano", "--labels", "x", "y"], "no option --labels"),
    ):
        assert main(args) == 2, args
        output = capsys.readouterr().err.strip()
        assert output.startswith("error: "), output
        assert says in output
        assert "\n" not in output
