"""Run directories as a training leaves them, and the page of one."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgpt import recipes
from fgpt.cli import report
from fgpt.cli.evaluation.compare.results import Answer, Comparison, as_json
from fgpt.data.prompt_templates import InstructionRow
from fgpt.io.files import write_json

EVIL = "<script>document.title = 'it ran'</script><img src='http://example.invalid/x.png'>"
LORA: Any = replace(recipes.find("lora-nano"), lr=1e-3, data=("rows 1.json",))


def write_lines(at: Path, steps: int, loss: float = 3.0) -> None:
    lines = (
        {"step": i, "loss": loss / i, "grad_norm": 90.0 / i, "lr": 1e-3, "tokens": 100 * i, "seconds": 0.5 * i}
        | {"memory_gb": 0.5, "weight": 7.0}
        | ({"heldout_loss": 2.0 / i} if i % 10 == 0 else {})
        for i in range(1, steps + 1)
    )
    at.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run_dir(at: Path, run: Any = LORA, steps: int = 60, **files: Any) -> Path:
    """A run's folder: `files` are JSON, by name without the ending."""
    at.mkdir()
    write_json(at / "run.json", {"kind": run.kind, "version": 1} | dataclasses.asdict(run))
    if steps:
        write_lines(at / "metrics.jsonl", steps)
    for name, value in files.items():
        write_json(at / f"{name}.json", value)
    return at


def comparison_with(prompts: int = 10) -> dict[str, Any]:
    rows = [
        InstructionRow(f"Say {i}. {EVIL}", "to & fro" if i else "", "It is." if i % 2 else "") for i in range(prompts)
    ]
    answers = {
        "base": [Answer("la la la la la la la la" if i else "", (), False) for i in range(prompts)],
        "tuned": [Answer(f"{i} is {EVIL}", (), True) for i in range(prompts)],
    }
    scores = {"base": {"points (0 to 100)": 10.0}, "tuned": {"points (0 to 100)": 20.0}}
    settings = {"base": "nano", "dtype": "float32", "quantize": None, "prompts": "held-out prompts"}
    settings |= {"max_new_tokens": 20, "sampling": {"temperature": 0.0, "top_k": None}, "seed": 0}
    more = {"steps": {"tuned": 60}, "intervals": {"tuned": {"points (0 to 100)": 4.5}}}
    best = {"points (0 to 100)": ["tuned"]}
    return as_json(Comparison("", [], rows, answers, scores, settings, best=best, **more))


def report_of(at: Path) -> str:
    return report.run(str(at)).read_text()


def section_of(text: str, name: str) -> str:
    return text.partition(f'<section id="{name}"')[2].partition("</section>")[0]
