"""What the format of a recipe's base costs, measured on the first tokens that it trains on and kept in the user's cache
folder; see `fgpt.cli.cache`.

    ~/.cache/fgpt/format_cost/KEY/cost.json

KEY is a hash of the quantized base, the dtype and the tokens.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fgpt.classification_head import num_classes
from fgpt.cli.cache import cache_folder, lock, note_use, remove_unused
from fgpt.cli.console import console, show_progress
from fgpt.cli.devices import free_memory
from fgpt.cli.training.build import load_base
from fgpt.cli.training.hashes import XXH3, fast_hash, model_hash
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.evaluation.quantization_cost import QuantizationCost, measure_base, quantization_cost
from fgpt.io.files import write_json
from fgpt.layers import num_parameters
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.recipes import FineTuningRecipe
from fgpt.sharding import has_sharded
from fgpt.tree import device, leaves, tree_map
from fgpt.weights import dtype

FORMAT_COST, FILE = "format_cost", "cost.json"
NUM_TOKENS = 128
"""Tokens that it is measured on: two passes of a model of 135 M parameters over them take 2 s on two CPU cores."""
SHARE = 0.5
"""The share of the free memory that the full base may take."""


def print_format_cost(recipe: FineTuningRecipe, base: GPT, examples: Iterable[Example]) -> None:
    """Print what the format of `base` costs on the first tokens of the examples, if the recipe quantizes a language
    model. One in parts is not measured: the full base beside it would not fit.
    """
    is_partial = has_sharded(base) or any(x.is_meta for x in leaves(base).values())
    if recipe.quantize is None or num_classes(base) is not None or is_partial:
        return
    cost = _cached_cost(recipe, base, [*_first_tokens(examples, NUM_TOKENS)])
    if cost is not None:
        console.print(f"{describe_cost(recipe.quantize, cost)}, on {NUM_TOKENS} tokens", soft_wrap=True)


def describe_cost(format: str, cost: QuantizationCost) -> str:
    """Such as "int8 changes the loss by +0.9 % (2.104 to 2.123 nats) and a LoRA's first gradient by 21 %"."""
    return (
        f"{format} changes the loss by {100 * cost.loss_increase:+.2g} % ({cost.full_loss:.4g} to {cost.loss:.4g} "
        f"nats) and a LoRA's first gradient by {100 * cost.gradient_error:.2g} %"
    )


def measure_cost(recipe: FineTuningRecipe, base: GPT, batch: Batch) -> QuantizationCost | None:
    """The cost of the recipe's format, beside the full base, which is loaded for it; None if that does not fit into
    memory beside `base`, which is printed.
    """
    if num_parameters(base) * dtype(base.wte.w).itemsize >= SHARE * free_memory(device(base)):
        console.print(f"what {recipe.quantize} costs is not measured: the full base does not fit beside it")
        return None
    with show_progress(f"measuring what {recipe.quantize} costs"):
        quantized = measure_base(base, [batch])
        return quantization_cost(measure_base(load_base(replace(recipe, quantize=None)), [batch]), quantized)


def _first_tokens(examples: Iterable[Example], count: int) -> Iterator[Example]:
    """The first tokens of texts, `count` in all: each token after the first of a text is predicted."""
    for example in examples:
        tokens = tuple(example.tokens[:count])
        if len(tokens) > 1:
            yield Example.completion(tokens, prompt_length=1)
        count -= len(tokens)
        if count <= 1:
            return


def _cached_cost(recipe: FineTuningRecipe, base: GPT, texts: Sequence[Example]) -> QuantizationCost | None:
    key = fast_hash(model_hash(base), f"{dtype(base.wte.w)}", texts).removeprefix(XXH3)
    folder = cache_folder(FORMAT_COST) / key
    if (cost := _read(folder / FILE)) is not None:
        note_use(folder)
        return cost
    if not texts:
        console.print(f"what {recipe.quantize} costs is not measured: there is no text")
        return None
    batch = tree_map(lambda x: x.to(device(base)), collate([[text] for text in texts]))
    cost = measure_cost(recipe, base, batch)
    if cost is None:
        return None
    try:
        with lock(folder):
            write_json(folder / FILE, cost._asdict())
        remove_unused(FORMAT_COST)
    except (InputError, OSError) as err:
        console.print(f"what {recipe.quantize} costs is not cached: {err}", soft_wrap=True)
    return cost


def _read(path: Path) -> QuantizationCost | None:
    try:
        return QuantizationCost(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
