"""`fgpt eval`: a run on its held-out rows, the perplexity of a text, or lm-eval's tasks.

eval.json          the settings and every result: in the run directory, or in --out
eval-wiki.json     the same with other settings than the run's own, named by those
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from fgpt.cli import processes, results, run_dir
from fgpt.cli.console import answers, console, show_progress
from fgpt.cli.devices import resolve_device
from fgpt.cli.evaluation import lm_eval_tasks
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.text import text_metrics
from fgpt.cli.options import parse
from fgpt.cli.output_options import is_json, print_json
from fgpt.cli.paths import shareable
from fgpt.cli.tasks import task_type
from fgpt.cli.training.build import load_base
from fgpt.cli.training.hashes import content_hash
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.distributed import object_from_first_rank
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import window_and_stride
from fgpt.io import models
from fgpt.io.files import read_text, write_json
from fgpt.model import GPT, Config
from fgpt.ranges import BatchSize, NonNegativeInt, PositiveInt
from fgpt.recipes import DataToTextRecipe, InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

NAME = Path(run_dir.EVAL).stem


@dataclass(frozen=True, kw_only=True)
class EvalRun(RunEvaluationOptions):
    """Evaluate a run on rows that it was not trained on: the loss of their answers, the accuracy of their labels, or of
    texts written from data BLEU, NIST, METEOR, ROUGE-L and CIDEr.
    """

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The name of a run, or its folder."""
    out: Path | None = None
    """The folder that eval.json is written into; None takes the run directory."""

    def __call__(self) -> None:
        folder = _find_run(self.run)
        recipe = run_dir.read_run(folder)
        if not isinstance(recipe, DataToTextRecipe):
            _refuse(self, folder, "num_beams", "length_penalty", "no_repeat_ngram", "outputs")
        settings = {"trained": results.training_id(folder)} | changed_options(self, EvalRun(run=self.run))
        metrics = task_type(recipe).evaluate(recipe, folder, self)
        base = recipe.to_json()["base"]
        about = {"evaluated": shareable(folder), "base": shareable(base), results.SETTINGS: settings}
        _write(about | metrics, folder, self.out)


def _refuse(options: EvalRun, folder: Path, *names: str) -> None:
    """Raises InputError for the first of these options that is given."""
    if used := [name for name in names if getattr(options, name) is not None]:
        option = used[0].replace("_", "-")
        raise InputError(f"--{option} is of a data-to-text run, and {folder} is none: leave it out")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is evaluated, and where its results are written."""

    base: str | None = None
    """A model as it is: "nano", "smollm2", a folder, a GGUF file, or a hub name."""
    run: str | None = None
    """In place of it, an instruction-tuned run: its name or its folder."""
    batch_size: BatchSize = 8
    """Rows in one batch; it changes no result."""
    out: Path | None = None
    """The folder that eval.json is written into; None takes the run directory, and for a base writes none."""


@dataclass(frozen=True, kw_only=True)
class EvalText(ModelOptions):
    """Measure the perplexity of a text by a sliding window: per token, byte and word."""

    text: Annotated[Positional[Path], arg(metavar="FILE")]
    """A UTF-8 file, or - for standard input."""
    window: PositiveInt | None = None
    """Tokens in a window; None takes the model's context, but 2048 at most."""
    stride: PositiveInt | None = None
    """New tokens in each window after the first; None takes half of it. Fewer cost more and give more context."""

    def __call__(self) -> None:
        model = find_model(self)
        text = _read_shared(self.text)
        cfg, tokenizer = _config_and_tokenizer(model)
        window, stride = window_and_stride(cfg, self.window, self.stride)
        settings = {"text": shareable(self.text)} | changed_options(self, EvalText(text=self.text))
        settings |= {"text_sha256": content_hash(text)}
        params = load(model)
        check_shared_evaluation(self, params, {"the text": text})
        metrics = text_metrics(params, tokenizer, text, window=window, stride=stride, batch_size=self.batch_size)
        evaluation = _about(model, settings) | {"text": {"file": shareable(self.text)} | metrics}
        _write(evaluation, model.folder, self.out)


