"""Files of labeled texts: formats, labels, folders and the hub's cache."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from builders import ROOT, SharedData

from fgpt.cli.training.examples import load_classification_split, load_test_texts, warn_of_shared_texts
from fgpt.data.classification_datasets import HUB_DATASETS, Columns, load_labeled_texts
from fgpt.data.classification_prompts import (
    LabeledText,
)
from fgpt.errors import InputError
from fgpt.recipes import ClassificationRecipe, find


def test_files_of_labeled_texts(tmp_path: Path):
    (tmp_path / "a.txt").write_text("i am; sad;sadness\n\n hooray ;joy\n", encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.txt")) == [
        LabeledText("i am; sad", "", "sadness"),
        LabeledText("hooray", "", "joy"),
    ]
    assert load_labeled_texts(str(tmp_path / "a.txt"))[1].where == f"{tmp_path / 'a.txt'}, line 3"
    (tmp_path / "a.csv").write_text('label,text\n2,"so, ""so"""\n', encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.csv")) == [LabeledText('so, "so"', "", "2")]
    (tmp_path / "a.tsv").write_text('index\ts1\ts2\tlabel\n0\t"We know\tIt "is"\tyes\n', encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.tsv"), columns=Columns("s1", "s2")) == [
        LabeledText('"We know', 'It "is"', "yes")
    ]


@pytest.mark.parametrize(
    ("name", "split", "columns", "count", "labels"),
    [
        ("emotion/train.txt", "train", None, 16000, {"sadness", "joy", "love", "anger", "fear", "surprise"}),
        ("davidson/val.csv", "test", None, 200, {"hate", "offensive", "neutral"}),
        ("davidson/labeled_data.csv", "train", Columns("tweet", label="class"), 24783, {"0", "1", "2"}),
        ("rte/dev.tsv", "test", Columns("sentence1", "sentence2"), 277, {"entailment", "not_entailment"}),
    ],
)
def test_real_files(
    name: str, split: str, columns: Columns | None, count: int, labels: set[str], shared_data: SharedData
):
    found = load_labeled_texts(str(shared_data(name)), split, columns)  # pyright: ignore[reportArgumentType]
    assert len(found) == count
    assert {row.label for row in found} == labels


def put(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format of the file's name, as pandas and json write them."""
    texts = [{name: "" if x is None else str(x) for name, x in record.items()} for record in records]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{record['text']};{record['label']}\n" for record in texts))
    elif path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        table = [{"text": "text", "label": "label"}, *texts]
        path.write_text("".join(f"{row['text']}{mark}{row['label']}\n" for row in table))
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


@pytest.mark.parametrize("end", FORMATS)
@pytest.mark.parametrize(
    ("given_labels", "labels"),
    [
        ([1, 0, 12], ["1", "0", "12"]),
        ([1.0, 0.0, -2.0], ["1", "0", "-2"]),
        (["1", "1.0", "0.00"], ["1", "1", "0"]),
        ([0.5, 2.25, 1e3], ["0.5", "2.25", "1000"]),
        ([True, False, True], ["True", "False", "True"]),
        (["01", "v1.0", "none"], ["01", "v1.0", "none"]),
    ],
)
def test_labels_have_one_rule(given_labels: list[Any], labels: list[str], end: str, tmp_path: Path):
    records = [{"text": f"text {i}", "label": label} for i, label in enumerate(given_labels)]
    assert [row.label for row in load_labeled_texts(str(put(tmp_path / f"a{end}", records)))] == labels


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [None, float("nan"), "", "nan", "NaN", "<NA>"])
@pytest.mark.parametrize("end", FORMATS)
def test_a_row_without_a_text_or_a_label_is_refused(end: str, value: Any, column: str, tmp_path: Path):
    records = [{"text": "a", "label": "b"}, {"text": "a", "label": "b"} | {column: value}]
    if end == ".parquet" and isinstance(value, float):
        records = [{"text": "a", "label": 1.0}, {"text": "a", "label": value}]
        column = "label"
    with pytest.raises(
        InputError, match=rf"(line|row) [23]: column '{column}' (is empty|holds .* means a missing value)"
    ):
        load_labeled_texts(str(put(tmp_path / f"a{end}", records)))


def test_a_file_to_train_on_is_scored_on_its_own_rows(tmp_path: Path):
    """A recipe's own test set is that of its own data."""
    path = put(tmp_path / "mine.csv", [{"text": f"text {i}", "label": i % 2} for i in range(400)])
    for name in ("emotion-small", "rte-small-lora"):
        run = find(name)
        assert isinstance(run, ClassificationRecipe)
        assert run.test is None
        recipe = replace(run, train=str(path), columns=Columns(), labels=(), num_heldout=40)
        train, test = load_classification_split(recipe)
        assert (len(train), len(test)) == (360, 40)
        assert {row.text for row in train} | {row.text for row in test} == {f"text {i}" for i in range(400)}
        given_test = replace(recipe, test=str(put(tmp_path / "test.csv", [{"text": "x", "label": 0}])))
        assert [len(part) for part in load_classification_split(given_test)] == [400, 1]
        assert load_test_texts(given_test) == load_classification_split(given_test)[1]


def test_texts_that_are_trained_on_and_scored_are_said():
    train = [LabeledText("a", label="x"), LabeledText("a", "b", label="x"), LabeledText("c", label="y")]
    assert warn_of_shared_texts(train, [LabeledText("b"), LabeledText("c", "b")]) == []
    assert warn_of_shared_texts(train, [LabeledText("a", label="y"), LabeledText("a", "b"), LabeledText("b")]) == [
        "warning: 2 of the test rows have texts that are trained on, too: the scores are too high"
    ]


@pytest.mark.slow
def test_folders_and_the_hub_s_cache(tmp_path: Path):
    """A split of a local folder, and a dataset of the hub that was fetched before, its classes by name."""
    data = tmp_path / "mine" / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"text": split, "label": 1}])
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    snapshot = tmp_path / "hub" / "datasets--dair-ai--emotion" / "snapshots" / "abc"
    (snapshot / "split").mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "oh", "label": 5}, {"text": "hm", "label": 0}]),
        snapshot / "split" / "test-00000-of-00001.parquet",
    )
    code = """
import sys
from fgpt.data.classification_datasets import load_labeled_texts
for source, split in (("mine", "test"), ("mine", "train"), ("emotion", "test"), ("emotion", "train")):
    try:
        print([(row.text, row.label) for row in load_labeled_texts(source, split)])
    except Exception as err:
        print(type(err).__name__, err)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    assert output[:3] == ["[('test', '1')]", "[('train', '1')]", "[('oh', 'surprise'), ('hm', 'sadness')]"]
    assert output[3].startswith("InputError the hub gave no 'emotion' (")
    assert "give a file instead" in output[3]
    assert HUB_DATASETS["rte"].files["test"] == "rte/validation-*.parquet"
