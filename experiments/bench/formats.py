"""What the formats of a quantized base cost a trained model: loss, outputs and the gradient of a LoRA beside fp32.

    python -m experiments.bench formats --calibration wiki.train.raw.xz --evaluation wiki.test.raw

Windows of tokens are spread evenly over either text. What needs texts to quantize sees those of the calibration file
alone.
"""

import lzma
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from experiments.bench.adapters import perturb
from experiments.bench.timing import console, hardware, report
from fgpt.adapter_lora import lora
from fgpt.adapters import adapt
from fgpt.errors import InputError, short_repr
from fgpt.gptq import quantize_gptq
from fgpt.io.models import load, tokenizer
from fgpt.losses import Batch, loss
from fgpt.model import GPT, apply
from fgpt.quantization import quantize
from fgpt.rng import key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import leaves, nbytes

BATCH_SIZE = 4
"""Windows in one forward pass."""
RANK = 8
HEADS = ("format", "loss", "relative to fp32", "KL from fp32", "LoRA gradient: rel. error", "MB of blocks", "seconds")

FORMATS: Mapping[str, Callable[[GPT, Sequence[Batch]], GPT]] = {
    "int8": lambda params, texts: quantize(params, "int8"),
    "int8, GPTQ": lambda params, texts: quantize_gptq(params, texts, "int8"),
    "rotated int8": lambda params, texts: quantize(params, "int8", rotate=True),
    "rotated int8, GPTQ": lambda params, texts: quantize_gptq(params, texts, "int8", rotate=True),
    "nf4": lambda params, texts: quantize(params, "nf4"),
    "nf4, GPTQ": lambda params, texts: quantize_gptq(params, texts, "nf4"),
    "fp4": lambda params, texts: quantize(params, "fp4"),
    "fp4, GPTQ": lambda params, texts: quantize_gptq(params, texts, "fp4"),
}
"""From a model and calibration texts to the quantized model."""


@dataclass(frozen=True)
class Formats:
    """What formats of a quantized base do to the loss, the outputs and the gradient of a LoRA."""

    calibration: Path
    """Text that GPTQ sees; .xz is decompressed."""
    evaluation: Path
    """Text on which all are compared."""
    model: str = "smollm2"
    formats: tuple[str, ...] = field(default_factory=lambda: tuple(FORMATS))
    width: int = 512
    """Tokens of a window."""
    calibration_windows: int = 64
    evaluation_windows: int = 40
    out: Path = Path("runs/bench")


@dataclass(frozen=True)
class Score:
    """A format beside fp32.

    Args:
        format: Its name.
        loss: Of the evaluation text, in nats per token.
        relative: loss / loss in fp32 - 1.
        kl: Σ p log(p / q), p in fp32 and q in the format, in nats per token.
        gradient_error: ‖g - g_fp32‖ / ‖g_fp32‖, g the gradient of the B's of a LoRA on all matrices.
        block_bytes: Of the blocks.
        seconds: To quantize.
    """

    format: str
    loss: float
    relative: float
    kl: float
    gradient_error: float
    block_bytes: int
    seconds: float

    @property
    def cells(self) -> tuple[str, ...]:
        numbers = f"{self.loss:.4f}", f"{self.relative:+.2%}", f"{self.kl:.4f}", f"{self.gradient_error:.1%}"
        return self.format, *numbers, f"{self.block_bytes / 1e6:.1f}", f"{self.seconds:.0f}"


def formats(bench: Formats) -> None:
    """Run the benchmark and write runs/bench/formats.json and formats.md. Raises InputError."""
    unknown = [name for name in bench.formats if name not in FORMATS]
    if unknown:
        raise InputError(f"format {unknown[0]!r}: expected one of {', '.join(FORMATS)}")
    model_tokenizer, calibration_text = tokenizer(bench.model), read_text(bench.calibration)
    calibration = windows(model_tokenizer, calibration_text, bench.calibration_windows, bench.width)
    evaluation = windows(model_tokenizer, read_text(bench.evaluation), bench.evaluation_windows, bench.width)
    check_apart(calibration_text, model_tokenizer, evaluation)
    scores = compare(load(bench.model), calibration, evaluation, {name: FORMATS[name] for name in bench.formats})
    notes = [
        f"{hardware(torch.device('cpu'))}; {bench.model}; {bench.calibration_windows} windows of {bench.width} tokens "
        f"of {bench.calibration.name} to calibrate, {bench.evaluation_windows} of {bench.evaluation.name} to evaluate"
    ]
    sheet = HEADS, [score.cells for score in scores]
    report("formats", ("format", "fp32"), [], notes, bench.out, [sheet])


