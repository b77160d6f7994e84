"""`fgpt forget` beside the training that never had the rows: equal to the byte, and at what share of its steps.

    python -m experiments.research.forgetting [--sets 20 --steps 328]

A recipe is trained once, with a checkpoint after each step. Then random sets of its rows are forgotten, and for each
set the recipe is trained from the start with these rows at weight 0.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.main import main as fgpt
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.errors import InputError

RECIPE = "lora-nano"
ADAPTER = "adapter/adapter_model.safetensors"


def main(arguments: Sequence[str] | None = None) -> float:
    """The share of the sets that came out equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20, help="random sets of rows")
    parser.add_argument("--rows", type=int, default=3, help="rows of a set")
    parser.add_argument("--steps", type=int, default=328, help="updates of a training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in NANO_TASKS.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        common = [RECIPE, "--steps", str(options.steps), "--compare-prompts", "0", "--out", str(out)]
        run("train", *common, "--checkpoint-every-minutes", "0", "--keep-checkpoints", str(options.steps))
        equal, steps_taken, seconds = 0, 0, {"forget": 0.0, "train": 0.0}
        for i in range(options.sets):
            chosen = random.Random(f"{options.seed} {i}").sample(rows, options.rows)
            path = out / f"set-{i}.jsonl"
            path.write_text(
                "".join(json.dumps({k: row[k] for k in ("instruction", "input", "output")}) + "\n" for row in chosen)
            )
            begin = time.monotonic()
            run("forget", RECIPE, "--rows", str(path), "--name", f"forgot-{i}", "--out", str(out))
            seconds["forget"] += time.monotonic() - begin
            begin = time.monotonic()
            run("train", *common, "--forget", str(path), "--name", f"whole-{i}")
            seconds["train"] += time.monotonic() - begin
            equal += (out / f"forgot-{i}" / ADAPTER).read_bytes() == (out / f"whole-{i}" / ADAPTER).read_bytes()
            manifest: Any = json.loads((out / f"forgot-{i}" / "forget.json").read_text())
            steps_taken += options.steps - manifest["taken_up_after_step"]
    print(
        f"{equal} of {options.sets} sets equal; {steps_taken / options.steps / options.sets:.2f} of the steps, "
        f"{seconds['forget'] / seconds['train']:.2f} of the time of the trainings from the start",
        flush=True,
    )
    return equal / options.sets


def run(*command: str) -> None:
    if fgpt([*command]) != 0:
        raise InputError(f"fgpt {' '.join(command)} has failed")


if __name__ == "__main__":
    main()
