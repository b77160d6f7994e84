"""The three kinds of runs, and what lays each out and carries it out. Each is imported only when it is asked for."""

from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.training.job import TrainingJob
from fgpt.recipes import AnyRecipe, ClassificationRecipe, PretrainingRecipe


def build_job(run: AnyRecipe) -> TrainingJob:
    """The run's training, laid out. Raises InputError for what bad input can spoil."""
    if isinstance(run, PretrainingRecipe):
        from fgpt.cli.training import pretraining

        return pretraining.build_job(run)[0]
    if isinstance(run, ClassificationRecipe):
        from fgpt.cli.training import classification

        return classification.build_job(run)[0]
    from fgpt.cli.training import instruction_tuning

    return instruction_tuning.build_job(run)[0]


def run(run: AnyRecipe, where: Path | None) -> Path:
    """Train, save, score: in a new folder, or in that of a run which is taken up again. Returns the folder.

    Raises InputError for a name that no folder can have, before anything is read.
    """
    run_dir.check_name(run.name)
    if isinstance(run, PretrainingRecipe):
        from fgpt.cli.training import pretraining

        return pretraining.pretrain(run, where)
    if isinstance(run, ClassificationRecipe):
        from fgpt.cli.training import classification

        return classification.classify(run, where)
    from fgpt.cli.training import instruction_tuning

    return instruction_tuning.train(run, where)
