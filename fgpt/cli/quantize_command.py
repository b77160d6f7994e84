"""`fgpt quantize`: what each format costs a base on your own text, and the quantized base as a folder.

loss, change        of the last windows of the text, beside the full base
gradient            how far a LoRA's first gradient moves there
calibration         GPTQ reads the windows before them
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from rich.table import Table
from tyro.conf import Positional, arg

from fgpt.classification_head import num_classes
from fgpt.cli.console import console, result_console, show_progress
from fgpt.cli.devices import resolve_device, resolve_dtype
from fgpt.cli.model_card.card import write_quantized_card
from fgpt.cli.paths import shareable
from fgpt.errors import InputError
from fgpt.evaluation.quantization_cost import QuantizationCost, measure_base, quantization_cost
from fgpt.gptq import quantize_gptq
from fgpt.io import models
from fgpt.io.files import atomic_dir, read_text, write_json
from fgpt.layers import has_quantized
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.quantization import quantize
from fgpt.ranges import PositiveInt
from fgpt.tree import nbytes

BaseFormat = Literal["int8", "rotated-int8", "gptq-rotated-int8", "blockwise8", "nf4", "gptq-nf4"]
CALIBRATED = ("gptq-rotated-int8", "gptq-nf4")
"""What GPTQ makes of the base, by a text."""
FULL = "full"
MANIFEST = "quantize.json"
MEASURED_SHARE = 4
"""At most one window of so many is measured on: GPTQ needs the others."""
CALIBRATION_WINDOWS = 64
"""The most windows that GPTQ reads: by 32 and 64 of them SmolLM2's nf4 loses 3.4 and 2.6 % on instructions."""


@dataclass(frozen=True)
class QuantizeOptions:
    """Compare the formats of a base on your own text, and write it in one of them."""

    base: Annotated[Positional[str], arg(metavar="BASE")]
    """nano (embedded), smollm2 (a package), a local folder or GGUF file, or a name on the Hugging Face Hub."""
    text: Path | None = None
    """A UTF-8 file of what the model is for: all formats are compared on its end, and GPTQ is calibrated on what comes
    before, which takes some fifteen minutes a format for 135 M parameters on a CPU. None compares nothing."""
    to: BaseFormat | None = None
    """The format to write; None writes nothing."""
    out: Path | None = None
    """The folder to write; None takes BASE-FORMAT in the current folder."""
    layout: Literal["fgpt", "bitsandbytes"] = "fgpt"
    """Of the folder: transformers reads that of bitsandbytes too, which has no rotated-int8 and no blockwise8."""
    max_seq_len: PositiveInt = 512
    """Tokens in a window of the text."""
    windows: PositiveInt = 8
    """Windows to compare on, at most a quarter of the text."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the full base, and of what a quantized weight stands for; auto is that of training."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or auto."""


class FormatResult(NamedTuple):
    """A row of the table."""

    bytes: int
    seconds: float
    cost: QuantizationCost


class TimedBase(NamedTuple):
    """A quantized base, and how long its quantization took."""

    params: GPT
    seconds: float


def run(options: QuantizeOptions) -> Path | None:
    """Print the table, and write the folder. Returns it, or None if nothing is written.

    Raises InputError for bad input, before anything slow begins where that can be known.
    """
    folder = _check(options)
    device = resolve_device(options.device)
    tokenizer = models.tokenizer(options.base)
    with show_progress(f"loading {options.base}"):
        params = models.load(options.base, resolve_dtype(options.dtype, device), device=device)
    if (classes := num_classes(params)) is not None:
        raise InputError(f"{options.base} is a classifier of {classes} classes: expected a language model")
    if has_quantized(params):
        raise InputError(f"{options.base} is quantized already: give the full base")
    measured, calibration = list[Batch](), list[Batch]()
    if options.text is not None:
        tokens = torch.tensor(tokenizer.encode(read_text(options.text)), device=device)
        measured, calibration = _windows(tokens, min(options.max_seq_len, params.cfg.n_ctx), options)
    chosen: dict[str, TimedBase] = {}
    if options.to is not None:  # before the comparison, which takes a while and would end in the same error
        with show_progress(f"quantizing {options.base} to {options.to}"):
            chosen[options.to] = _time_quantization(options.to, params, calibration)
    results: dict[str, FormatResult] = {}
    if measured:
        results = _compare(params, measured, calibration, chosen)
        result_console.print(table(options.base, results, measured))
        result_console.print(recommendation(results), soft_wrap=True)
    if options.to is None or folder is None:
        return None
    quantized = chosen[options.to].params
    with atomic_dir(folder) as partial:
        models.save(quantized, partial, like=options.base, layout=options.layout)
        manifest = {"base": shareable(options.base), "format": options.to, "bytes": nbytes(quantized)}
        cost = results[options.to].cost._asdict() if options.to in results else {}
        if options.text is not None and cost:
            manifest |= {"text": shareable(options.text), **cost}
        write_json(partial / MANIFEST, manifest)
        write_quantized_card(partial, options.base, options.to, options.layout, cost)
    console.print(
        f"saved {folder}, {nbytes(quantized) / 1e6:,.1f} MB in place of {nbytes(params) / 1e6:,.1f}; train over it by "
        f"--base {folder}, without --quantize",
        markup=False,
        soft_wrap=True,
    )
    return folder


