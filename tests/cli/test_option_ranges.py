"""Every numeric option has a range; a number out of it is one line."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from builders.command_line import OPTION_CLASSES

from fgpt import ranges
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.errors import InputError
from fgpt.recipes import RECIPES


def numeric(hint: Any) -> bool:
    parts = ranges.get_args(hint)
    return hint in (int, float) or any(map(numeric, parts))


def options_without_range(cls: type[Any]) -> list[str]:
    """Numeric fields without a range, in nested dataclasses too."""
    found: list[str] = []
    for name, hint in ranges.hints(cls).items():
        bare = ranges.get_args(hint)[0] if ranges.is_flat(hint) else hint
        if dataclasses.is_dataclass(bare):
            found += options_without_range(bare)  # pyright: ignore[reportArgumentType]
        elif numeric(hint) and not list(ranges.ranges(hint)):
            found.append(f"{cls.__name__}.{name}")
    return found


def test_every_numeric_option_has_a_range():
    assert len(OPTION_CLASSES) >= 13
    assert [name for cls in OPTION_CLASSES for name in options_without_range(cls)] == []


def test_every_recipe_is_within_them():
    for make in RECIPES.values():
        ranges.check(make())


BAD: dict[str, list[str]] = {
    "train lora-nano": [
        *(
            "--micro-batch-size=-1",
            "--micro-batch-size=0",
            "--micro-batch-size=9999999999",
            "--micro-batch-size=2147483647",
            "--grad-accumulation-steps=0",
            "--grad-accumulation-steps=-2",
            "--steps=0",
            "--steps=-3",
        ),
        *("--lr=-1", "--lr=nan", "--lr=inf", "--lr=0", "--epochs=0", "--epochs=-1", "--epochs=nan", "--epochs=1e300"),
        *(
            "--warmup-steps=-1",
            "--max-seq-len=0",
            "--max-seq-len=1",
            "--keep-checkpoints=0",
            "--checkpoint-every-minutes=-1",
            "--checkpoint-every-minutes=nan",
            "--eval-every=0",
        ),
        *("--num-heldout=-1", "--compare-prompts=-1", "--max-new-tokens=0", "--weight-decay=-1", "--weight-decay=nan"),
        *(f"--seed={2**64}", f"--seed={-(2**63) - 1}", "--adapter.rank=0", "--adapter.alpha=nan"),
        *("--adapter.alpha=0", "--adapter.alpha=-1", "--adapter.dropout=1", "--adapter.dropout=-0.1"),
    ],
    "doctor lora-nano": ["--micro-batch-size=-1", "--lr=nan"],
    "train emotion-small": ["--num-fewshot=-1", "--num-heldout=0", "--max-seq-len=1"],
    "train pretrain-nano": [
        *(
            "--betas 0.9 1",
            "--betas -0.1 0.9",
            "--min-lr-ratio=-1",
            "--min-lr-ratio=2",
            "--peak-tflops=0",
            "--vocab=0",
            "--n-layer=0",
        ),
        *(
            "--steps=0",
            "--lr=nan",
            "--warmup-steps=-1",
            "--micro-batch-size=2147483647",
            "--grad-accumulation-steps=2147483647",
            "--n-layer=2147483647",
        ),
    ],
    "generate r hi": [
        *(
            "--temperature=-1",
            "--temperature=nan",
            "--top-p=0",
            "--top-p=1.1",
            "--top-k=0",
            "--min-p=2",
            "--num-beams=0",
        ),
        *(
            "--num-return-sequences=0",
            "--max-new-tokens=0",
            "--length-penalty=nan",
            "--repetition-penalty=0",
            "--no-repeat-ngram=0",
        ),
        *(f"--seed={2**64}", "--length-penalty=1e300", "--length-penalty=-1e300", "--num-return-sequences=2147483647"),
        "--num-beams=2147483647",
    ],
    "chat r": ["--max-new-tokens=-1", "--top-k=-1"],
    "compare r": ["--num-prompts=0", "--max-new-tokens=0", "--temperature=inf"],
    "eval run r": ["--limit=0", "--num-generations=0", "--batch-size=0"],
    "eval text t": ["--window=0", "--stride=0", "--batch-size=0"],
    "eval tasks t": ["--limit=0", "--num-fewshot=-1"],
    "replay r": ["--step=0", "--step=-1"],
}


@pytest.mark.parametrize(("command", "option"), [(c, option) for c, options in BAD.items() for option in options])
def test_a_number_out_of_range_is_one_line_before_anything_is_read(
    command: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), *option.split()]) == 2
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 1
    name = option.partition("=")[0].split()[0].removeprefix("--")
    assert name in output[0].replace("_", "-")
    assert " is " in output[0]
    assert "expected" in output[0]
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_file_and_of_a_resumed_run_are_checked(project: Path, tmp_path: Path, capsys: Any):
    for field, value in (("micro_batch_size", -1), ("lr", math.nan), ("max_seq_len", 1)):
        values = json.loads((project / "runs" / "it[b]" / "run.json").read_text()) | {field: value}
        (tmp_path / "run.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=rf"run\.json: {field} is {value}: expected .*; correct it, or"):
            run_dir.read_run(tmp_path)
    (tmp_path / "run.json").write_text((project / "runs" / "it[b]" / "run.json").read_text())
    (tmp_path / "status.json").write_text('{"state": "interrupted"}')
    assert main(["train", str(tmp_path), "--resume", "--keep-checkpoints", "0"]) == 2
    assert "--keep-checkpoints is 0: expected 1 or more" in capsys.readouterr().err


def test_ranges_in_words():
    output = {
        "1 or more": ranges.Range(least=1, most=ranges.LARGEST),
        "a number above 0, at most 1": ranges.Range(above=0, most=1),
        "0 or more, below 1": ranges.Range(least=0, below=1),
        "a finite number": ranges.Range(),
    }
    assert {allowed.describe(-1): allowed for allowed in output.values()} == output
    assert ranges.Range(least=1, most=ranges.LARGEST).describe(2**40) == "1 or more, at most 2,147,483,647"
    assert not any(allowed.holds(x) for allowed in output.values() for x in (math.nan, math.inf, -math.inf))
    assert ranges.Range(least=0).holds(10**400)  # which no float is