@dataclass(frozen=True, kw_only=True)
class EvalTasks(ModelOptions):
    """Score a model in the tasks of EleutherAI's lm-eval, which pip install 'fgpt[eval]' installs."""

    tasks: Annotated[Positional[str], arg(metavar="NAMES")]
    """lm-eval's tasks, such as hellaswag,arc_easy."""
    include_path: Path | None = None
    """A folder of tasks of your own: lm-eval's YAML files."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in each prompt of a task; None takes the task's own number."""
    chat: bool = False
    """Put the prompts in the model's chat template."""
    limit: PositiveInt | None = None
    """Only the first N documents of each task."""

    def __call__(self) -> None:
        model = find_model(self)
        _, tokenizer = _config_and_tokenizer(model)
        tasks = lm_eval_tasks.find(self.tasks, self.include_path)
        settings = {"tasks": self.tasks} | changed_options(self, EvalTasks(tasks=self.tasks))
        params = load(model)
        check_shared_evaluation(self, params, {})
        scores = lm_eval_tasks.run(tasks, params, tokenizer, self.batch_size, self.limit, self.num_fewshot, self.chat)
        _write(_about(model, settings) | {"tasks": scores}, model.folder, self.out)


def _read_shared(path: Path) -> str:
    """The text of a file. Of several processes the first one reads standard input for all."""
    if str(path) != "-":
        return read_text(path)
    return object_from_first_rank(read_text(path) if processes.is_first() else "")


COMMANDS: dict[str, type[Any]] = {"run": EvalRun, "text": EvalText, "tasks": EvalTasks}
FORMS = ("fgpt eval run RUN", "fgpt eval text FILE --base MODEL", "fgpt eval tasks NAMES --base MODEL")


def run(args: Sequence[str]) -> None:
    """Evaluate what the arguments name. Everything in which bad input can be found is read before anything slow begins.

    Raises InputError.
    """
    kind, *options = args or [""]
    if kind in ("-h", "--help"):
        _print_help()
    elif kind in COMMANDS:
        parse(COMMANDS[kind], options, None, f"fgpt eval {kind}")()
    else:
        raise InputError(f"expected run, text or tasks after fgpt eval; type: {command_meant(args)}")


def _print_help() -> None:
    answers.print("usage: fgpt eval run|text|tasks .. [options]\n")
    for form, command in zip(FORMS, COMMANDS.values(), strict=True):
        answers.print(f"  {form}\n      {(command.__doc__ or '').splitlines()[0]}", soft_wrap=True)
    answers.print("\nfgpt eval run --help, text --help and tasks --help list the options of each.")


def command_meant(args: Sequence[str]) -> str:
    """What to type in place of arguments that name no subcommand.

    >>> command_meant(["lora-nano", "--limit", "7"])
    'fgpt eval run lora-nano --limit 7'
    >>> command_meant(["--base", "nano", "--text", "a b.txt"])
    "fgpt eval text 'a b.txt' --base nano"
    """
    words = list(args)
    model = ["--run", words.pop(0)] if words and not words[0].startswith("-") else []
    for kind in ("text", "tasks"):
        if f"--{kind}" in words[:-1]:
            i = words.index(f"--{kind}")
            return shlex.join(["fgpt", "eval", kind, words[i + 1], *model, *words[:i], *words[i + 2 :]])
    if model:
        return shlex.join(["fgpt", "eval", "run", model[1], *words])
    return ", or ".join(FORMS)


# ---------------------------------------------------------------------------------------------------------- the model


class EvaluatedModel(NamedTuple):
    """An instruction-tuned run, or a base."""

    base: str
    recipe: InstructionRecipe | None
    folder: Path | None
    """The run directory."""


