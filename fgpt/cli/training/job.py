"""A training job: all that a training needs. The state after any step follows from it and the state before."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from fgpt.adapters import num_trainable
from fgpt.cli import paths
from fgpt.cli.training.hashes import fast_hash
from fgpt.data.examples import Example
from fgpt.io import gguf, models
from fgpt.io.serialization import config_to_json
from fgpt.kernels.adam import Number
from fgpt.layers import num_parameters
from fgpt.model import GPT
from fgpt.optim import Schedule
from fgpt.recipes import TrainingRecipe
from fgpt.rng import fold_in
from fgpt.tokenizers import tokenizer_files
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Loss, Metrics, State, Step
from fgpt.tree import device, tree_map

B = TypeVar("B")
RowIndices: TypeAlias = list[list[int]]
"""Rows of examples that are packed together, by their indices."""

MUTABLE_OPTIONS = ("checkpoint_every_minutes", "keep_checkpoints", "tracker", "per_example", "shard_base", "out")
"""Options that a resumed run may change, since they change nothing of what is trained."""


LENGTHS = ("steps", "epochs", "lengthened_at")
"""Options that a finished run may change to be lengthened: up to then it is the same training."""


class Origin(NamedTuple):
    """Where an example comes from."""

    source: str
    row: int
    """Its number among the rows of the source, from 1."""
    where: str
    """The same in words, as the source counts them, such as `line 3`."""
    label: str = ""
    """Its class."""


class InitialState:
    """The state before the first step.

    `peek` reads it any number of times. `take` hands it over and lets go of it, so that the memory of the initial
    weights is freed by the first step of full tuning; after that it is gone.
    """

    def __init__(self, state: State) -> None:
        self._state: State | None = state

    def peek(self) -> State:
        """The state. Raises RuntimeError after `take`."""
        if self._state is None:
            raise RuntimeError("the initial state was taken by a training already: build the job again")
        return self._state

    def take(self) -> State:
        """The state, which this object then no longer holds. Raises RuntimeError for a second call."""
        state = self.peek()
        self._state = None
        return state


def parameter_counts(trainable: Any, frozen: Any) -> dict[str, int]:
    """How many parameters a training changes, and of how many; `frozen` is None if it changes all of them.

    >>> parameter_counts({"w": torch.zeros(2, 3)}, None)
    {'trained': 6, 'total': 6}
    """
    if frozen is None:
        return {"trained": num_parameters(trainable), "total": num_parameters(trainable)}
    return {"trained": num_trainable(trainable), "total": num_parameters(frozen)}


def trained_params(state: State) -> Any:
    """What a step updates, which most optimizers evaluate and save."""
    return state.trainable


@dataclass(frozen=True)
class TrainingJob:
    """What `train_loop` and `replay` need."""

    recipe: TrainingRecipe
    step: Step
    frozen: Any
    """The frozen base; None if every parameter is trained."""
    batches: Callable[[int], Iterator[list[Any]]]
    """The micro-batches, `Batch`es or other trees with `tokens` that the loss takes, of one update after
    the other, without end, from that update on; counted from 0."""
    steps: int
    schedule: Schedule
    rng: torch.Generator
    """Each step folds its number into it."""
    fingerprint: dict[str, str]
    """The hashes of all that the training reads: a checkpoint must have been made from the same."""
    initial_state: InitialState
    tokenizer: Tokenizer
    eval_losses: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    """The loss of the trained leaves on held-out rows and on each evaluation set, by the name of its metric. The best
    state and early stopping follow the first.
    """
    step_for: Callable[[Schedule, Number | None], Step] | None = None
    """The same step with another schedule and weight decay (None: the recipe's); the state before the first step is the
    same."""
    evaluation_params: Callable[[State], Any] = trained_params
    """What is evaluated and saved of a state: not what is trained, if the optimizer averages."""
    examples: Sequence[Example] = ()
    """What is trained on, if it is known beforehand."""
    origin: Callable[[int], Origin] | None = None
    """Of each of the `examples`, by its index."""
    loss: Loss | None = None
    """What is minimized, without NEFTune's noise: of what is trained, (frozen base, norms of DoRAs) and a `Batch`."""
    row_indices: Callable[[int], Iterator[list[RowIndices]]] | None = None
    """Of each micro-batch of `batches`, the indices of the `examples` in each of its rows; None if they are not known
    beforehand."""
    mfu: Callable[[float], float] | None = None
    """Model FLOPs utilization (0 to 1) at a number of tokens per second."""
    saved: Callable[[Any], Any] = lambda trained: trained
    """What was trained as it is saved, over the recipe's own base."""
    steps_per_epoch: float | None = None
    """Of one pass over the examples; None if their number is not known beforehand."""
    epsilon: Callable[[int], float] | None = None
    """The privacy that a number of steps has spent, in seconds; None if the training is not private."""

    def epochs(self, step: int) -> dict[str, float]:
        """The passes over the examples after a step, as a line of metrics has them; nothing if they are not known."""
        return {} if self.steps_per_epoch is None else {"epoch": round(step / self.steps_per_epoch, 4)}

    def train_step(self, state: State, micro_batches: Sequence[Any], step: int | None = None) -> tuple[State, Metrics]:
        """The step after `state`, with the key of its number, on the device that the state is on.

        Args:
            state: The state before it.
            micro_batches: What it reads, on the CPU or that device.
            step: The number of steps so far. None reads the state's own, which waits for the device.
        """
        target = device(state.trainable)
        placed = [place(batch, target) for batch in micro_batches]
        return self.step(state, self.frozen, placed, fold_in(self.rng, int(state.step) if step is None else step))


def place(batch: B, target: torch.device) -> B:
    """The batch on a device. To CUDA it is copied from pinned memory: nobody waits for the copy."""
    if target.type != "cuda":
        return tree_map(lambda x: x.to(target), batch)
    return tree_map(lambda x: (x.pin_memory() if x.is_cpu else x).to(target, non_blocking=True), batch)


def fingerprint(recipe: TrainingRecipe, base: GPT, tokenizer: Tokenizer, source: str, **others: Any) -> dict[str, str]:
    """The hash of each thing that a training reads, by its name: the recipe's options, the base, the tokenizer, and
    `others`, rows above all. The content of files counts and not their path.

    Args:
        source: the model whose tokenizer it is; empty for one that comes with the package.
        others: names (underscores become spaces) and values, as `fast_hash` takes them.
    """
    special = f"{tokenizer.n_vocab} {tokenizer.eos_token_id} {tokenizer.bos_token_id}"
    hashes = {
        "options": fast_hash(training_options(recipe)),
        "base config": fast_hash(json.dumps(config_to_json(base.cfg))),
        "base weights": fast_hash(base),
        "tokenizer": fast_hash(special, *tokenizer_contents(source)),
    }
    return hashes | {name.replace("_", " "): fast_hash(value) for name, value in others.items()}


def training_options(recipe: TrainingRecipe) -> str:
    """The options of a recipe that change what is trained, except those that name files, as JSON."""
    ignored = {"name", "device", *LENGTHS, *MUTABLE_OPTIONS}
    values = {}
    for name, value in recipe.to_json().items():
        is_path = name in paths.FIELDS and not isinstance(value, int)
        if name not in ignored and not is_path:
            values[name] = value
    return json.dumps(json.loads(json.dumps(values), parse_int=float), sort_keys=True)  # 1 and 1.0 are equal


def tokenizer_contents(source: str) -> list[str | bytes]:
    """All that the tokenizer of a model is read from, chat template included: its files, or the fields of its GGUF
    file.
    """
    if not source:
        return []
    path = models.resolve(source)
    if path.is_file():
        fields = gguf.open_gguf(path).fields
        return [f"{name} {value}" for name, value in fields.items() if name.startswith("tokenizer.")]
    contents: list[str | bytes] = []
    for name in tokenizer_files.FILES:
        if (path / name).is_file():
            contents += [name, (path / name).read_bytes()]
    return contents
