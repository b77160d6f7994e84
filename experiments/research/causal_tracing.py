"""Causal tracing: which state carries a name through the embedded model? One position of one layer's residual stream is
taken from a prompt with another name, for every layer and every position, as one `vmap` and as a loop.

    python -m experiments.research.causal_tracing            # --tiny: a shorter prompt, timed once

A table's entry is the share of the way to the other prompt's answer that one state goes alone:

    (margin(clean) - margin(patched)) / (margin(clean) - margin(other))

where a prompt's margin is the logit of the name minus that of the other name.

Source: Meng et al. 2022 (ROME), section 2; Zhang and Nanda 2024, "Best Practices of Activation Patching", section 2.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap

import fgpt

PROMPT = "Once upon a time, there was a fox named {}. One day,"
SHORT_PROMPT = "There was a fox named {}. One day,"
NAME, OTHER_NAME = " Tim", " Sue"
TARGET = r"embed|blocks\.\d+"


class Tracing(NamedTuple):
    """A prompt, the states of another one, and the names that their answers are.

    Args:
        params: The model.
        tokens: The prompt with the name.
        states: The residual stream of the prompt with the other name, by its points in order: [seq d_model] each.
        names: The tokens of name and other name.
    """

    params: fgpt.GPT
    tokens: Int[Tensor, " seq"]
    states: dict[str, Float[Tensor, "seq d_model"]]
    names: tuple[int, int]

    def margin(self, tap: fgpt.Tap | None = None) -> Float[Tensor, ""]:
        """How much more likely the name is next than the other one, as a difference of logits."""
        h = fgpt.hidden(self.params, self.tokens, tap=tap)
        scores = fgpt.logits(self.params, h[-1])
        return scores[self.names[0]] - scores[self.names[1]]

    def patched_margin(
        self, layer: Int[Tensor, ""] | int, position: Int[Tensor, ""] | int, target: str = TARGET
    ) -> Float[Tensor, ""]:
        """The margin with one state from the other prompt.

        Args:
            layer: 0 is the embedding, the states before any block; i those after i blocks.
            position: Of the token.
            target: The points that are tapped; one of them is that of `layer`.
        """
        layers = {path: i for i, path in enumerate(self.states)}
        at_position = torch.arange(len(self.tokens)) == position

        def patch(path: str, x: Tensor) -> Tensor:
            is_here = at_position & (layer == layers[path])
            return torch.where(is_here[:, None], self.states[path], x)

        return self.margin(fgpt.Tap(patch, target))


def build(template: str) -> tuple[Tracing, list[str]]:
    """The tracing of a prompt on the embedded model, and the text of its tokens."""
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    clean, other = (torch.tensor(tokenizer.encode(template.format(x.strip()))) for x in (NAME, OTHER_NAME))
    names = [tokenizer.encode(x) for x in (NAME, OTHER_NAME)]
    assert len(clean) == len(other), "the names have as many tokens"
    assert [len(x) for x in names] == [1, 1]
    _, states = fgpt.trace(params, other, target=TARGET)
    tracing = Tracing(params, clean, states, (names[0][0], names[1][0]))
    return tracing, [tokenizer.decode([int(token)]) for token in clean]


def margins_by_vmap(tracing: Tracing) -> Float[Tensor, "layer seq"]:
    """The patched margins of all states, as one pass."""
    sizes = len(tracing.states), len(tracing.tokens)
    layers, positions = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    return vmap(tracing.patched_margin)(layers.flatten(), positions.flatten()).view(sizes)


def margins_by_loop(tracing: Tracing) -> Float[Tensor, "layer seq"]:
    """The same, one state after the other, each with a tap at its own point alone."""
    margins: list[Tensor] = []
    for layer, path in enumerate(tracing.states):
        for position in range(len(tracing.tokens)):
            margins.append(tracing.patched_margin(layer, position, target=re.escape(path)))
    return torch.stack(margins).view(len(tracing.states), -1)


def effects(tracing: Tracing, margins: Float[Tensor, "layer seq"]) -> Float[Tensor, "layer seq"]:
    """The share of the way to the other prompt's answer. All states of the embedding are that prompt."""
    clean = tracing.margin()
    other = tracing.margin(fgpt.Tap(lambda path, x: tracing.states[path], target="embed"))
    return (clean - margins) / (clean - other)


def time_by_turns(sides: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call of each side, by turns; before that each is called once."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for call, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a shorter prompt, timed once")
    options = parser.parse_args(arguments)
    tracing, texts = build(SHORT_PROMPT if options.tiny else PROMPT)
    table = effects(tracing, margins_by_vmap(tracing))
    print(f"{'':12}" + "".join(f"{path.replace('blocks.', 'block '):>9}" for path in tracing.states))
    for text, row in zip(texts, table.T, strict=True):
        print(f"{text.strip():12}" + "".join(f"{round(float(x), 2) + 0.0:9.2f}" for x in row))  # + 0.0: no -0.00
    sides = [lambda: margins_by_vmap(tracing), lambda: margins_by_loop(tracing)]
    times = time_by_turns(sides, 1 if options.tiny else 15)
    mapped, loop = map(statistics.median, times)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    print(f"{table.numel()} patched passes: vmap {mapped:.3f} s, loop {loop:.3f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
