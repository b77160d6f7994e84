"""Classification of many texts: they are packed into rows as in training, and no text attends to another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.classification_head import with_classification_head
from fgpt.cli import run_dir
from fgpt.cli.console import show_progress
from fgpt.cli.training.build import load_base
from fgpt.cli.training.tokenizer import load_tokenizer
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
from fgpt.data.examples import Example
from fgpt.distributed import map_over_ranks
from fgpt.errors import InputError
from fgpt.model import GPT, KVCache, forward_with_cache, hidden_at, logits
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device, tree_map

BATCH_SIZE = 8
"""Rows in a batch; of packed texts, each row holds several."""


@torch.no_grad()
def log_probabilities(
    params: GPT, examples: Sequence[Example], labels: Labels, max_seq_len: int = 512
) -> Float[Tensor, "n classes"]:
    """The log-probability of each class for each example, normalized over the classes; their labels are not read.

    If most of every example is a common prefix, such as shots, that prefix is read once. Otherwise examples are packed
    into rows of `max_seq_len` tokens, or of the longest example if that is longer.
    """
    by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    texts = [examples[i].tokens for i in by_length]
    prefix_length = common_prefix_length(texts)
    if 2 * prefix_length > len(texts[0]):
        hidden_states = _hidden_after_prefix(params, texts, prefix_length)
    else:
        hidden_states = _hidden_packed(params, texts, max_seq_len)
    choices, logprobs = torch.tensor(labels.output_ids), torch.empty(len(examples), len(labels.output_ids))

    @torch.no_grad()
    def classify(batch: HiddenStates) -> tuple[list[int], Float[Tensor, "texts classes"]]:
        indices, h = batch()
        return indices, logits(params, h).float().cpu()[:, choices].log_softmax(-1)

    with show_progress("classifying", len(examples)) as advance:
        for indices, batch_logprobs in map_over_ranks(classify, hidden_states):
            logprobs[[by_length[i] for i in indices]] = batch_logprobs
            advance(len(indices))
    return logprobs


HiddenStates: TypeAlias = Callable[[], tuple[list[int], Float[Tensor, "texts d_model"]]]
"""Computes a batch: indices of texts, and the hidden state at the last position of each."""


def _hidden_packed(params: GPT, texts: Sequence[Sequence[int]], max_seq_len: int) -> list[HiddenStates]:
    target, lengths = device(params), [len(text) for text in texts]  # longest first, which packs well
    bins = packing.pack(lengths, max(max_seq_len, lengths[0]))

    def compute(batch_bins: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        rows = []
        for indices in batch_bins:
            rows.append([Example.classification(texts[i], 0) for i in indices])
        batch = tree_map(lambda x: x.to(target), packing.collate(rows))
        assert batch.loss_positions is not None  # the last position of each text, in their order
        h = hidden_at(params, batch.tokens, batch.loss_positions, batch.segments, cu_seqlens=batch.cu_seqlens)
        return [i for indices in batch_bins for i in indices], h

    return [partial(compute, bins[start : start + BATCH_SIZE]) for start in range(0, len(bins), BATCH_SIZE)]


def _hidden_after_prefix(params: GPT, texts: Sequence[Sequence[int]], prefix_length: int) -> list[HiddenStates]:
    target = device(params)
    prefix = torch.tensor([texts[0][:prefix_length]], device=target)
    _, prefix_cache = forward_with_cache(params, prefix, KVCache())

    def compute(start: int) -> tuple[list[int], Tensor]:
        rows = [text[prefix_length:] for text in texts[start : start + BATCH_SIZE]]
        num_rows, longest = len(rows), max(map(len, rows))
        padded = torch.tensor([[*row] + [0] * (longest - len(row)) for row in rows], device=target)
        cache = tree_map(lambda x, n=num_rows: x.expand(n, *x.shape[1:]), prefix_cache)
        h, _ = forward_with_cache(params, padded, cache)
        last = [len(row) - 1 for row in rows]  # no text attends to the padding after it
        return list(range(start, start + num_rows)), h[range(num_rows), last]

    return [partial(compute, start) for start in range(0, len(texts), BATCH_SIZE)]


def common_prefix_length(texts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all texts have in common at their beginning; at least one of each is left over."""
    limit = min(map(len, texts)) - 1
    for i in range(limit):
        if len({text[i] for text in texts}) > 1:
            return i
    return limit


