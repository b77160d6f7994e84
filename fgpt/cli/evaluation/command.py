"""`just eval`: the perplexity of a text, lm-eval's tasks, or a run's own held-out rows.

eval.json          the settings and every result: in the run directory, or in --out
eval-wiki.json     the same with other settings than the run's own, named by those
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from fgpt.cli import results, run_dir
from fgpt.cli.console import console, show_progress
from fgpt.cli.evaluation import lm_eval_tasks, run_evaluation
from fgpt.cli.evaluation.run_evaluation import Metrics, loglikelihoods, print_metrics
from fgpt.cli.paths import shareable
from fgpt.cli.training.job import content_hash
from fgpt.cli.training.tasks import task_type
from fgpt.data.classification_datasets import Columns
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import perplexity, window_and_stride, windows
from fgpt.io import models
from fgpt.io.files import read_text, write_json
from fgpt.model import GPT
from fgpt.ranges import BatchSize, NonNegativeInt, PositiveInt
from fgpt.recipes import InstructionRecipe
from fgpt.recipes.classification import ClassificationRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import tree_map

NAME = Path(run_dir.EVAL).stem


@dataclass(frozen=True)
class EvalOptions:
    """The perplexity of a text, scores in lm-eval's tasks, or, if neither is asked for, how well a run does its own
    task on rows that it was not trained on: the loss of their answers, or the accuracy of their labels.
    """

    run: tyro.conf.Positional[str] = ""
    """A trained run's name, or its directory."""
    base: str | None = None
    """A model as it is, in place of a run: "nano", "smollm2", a folder, a GGUF file, or a hub name."""
    text: Path | None = None
    """A UTF-8 file, or - for standard input: its perplexity by a sliding window, per token, byte and word."""
    window: PositiveInt | None = None
    """Tokens in a window; None takes the model's context, but 2048 at most."""
    stride: PositiveInt | None = None
    """New tokens in each window after the first; None takes half of it. Fewer cost more and give more context."""
    test: str | None = None
    """For a classifier: other rows than its own, from a source as just train's --test takes."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of those rows hold text, second text and label, if they are others than the run's."""
    labels: tuple[str, ...] = ()
    """For a classifier whose labels are words that it generates: other labels than it was trained on, as just train
    takes them. Its base is then scored as well."""
    tasks: str | None = None
    """lm-eval's tasks, such as hellaswag,arc_easy; they need `just setup-eval`."""
    include_path: Path | None = None
    """A folder of tasks of your own: lm-eval's YAML files."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in each prompt of a task; None takes the task's own number."""
    chat: bool = False
    """Put the tasks' prompts in the model's chat template."""
    num_generations: PositiveInt | None = None
    """For an instruction-tuned run: also answer N held-out prompts, and score the answers as just compare does."""
    limit: PositiveInt | None = None
    """Only the first N documents of each task, or the first N held-out rows."""
    batch_size: BatchSize = 8
    """Rows in one batch; it changes no result."""
    out: Path | None = None
    """The folder that eval.json is written into; None takes the run directory, and for a base writes none."""


class EvalTarget(NamedTuple):
    """What is evaluated."""

    name: str
    base: str
    run: InstructionRecipe | ClassificationRecipe | None
    folder: Path | None
    """The run directory."""


def run(options: EvalOptions) -> dict[str, Any]:
    """Evaluate, print and write. Everything in which bad input can be found is read before anything slow begins.

    Raises InputError.
    """
    target = find_target(options)
    own_rows = options.text is None and options.tasks is None
    _check_options(options, target, own_rows)
    text = None if options.text is None else read_text(options.text)
    cfg, tokenizer = models.load_config_and_tokenizer(target.base)
    window, stride = window_and_stride(cfg, options.window, options.stride)
    tasks = None if options.tasks is None else lm_eval_tasks.find(options.tasks, options.include_path)
    run = target.run
    if isinstance(run, ClassificationRecipe):
        run = run_evaluation.with_other_data(run, options.test, options.columns, options.labels)
    evaluate_own_rows = None
    if run and target.folder:
        evaluate_own_rows = run_evaluation.own_rows_evaluation(
            run, target.folder, own_rows, options.num_generations, options.limit, options.batch_size
        )
    settings = settings_of(options, target, text)
    found: dict[str, Any] = {
        "evaluated": shareable(target.name),
        "base": shareable(target.base),
        results.SETTINGS: settings,
    }
    if isinstance(run, ClassificationRecipe) and options.labels:
        found["test rows, untuned"] = run_evaluation.untuned_scores(run, options.limit)
    params = load(target)
    if text is not None:
        metrics = text_metrics(params, tokenizer, text, window, stride, options.batch_size)
        found["text"] = {"file": shareable(options.text or "")} | metrics
    if tasks is not None:
        found["tasks"] = lm_eval_tasks.run(
            tasks, params, tokenizer, options.batch_size, options.limit, options.num_fewshot, options.chat
        )
    if evaluate_own_rows is not None:
        found |= evaluate_own_rows(params)
    out = options.out or target.folder
    if out is not None:
        full = "-".join([NAME, *name_parts(settings)])
        stem = results.free_name(out, [full] if options.out is None else [NAME, full], settings, [".json"])
        write_json(out / f"{stem}.json", found)
        console.print(f"written: {out / stem}.json", markup=False, soft_wrap=True)
    return found


