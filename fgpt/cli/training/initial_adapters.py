"""What the adapters of a training begin as: random, from the weights, their gradient or inputs, or trained before.

PiSSA, OLoRA and LoRA-GA change the base, W = W' + s·B·A. What is saved lies over the base of the recipe, so that
everything reads it as any other adapter: a LoRA of twice the rank, s·(B·A - B₀·A₀).
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fgpt.adapter_combining import combine
from fgpt.adapter_initialization import eva, lora_ga, olora, pissa
from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.cli import run_dir
from fgpt.cli.console import show_progress
from fgpt.errors import InputError
from fgpt.io.peft.adapter_files import CONFIG
from fgpt.kernels.quantized_linear import is_quantized
from fgpt.kernels.sharded_parameter import ShardedParameter, split_parameter
from fgpt.layers import weight_matrices
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.recipes import FineTuningRecipe
from fgpt.recipes.tuning import INITIALIZATIONS
from fgpt.tree import leaves, select, tree_leaves, unflatten_like

EVA_BATCHES = 16
"""Micro-batches whose inputs EVA decomposes."""


class Initialized(NamedTuple):
    """How a training begins."""

    base: GPT
    adapters: Adapters
    saved: Callable[[Adapters], Adapters]
    """Trained adapters as they lie over the recipe's own base."""


def initialize(
    recipe: FineTuningRecipe,
    base: GPT,
    adapters: Adapters,
    batches: Callable[[], Any],
    objective: Callable[[GPT, Batch], tuple[Tensor, Tensor]],
) -> Initialized:
    """The base and the adapters of a training.

    Args:
        recipe: Its `adapter.init` says how; what is no LoRA of it stays as it is.
        base: The recipe's.
        adapters: Those that begin at random.
        batches: The first micro-batches, one list for each update.
        objective: (Σ loss, Σ weight) of params and a batch.

    Raises:
        InputError: for an initialization from the weights of a quantized base, and as the initialization does.
    """
    adapter = recipe.adapter
    if adapter.init not in INITIALIZATIONS or adapter.init == "default":
        return Initialized(base, adapters, lambda trained: trained)
    options: dict[str, Any] = {"alpha": adapter.alpha, "target": adapter.target_pattern, "rs": adapter.rs}
    matrices = weight_matrices(base)
    if adapter.init != "eva" and any(is_quantized(matrices[path]) for path in select(matrices, adapter.target_pattern)):
        raise InputError(
            f"--adapter.init {adapter.init} subtracts from the base's weights, which are in {recipe.quantize}: take "
            "eva or default, or leave out --quantize"
        )
    micro_batches = itertools.chain.from_iterable(batches())
    with show_progress(f"initializing the adapters by {adapter.init}"):
        if adapter.init == "pissa":
            changed, untrained = pissa(base, adapter.rank, **options)
        elif adapter.init == "olora":
            changed, untrained = olora(base, adapter.rank, **options)
        elif adapter.init == "eva":
            changed, untrained = eva(base, itertools.islice(micro_batches, EVA_BATCHES), adapter.rank, **options)
        else:
            batch = next(micro_batches)

            def loss(params: GPT) -> Tensor:
                total, weight = objective(params, batch)
                return total / weight

            changed, untrained = lora_ga(base, loss, adapter.rank, **options)
    first: Adapters = {path: _with_dropout(x, adapter.dropout) for path, x in untrained.items()}
    others = {path: x for path, x in adapters.items() if not isinstance(x, LoRA)}
    if adapter.init == "eva":
        return Initialized(changed, first | others, lambda trained: trained)

    def on_plain_base(trained: Adapters) -> Adapters:
        difference = combine(base, [{path: trained[path] for path in first}, first], weights=[1.0, -1.0])
        return trained | difference

    return Initialized(changed, first | others, on_plain_base)


def _with_dropout(x: Any, dropout: float) -> LoRA:
    return LoRA(x.a, x.b, x.alpha, x.rs, dropout)


# ---------------------------------------------------------------------------------------------------- trained before


def trained_before(recipe: FineTuningRecipe, base: GPT, fresh: Adapters) -> Adapters:
    """The adapters of the run or folder that `adapter.init` names, to be trained on; `fresh` if it names none.

    Raises InputError if there is no such folder, and for adapters of other layers, ranks or strengths than `fresh`.
    """
    source = recipe.adapter.init
    if source in INITIALIZATIONS:
        return fresh
    adapters = run_dir.load_adapters_in(_adapter_folder(recipe, source), base)
    if differing := fresh.keys() ^ adapters.keys():
        path = min(differing)
        which = "has none on" if path in fresh else "has one on"
        raise InputError(f"--adapter.init {source} {which} {path}, unlike this recipe: give its --adapter.target")
    result: Adapters = {}
    for path, x in fresh.items():
        whole = adapters[path]
        if isinstance(x, ShardedParameter) and isinstance(whole, Tensor) and whole.shape == x.shape:
            result[path] = split_parameter(whole, x)
            continue
        before, now = _form(adapters[path]), _form(x)
        if before != now:
            raise InputError(f"--adapter.init {source}: {path} is {before} there, here {now}: make them equal")
        values = [a.to(b.device, b.dtype) for a, b in zip(tree_leaves(adapters[path]), tree_leaves(x), strict=True)]
        result[path] = unflatten_like(x, values)
    return result


def _form(adapter: Any) -> str:
    """What two adapters have in common if one can go on from the other: all but their elements and dropout."""
    shapes = " ".join(f"{name} {list(x.shape)}" for name, x in leaves({"x": adapter}).items())
    low_rank = getattr(adapter, "lora", adapter)
    scale = f", scale {low_rank.scale:g}" if isinstance(low_rank, LoRA) else ""
    return f"{type(adapter).__name__} of {shapes}{scale}".replace("x.", "").replace("x/", "")


def _adapter_folder(recipe: FineTuningRecipe, source: str) -> Path:
    folder = Path(source)
    if any((folder / name).is_file() for name in (CONFIG, run_dir.ADAPTERS)) and not (folder / run_dir.RUN).exists():
        return folder
    try:
        run = run_dir.find_finished(source)
    except InputError as err:
        raise InputError(f"--adapter.init {source} is none of {', '.join(INITIALIZATIONS)}, and {err}") from None
    before: Mapping[str, Any] = run_dir.read_run(run).to_json()
    if before.get("base") != recipe.base:
        raise InputError(f"--adapter.init {source} is a run over {before.get('base')}, not over {recipe.base}")
    if not (run / run_dir.ADAPTER).is_dir():
        raise InputError(f"--adapter.init {source} has trained all parameters: give --base {run / run_dir.MODEL}")
    return run / run_dir.ADAPTER
