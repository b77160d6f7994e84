"""Options of a short training, and what a comparison prints."""

import json
from pathlib import Path

SHORT_TRAINING = [
    "--steps",
    "4",
    "--micro-batch-size",
    "2",
    "--warmup-steps",
    "1",
    "--compare-prompts",
    "3",
    "--max-new-tokens",
    "16",
]
RUN_NAMES = ["lora-nano", "ia3-nano"]


def comparison_of(path: Path) -> dict:
    return json.loads(path.read_text())