def read_text(path: Path) -> str:
    content = path.read_bytes()
    return (lzma.decompress(content) if path.suffix == ".xz" else content).decode()


def windows(model_tokenizer: Tokenizer, text: str, count: int, width: int) -> list[Batch]:
    """`count` windows of `width` tokens and the token that follows, spread evenly over a text."""
    # Of a long text the tokens between two windows are never looked at: each is cut out of some characters of its own.
    step = len(text) // count
    rows: list[Tensor] = []
    for i in range(count):
        tokens = model_tokenizer.encode(text[i * step : i * step + min(step, 12 * width)])
        if len(tokens) <= width:
            raise InputError(f"a text of {len(text)} characters is too short for {count} windows of {width} tokens")
        rows.append(torch.tensor(tokens[: width + 1]))
    batches: list[Batch] = []
    for part in torch.stack(rows).split(BATCH_SIZE):
        batches.append(Batch(part[:, :-1], part[:, 1:], torch.ones(len(part), width)))
    return batches


def check_apart(calibration_text: str, model_tokenizer: Tokenizer, evaluation: Sequence[Batch]) -> None:
    """Raises InputError if a part of the evaluation text is in the calibration text."""
    for batch in evaluation:
        for row in batch.tokens:
            middle = model_tokenizer.decode(row[len(row) // 2 :][:32].tolist()).strip()
            if middle in calibration_text:
                raise InputError(f"the calibration text has a part of the evaluation text: {short_repr(middle)}")


def compare(
    params: GPT,
    calibration: Sequence[Batch],
    evaluation: Sequence[Batch],
    formats: Mapping[str, Callable[[GPT, Sequence[Batch]], GPT]],
) -> list[Score]:
    """fp32 and each format, on the evaluation texts; the gradient is that of their first batch."""
    models, seconds = {"fp32": params}, {"fp32": 0.0}
    for name, to_format in formats.items():
        console.print(f"{name} ..")
        start = time.perf_counter()
        models[name] = to_format(params, calibration)
        seconds[name] = time.perf_counter() - start
    console.print("losses and outputs ..")
    losses, kls = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for batch in evaluation:
        reference = log_probs(params, batch)
        for name, model in models.items():
            q = reference if name == "fp32" else log_probs(model, batch)
            losses[name] -= q.gather(-1, batch.targets[..., None]).sum().item()
            kls[name] += (reference.exp() * (reference - q)).sum().item()
    console.print("gradients ..")
    gradients = {name: lora_gradient(model, params, evaluation[0]) for name, model in models.items()}
    count, expected = sum(batch.targets.numel() for batch in evaluation), gradients["fp32"]
    scores: list[Score] = []
    for name, model in models.items():
        error = float((gradients[name] - expected).norm() / expected.norm())
        value, relative = losses[name] / count, losses[name] / losses["fp32"] - 1
        scores.append(Score(name, value, relative, kls[name] / count, error, nbytes(model.blocks), seconds[name]))
    return scores


@torch.no_grad()
def log_probs(params: GPT, batch: Batch) -> Tensor:
    return apply(params, batch.tokens).log_softmax(-1)


def lora_gradient(base: GPT, params: GPT, batch: Batch) -> Tensor:
    """The gradient of the B's of a LoRA on all matrices of `params`, as one vector; no B is 0."""
    adapters = perturb(lora(params, key(1), RANK))
    gradient: Any = grad(lambda adapters: loss(adapt(base, adapters), batch))(adapters)
    return torch.cat([x.flatten() for path, x in leaves(gradient).items() if path.endswith("/b")])