def label_choices(recipe: ClassificationRecipe, names: Sequence[str], tokenizer: Tokenizer) -> Labels:
    """The labels, and which logit stands for each. Raises InputError if labels are next tokens and one of them is
    several tokens.
    """
    return verbalizers(names, tokenizer) if recipe.head == "lm" else class_labels(names)


def prompt_frame_of(
    recipe: ClassificationRecipe, names: Sequence[str], tokenizer: Tokenizer, shots: Sequence[LabeledText] = ()
) -> PromptFrame:
    """The tokens around each text, in training and in inference."""
    return prompt_frame(recipe.prompt, names, tokenizer, recipe.head == "classifier", shots)


def with_head(recipe: ClassificationRecipe, base: GPT, names: Sequence[str]) -> GPT:
    """What the recipe adapts: the base, with a new classification head if the recipe has one."""
    if recipe.head != "classifier":
        return base
    return with_classification_head(base, len(names), fold_in(key(recipe.seed), "head"))


def read_recipe(folder: Path) -> ClassificationRecipe:
    """The classification recipe of a run directory. Raises InputError for any other recipe."""
    return run_dir.read_run_as(folder, ClassificationRecipe, "a classifier, as emotion-small is")


class LoadedClassifier(NamedTuple):
    """A trained classifier, ready to use."""

    recipe: ClassificationRecipe
    params: GPT
    tokenizer: Tokenizer


def load_classifier(folder: Path) -> LoadedClassifier:
    """The trained classifier in a run directory. Raises InputError for any other directory."""
    recipe = read_recipe(folder)
    base = with_head(recipe, load_base(recipe), recipe.labels)
    return LoadedClassifier(recipe, run_dir.load_tuned(folder, base), load_tokenizer(recipe).tokenizer)


def resolve_inference_labels(recipe: ClassificationRecipe, labels: Sequence[str]) -> tuple[str, ...]:
    """`labels`, each as "label" or "label=word", or the recipe's own if there are none.

    Raises InputError if the recipe has a classification head, which knows its own labels alone, for fewer than two
    labels, and for two that are equal.
    """
    if labels and recipe.head == "classifier":
        raise InputError(f"{recipe.name} has a head of its own labels, {', '.join(recipe.labels)}: leave --labels out")
    resolved = tuple(labels) or recipe.labels
    apply_labels(parse_labels(resolved), ())
    return resolved


class Predictions(NamedTuple):
    """The probability of each label for each text."""

    names: tuple[str, ...]
    probabilities: Float[Tensor, "n classes"]

    @property
    def argmax(self) -> list[str]:
        """The most likely label of each text."""
        return [self.names[i] for i in self.probabilities.argmax(-1).tolist()]


def predict(classifier: LoadedClassifier, rows: Sequence[LabeledText], labels: Sequence[str] = ()) -> Predictions:
    """The probability of each label for each row: of the recipe's labels, or of `labels` as `resolve_inference_labels`
    takes them. The rows' own labels are not read.

    Raises InputError as `resolve_inference_labels` does, and for rows that do not fit.
    """
    recipe, params, tokenizer = classifier
    names = tuple(parse_labels(resolve_inference_labels(recipe, labels)).values())
    choices, max_seq_len = label_choices(recipe, names, tokenizer), min(recipe.max_seq_len, params.cfg.n_ctx)
    unlabeled = [replace(row, label="") for row in rows]
    frame = prompt_frame_of(recipe, names, tokenizer)
    examples = encode(unlabeled, choices, frame, tokenizer, max_seq_len).examples
    return Predictions(names, log_probabilities(params, examples, choices, max_seq_len).exp())
