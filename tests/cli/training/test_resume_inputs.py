"""Other inputs and other options are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.resume import resume

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.training.hashes import content_hash, fast_hash
from fgpt.data.examples import Example, Span
from fgpt.io.files import write_json
from fgpt.tree import leaves, replace_at


def test_other_inputs_are_refused(
    checkpointed_run: Path, tmp_path: Path, training_args: Any, capsys: pytest.CaptureFixture[str]
):
    """A row or a number of the base that has changed would make another training of it."""
    run = shutil.copytree(checkpointed_run, tmp_path / checkpointed_run.name)
    values = json.loads((run / "run.json").read_text())
    rows = json.loads(Path(run_dir.instruction_run(run).data[0]).read_text())
    rows[0]["output"] += " And more."
    write_json(tmp_path / "rows.json", rows)
    write_json(run / "run.json", values | {"data": [str(tmp_path / "rows.json")]})
    (run / "status.json").write_text('{"state": "running", "steps": 12}\n')
    before = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    assert main(resume(run)) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "was made from other inputs than there are now; changed: training rows. Restore them" in output
    assert before == {p: p.read_bytes() for p in run.rglob("*.safetensors")}


@pytest.mark.parametrize("hash_of", [content_hash, fast_hash])
def test_the_hash_sees_every_number(hash_of: Callable[..., str]):
    base = fgpt.init(fgpt.Config(1, 2, 8, 16, 11, 16), fgpt.key(0))
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    hashes = {hash_of(base, rows)}
    for path in leaves(base):
        hashes.add(hash_of(replace_at(base, {path: torch.nextafter(leaves(base)[path], torch.tensor(9.0))}), rows))
    hashes |= {
        hash_of(base, rows[::-1]),
        hash_of(base, [torch.tensor([1, 2]), torch.tensor([3, 4])]),
        hash_of(base, rows[:1]),
    }
    assert len(hashes) == len(leaves(base)) + 4


@pytest.mark.parametrize("hash_of", [content_hash, fast_hash])
def test_the_hash_sees_every_part_of_an_example(hash_of: Callable[..., str]):
    first, second = Example.completion((1, 2, 3), 1), Example.classification((4, 5), 2)
    others = [
        [first],
        [second, first],
        [replace(first, tokens=(1, 2)), replace(second, tokens=(3, 4, 5))],
        [replace(first, tokens=(1, 2, 4)), second],
        [replace(first, spans=(Span(2, 3),)), second],
        [first, replace(second, label=3)],
        [first, replace(second, spans=(Span(2, 3, 0.5),))],
        [],
    ]
    assert len({hash_of(rows) for rows in [[first, second], *others]}) == len(others) + 1
    assert hash_of([first, second]) == hash_of([Example.completion((1, 2, 3), 1), Example.classification((4, 5), 2)])


def test_options_that_make_another_run_are_refused(
    checkpointed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = shutil.copytree(checkpointed_run, tmp_path / checkpointed_run.name)
    assert main(resume(run)) == 2
    assert "has finished" in capsys.readouterr().err
    (run / "status.json").write_text('{"state": "interrupted", "steps": 12}\n')
    assert main(resume(run, "--lr", "0.5")) == 2
    assert "was started with --lr 0.006, not 0.5" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "lora-nano", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "nothing to resume" in capsys.readouterr().err
