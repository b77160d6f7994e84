"""What differs between the kinds of recipes: a `Task` for each, looked up here alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from fgpt.cli import processes, run_dir
from fgpt.cli.console import console
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.metrics_log import plot_loss
from fgpt.cli.model_card.card import write_trained_card
from fgpt.cli.tasks.classification import ClassificationTask
from fgpt.cli.tasks.data_to_text import DataToTextTask
from fgpt.cli.tasks.grpo import GRPOTask
from fgpt.cli.tasks.instruction_tuning import InstructionTask
from fgpt.cli.tasks.preference_tuning import PreferenceTask
from fgpt.cli.tasks.pretraining import PretrainingTask
from fgpt.cli.tasks.reward_modeling import RewardTask
from fgpt.cli.training.early_stopping import check_evaluation_options
from fgpt.cli.training.final_state import check_final_state
from fgpt.cli.training.forgotten_rows import finish_manifest
from fgpt.cli.training.job import TrainingJob, parameter_counts
from fgpt.cli.training.loop import TrainResult, resume_hint, train_loop
from fgpt.cli.training.private import check_private_options, with_private_seed
from fgpt.cli.training.reproducibility import use_determinism
from fgpt.cli.training.row_gradients import check_per_example_options, report_row_gradients
from fgpt.cli.training.shared_update import check_shared_update, describe_inputs
from fgpt.data.examples import Example
from fgpt.distributed import object_from_first_rank, world
from fgpt.errors import InputError
from fgpt.kernels.sharded_parameter import has_sharded_parameters
from fgpt.model import GPT
from fgpt.recipes import (
    AnyRecipe,
    ClassificationRecipe,
    DataToTextRecipe,
    FineTuningRecipe,
    GRPORecipe,
    InstructionRecipe,
    PreferenceRecipe,
    PretrainingRecipe,
    RewardRecipe,
    TrainingRecipe,
)
from fgpt.recipes.tuning import INITIALIZATIONS
from fgpt.sharding import gather_on_first, has_sharded


@runtime_checkable
class Task(Protocol):
    """A training, and what is scored before and after it. `run_task` calls `score_initial`, `save`, `score` and
    `report`, in this order.
    """

    @property
    def recipe(self) -> AnyRecipe:
        """The recipe with all that its data decides, such as the labels: what run.json holds."""
        ...

    @property
    def job(self) -> TrainingJob: ...

    def score_initial(self) -> Any:
        """The scores before training; None if there are none. Reads the job's initial state."""
        ...

    def save(self, trainable: Any, out: Path) -> Path:
        """Save what was trained in the run directory. Returns where."""
        ...

    def score(self, trainable: Any, out: Path) -> Any:
        """The scores of what was trained and saved; None if there are none."""
        ...

    def report(self, before: Any, after: Any, out: Path) -> None:
        """Print both scores, and write them into the run directory."""
        ...


