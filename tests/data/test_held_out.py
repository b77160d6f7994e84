"""Few rows are shared between training and evaluation; one row cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fgpt.cli.training.examples import load_instruction_data, num_heldout
from fgpt.errors import InputError
from fgpt.recipes.instruction import lora_nano


@pytest.mark.parametrize(
    ("count", "requested", "heldout"), [(60, 64, 6), (64, 64, 6), (127, 64, 12), (128, 64, 64), (2, 9, 1)]
)
def test_few_rows_are_shared(count: int, requested: int, heldout: int, capsys: pytest.CaptureFixture[str]):
    assert num_heldout(range(count), requested, "a.jsonl") == heldout
    message = " ".join(capsys.readouterr().err.split())
    hint = f"--num-heldout {requested} would be more than half"
    assert message == ("" if heldout == requested else f"held out {heldout} of {count} rows, a tenth: {hint}")


def test_one_row_cannot_be_shared():
    with pytest.raises(InputError, match=r"^a\.jsonl has 1 rows: expected 2 or more, one of them to be held out"):
        num_heldout(range(1), 1, "a.jsonl")


def test_a_long_row_is_named_by_its_place_in_its_source(tmp_path: Path):
    """Held-out rows and those of other sources do not count."""
    for name in ("a", "b"):
        rows = [
            {"instruction": f"Say {i}.", "output": "Yes. " * (999 if (name, i) == ("b", 37) else 1)} for i in range(40)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    recipe = replace(lora_nano(), data=(str(tmp_path / "a.json"), str(tmp_path / "b.json")), num_heldout=5)
    with pytest.raises(InputError, match=r"b\.json, row 38 has \d+ tokens, the limit is 512"):
        load_instruction_data(recipe)


def test_a_source_that_is_given_twice_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A row that is held out of the one is trained on from the other."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": f"Say {i}.", "output": "Yes."} for i in range(40)]))
    recipe = replace(lora_nano(), data=(str(path), str(path)), num_heldout=5)
    for changed, noticed in (
        (recipe, True),
        (replace(recipe, num_heldout=0), False),
        (replace(recipe, data=(str(path),)), False),
    ):
        load_instruction_data(changed)
        output = " ".join(capsys.readouterr().err.split())
        assert ("a.json is given 2 times: rows that are held out once are trained on otherwise" in output) == noticed
