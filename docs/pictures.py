"""The pictures of the site, drawn from what fgpt computes: `just docs-pictures`.

loss.svg           fgpt train lora-nano --steps 100 --eval-every 10
sweep.svg          five learning rates as one program
spectrum.svg       the density of a Hessian's eigenvalues
attribution.svg    what each training row adds to the loss of an answer
mixed_batch.svg    three adapters in one batch
"""

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.func import grad

import fgpt
from fgpt.cli.main import main as fgpt_command
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import InstructionRow, encode, encode_prompt, template
from fgpt.transforms.curvature import hessian_operator
from fgpt.transforms.spectrum import spectral_density
from fgpt.transforms.unroll import metagradient, unroll
from fgpt.tree import tree_map

FOLDER = Path(__file__).parent / "pictures"
GRAY, COLORS = "#808080", ["#4c8bf5", "#e8710a", "#12a150", "#c2379a", "#a08000"]
"""Of a contrast of 3 or more both on white and on the site's dark background."""
NAMES = ["Tim", "Sue", "Ben", "Mia", "Tom", "Lily"]

STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.figsize": (6.4, 3.2),
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GRAY,
    "savefig.transparent": True,
    "svg.hashsalt": "fgpt",
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def encode_rows(rows: list[InstructionRow]) -> list[Example]:
    """The examples of rows, in the plain template."""
    return [encode(row, template("plain"), fgpt.tokenizer("nano")) for row in rows]


def greetings(names: list[str], greeting: str = "Hello") -> list[InstructionRow]:
    """Rows that ask for a greeting."""
    return [InstructionRow(f"Greet {name}.", output=f"{greeting}, {name}!") for name in names]


def response_loss(adapters: fgpt.Adapters, base: fgpt.GPT, batch: fgpt.Batch, seed: torch.Tensor | None):
    """The loss of a step."""
    return fgpt.nll(fgpt.adapt(base, adapters, rng=seed), batch)


def draw_loss(axes: Axes) -> None:
    """The losses of a short training by the command line."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(open(os.devnull, "w")):
        options = ["--steps", "100", "--eval-every", "10", "--compare-prompts", "0", "--out", folder]
        assert fgpt_command(["train", "lora-nano", *options]) == 0
        lines = [json.loads(x) for x in (Path(folder) / "lora-nano" / "metrics.jsonl").read_text().splitlines()]
    heldout = [line for line in lines if "heldout_loss" in line]
    training = [line for line in lines if "loss" in line]
    axes.plot([x["step"] for x in training], [x["loss"] for x in training], alpha=0.6, label="training")
    axes.plot([x["step"] for x in heldout], [x["heldout_loss"] for x in heldout], marker="o", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()


def draw_sweep(axes: Axes) -> None:
    """The losses of five learning rates, trained at once."""
    base = fgpt.load("nano")
    batch = packing.collate([encode_rows(greetings(NAMES))])
    lrs = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    plain = fgpt.adamw(0.0)
    start = fgpt.init_state(fgpt.lora(base, fgpt.key(0), rank=8), plain)
    result = fgpt.sweep(
        lambda h: fgpt.make_step(response_loss, fgpt.adamw(h["lr"]), max_norm=1.0),
        [start] * len(lrs),
        base,
        [[[batch]] * len(lrs)] * 30,
        optimizer=plain,
        hyperparameters={"lr": torch.tensor(lrs)},
    )
    for lr, losses in zip(lrs, result.losses.tolist(), strict=True):
        axes.semilogy(range(1, len(losses) + 1), losses, label=f"lr {lr:g}")
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.legend()


def draw_spectrum(axes: Axes) -> None:
    """The density of the Hessian of docs/notebooks/hessian_spectrum.py."""
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    texts = ["Once upon a time, there was a fox.", "One day, a little girl went out."]
    tokens = torch.tensor([tokenizer.encode(text)[:8] for text in texts])
    batch = fgpt.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 7))
    fresh = fgpt.lora(params, fgpt.key(0), rank=2, target=r"blocks\.\d+\.attn\.(q|v)")
    adapters = tree_map(lambda x: x + 0.01, fresh)
    operator = hessian_operator(lambda a: fgpt.loss(fgpt.adapt(params, a), batch), adapters)
    density = spectral_density(operator, adapters, fgpt.key(1), num_probes=2, num_steps=20)
    low, high = float(density.values.min()), float(density.values.max())
    points = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 400)
    axes.semilogy(points, density.at(points, width=0.01 * (high - low)).clamp(min=1e-5))
    axes.set(xlabel="eigenvalue", ylabel="density")


def draw_attribution(axes: Axes) -> None:
    """The metagradient of one answer's loss by the weight of each of twelve training rows."""
    base = fgpt.load("nano")
    rows = greetings(NAMES) + [InstructionRow(f"Say bye to {name}.", output=f"Bye, {name}.") for name in NAMES]
    batch = packing.collate([[example] for example in encode_rows(rows)])
    query = packing.collate([encode_rows(greetings(["Max"]))])
    optimizer = fgpt.adamw(3e-3, eps_root=1e-6)
    step = fgpt.make_step(response_loss, optimizer)

    def advance(state: fgpt.State, t: int, row_weights: torch.Tensor) -> fgpt.State:
        weighted = fgpt.Batch(batch.tokens, batch.targets, batch.weights * row_weights[:, None], batch.segments)
        return step(state, base, [weighted], fgpt.fold_in(fgpt.key(1), t))[0]

    row_weights = torch.ones(len(rows))
    start = fgpt.init_state(fgpt.lora(base, fgpt.key(0), rank=4), optimizer)
    training = unroll(advance, start, row_weights, num_steps=8)
    cotangent = grad(lambda a: fgpt.loss(fgpt.adapt(base, a), query))(training.final.trainable)
    effects = -metagradient(advance, training, row_weights, cotangent).meta
    order = effects.argsort().tolist()
    axes.barh([rows[i].output for i in order], [float(effects[i]) for i in order], color=COLORS[0])
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.set(xlabel='rise of the loss of "Hello, Max!" without the row (nats per token)')


