"""All sections inside a time limit: `just gpu [--minutes 8] [--tiny] [--only parity decoding]`.

The most important sections come first. What fails is reported, and the next section runs. Numbers go to gpu.json in the
folder that $OUT names.
"""

import argparse
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from experiments.bench.gpu.attention_shapes import attention_shapes
from experiments.bench.gpu.ceilings import ceilings
from experiments.bench.gpu.decoding import decoding
from experiments.bench.gpu.environment import environment
from experiments.bench.gpu.lora_steps import lora_steps
from experiments.bench.gpu.measure import DEVICE
from experiments.bench.gpu.parity import parity
from experiments.bench.gpu.peft_step import compare_with_peft
from experiments.bench.gpu.quantized_bases import quantized_bases
from experiments.bench.gpu.report import Report, out_folder
from experiments.bench.gpu.stacked_members import stacked_members
from experiments.bench.gpu.training_loop import training_loop


class Section(NamedTuple):
    run: Callable[[Report, bool], None]
    seconds_needed: float
    """Of the time limit; with less it is left out."""


SECTIONS = {
    "environment": Section(environment, 5),
    "parity": Section(parity, 30),
    "attention": Section(attention_shapes, 20),
    "ceilings": Section(ceilings, 10),
    "LoRA step": Section(lora_steps, 60),
    "training loop": Section(training_loop, 40),
    "sweep": Section(stacked_members, 30),
    "quantized bases": Section(quantized_bases, 40),
    "PEFT": Section(compare_with_peft, 40),
    "decoding": Section(decoding, 40),
}


def run_section(name: str, report: Report, tiny: bool) -> None:
    section = SECTIONS[name]
    if report.seconds_left < section.seconds_needed:
        report.add(name, "left out", "no time")
        return
    before = report.seconds_left
    try:
        section.run(report, tiny)
    except Exception as err:  # the other sections still measure
        traceback.print_exc(limit=-3)
        report.add(name, "failed", f"{type(err).__name__}: {str(err).splitlines()[0][:200]}")
    report.add(name, "time (s)", round(before - report.seconds_left, 1))
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    """Exit code 1 if a section failed, or a gradient differs from the CPU's."""
    parser = argparse.ArgumentParser(prog="just gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="the time limit")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, to try the sections themselves")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report = Report(options.minutes)
    for name in options.only:
        run_section(name, report, options.tiny)
        report.write(out_folder())
    print(f"\n{report.table()}")
    wrong = report.values.get("parity", {}).get("gradients that differ from the CPU's, or fail", "none")
    return int(wrong != "none" or any("failed" in values for values in report.values.values()))


if __name__ == "__main__":
    raise SystemExit(main())
