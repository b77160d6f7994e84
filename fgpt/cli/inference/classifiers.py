"""The class of each of many texts: they are packed into rows as in training, and no text sees another."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.classification_head import with_classification_head
from fgpt.cli import run_dir
from fgpt.cli.console import show_progress
from fgpt.cli.training.instruction_tuning import load_base
from fgpt.data import packing
from fgpt.data.classification_prompts import (
    LabeledText,
    Labels,
    PromptFrame,
    apply_labels,
    class_labels,
    encode,
    parse_labels,
    prompt_frame,
    verbalizers,
)
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.model import GPT, KVCache, forward_with_cache, hidden, logits
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device, tree_map

AT_ONCE = 8
"""Rows of texts in a batch."""


@torch.no_grad()
def log_probabilities(
    params: GPT, examples: Sequence[Example], labels: Labels, width: int = 512
) -> Float[Tensor, "n classes"]:
    """Of each example the log-probability of each class, among the classes alone; its own label is not read.

    What most of every example has in common at its beginning, as shots are, is read once. Else they are packed, into
    rows of `width` tokens, or as long as the longest.
    """
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    texts, common = [examples[i].tokens for i in by_length], common_to([x.tokens for x in examples])
    reads = _after(params, texts, common) if 2 * common > len(texts[0]) else _packed(params, texts, width)
    choices, found = torch.tensor(labels.output_ids), torch.empty(len(examples), len(labels.output_ids))
    with show_progress("telling classes", len(examples)) as advance:
        for numbers, h in reads:
            each = logits(params, h).float().cpu()[:, choices].log_softmax(-1)
            found[[by_length[i] for i in numbers]] = each
            advance(len(numbers))
    return found


Reads: TypeAlias = Iterator[tuple[list[int], Float[Tensor, "some d_model"]]]
"""Numbers of texts, and their last hidden states."""


def _packed(params: GPT, texts: Sequence[tuple[int, ...]], width: int) -> Reads:
    at, lengths = device(params), list(map(len, texts))  # longest first, which packs well
    bins = packing.pack(lengths, max(width, lengths[0]))
    for i in range(0, len(bins), AT_ONCE):
        rows = [[Example(texts[j], len(texts[j]), 0) for j in some] for some in bins[i : i + AT_ONCE]]
        batch = tree_map(lambda x: x.to(at), packing.collate(rows))
        assert batch.loss_positions is not None  # each text's last position, in their order
        h = hidden(params, batch.tokens, batch.segments).flatten(0, -2)[batch.loss_positions]
        yield [j for some in bins[i : i + AT_ONCE] for j in some], h


def _after(params: GPT, texts: Sequence[tuple[int, ...]], common: int) -> Reads:
    at = device(params)
    _, once = forward_with_cache(params, torch.tensor([texts[0][:common]], device=at), KVCache())
    for i in range(0, len(texts), AT_ONCE):
        rest = [text[common:] for text in texts[i : i + AT_ONCE]]
        many, wide = len(rest), max(map(len, rest))
        padded = [[*row] + [0] * (wide - len(row)) for row in rest]  # no text sees what follows it
        cache = tree_map(lambda x, many=many: x.expand(many, *x.shape[1:]), once)
        h, _ = forward_with_cache(params, torch.tensor(padded, device=at), cache)
        yield list(range(i, i + many)), h[range(many), [len(row) - 1 for row in rest]]


def common_to(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with alike, each keeping one of its own at least."""
    most = min(map(len, texts)) - 1
    return next((i for i in range(most) if len({text[i] for text in texts}) > 1), most)


class LoadedClassifier(NamedTuple):
    """A trained run, ready to classify."""

    run: ClassificationRecipe
    params: GPT
    tokenizer: Tokenizer


def labels_of(run: ClassificationRecipe, names: Sequence[str], tokenizer: Tokenizer) -> Labels:
    """Raises InputError for names that are several tokens, where the label is the next."""
    return verbalizers(names, tokenizer) if run.head == "lm" else class_labels(names)


def frame_of(
    run: ClassificationRecipe, names: Sequence[str], tokenizer: Tokenizer, shots: Sequence[LabeledText] = ()
) -> PromptFrame:
    """What stands around the texts of a run, in training and in use."""
    return prompt_frame(run.prompt, names, tokenizer, run.head == "classifier", shots)


def with_head(run: ClassificationRecipe, base: GPT, names: Sequence[str]) -> GPT:
    """The params that the run adapts: the base, or for classes the same with their head."""
    return with_classification_head(base, len(names), fold_in(key(run.seed), "head")) if run.head == "classifier" else base


def read_run(where: Path) -> ClassificationRecipe:
    """The run of classes that made a folder. Raises InputError for any other."""
    if not isinstance(run := run_dir.read_run(where), ClassificationRecipe):
        raise InputError(f"{where} is no run that classifies, as emotion-small is: {run_dir.suggest_use(where, run)}")
    return run


def load_classifier(where: Path) -> LoadedClassifier:
    """The trained run in a folder. Raises InputError for any other folder."""
    run = read_run(where)
    params = run_dir.load_tuned(where, with_head(run, load_base(run), run.labels))
    return LoadedClassifier(run, params, models.tokenizer(run.base))


def labels_or_own(run: ClassificationRecipe, given: Sequence[str]) -> tuple[str, ...]:
    """Labels as they are given, each as "label" or "label=word", or the run's own where none is.

    Raises InputError for others where a head has learned its own, for fewer than two, and two that are the same.
    """
    if given and run.head == "classifier":
        raise InputError(f"{run.name} has a head of its own labels, {', '.join(run.labels)}: leave --labels out")
    labels = tuple(given) or run.labels
    apply_labels(parse_labels(labels), ())
    return labels


class Predictions(NamedTuple):
    """What a run makes of texts."""

    names: tuple[str, ...]
    probabilities: Float[Tensor, "n classes"]

    @property
    def argmax(self) -> list[str]:
        return [self.names[i] for i in self.probabilities.argmax(-1).tolist()]


def predict(it: LoadedClassifier, rows: Sequence[LabeledText], given: Sequence[str] = ()) -> Predictions:
    """How likely each label is of each row: of the run's own, or of `given` as `own_or` takes them. What a row is
    labeled is not read.

    Raises InputError as `own_or` does, and for rows that cannot be laid.
    """
    own = tuple(parse_labels(labels_or_own(it.run, given)).values())
    labels, width = labels_of(it.run, own, it.tokenizer), min(it.run.max_seq_len, it.params.cfg.n_ctx)
    bare = [replace(row, label="") for row in rows]
    examples = encode(bare, labels, frame_of(it.run, own, it.tokenizer), it.tokenizer, width).examples
    return Predictions(own, log_probabilities(it.params, examples, labels, width).exp())
