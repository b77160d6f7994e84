"""How well a trained run, or a model as it is, tells texts and does tasks: `just eval`.

eval.json          what was asked and every figure: in the run's folder, or where --out says
eval-wiki.json     the same of other settings than the run's own, which the name says
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from fgpt.cli import results, run_dir
from fgpt.cli.console import console, working
from fgpt.cli.evaluation import lm_eval_tasks, run_evaluation
from fgpt.cli.evaluation.run_evaluation import Figures, scored, shown
from fgpt.cli.inference import classifiers
from fgpt.cli.paths import shareable
from fgpt.cli.training.instruction_tuning import load_base
from fgpt.cli.training.job import hashed
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
    """The perplexity of a text, scores in lm-eval's tasks, or, where neither is asked for, how well a run does its own
    task on rows that it was not trained on: the loss of their answers, or how it tells their classes.
    """

    run: tyro.conf.Positional[str] = ""
    """A trained run's name, or its folder."""
    base: str | None = None
    """A model as it is, in place of a run: "nano", "smollm2", a folder, a GGUF file, or a hub name."""
    text: Path | None = None
    """A UTF-8 file, or - for what is piped in: its perplexity through a sliding window, by its own bytes and words."""
    window: PositiveInt | None = None
    """Tokens that the model reads in a window; None takes its context, but 2048 at most."""
    stride: PositiveInt | None = None
    """New tokens in each window but the first; None takes half of it. Fewer cost more, and leave more to go by."""
    test: str | None = None
    """Of a run that classifies: other rows than its own, from a source as just train's --test takes."""
    columns: Columns = field(default_factory=Columns)
    """Which columns of those rows hold text, second text and label, where they are others than the run's."""
    labels: tuple[str, ...] = ()
    """Of a run whose labels are words that it writes: other labels than it was trained on, as just train takes them.
    Its base is then scored beside it."""
    tasks: str | None = None
    """lm-eval's tasks, such as hellaswag,arc_easy; they want `just setup-eval`."""
    include_path: Path | None = None
    """A folder of tasks of your own: lm-eval's YAML files."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in each prompt of a task; None takes the task's own number."""
    chat: bool = False
    """Put the tasks' prompts in the model's chat template."""
    num_generations: PositiveInt | None = None
    """Of a run of instructions: answer so many held-out prompts as well, and score the answers as just compare does."""
    limit: PositiveInt | None = None
    """The first so many documents of each task, or held-out rows."""
    batch_size: BatchSize = 8
    """Rows that are read at once; they change no result."""
    out: Path | None = None
    """The folder that eval.json is written into; None takes the run's own, and for a base writes none."""


class EvalTarget(NamedTuple):
    """What is evaluated."""

    name: str
    base: str
    run: InstructionRecipe | ClassificationRecipe | None
    at: Path | None
    """The run's folder."""


def run(asked: EvalOptions) -> dict[str, Any]:
    """Evaluate, print, and write. Everything that bad input can spoil is read before anything slow begins.

    Raises InputError.
    """
    it = subject(asked)
    plain = asked.text is None and asked.tasks is None
    if plain and it.run is None:
        raise InputError("what is to be evaluated? a base has no held-out rows: give --text FILE or --tasks NAMES")
    if isinstance(it.run, ClassificationRecipe) and not (plain and asked.num_generations is None):
        raise InputError(
            f"{it.name} tells classes, and is evaluated on its own rows: leave --text, --tasks, --num-generations out"
        )
    if not isinstance(it.run, ClassificationRecipe) and (asked.test, asked.columns, asked.labels) != (
        None,
        Columns(),
        (),
    ):
        raise InputError(f"{it.name} tells no classes: leave --test, --columns and --labels out")
    if it.run is None and asked.num_generations is not None:
        raise InputError(
            "a base has no held-out rows to answer: give a run in place of --base, or leave --num-generations out"
        )
    text = None if asked.text is None else read_text(asked.text)
    cfg, tokenizer = models.load_config_and_tokenizer(it.base)
    window = window_and_stride(cfg, asked.window, asked.stride)
    chosen = None if asked.tasks is None else lm_eval_tasks.find(asked.tasks, asked.include_path)
    run = it.run
    if isinstance(run, ClassificationRecipe):
        run = run_evaluation.of_others(run, asked.test, asked.columns, asked.labels)
    own = (
        run_evaluation.own(run, it.at, plain, asked.num_generations, asked.limit, asked.batch_size)
        if run and it.at
        else None
    )
    settings = settings_of(asked, it, text)
    found: dict[str, Any] = {"evaluated": shareable(it.name), "base": shareable(it.base), results.SETTINGS: settings}
    if isinstance(run, ClassificationRecipe) and asked.labels:
        found["test rows, untuned"] = run_evaluation.untuned_scores(run, asked.limit)
    params = load(it)
    if text is not None:
        found["text"] = {"file": shareable(asked.text or "")} | of_text(
            params, tokenizer, text, *window, asked.batch_size
        )
    if chosen is not None:
        found["tasks"] = lm_eval_tasks.run(
            chosen, params, tokenizer, asked.batch_size, asked.limit, asked.num_fewshot, asked.chat
        )
    if own is not None:
        found |= own(params)
    out = asked.out or it.at
    if out is not None:
        full = "-".join([NAME, *parts_of(settings)])
        stem = results.free(out, [full] if asked.out is None else [NAME, full], settings, [".json"])
        write_json(out / f"{stem}.json", found)
        console.print(f"written: {out / stem}.json", markup=False, soft_wrap=True)
    return found


