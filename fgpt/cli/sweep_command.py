"""`fgpt sweep`: a recipe and options with several values, or a sweep to resume."""

from collections.abc import Sequence
from pathlib import Path

from fgpt.cli.console import answers
from fgpt.cli.options import option_names, parse
from fgpt.cli.train_command import HELP, recipe_with_options, split_options, wants_recipe
from fgpt.errors import InputError


def sweep(args: Sequence[str]) -> None:
    """Train every combination of learning rates, seeds, ranks .. at once, as one program over one base."""
    name, *options = args or [""]
    if wants_recipe("sweep", name):
        answers.print("Sweeps are of recipes that tune a base on batches that are given: not of GRPO and pretraining.")
        answers.print("fgpt sweep SWEEP --resume resumes a sweep, by its name or folder.")
        return
    from fgpt.cli.run_dir import SWEEP
    from fgpt.cli.sweep import command
    from fgpt.cli.sweep.grid import SWEPT

    program = f"fgpt sweep {name}"
    if "--resume" in options:
        if others := [option for option in options if option != "--resume"]:
            raise InputError(f"{others[0]}: a sweep is resumed as it was begun; leave it out")
        folder = Path(name) if (Path(name) / SWEEP).is_file() else Path("runs") / name
        command.resume(folder)
        return
    sweep_args, recipe_args = split_options(options, option_names(command.SweepOptions))
    if set(HELP) & set(recipe_args):
        answers.print(f"These options have several values: {', '.join(SWEPT)}")
        answers.print(f"All other options of the recipe have one: fgpt train {name} --help\n")
        sweep_args, recipe_args = ["--help"], []
    sweep_options = parse(command.SweepOptions, sweep_args, None, program)
    if not recipe_args:
        recipe_with_options(name, [], program)
    command.run(name, recipe_args, sweep_options, program)
