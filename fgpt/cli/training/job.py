"""A training job: all that a training needs. The state after any step follows from it and the state before."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgpt.cli import paths
from fgpt.data.prompt_templates import Example
from fgpt.io import gguf, models
from fgpt.io.serialization import config_to_json
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.optim import Schedule
from fgpt.recipes import TrainingRecipe
from fgpt.rng import fold_in
from fgpt.tokenizers import tokenizer_files
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Metrics, State, Step
from fgpt.tree import device, tree_map, walk

MUTABLE_OPTIONS = ("checkpoint_every_minutes", "keep_checkpoints", "tracker", "out")
"""Options that a resumed run may change, since they change nothing of what is trained."""


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


@dataclass(frozen=True)
class TrainingJob:
    """What `train_loop` and `replay` need."""

    recipe: TrainingRecipe
    step: Step
    frozen: Any
    """The frozen base; None if every parameter is trained."""
    batches: Callable[[int], Iterator[list[Batch]]]
    """The micro-batches of one update after the other, without end, from that update on; counted from 0."""
    steps: int
    schedule: Schedule
    rng: torch.Generator
    """Each step folds its number into it."""
    fingerprint: dict[str, str]
    """The hashes of all that the training reads: a checkpoint must have been made from the same."""
    initial_state: InitialState
    tokenizer: Tokenizer
    heldout_loss: Callable[[Any], float] | None = None
    """Loss of the trained leaves on held-out rows."""
    mfu: Callable[[float], float] | None = None
    """Model FLOPs utilization (0 to 1) at a number of tokens per second."""

    def train_step(
        self, state: State, micro_batches: Sequence[Batch], step: int | None = None
    ) -> tuple[State, Metrics]:
        """The step after `state`, with the key of its number, on the device that the state is on.

        Args:
            state: The state before it.
            micro_batches: What it reads, on the CPU or that device.
            step: The number of steps so far. None reads the state's own, which waits for the device.
        """
        target = device(state.trainable)
        placed = [place(batch, target) for batch in micro_batches]
        return self.step(state, self.frozen, placed, fold_in(self.rng, int(state.step) if step is None else step))


def place(batch: Batch, target: torch.device) -> Batch:
    """The batch on a device. To CUDA it is copied from pinned memory: nobody waits for the copy."""
    if target.type != "cuda":
        return tree_map(lambda x: x.to(target), batch)
    return tree_map(lambda x: (x.pin_memory() if x.is_cpu else x).to(target, non_blocking=True), batch)


def fingerprint(recipe: TrainingRecipe, base: GPT, tokenizer: Tokenizer, source: str, **others: Any) -> dict[str, str]:
    """The hash of each thing that a training reads, by its name: the recipe's options, the base, the tokenizer, and
    `others`, rows above all. The content of files counts and not their path.

    Args:
        source: the model whose tokenizer it is; empty for one that comes with the package.
        others: names (underscores become spaces) and values, as `content_hash` takes them.
    """
    special = f"{tokenizer.n_vocab} {tokenizer.eos_token_id} {tokenizer.bos_token_id}"
    hashes = {
        "options": content_hash(training_options(recipe)),
        "base config": content_hash(json.dumps(config_to_json(base.cfg))),
        "base weights": content_hash(base),
        "tokenizer": content_hash(special, *tokenizer_contents(source)),
    }
    return hashes | {name.replace("_", " "): content_hash(value) for name, value in others.items()}


def training_options(recipe: TrainingRecipe) -> str:
    """The options of a recipe that change what is trained, except those that name files, as JSON."""
    ignored = {"name", "device", *MUTABLE_OPTIONS}
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


def content_hash(*values: Any) -> str:
    """The SHA-256 of trees, of sequences (of examples, tensors or rows), and of texts: bit by bit, in this order."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, str | bytes):
            _feed_text(digest, value)
        elif isinstance(value, Sequence):
            _feed_rows(digest, value)
        else:
            _feed_tree(digest, value)
    return digest.hexdigest()


def _feed_tree(digest: Any, tree: Any) -> None:
    """Feed the leaves, and the static fields of the nodes."""
    for path, x in walk(tree):
        if isinstance(x, Tensor):
            _feed_text(digest, f"{path} {x.dtype} {list(x.shape)}")
            _feed_tensor(digest, x)
        elif dataclasses.is_dataclass(x):
            static = [f"{f.name} {getattr(x, f.name)!r}" for f in dataclasses.fields(x) if f.metadata.get("static")]
            _feed_text(digest, f"{path} {type(x).__name__} {' '.join(static)}")


def _feed_rows(digest: Any, rows: Sequence[Any]) -> None:
    _feed_text(digest, f"{len(rows)} rows")
    for row in rows:
        if isinstance(row, Example):
            _feed_text(digest, f"{row.prompt_length} {row.label} {row.weight}")
            _feed_tensor(digest, torch.tensor(row.tokens))
        elif isinstance(row, Tensor):
            _feed_tensor(digest, row)
        else:
            _feed_text(digest, row if isinstance(row, str) else repr(row))


def _feed_text(digest: Any, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    digest.update(f" {len(data)}:".encode())
    digest.update(data)


def _feed_tensor(digest: Any, x: Tensor) -> None:
    digest.update(f" {x.numel()}:".encode())
    flat: Any = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    digest.update(flat)