def settings_of(asked: EvalOptions, it: EvalTarget, text: str | None) -> dict[str, Any]:
    """What makes an evaluation the one that it is: the model, and every option that is not at its default."""
    apart = {"run", "base", "rows", "out"}  # whose it is, what changes no figure, and where it goes
    values = {name: x for name, x in asdict(asked).items() if name not in apart}
    usual = asdict(EvalOptions())
    chosen = {name: x for name, x in values.items() if x != usual[name]}
    chosen |= {name: shareable(x) for name, x in chosen.items() if isinstance(x, str | Path)}
    model = {"trained": results.trained_as(it.at)} if it.at else {"base_sha256": hashed(where_is(it.base))}
    return model | chosen | ({"text_sha256": hashed(text)} if text is not None else {})


def where_is(base: str) -> str:
    return str(Path(base).resolve()) if base not in models.EMBEDDED and Path(base).exists() else base


def parts_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as parts of a file's name."""
    names = [f.name for f in fields(EvalOptions) if f.name in settings]
    return [part_of(name, settings[name]) for name in names]


def part_of(name: str, value: Any) -> str:
    if name in ("text", "test"):
        return results.part(Path(value).stem if value != "-" else "stdin")
    if name in ("tasks", "labels"):
        return results.part(value if isinstance(value, str) else "-".join(value))
    if name in ("chat", "columns", "include_path"):
        return name.replace("_", "-")
    return f"{value}-{name}" if name in ("answers", "shots") else f"{name}-{value}"


def subject(asked: EvalOptions) -> EvalTarget:
    """Raises InputError for an unknown run, and unless it is either a run or a base."""
    if bool(asked.run) == (asked.base is not None):
        raise InputError("what is to be evaluated? expected one of just eval RUN and just eval --base MODEL")
    if asked.base is not None:
        return EvalTarget(asked.base, asked.base, None, None)
    try:
        at = run_dir.find_finished(asked.run)
    except InputError as err:
        raise InputError(f"{err}; or for a model as it is: just eval --base {shlex.quote(asked.run)}") from None
    run = run_evaluation.run_of(at)
    return EvalTarget(str(at), run.base, run, at)


def load(it: EvalTarget) -> GPT:
    """A run's model as it was trained, or a base in fp32, on the device there is."""
    if isinstance(it.run, ClassificationRecipe) and it.at is not None:
        return classifiers.load_classifier(it.at).params
    if it.run is not None and it.at is not None:
        return run_dir.load_tuned(it.at, load_base(it.run))
    device = run_dir.device_of("auto")
    with working(f"loading {it.base}"):
        return tree_map(lambda x: x.to(device), models.load(it.base))


# ---------------------------------------------------------------------------------------------------------------- texts


def of_text(params: GPT, tokenizer: Tokenizer, text: str, width: int, stride: int, rows: int) -> Figures:
    """The perplexities of a text, by name."""
    with working("tokenizing"):
        tokens = tokenizer.encode(text)
    parts = scored(params, windows(tokens, tokenizer.bos, width=width, stride=stride), rows)
    of = perplexity([x for part in parts for x in part.logprobs], text)
    counts = {"tokens": of.tokens, "bytes": of.bytes, "words": of.words, "width": width, "stride": stride}
    figures = {
        "nats per token": of.loss,
        "perplexity per token": of.per_token,
        "bits per byte": of.bits_per_byte,
        "byte perplexity": of.per_byte,
        "word perplexity": of.per_word,
    }
    return shown("text", counts, figures)