def _check_options(options: EvalOptions, target: EvalTarget, own_rows: bool) -> None:
    """Raises InputError for options that the target cannot have."""
    classifies = isinstance(target.run, ClassificationRecipe)
    if own_rows and target.run is None:
        raise InputError("nothing to evaluate: a base has no held-out rows: give --text FILE or --tasks NAMES")
    if classifies and not (own_rows and options.num_generations is None):
        raise InputError(
            f"{target.name} is a classifier, evaluated on its own rows: leave out --text, --tasks, --num-generations"
        )
    if not classifies and (options.test, options.columns, options.labels) != (None, Columns(), ()):
        raise InputError(f"{target.name} is not a classifier: leave out --test, --columns and --labels")
    if target.run is None and options.num_generations is not None:
        raise InputError(
            "a base has no held-out rows to answer: give a run in place of --base, or leave out --num-generations"
        )


def settings_of(options: EvalOptions, target: EvalTarget, text: str | None) -> dict[str, Any]:
    """What identifies an evaluation: the model, and every option that is not at its default."""
    excluded = {"run", "base", "batch_size", "out"}  # the model is told otherwise; the others change no result
    defaults = asdict(EvalOptions())
    changed = {name: x for name, x in asdict(options).items() if name not in excluded and x != defaults[name]}
    changed |= {name: shareable(x) for name, x in changed.items() if isinstance(x, str | Path)}
    if target.folder:
        model = {"trained": results.training_id(target.folder)}
    else:
        model = {"base_sha256": content_hash(absolute_base(target.base))}
    return model | changed | ({"text_sha256": content_hash(text)} if text is not None else {})


def absolute_base(base: str) -> str:
    return str(Path(base).resolve()) if base not in models.EMBEDDED and Path(base).exists() else base


def name_parts(settings: Mapping[str, Any]) -> list[str]:
    """Settings as parts of a file name."""
    names = [f.name for f in fields(EvalOptions) if f.name in settings]
    return [name_part(name, settings[name]) for name in names]


COUNTS = {"num_generations": "generations", "num_fewshot": "shot"}


def name_part(name: str, value: Any) -> str:
    if name in ("text", "test"):
        return results.name_part(Path(value).stem if value != "-" else "stdin")
    if name in ("tasks", "labels"):
        return results.name_part(value if isinstance(value, str) else "-".join(value))
    if name in ("chat", "columns", "include_path"):
        return name.replace("_", "-")
    return f"{value}-{COUNTS[name]}" if name in COUNTS else f"{name}-{value}"


def find_target(options: EvalOptions) -> EvalTarget:
    """Raises InputError for an unknown run, and unless exactly one of a run and a base is given."""
    if bool(options.run) == (options.base is not None):
        raise InputError("nothing to evaluate: expected one of just eval RUN and just eval --base MODEL")
    if options.base is not None:
        return EvalTarget(options.base, options.base, None, None)
    try:
        folder = run_dir.find_finished(options.run)
    except InputError as err:
        raise InputError(f"{err}; or for a model as it is: just eval --base {shlex.quote(options.run)}") from None
    run = run_evaluation.read_run(folder)
    return EvalTarget(str(folder), run.base, run, folder)


def load(target: EvalTarget) -> GPT:
    """A run's model as it was trained, or a base in fp32, on the available device."""
    if target.run is not None and target.folder is not None:
        return run_dir.load_tuned(target.folder, task_type(target.run).load_base(target.run))
    device = run_dir.resolve_device("auto")
    with show_progress(f"loading {target.base}"):
        return tree_map(lambda x: x.to(device), models.load(target.base))


# ---------------------------------------------------------------------------------------------------------------- texts


def text_metrics(params: GPT, tokenizer: Tokenizer, text: str, window: int, stride: int, batch_size: int) -> Metrics:
    """The perplexities of a text, by name."""
    with show_progress("tokenizing"):
        tokens = tokenizer.encode(text)
    parts = loglikelihoods(params, windows(tokens, tokenizer.bos_token_id, width=window, stride=stride), batch_size)
    measured = perplexity([logprob for part in parts for logprob in part.logprobs], text)
    counts = {
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "words": measured.words,
        "window": window,
        "stride": stride,
    }
    values = {
        "nats per token": measured.loss,
        "perplexity per token": measured.per_token,
        "bits per byte": measured.bits_per_byte,
        "byte perplexity": measured.per_byte,
        "word perplexity": measured.per_word,
    }
    return print_metrics("text", counts, values)