def draw_mixed_batch(axes: Axes) -> None:
    """Three adapters answer the same prompt, beside the base, in one batch of `generate`."""
    base, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    optimizer = fgpt.adamw(1e-2)
    step = fgpt.make_step(response_loss, optimizer, max_norm=1.0)
    words, adapters = ["Hello", "Bye", "Thank you"], []
    for number, word in enumerate(words):
        batch = packing.collate([encode_rows(greetings(NAMES, word))])
        state = fgpt.init_state(fgpt.lora(base, fgpt.key(number), rank=2 + 2 * number), optimizer)
        for i in range(40):
            state, _ = step(state, base, [batch], fgpt.fold_in(fgpt.key(9), i))
        adapters.append(state.trainable)
    prompt = encode_prompt(InstructionRow("Greet Sue."), template("plain"), tokenizer)
    prompts, sides = [prompt] * 4, [{}, *adapters]
    outputs = fgpt.generate(base, prompts, eos_token_id=tokenizer.eos_token_id, max_new_tokens=9, adapters=sides)
    labels = ["the base", *(f"LoRA of rank {2 + 2 * i}" for i in range(3))]
    axes.axis("off")
    axes.text(0, 0.95, 'One batch, one prompt: "Greet Sue."', weight="bold", va="top")
    for i, (label, output) in enumerate(zip(labels, outputs, strict=True)):
        height = 0.74 - 0.22 * i
        axes.text(0, height, label, color=COLORS[i], va="top")
        answer = " ".join(tokenizer.decode(output.tokens).split())
        axes.text(0.28, height, answer if output.finished else answer + " ..", va="top", family="monospace")


PICTURES: dict[str, Callable[[Axes], None]] = {
    "loss": draw_loss,
    "sweep": draw_sweep,
    "spectrum": draw_spectrum,
    "attribution": draw_attribution,
    "mixed_batch": draw_mixed_batch,
}


def main() -> None:
    """Draws the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []])
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().names or PICTURES:
        with matplotlib.rc_context(STYLE):
            figure = Figure(layout="constrained")
            PICTURES[name](figure.subplots())
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
        print(FOLDER / f"{name}.svg", (FOLDER / f"{name}.svg").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
