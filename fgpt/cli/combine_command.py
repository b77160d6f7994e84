"""`fgpt combine`: the adapters of several runs over one base as one run.

combine.json    the runs, their weights and the method
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from fgpt.adapter_combining import DENSITY, Method, combine, default_weights, task_vector
from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.adapters import num_trainable
from fgpt.cli import run_dir
from fgpt.cli.console import console
from fgpt.cli.model_card.card import write_trained_card
from fgpt.cli.paths import shareable
from fgpt.cli.tasks import task_type
from fgpt.cli.training.hashes import model_hash
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.model import GPT
from fgpt.ranges import PositiveInt, Range, Seed
from fgpt.recipes import InstructionRecipe
from fgpt.rng import key


@dataclass(frozen=True)
class CombineOptions:
    """Combine the adapters of several runs over one base into a new run, by what each changes in the weights."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ..")]
    """The names of runs, or their folders."""
    weights: tuple[Annotated[float, Range(least=-1e6, most=1e6)], ...] = ()
    """One for each run; none given takes 1/n, for ties 1."""
    method: Method = "linear"
    """linear: the weighted sum. ties: trimmed, one sign elected, averaged. dare: thinned at random, then summed. slerp:
    on the arc between two."""
    density: Annotated[float, Range(above=0, most=1)] = DENSITY
    """The share of each change that ties and dare keep."""
    rank: PositiveInt | None = None
    """The rank of the result's LoRAs, by SVD; None keeps what is exact: of LoRAs the sum of the ranks, else leaves."""
    seed: Seed = 0
    """Of dare."""
    name: str = "combined"
    """The name of the new run."""
    out: Path = Path("runs")
    """The folder of run directories."""


def run(options: CombineOptions) -> Path:
    """Write the combination as a run, and print what it is. Returns its folder.

    Raises InputError for runs of different bases, and as `combine` does.
    """
    if len(options.runs) < 2:
        raise InputError("expected two runs or more: fgpt combine RUN RUN")
    folders = [run_dir.find_finished(name, options.out) for name in options.runs]
    recipes = [run_dir.instruction_run(folder) for folder in folders]
    _check_bases(folders, recipes)
    first = recipes[0]
    base = task_type(first).load_base(first)
    sets = [run_dir.load_adapters_of(folder, base) for folder in folders]
    weights = list(options.weights) or default_weights(len(sets), options.method)
    adapters = combine(
        base,
        sets,
        weights,
        method=options.method,
        density=options.density,
        rank=options.rank,
        rng=key(options.seed),
    )
    recipe = replace(first, name=options.name, out=options.out)
    with run_dir.open_run_dir(recipe, 0) as out:
        tokenizer = load_tokenizer(recipe).tokenizer if recipe.new_tokens else None
        saved = run_dir.save_tuned(out, base, adapters, recipe.base, tokenizer)
        write_json(
            out / run_dir.COMBINED,
            {
                "runs": [shareable(folder) for folder in folders],
                "weights": weights,
                "method": options.method,
                "density": options.density if options.method in ("ties", "dare") else None,
                "rank": options.rank,
                "seed": options.seed if options.method == "dare" else None,
            },
        )
        write_trained_card(out, recipe, ())
    parts = ", ".join(f"{weight:g} {folder.name}" for weight, folder in zip(weights, folders, strict=True))
    console.print(f"{options.method} combination of {parts}: {describe(adapters)}", markup=False, soft_wrap=True)
    if options.rank is not None and options.method == "linear":
        loss = _truncation(base, combine(base, sets, weights), adapters)
        console.print(f"rank {options.rank} leaves out {loss:.1%} of the change's norm".replace("%", " %"))
    console.print(f"saved in {saved}; {recipe.suggest_use(out)}", markup=False, soft_wrap=True)
    return out


def describe(adapters: Adapters) -> str:
    """The kinds of adapters and their size."""
    ranks = sorted({len(x.a) for x in adapters.values() if isinstance(x, LoRA)})
    loras = sum(isinstance(x, LoRA) for x in adapters.values())
    parts = [f"{loras} LoRAs of rank {' and '.join(map(str, ranks))}"] if loras else []
    parts += [f"{len(adapters) - loras} leaves"] if len(adapters) > loras else []
    return f"{' and '.join(parts)}, {num_trainable(adapters):,} parameters"


def _truncation(base: GPT, exact: Adapters, adapters: Adapters) -> float:
    """The norm of what a rank leaves out of a linear combination, as a share of its norm."""
    before, after = task_vector(base, exact), task_vector(base, adapters)
    total = sum(float(x.square().sum()) for x in before.values())
    rest = sum(float((x - after.get(path, torch.zeros_like(x))).square().sum()) for path, x in before.items())
    return (rest / total) ** 0.5 if total else 0.0


def _check_bases(folders: Sequence[Path], recipes: Sequence[InstructionRecipe]) -> None:
    """Raises InputError unless all runs have the same base, in the same format."""
    first = recipes[0]
    for folder, recipe in zip(folders[1:], recipes[1:], strict=True):
        for name in ("quantize", "new_tokens"):
            before, now = getattr(first, name), getattr(recipe, name)
            if before != now:
                raise InputError(f"{folder} has {name} {now}, and {folders[0]} {before}: expected runs over one base")
        if recipe.base != first.base:
            hashes = {model_hash(task_type(each).load_base(each)) for each in (first, recipe)}
            if len(hashes) > 1:
                raise InputError(
                    f"{folder} is trained on {recipe.base}, and {folders[0]} on {first.base}: expected one base"
                )
