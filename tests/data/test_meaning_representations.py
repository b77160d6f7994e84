"""Meaning representations and their references are recognized by their columns."""

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders import SharedData
from builders.hub import FakeHub

from fgpt.cli.evaluation.data_to_text import load_references
from fgpt.data.instruction_datasets import Columns, load_examples, load_rows
from fgpt.data.prompt_templates import DATA_TO_TEXT, encode, template
from fgpt.data.rows import InstructionRow
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.recipes import DataToTextRecipe, find

MR = "name[Blue Spice], eatType[coffee shop]"


def table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("header", ["mr,ref", "id,ref,mr", "meaning_representation,human_reference"])
def test_the_columns_of_the_challenge_and_of_the_hub(header: str, tmp_path: Path):
    values = {"id": "7", "mr": f'"{MR}"', "meaning_representation": f'"{MR}"'}
    cells = [values.get(name, "A coffee shop.") for name in header.split(",")]
    examples = load_examples(table(tmp_path, header, ",".join(cells)))
    assert examples.rows == [InstructionRow(MR, "", "A coffee shop.")]
    assert "meaning representations and references" in examples.format


def test_the_test_split_of_a_folder(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(f'mr,ref\n"{MR}",of {split}\n')
    recipe = find("e2e-nano")
    assert isinstance(recipe, DataToTextRecipe)
    assert load_references(str(tmp_path), recipe).references == [["of test"]]
    assert load_references(f"{tmp_path}[train]", recipe).references == [["of train"]]


def test_the_challenges_repository_on_the_hub(fake: FakeHub):
    """Its revision without a program has a folder for each split."""

    def parquet(text: str) -> bytes:
        out = io.BytesIO()
        row = {"meaning_representation": MR, "human_reference": text}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), out)
        return out.getvalue()

    splits = ("train", "validation", "test")
    fake.files = {f"default/{split}/0000.parquet": parquet(f"of {split}") for split in splits}
    recipe = find("e2e-medium")
    assert isinstance(recipe, DataToTextRecipe)
    assert load_rows(recipe.data[0]) == [InstructionRow(MR, "", "of train")]
    assert load_references(str(recipe.test), recipe).references == [["of test"]]
    assert load_references(recipe.data[0], recipe).references == [["of test"]]
    assert not any("validation" in path for path in fake.asked if "resolve" in path)


def test_columns_that_are_named_come_first(tmp_path: Path):
    path = table(tmp_path, "mr,ref,other", "m,r,o")
    assert load_rows(path, Columns(instruction="mr", output="other")) == [InstructionRow("m", "", "o")]


@pytest.mark.parametrize(("header", "missing", "nearest"), [("mr,refs", "ref", "refs"), ("mrs,ref", "mr", "mrs")])
def test_a_missing_column_is_named(header: str, missing: str, nearest: str, tmp_path: Path):
    with pytest.raises(InputError, match=rf"no column '{missing}'; there are .*the nearest is '{nearest}'"):
        load_rows(table(tmp_path, header, "a,b"))


def test_a_text_begins_on_the_line_after_its_meaning():
    tokenizer = models.load_config_and_tokenizer("nano")[1]
    example = encode(InstructionRow(MR, "", "A café."), template("data-to-text"), tokenizer)
    ((start, stop, weight),) = example.spans
    tokens = list(example.tokens)
    assert tokenizer.decode(tokens[:start]) == f"{MR}\n"
    assert tokenizer.decode(tokens[start : stop - 1]) == "A café."
    assert (tokens[stop - 1], stop, weight) == (tokenizer.eos_token_id, len(tokens), 1.0)
    assert DATA_TO_TEXT.prompt(InstructionRow("a", "b")) == "a\n\nb\n"


def test_the_development_set(shared_data: SharedData):
    rows = load_rows(shared_data("e2e/devset.csv"))
    assert len(rows) == 4672
    assert rows[0].instruction == "name[Alimentum], area[city centre], familyFriendly[no]"
