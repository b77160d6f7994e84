"""`fgpt train`, `fgpt doctor` and `fgpt lr-range`: a recipe and its options, or a run to resume."""

import dataclasses
import inspect
import itertools
from collections.abc import Sequence
from pathlib import Path

from fgpt import recipes
from fgpt.cli import config_file, run_json
from fgpt.cli.console import answers, console
from fgpt.cli.listing import print_recipes
from fgpt.cli.options import option_names, parse
from fgpt.errors import InputError

HELP = ("-h", "--help")
AUTO_RESUME = "--auto-resume"


def train(args: Sequence[str]) -> None:
    """Train a recipe, or resume a run: fgpt train lora-nano --lr 1e-3."""
    name, *options = with_recipe(args) or [""]
    if wants_recipe("train", name):
        return
    if AUTO_RESUME in options:
        options = [option for option in options if option != AUTO_RESUME]
        if (outcome := _auto_resume(name, options)) is None:
            return
        run, folder = outcome
    elif "--resume" in options:
        if config_file.split_config(options)[0] is not None:
            raise InputError("--resume goes on with the options that the run has: leave --config out")
        run, folder = resume(name, [option for option in options if option != "--resume"])
    else:
        run, folder = recipe_with_options(name, options, f"fgpt train {name}"), None
    from fgpt.cli import tasks
    from fgpt.cli.training import trackers

    trackers.check(run)
    tasks.run_recipe(run, folder)


def doctor(args: Sequence[str]) -> None:
    """Check a recipe on your model, data and machine before training it."""
    name, *options = args or [""]
    if wants_recipe("doctor", name):
        return
    from fgpt.cli.diagnostics.doctor import run

    run(recipe_with_options(name, options, f"fgpt doctor {name}"))


def lr_range(args: Sequence[str]) -> None:
    """Compare learning rates of a recipe in one short training of all of them, and suggest one."""
    name, *options = args or [""]
    if wants_recipe("lr-range", name):
        return
    from fgpt.cli.diagnostics.lr_range import RangeOptions, run

    command = f"fgpt lr-range {name}"
    range_args, others = split_options(options, option_names(RangeOptions))
    if set(HELP) & set(others):
        range_args, others = ["--help"], []
    range_options = parse(RangeOptions, range_args, None, command)
    run(recipe_with_options(name, others, command), range_options)


def with_recipe(args: Sequence[str]) -> list[str]:
    """The arguments with the name of the recipe in front, where a --config file says it alone.

    Raises InputError if it does not.
    """
    if not args or args[0].partition("=")[0] != config_file.OPTION:
        return list(args)
    path, _ = config_file.split_config(args)
    assert path is not None
    values = config_file.read_config(path)
    name = values.get(config_file.RECIPE)
    if name is None and path.name == run_json.RUN:
        name = recipes.nearest(run_json.read_run(path.parent))
    if not isinstance(name, str):
        raise InputError(f"{path} names no recipe: add recipe: lora-nano, or type fgpt train RECIPE --config {path}")
    return [name, *args]


