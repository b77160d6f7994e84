"""A training laid out before its first step: from it, and the state after any step, follows all that comes after."""

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
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.optim import Schedule
from fgpt.recipes import TrainingRecipe
from fgpt.rng import fold_in
from fgpt.tokenizers import tokenizer_files
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Metrics, State, Step
from fgpt.tree import device, tree_map, walk


@dataclass
class TrainingJob:
    """What `fit` needs, and `replay`."""

    run: TrainingRecipe
    step: Step
    frozen: Any
    batches: Callable[[int], Iterator[list[Batch]]]
    """The micro-batches of one update after the other, without end, from that update on; counted from 0."""
    steps: int
    schedule: Schedule
    rng: torch.Generator
    """Each step takes a key of its own from it, by its number."""
    fingerprint: dict[str, str]
    """The hashes of all that the training reads: what a checkpoint must have been made from."""
    initial_state: State | None
    """The state before the first step, until it is taken."""
    tokenizer: Tokenizer
    heldout: Callable[[Any], float] | None = None
    """Loss on rows apart, of what is trained."""
    mfu: Callable[[float], float] | None = None
    """Which part of the machine so many tokens a second take."""

    def train_step(self, state: State, micro: Sequence[Batch]) -> tuple[State, Metrics]:
        """The step after `state`, with the key of its number, on the device that the state is on."""
        at = device(state.trainable)
        placed = [tree_map(lambda x: x.to(at), batch) for batch in micro]
        return self.step(state, self.frozen, placed, fold_in(self.rng, int(state.step)))

    def pop_initial_state(self) -> State:
        """The state before the first step. It is given away: nobody else holds on to memory that the training lets go
        of with its first step.
        """
        state, self.initial_state = self.initial_state, None
        assert state is not None, "taken already"
        return state


def fingerprint(run: TrainingRecipe, base: GPT, tokenizer: Tokenizer, source: str, **others: Any) -> dict[str, str]:
    """By name the hash of each thing that a training reads: the run's options, the base, the tokenizer, and `others`,
    rows above all. Where a path leads is not among them, what lies there is. `source` is the model whose tokenizer it
    is, empty for one that comes with the package.
    """
    ends = f"{tokenizer.n_vocab} {tokenizer.eos} {tokenizer.bos}"
    inputs = {
        "options": hashed(options(run)),
        "base config": hashed(repr(base.cfg)),
        "base weights": hashed(base),
        "tokenizer": hashed(ends, *files_of_tokenizer(source)),
    }
    return inputs | {name.replace("_", " "): hashed(x) for name, x in others.items()}


def options(run: TrainingRecipe) -> str:
    """The options of a run that change what is trained, but for those that name files."""
    apart = {"name", "device", *LASTING}
    counted = {name: x for name, x in run.to_json().items() if name not in apart}
    values = {name: x for name, x in counted.items() if name not in paths.FIELDS or isinstance(x, int)}
    return json.dumps(json.loads(json.dumps(values), parse_int=float), sort_keys=True)  # 1 and 1.0 are one number


LASTING = ("checkpoint_every_minutes", "keep_checkpoints", "tracker", "out")
"""Options that change nothing of what is trained."""


def files_of_tokenizer(source: str) -> list[str | bytes]:
    """What the tokenizer of a model is read from, chat template and all: its files, or the fields of its GGUF file."""
    if not source:
        return []
    at = models.resolve(source)
    if at.is_file():
        return [f"{name} {x}" for name, x in gguf.open_gguf(at).fields.items() if name.startswith("tokenizer.")]
    files = [at / name for name in tokenizer_files.FILES if (at / name).is_file()]
    return [part for file in files for part in (file.name, file.read_bytes())]


def hashed(*values: Any) -> str:
    """The hash of trees, of sequences of examples, tensors or rows, and of texts: bit by bit, and in this order."""
    whole = hashlib.sha256()
    for value in values:
        if isinstance(value, str | bytes):
            _feed_text(whole, value)
        elif isinstance(value, Sequence):
            _feed_rows(whole, value)
        else:
            _feed_tree(whole, value)
    return whole.hexdigest()


def _feed_tree(whole: Any, tree: Any) -> None:
    """Its leaves, and the static fields of its nodes."""
    for path, x in walk(tree):
        if isinstance(x, Tensor):
            _feed_text(whole, f"{path} {x.dtype} {list(x.shape)}")
            _feed(whole, x)
        elif dataclasses.is_dataclass(x):
            fixed = [f"{f.name} {getattr(x, f.name)!r}" for f in dataclasses.fields(x) if f.metadata.get("static")]
            _feed_text(whole, f"{path} {type(x).__name__} {' '.join(fixed)}")


def _feed_rows(whole: Any, rows: Sequence[Any]) -> None:
    _feed_text(whole, f"{len(rows)} rows")
    for row in rows:
        if isinstance(row, Example):
            _feed_text(whole, f"{row.prompt_length} {row.label} {row.weight}")
            _feed(whole, torch.tensor(row.tokens))
        elif isinstance(row, Tensor):
            _feed(whole, row)
        else:
            _feed_text(whole, row if isinstance(row, str) else repr(row))


def _feed_text(whole: Any, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    whole.update(f" {len(data)}:".encode())
    whole.update(data)


def _feed(whole: Any, x: Tensor) -> None:
    whole.update(f" {x.numel()}:".encode())
    flat: Any = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    whole.update(flat)