@runtime_checkable
class TaskType(Protocol):
    """The class of a task: what can be made from a recipe alone."""

    @property
    def loss_unit(self) -> str:
        """What has weight 1 in the loss, for plots: "token" or "example"."""
        ...

    @property
    def report_section(self) -> str:
        """The section of a report that shows the results of a training."""
        ...

    def build(self, recipe: Any) -> Task:
        """Read and check everything that the training needs. Raises InputError for bad input."""
        ...

    def load_base(self, recipe: Any) -> GPT:
        """What the recipe adapts. Raises InputError if it adapts nothing."""
        ...

    def class_names(self, recipe: Any) -> tuple[str, ...]:
        """The classes of the recipe's classification head; none if it has no such head."""
        ...

    def load_heldout_examples(self, recipe: Any, limit: int) -> list[Example]:
        """Up to `limit` examples that the recipe does not train on; if it holds out none, of those that it does."""
        ...

    def evaluate(self, recipe: Any, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        """The metrics of a trained run, by what they are of, printed too. Whatever can be bad input is read before the
        model is loaded.

        Raises InputError for options that such a run cannot have, and if it has no rows to be evaluated on.
        """
        ...

    def eval_command(self, folder: str) -> str:
        """The command that evaluates the run of a directory."""
        ...


TASKS: dict[type[TrainingRecipe], TaskType] = {
    InstructionRecipe: InstructionTask,
    GRPORecipe: GRPOTask,
    DataToTextRecipe: DataToTextTask,
    PreferenceRecipe: PreferenceTask,
    RewardRecipe: RewardTask,
    ClassificationRecipe: ClassificationTask,
    PretrainingRecipe: PretrainingTask,
}


def task_type(recipe: TrainingRecipe) -> TaskType:
    """The kind of task that a recipe describes."""
    return TASKS[type(recipe)]


def build_task(recipe: AnyRecipe) -> Task:
    """Read and check everything that a training needs, before anything slow begins.

    Raises InputError for bad input.
    """
    check_evaluation_options(recipe)
    check_private_options(recipe)
    check_initialization(recipe)
    if isinstance(recipe, FineTuningRecipe):
        run_dir.check_base(recipe.base)
    check_per_example_options(recipe)
    check_shared_update(recipe, world().size)
    use_determinism(recipe)
    return task_type(recipe).build(with_private_seed(recipe))


def build_job(recipe: AnyRecipe) -> TrainingJob:
    """The training of a recipe alone. Raises InputError as `build_task` does."""
    return build_task(recipe).job


def run_recipe(recipe: AnyRecipe, resumed: Path | None = None) -> Path:
    """Train, save, score and report: in a new run directory, or in `resumed`. Returns the run directory.

    Raises InputError for a name that no folder can have and a place that none can be made in, before anything is read,
    and as `build_task` and `train_loop` do.
    """
    run_dir.check_name(recipe.name)
    if resumed is None:
        run_dir.check_out(recipe.out)
    return run_task(build_task(recipe), resumed)


def run_task(task: Task, resumed: Path | None = None) -> Path:
    """`run_recipe` for a task that is already built.

    Raises KeyboardInterrupt after saving what was trained so far, if the training was interrupted; and InputError
    before anything is saved, if what was trained is not finite.
    """
    recipe, job = task.recipe, task.job
    processes.check_alike(lambda: describe_inputs(job, resumed))
    if isinstance(recipe, FineTuningRecipe) and recipe.lengthened_at:
        _announce_lengthening(job, recipe.lengthened_at[-1])
    with _shared_run_dir(recipe, job, resumed) as out, processes.remedy(resume_hint(out)):
        before = task.score_initial()
        result = train_loop(job, out)
        check_final_state(job, result.state)
        trained: Any = job.evaluation_params(result.state)
        scores: Any = None
        scores_parts = isinstance(task, ClassificationTask) and has_sharded(job.frozen)
        if scores_parts and not result.interrupted:
            scores = task.score(trained, out)  # while those that hold the other parts are there
        if has_sharded_parameters(trained):
            trained = gather_on_first(trained)
        if not processes.leave():
            if result.interrupted:
                raise KeyboardInterrupt
            return out
        saved = task.save(trained, out)
        classes = task_type(recipe).class_names(recipe)
        write_trained_card(out, recipe, classes)
        plot_loss(out / run_dir.METRICS, out / run_dir.LOSS, recipe.name, task_type(recipe).loss_unit)
        print_saved(result, saved)
        if result.interrupted:
            console.print(f"what was trained so far is usable: {recipe.suggest_use(out)}; {resume_hint(out)}")
            raise KeyboardInterrupt
        task.report(before, scores if scores_parts else task.score(trained, out), out)
        write_trained_card(out, recipe, classes)  # with the scores
        finish_manifest(out)
        console.print(recipe.suggest_use(out), markup=False, soft_wrap=True)
        if isinstance(recipe, FineTuningRecipe) and recipe.per_example:
            report_row_gradients(job, trained, out)
    return out


def _announce_lengthening(job: TrainingJob, end: int) -> None:
    """Say how a run goes on that had finished after step `end`. Raises InputError if it has no more steps."""
    if job.steps <= end:
        raise InputError(f"the run has finished its {end} steps, and {job.steps} are no more: give more --steps")
    lr = float(job.schedule(torch.tensor(end)))
    console.print(
        f"lengthened from {end} to {job.steps} steps: lr goes on at {lr:.2g}, as in a training of {job.steps} steps"
    )


def check_initialization(recipe: AnyRecipe) -> None:
    """Raises InputError for an initialization that the kind of training does not have."""
    if not isinstance(recipe, FineTuningRecipe) or recipe.adapter.init not in INITIALIZATIONS[1:]:
        return
    init = recipe.adapter.init
    if not isinstance(recipe, InstructionRecipe | ClassificationRecipe) or isinstance(
        recipe, GRPORecipe | PreferenceRecipe
    ):
        raise InputError(
            f"--adapter.init {init} is of instruction tuning and classification, and {recipe.name} is neither: leave "
            "it out"
        )
    if recipe.privacy.epsilon is not None and init in ("eva", "lora_ga"):
        raise InputError(f"--adapter.init {init} reads the data without noise: take pissa or olora with --privacy")


@contextlib.contextmanager
def _shared_run_dir(recipe: AnyRecipe, job: TrainingJob, resumed: Path | None) -> Iterator[Path]:
    """The run directory, which rank 0 opens for all."""
    if not processes.is_first():
        yield Path(object_from_first_rank(""))
        return
    parameters = parameter_counts(job.initial_state.peek().trainable, job.frozen)
    with run_dir.open_run_dir(recipe, job.steps, resumed, parameters) as out:
        object_from_first_rank(str(out))
        yield out


def print_saved(result: TrainResult, saved: Path) -> None:
    """Say how a training ended."""
    how = "interrupted" if result.interrupted else "saved the state"
    console.print(f"{how} after {int(result.state.step)} steps, {result.seconds:.0f} s; saved in {saved}")