def find_model(options: ModelOptions) -> EvaluatedModel:
    """Raises InputError for an unknown run, one that is not instruction-tuned, and unless exactly one of a run and a
    base is given.
    """
    if (options.run is None) == (options.base is None):
        raise InputError("nothing to evaluate: expected one of --base MODEL and --run RUN")
    if options.run is not None:
        folder = _find_run(options.run)
        recipe = run_dir.instruction_run(folder)
        return EvaluatedModel(recipe.base, recipe, folder)
    assert options.base is not None
    run_dir.check_base(options.base)
    return EvaluatedModel(options.base, None, None)


def _find_run(name: str) -> Path:
    try:
        return run_dir.find_finished(name)
    except InputError as err:
        hint = f"fgpt eval text FILE --base {shlex.quote(name)}"
        raise InputError(f"{err}; or for a model as it is: {hint}") from None


def _config_and_tokenizer(model: EvaluatedModel) -> tuple[Config, Tokenizer]:
    if model.recipe is None:
        return models.load_config_and_tokenizer(model.base)
    cfg, tokenizer, _ = load_tokenizer(model.recipe)
    return cfg, tokenizer


def load(model: EvaluatedModel) -> GPT:
    """A run's model as it was trained, or a base in fp32, on the available device."""
    if model.recipe is not None and model.folder is not None:
        return run_dir.load_tuned(model.folder, load_base(model.recipe))
    device = resolve_device("auto")
    with show_progress(f"loading {model.base}"):
        return models.load(model.base, device=device)


# -------------------------------------------------------------------------------------------------------- the results


def _about(model: EvaluatedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was evaluated, and the settings that identify the evaluation: the model, and every changed option."""
    if model.folder is not None:
        identity = {"trained": results.training_id(model.folder)}
    else:
        identity = {"base_sha256": content_hash(absolute_base(model.base))}
    return {
        "evaluated": shareable(model.folder or model.base),
        "base": shareable(model.base),
        results.SETTINGS: {**identity, **settings},
    }


def changed_options(options: Any, defaults: Any) -> dict[str, Any]:
    """The options that are not at their defaults, but for those that change no result or say what is evaluated."""
    excluded = {"run", "base", "batch_size", "out", "outputs"}
    before, changed = asdict(defaults), {}
    for name, value in asdict(options).items():
        if name not in excluded and value != before[name]:
            changed[name] = shareable(value) if isinstance(value, str | Path) else value
    return changed


def absolute_base(base: str) -> str:
    return str(Path(base).resolve()) if base not in models.EMBEDDED and Path(base).exists() else base


def _write(evaluation: Mapping[str, Any], folder: Path | None, out: Path | None) -> None:
    """Write eval.json, by another name for other settings: into `out`, else into the run directory; and print it if
    JSON is asked for. Of several processes the first one does.
    """
    place = out or folder
    if is_json():
        print_json(evaluation)
    if place is None or not processes.is_first():
        return
    settings = evaluation[results.SETTINGS]
    full = "-".join([NAME, *name_parts(settings)])
    stem = results.free_name(place, [full] if out is None else [NAME, full], settings, [".json"])
    write_json(place / f"{stem}.json", evaluation)
    console.print(f"written: {place / stem}.json", markup=False, soft_wrap=True)


IDENTITY = ("trained", "base_sha256", "text_sha256")
"""Settings that are hashes, and no options."""


def name_parts(settings: Mapping[str, Any]) -> list[str]:
    """Settings as parts of a file name."""
    return [name_part(name, value) for name, value in settings.items() if name not in IDENTITY]


COUNTS = {"num_generations": "generations", "num_fewshot": "shot"}


def name_part(name: str, value: Any) -> str:
    if name in ("text", "test"):
        return results.name_part(Path(value).stem if value != "-" else "stdin")
    if name in ("tasks", "labels"):
        return results.name_part(value if isinstance(value, str) else "-".join(value))
    if name in ("chat", "columns", "include_path"):
        return name.replace("_", "-")
    return f"{value}-{COUNTS[name]}" if name in COUNTS else f"{name}-{value}"