def split_options(args: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `args` that `names` has, with their one value each, and all others."""
    matched: list[str] = []
    others: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg.partition("=")[0].replace("_", "-") not in names:
            others.append(arg)
            continue
        matched.append(arg)
        if "=" not in arg and rest:
            matched.append(rest.pop(0))
    return matched, others


def wants_recipe(command: str, name: str) -> bool:
    """Whether help was asked for, which is then printed. Raises InputError if no recipe is named."""
    if name in HELP:
        answers.print(f"usage: fgpt {command} RECIPE [options]\n")
        answers.print(f"fgpt {command} RECIPE --help lists the options of a recipe.")
        if command == "train":
            answers.print(
                "fgpt train RECIPE --resume resumes its newest unfinished run, fgpt train RUN --resume any run, and "
                "fgpt train RECIPE --auto-resume begins one if there is none."
            )
        answers.print("\nThe recipes:\n")
        print_recipes()
    elif not name:
        raise InputError(f"expected a recipe: fgpt {command} RECIPE [options]; `fgpt recipes` lists them")
    return name in HELP


def recipe_with_options(name: str, options: Sequence[str], command: str) -> recipes.AnyRecipe:
    """A recipe with its options replaced, by those of a --config file first. Raises InputError for an unknown recipe or
    option.
    """
    path, options = config_file.split_config(options)
    _check_length(options)
    if path is not None:
        from_file = config_file.as_options(config_file.read_config(path), path)
        options = [*config_file.without_overridden(from_file, options), *options]
    if name not in recipes.RECIPES and (folder := _run_dir_of(name)):
        raise InputError(
            f"no recipe named {name!r}: {folder} is a run that a recipe has made; give that recipe, and --name "
            f"{folder.name}"
        )
    recipe = recipes.find(name)
    try:
        run = parse(type(recipe), options, recipe, command, inspect.getdoc(recipes.RECIPES[name]))
    except InputError as err:
        raise err if path is None else InputError(f"{err} (some of the options are those of {path})") from None
    return _with_target_of_kind(recipe, _with_update_of(recipe, run))


def _check_length(options: Sequence[str]) -> None:
    """Raises InputError for a number of steps and of epochs, of which only one could be kept."""
    steps, epochs = _value_of("--steps", options), _value_of("--epochs", options)
    if epochs is not None and steps not in (None, "None"):
        raise InputError(f"--steps {steps} and --epochs {epochs} both say how long to train: leave one out")


LOW_RANK = ("lora", "dora")


def _with_target_of_kind(recipe: recipes.AnyRecipe, run: recipes.AnyRecipe) -> recipes.AnyRecipe:
    """`run` with the default target of its kind of adapter, if `recipe` has a kind with other targets."""
    if not isinstance(run, recipes.FineTuningRecipe) or not isinstance(recipe, recipes.FineTuningRecipe):
        return run
    before, now = recipe.adapter, run.adapter
    is_same = before.kind == now.kind or {before.kind, now.kind} <= set(LOW_RANK)
    if is_same or now.target != before.target:
        return run
    return dataclasses.replace(run, adapter=dataclasses.replace(now, target=None))


def _with_update_of(recipe: recipes.AnyRecipe, run: recipes.AnyRecipe) -> recipes.AnyRecipe:
    """`run` with the update of `recipe`, whose own micro-batch size `auto` has replaced."""
    if not isinstance(run, recipes.FineTuningRecipe) or not isinstance(recipe, recipes.FineTuningRecipe):
        return run
    if run.micro_batch_size != "auto" or recipe.micro_batch_size == "auto":
        return run
    from fgpt.cli.devices import resolve_device

    if resolve_device(run.device).type == "cpu":
        console.print(
            f"micro-batches of {recipe.micro_batch_size} rows (--micro-batch-size auto), the recipe's own number: "
            "larger ones gain nothing on a CPU"
        )
        return dataclasses.replace(run, micro_batch_size=recipe.micro_batch_size)
    rows = recipe.micro_batch_size * run.grad_accumulation_steps
    return dataclasses.replace(run, grad_accumulation_steps=rows)


def _run_dir_of(name: str) -> Path | None:
    """The run directory if `name` is a run and no recipe."""
    from fgpt.cli import run_dir

    folders = (Path(name), Path("runs") / name)
    return next((folder for folder in folders if name and (folder / run_dir.RUN).is_file()), None)


def resume(name: str, options: Sequence[str]) -> tuple[recipes.AnyRecipe, Path]:
    """The recipe and the directory of an unfinished run, by the name of its recipe, its own name or its folder; or with
    more steps or epochs those of a finished one.

    Raises InputError if there is none, or an option would make it another training.
    """
    from fgpt.cli import run_dir
    from fgpt.cli.training.job import LENGTHS, MUTABLE_OPTIONS

    command = f"fgpt train {name} --resume"
    lengths = {option.partition("=")[0].removeprefix("--") for option in options} & {"steps", "epochs"}
    if name in recipes.RECIPES:
        recipe = recipe_with_options(name, options, command)
        folder = _find_resumable(recipe.name, recipe.out, bool(lengths))
    else:
        folder = _find_resumable(name, _out_option(options), bool(lengths))
    started = run_dir.read_run(folder)
    _check_length(options)
    run = parse(type(started), options, started, command)
    is_lengthened = bool(lengths) and run_dir.read_state(folder) == "finished"
    if is_lengthened:
        run = _lengthen(run, folder, lengths)
    if run.dtype == "auto":
        run = dataclasses.replace(run, dtype=started.dtype)
    if run.micro_batch_size == "auto":
        run = dataclasses.replace(run, micro_batch_size=started.micro_batch_size)  # what auto has chosen at the start
    if isinstance(run, recipes.InstructionRecipe) and isinstance(started, recipes.InstructionRecipe):
        run = run if run.template != "auto" else dataclasses.replace(run, template=started.template)
    for field in dataclasses.fields(run):
        before, now = getattr(started, field.name), getattr(run, field.name)
        if is_lengthened and field.name in LENGTHS:
            continue
        if before != now and field.name not in MUTABLE_OPTIONS:
            option = "--" + field.name.replace("_", "-")
            restart = "leave out --resume" if name in recipes.RECIPES else "start a new run"
            raise InputError(f"{folder} was started with {option} {before}, not {now}: leave it out, or {restart}")
    return run, folder


def _find_resumable(name: str, out: Path, may_be_lengthened: bool) -> Path:
    """The unfinished run of a name; if there is none, the newest one, which has finished and may be lengthened."""
    from fgpt.cli import run_dir

    try:
        return run_dir.find_unfinished(name, out)
    except InputError:
        if not may_be_lengthened:
            raise
    return run_dir.find_any(name, out)


def _lengthen(run: recipes.AnyRecipe, folder: Path, lengths: set[str]) -> recipes.AnyRecipe:
    """A finished run with more steps or epochs. Raises InputError for one that cannot have more."""
    if not isinstance(run, recipes.FineTuningRecipe):
        raise InputError(f"{folder} has finished, and a pretraining cannot be lengthened: start a new run")
    if run.privacy.epsilon is not None:
        raise InputError(f"{folder} has spent its privacy budget: it cannot be lengthened")
    from fgpt.cli import run_dir
    from fgpt.cli.metrics_log import last_metrics

    end = last_metrics(folder / run_dir.METRICS).get("step", 0)
    steps = run.steps if "steps" in lengths else None
    return dataclasses.replace(run, steps=steps, lengthened_at=(*run.lengthened_at, end))


def _auto_resume(recipe_name: str, options: Sequence[str]) -> tuple[recipes.AnyRecipe, Path | None] | None:
    """The recipe, and its newest run to go on with: None begins one. None in place of both if that run has finished.
    So one command begins a training, and goes on with it after each end of its machine.

    Raises InputError as `resume` does.
    """
    from fgpt.cli import run_dir

    recipe = recipe_with_options(recipe_name, options, f"fgpt train {recipe_name} {AUTO_RESUME}")
    runs = run_dir.runs_named(recipe.name, recipe.out)
    if not runs:
        return recipe, None
    if run_dir.read_state(runs[-1]) == "finished":
        console.print(f"{runs[-1]} has finished: nothing to train", markup=False, soft_wrap=True)
        return None
    return resume(recipe_name, options)


def _out_option(options: Sequence[str]) -> Path:
    """The value of --out, which is needed before it is known which recipe's options these are."""
    return Path(_value_of("--out", options) or "runs")


def _value_of(name: str, options: Sequence[str]) -> str | None:
    """The value of an option as it was typed, the last one; None if it was not."""
    value = None
    for option, following in itertools.pairwise([*options, ""]):
        if option == name:
            value = following
        elif option.startswith(f"{name}="):
            value = option.removeprefix(f"{name}=")
    return value
