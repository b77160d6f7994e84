"""Bad input to the training of a classifier is one line."""

import re
from pathlib import Path

import pytest

from fgpt.cli.main import main

GOOD = "i am glad;joy\ni am sad;fear\n" * 4


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ("i am glad\n", GOOD, [], r"train\.txt, line 1: no ';': expected text;label"),
        ("i am glad;joy\n\n  ;fear", GOOD, [], r"train\.txt, line 3: column 'text' is empty"),
        ("i am glad;", GOOD, [], r"train\.txt, line 1: column 'label' is empty"),
        ("", GOOD, [], r"train\.txt: the file is empty, expected rows"),
        ("\n\n", GOOD, [], r"train\.txt: it holds no rows"),
        (GOOD, "who;anger", [], r"test\.txt, line 1: label 'anger', expected one of fear, joy: fix the row"),
        (GOOD, GOOD, ["--labels", "joy"], r"labels are joy: expected at least two"),
        (GOOD, GOOD, ["--labels", "joy", "love"], r"line 2: label 'fear', expected one of joy, love"),
        (
            GOOD,
            GOOD,
            ["--labels", "joy", "fear", "love"],
            r"label 'love' has no training row: add some, or leave it out",
        ),
        (GOOD, GOOD, ["--labels", "joy", "fear", "joy"], r"one is there twice"),
        (GOOD, GOOD, ["--labels", "joy=x", "fear=x"], r"one is there twice"),
        ("i am glad;joy", GOOD, [], r"labels are joy: expected at least two"),
        (GOOD, GOOD, ["--head", "lm", "--labels", "joy", "fear=hate"], r"label 'hate' is 2 tokens \(' h"),
        (GOOD, GOOD, ["--num-fewshot", "2"], r"--num-fewshot 2 needs labels as next tokens: give --head lm"),
        (
            GOOD,
            GOOD,
            ["--head", "lm", "--num-fewshot", "20"],
            r"20 shots need 10 of 'fear', but there are 4: lower --num-fewshot",
        ),
        (GOOD, GOOD, ["--head", "classy"], r"classy"),
        (
            GOOD,
            GOOD,
            ["--max-seq-len", "3"],
            r"line 1: the words around a text take 1 of 3 tokens, which leaves too few",
        ),
        (GOOD, GOOD, ["--columns.text2", "more"], r"line 1: no column 'more'; there are 'text', 'label': name the"),
        (GOOD, GOOD, ["--columns.label", "class"], r"line 1: no column 'class'; .*--columns\.label"),
        (GOOD, GOOD, ["--test", "davidson"], r"davidson has no test split on the hub: leave --test out"),
        (GOOD, GOOD, ["--test", "gone.txt"], r"gone\.txt: no such file; expected a path or one of emotion, "),
        (
            GOOD,
            GOOD,
            ["--train", "emotions"],
            r"unknown source 'emotions': expected one of emotion, rte, davidson, or ",
        ),
        (
            "i am glad;joy",
            GOOD,
            ["--test", "None"],
            r"train\.txt has 1 rows: expected 2 or more, one of them to be held",
        ),
        (GOOD, GOOD, ["--tune-also", "nothing"], r"'nothing' matches no path"),
        (GOOD, GOOD, ["--adapter.target", "nothing"], r"'nothing' matches no path"),
        (GOOD, GOOD, ["--device", "cuda:99"], r"device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line(
    train: str, test: str, options: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(train)
    Path("test.txt").write_text(test)
    files = ["--train", "train.txt", "--test", "test.txt"]
    assert main(["train", "emotion-small", "--base", "nano", *files, *options]) == 2
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1, output
    assert output[0].startswith("error: ")
    assert re.search(message, output[0]), output[0]
    assert {p.name for p in tmp_path.iterdir()} == {"train.txt", "test.txt"}  # nothing half-made


def test_pairs_that_are_too_long_or_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "a fox ran home " * 20
    (tmp_path / "a.tsv").write_text(f"sentence1\tsentence2\tlabel\na\tb\tyes\na\tb\tno\n{long}\t{long}\tno\n")
    run = ["train", "rte-small-lora", "--base", "nano", "--labels", "yes", "no", "--test", str(tmp_path / "a.tsv")]
    out = ["--train", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "out"), "--max-seq-len", "40"]
    assert main([*run, *out]) == 2
    output = capsys.readouterr().err.strip()
    assert "a.tsv, line 4: both texts are too long: 80 and 80 tokens, with space for 38 in all" in output
    assert "\n" not in output
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\tlabel\na\t\tyes\n")
    assert main([*run, *out]) == 2
    assert "line 2: column 'sentence2' is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
