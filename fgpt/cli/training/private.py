"""Private trainings: what such a recipe may not have, its noise, and the budget that it has spent."""

import secrets
from dataclasses import dataclass, replace

import numpy as np

from fgpt.cli.console import console, show_progress
from fgpt.cli.training.examples import InstructionData
from fgpt.cli.training.row_order import LotOrder
from fgpt.data.example_store import StoredExamples
from fgpt.data.mixtures import Mixture
from fgpt.distributed import object_from_first_rank
from fgpt.errors import InputError
from fgpt.extras import require_extra
from fgpt.kernels.rotary import DynamicScaling
from fgpt.model import Config
from fgpt.recipes import SUPERVISED, AnyRecipe, ClassificationRecipe, FineTuningRecipe, InstructionRecipe
from fgpt.transforms.privacy import GaussianMechanism
from fgpt.transforms.privacy_accounting import find_noise_multiplier, spent_epsilon


def is_private(recipe: AnyRecipe) -> bool:
    return isinstance(recipe, FineTuningRecipe) and recipe.privacy.epsilon is not None


def check_private_options(recipe: AnyRecipe) -> None:
    """Raises InputError for a private training whose loss is not a sum over examples, and for options under which one
    example changes more than its own gradient, or is read besides.
    """
    if not isinstance(recipe, FineTuningRecipe) or recipe.privacy.epsilon is None:
        return
    recipe.privacy.check()
    option = "--privacy.epsilon"
    if type(recipe) not in SUPERVISED:
        raise InputError(
            f"{option} is of instruction tuning and classification, whose losses are sums over examples: "
            f"{recipe.kind} training has no private form here, leave it out"
        )
    if recipe.neftune_noise_alpha:
        raise InputError(
            "--neftune-noise-alpha scales noise by the longest row of a batch, so that an example changes what others "
            f"add, and {option} bounds what it adds itself: leave one of them out"
        )
    if recipe.cuda_graphs:
        raise InputError(f"--cuda-graphs records steps of few shapes, and lots of {option} have many: leave one out")
    if isinstance(recipe, InstructionRecipe) and recipe.forget is not None:
        raise InputError(
            f"--forget takes the steps of {option} again with the same noise, and the difference of both runs would "
            "show the rows: leave one of them out"
        )
    if isinstance(recipe, InstructionRecipe) and recipe.streaming:
        raise InputError(f"{option} draws lots from all examples, which --streaming does not know: leave one out")
    if isinstance(recipe, ClassificationRecipe):
        if not recipe.labels:
            raise InputError(f"{option} needs --labels: read from the examples, they would tell that one has a label")
        if recipe.num_fewshot:
            raise InputError(f"--num-fewshot shows training examples to the base without {option}: leave one out")
    require_extra("privacy", "private trainings", "dp_accounting")


def with_private_seed(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with a seed of its noise that nobody knows, if it is private and names none; one for all processes."""
    if not isinstance(recipe, FineTuningRecipe) or recipe.privacy.epsilon is None or recipe.privacy.seed is not None:
        return recipe
    return replace(recipe, privacy=replace(recipe.privacy, seed=object_from_first_rank(secrets.randbits(63))))


@dataclass(frozen=True)
class PrivateTraining:
    """The numbers of a private training."""

    mechanism: GaussianMechanism
    sampling_rate: float
    delta: float

    def epsilon(self, steps: int) -> float:
        """ε after so many steps."""
        noise = self.mechanism.noise_multiplier
        return spent_epsilon(noise, delta=self.delta, sampling_rate=self.sampling_rate, steps=steps)


def plan_private(recipe: FineTuningRecipe, order: LotOrder, cfg: Config) -> PrivateTraining:
    """The noise with which the steps of the training spend its budget, printed.

    Raises InputError for lots of more rows than there are, for a delta under which an example may be published, and for
    a model in which a long row changes others.
    """
    num_examples = order.num_examples
    epsilon, delta = recipe.privacy.epsilon, recipe.privacy.delta
    assert epsilon is not None
    assert delta is not None
    lot_size, rate, steps = recipe.rows_per_update, order.sampling_rate, order.num_steps()
    if rate > 1:
        raise InputError(
            f"--micro-batch-size {recipe.micro_batch_size} times --grad-accumulation-steps "
            f"{recipe.grad_accumulation_steps} are {lot_size} rows in a step, and there are {num_examples} examples: "
            "lower one of them"
        )
    if delta * num_examples >= 1:
        raise InputError(
            f"--privacy.delta {delta:g} is not below 1 / {num_examples} examples ({1 / num_examples:.2g}): to publish "
            "one of them whole would be private by it; lower it"
        )
    if isinstance(cfg.rope_scaling, DynamicScaling) and order.max_seq_len > cfg.rope_scaling.context:
        raise InputError(
            f"beyond {cfg.rope_scaling.context} tokens a long row turns the angles of rows that are filled up to its "
            "length: lower --max-seq-len for --privacy.epsilon"
        )
    with show_progress("calibrating the noise"):
        noise = find_noise_multiplier(epsilon, delta=delta, sampling_rate=rate, steps=steps)
    mechanism = GaussianMechanism(recipe.privacy.max_norm, noise, float(lot_size))
    console.print(
        f"private: epsilon {epsilon:g} at delta {delta:g} for each of {num_examples:,} examples, a row by itself; "
        f"{steps} lots of {lot_size} on average; noise {noise:.4g} times the largest norm, {mechanism.max_norm:g}",
        soft_wrap=True,
    )
    return PrivateTraining(mechanism, rate, delta)


def check_private_data(data: InstructionData, mixture: Mixture) -> None:
    """Raises InputError if a row of the data is in lots more often than others, or is several examples."""
    if mixture.counts != mixture.sizes:
        raise InputError("--privacy.epsilon draws each example equally often: leave out the weights of --data")
    names = [name for name, _, _ in data.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--data names {twice[0]} twice, and --privacy.epsilon protects one example: give it once")
    for name, examples in zip(names, data.by_source, strict=True):
        rows = examples.rows if isinstance(examples, StoredExamples) else np.arange(len(examples))
        if more := len(rows) - len(np.unique(rows)):
            raise InputError(
                f"{more:,} examples of {name} are further parts of their rows (texts longer than --max-seq-len, or "
                "conversations whose template rewrites earlier turns), and --privacy.epsilon protects one example: "
                "raise the limit, or give --assistant-turns last"
            )