def quantize_to(format: BaseFormat, params: GPT, calibration: list[Batch]) -> GPT:
    """The base in a format; GPTQ reads the batches."""
    formats: dict[BaseFormat, Callable[[], GPT]] = {
        "int8": lambda: quantize(params, "int8"),
        "rotated-int8": lambda: quantize(params, "int8", rotate=True),
        "blockwise8": lambda: quantize(params, "blockwise8"),
        "gptq-rotated-int8": lambda: quantize_gptq(params, calibration, "int8", rotate=True),
        "nf4": lambda: quantize(params, "nf4"),
        "gptq-nf4": lambda: quantize_gptq(params, calibration, "nf4"),
    }
    return formats[format]()


def table(base: str, results: dict[str, FormatResult], batches: list[Batch]) -> Table:
    """A row for each format, the full base first."""
    count = sum(int(batch.weights.sum()) for batch in batches)
    view = Table("format", "MB", "loss", "change", "gradient error", "seconds", title=f"{base} on {count:,} tokens")
    view.title_justify = "left"
    for column in view.columns[1:]:
        column.justify = "right"
    for name, (size, seconds, cost) in results.items():
        changes = (
            ("", "", "")
            if name == FULL
            else (f"{100 * cost.loss_increase:+.2f} %", f"{100 * cost.gradient_error:.1f} %", f"{seconds:.1f}")
        )
        view.add_row(name, f"{size / 1e6:,.1f}", f"{cost.loss:.4f}", *changes)
    return view


def recommendation(results: dict[str, FormatResult]) -> str:
    """One sentence: of the fast formats, and of the small ones, the one that moves the gradient least."""
    described: list[str] = []
    for names in (("int8", "rotated-int8", "gptq-rotated-int8"), ("nf4", "gptq-nf4")):
        measured = [name for name in names if name in results]
        if measured:
            best = min(measured, key=lambda name: results[name].cost.gradient_error)
            size, _, cost = results[best]
            described.append(f"{best} ({size / 1e6:,.1f} MB, loss {100 * cost.loss_increase:+.2f} %)")
    return f"recommended: {'; where memory is short, '.join(described)}"


def _check(options: QuantizeOptions) -> Path | None:
    """The folder to write, if any. Raises InputError for options that do not go together."""
    if options.text is None and options.to is None:
        raise InputError("nothing to do: give --text FILE to compare formats, --to FORMAT to write one, or both")
    if options.text is None and options.to in CALIBRATED:
        raise InputError(f"{options.to} is calibrated on text: give --text FILE")
    if options.to is None:
        if options.out is not None:
            raise InputError(f"--out {options.out} has nothing to write: give --to {'|'.join(get_args(BaseFormat))}")
        if options.layout != "fgpt":
            raise InputError(f"--layout {options.layout} is of a folder that is written: give --to FORMAT too")
        return None
    if options.layout == "bitsandbytes" and options.to in ("rotated-int8", "gptq-rotated-int8", "blockwise8"):
        raise InputError(f"bitsandbytes' files hold no {options.to}: expected int8, nf4 or gptq-nf4")
    folder = options.out or Path(f"{options.base.rstrip('/').split('/')[-1]}-{options.to}")
    if folder.exists():
        raise InputError(f"{folder} exists: give another --out, or remove it")
    return folder


def _windows(tokens: torch.Tensor, seq: int, options: QuantizeOptions) -> tuple[list[Batch], list[Batch]]:
    """The windows to compare on, and those before them to calibrate on. Raises InputError for too short a text."""
    count = len(tokens) // (seq + 1)
    if count < 2:
        raise InputError(
            f"{options.text} has {len(tokens):,} tokens: expected two windows of {seq + 1} at least; give a longer "
            "text or a smaller --max-seq-len"
        )
    batches: list[Batch] = []
    for window in tokens[len(tokens) - count * (seq + 1) :].view(count, 1, seq + 1):
        batches.append(Batch(window[:, :-1], window[:, 1:], torch.ones(1, seq, device=tokens.device)))
    measured = min(options.windows, max(1, count // MEASURED_SHARE))
    calibration = batches[:-measured][-CALIBRATION_WINDOWS:]
    console.print(
        f"{options.text}: {len(tokens):,} tokens in {count} windows of {seq}; the last {measured} are compared on, "
        f"{len(calibration)} before them calibrate GPTQ",
        markup=False,
        soft_wrap=True,
    )
    return batches[-measured:], calibration


def _time_quantization(format: BaseFormat, params: GPT, calibration: list[Batch]) -> TimedBase:
    begin = time.perf_counter()
    quantized = quantize_to(format, params, calibration)
    return TimedBase(quantized, time.perf_counter() - begin)


def _compare(
    params: GPT, measured: list[Batch], calibration: list[Batch], chosen: dict[str, TimedBase]
) -> dict[str, FormatResult]:
    """The rows of the table; the base in a chosen format is not quantized again."""
    with show_progress("measuring the full base"):
        full = measure_base(params, measured)
    results = {FULL: FormatResult(nbytes(params), 0.0, quantization_cost(full, full))}
    for format in get_args(BaseFormat):
        with show_progress(f"measuring {format}"):
            try:
                quantized, seconds = chosen.get(format) or _time_quantization(format, params, calibration)
            except InputError as err:
                console.print(f"{format} is left out: {err}", markup=False, soft_wrap=True)
                continue
            cost = quantization_cost(full, measure_base(quantized, measured))
            results[format] = FormatResult(nbytes(quantized), seconds, cost)
    return results
