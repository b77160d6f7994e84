"""The command line behind `just train | generate | chat | compare | merge | eval | report | replay | doctor | runs`.

Errors a user can mend are one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro

from fgpt import ranges, recipes
from fgpt.cli import streams
from fgpt.cli.errors import explained
from fgpt.cli.inference.options import DEFAULT_DECODING, DEFAULT_SAMPLING, ComparisonDecoding, GenerationOptions
from fgpt.cli.signals import interrupt, on_first
from fgpt.errors import InputError
from fgpt.ranges import PositiveInt


def train(args: Sequence[str]) -> None:
    name, *options = args or [""]
    if name in ("", "-h", "--help"):
        raise InputError(f"expected a run: just train NAME [--option value ..]; there are {', '.join(recipes.RECIPES)}")
    if "--resume" in options:
        run, where = resumed(name, [option for option in options if option != "--resume"])
    else:
        run, where = named(name, options, f"just train {name}"), None
    from fgpt.cli.training import tasks, trackers

    trackers.check(run)
    tasks.run_recipe(run, where)


def named(name: str, options: Sequence[str], command: str) -> recipes.AnyRecipe:
    """A recipe's run, with its options. Raises InputError for a name or an option that is none."""
    if name not in recipes.RECIPES and (at := _made_under(name)):
        raise InputError(f"no run named {name!r} to begin: {at} was made by a recipe; name that, and --name {at.name}")
    run = recipes.find(name)
    return parse(type(run), options, run, command)


def _made_under(name: str) -> Path | None:
    """The folder of a run, where it is not a recipe that is named, but what one has made."""
    from fgpt.cli import run_dir

    return next((at for at in (Path(name), Path("runs") / name) if name and (at / run_dir.RUN).is_file()), None)


def resumed(name: str, options: Sequence[str]) -> tuple[recipes.AnyRecipe, Path]:
    """The run that was begun under a name, or in a folder, as it was begun; and its folder.

    Raises InputError where there is none, or the options would make it another run.
    """
    from fgpt.cli import run_dir
    from fgpt.cli.training.job import MUTABLE_OPTIONS

    command = f"just train {name} --resume"
    if name in recipes.RECIPES:
        asked = named(name, options, command)
        where = run_dir.find_unfinished(asked.name, asked.out)
    else:
        where = run_dir.find_unfinished(name, _out_of(options))
    recorded = run_dir.read_run(where)
    run = parse(type(recorded), options, recorded, command)
    for field in dataclasses.fields(run):
        was, now = getattr(recorded, field.name), getattr(run, field.name)
        if was != now and field.name not in MUTABLE_OPTIONS:
            anew = "leave out --resume" if name in recipes.RECIPES else "begin a new run"
            raise InputError(f"{where} was begun with {field.name} {was}, not {now}: leave it out, or {anew}")
    return run, where


def _out_of(options: Sequence[str]) -> Path:
    """Where --out says that runs lie, before it is known what kind of run has the options."""
    for option, value in itertools.pairwise([*options, ""]):
        if option == "--out":
            return Path(value)
        if option.startswith("--out="):
            return Path(option.removeprefix("--out="))
    return Path("runs")


def list_runs(args: Sequence[str]) -> None:
    if args:
        raise InputError(f"`runs` takes no options, got {args[0]!r}")
    from rich.table import Table
    from rich.text import Text

    from fgpt.cli.console import answers

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, line in recipes.describe():
        table.add_row(Text(name, "bold"), line)
    answers.print(table)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer a prompt with a trained run, in the run's own template."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""
    prompt: tyro.conf.Positional[str]
    input: str = ""
    """What the instruction is to be applied to."""
    generation: tyro.conf.OmitArgPrefixes[GenerationOptions] = DEFAULT_SAMPLING


def generate(args: Sequence[str]) -> None:
    options = parse(Generate, args, None, "just generate")
    from fgpt.cli.inference.generation import answer

    answer(options.run, options.prompt, options.input, options.generation)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation with a trained run, in the run's own template."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""
    generation: tyro.conf.OmitArgPrefixes[GenerationOptions] = DEFAULT_SAMPLING


def chat(args: Sequence[str]) -> None:
    options = parse(Chat, args, None, "just chat")
    from fgpt.cli.inference.generation import chat as run_chat

    run_chat(options.run, options.generation)


def classify(args: Sequence[str]) -> None:
    from fgpt.cli.inference.classify_texts import ClassifyOptions, run

    run(parse(ClassifyOptions, args, None, "just classify"))


@dataclasses.dataclass(frozen=True)
class Compare:
    """The base and one or several runs over it, side by side on the same prompts, with scores."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of runs, or their folders."""
    prompts: str | None = None
    """A .json or .jsonl file of texts, or of objects with an instruction, or "general", 32 prompts that come with the
    package; None takes what the first run held out."""
    num_prompts: PositiveInt | None = None
    """Take the first so many prompts; None takes all of a file, and of held-out ones as many as after training."""
    decoding: tyro.conf.OmitArgPrefixes[ComparisonDecoding] = DEFAULT_DECODING
    out: Path | None = None
    """Where to write; None takes the run's folder, and for several a new one beside the first."""


def compare(args: Sequence[str]) -> None:
    options = parse(Compare, args, None, "just compare")
    from fgpt.cli.evaluation.compare import compare_runs

    compare_runs(options.runs, options.decoding, options.prompts, options.num_prompts, options.out)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A trained run as one plain model, and by how much it answers differently."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""
    merge_base: Literal["dequantized", "original"] | None = None
    """Over a quantized base: add the adapter to the numbers it was trained on, or to those that were quantized."""


def merge(args: Sequence[str]) -> None:
    options = parse(Merge, args, None, "just merge")
    from fgpt.cli.inference.merging import merge as go

    go(options.run, options.merge_base)


def evaluate(args: Sequence[str]) -> None:
    from fgpt.cli.evaluation.command import EvalOptions, run

    run(parse(EvalOptions, args, None, "just eval"))


@dataclasses.dataclass(frozen=True)
class Replay:
    """One step of a training computed again: its rows, its loss, its gradient norm."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""
    step: PositiveInt
    """Which, counted from 1."""


def replay(args: Sequence[str]) -> None:
    options = parse(Replay, args, None, "just replay")
    from fgpt.cli.diagnostics.replay import replay as go

    go(options.run, options.step)


def doctor(args: Sequence[str]) -> None:
    name, *options = args or [""]
    if name in ("", "-h", "--help"):
        raise InputError("expected a run: just doctor NAME [options, as just train has them]")
    from fgpt.cli.diagnostics.doctor import run

    run(named(name, options, f"just doctor {name}"))


@dataclasses.dataclass(frozen=True)
class Report:
    """A run on one page: curves, configuration, samples, comparison, environment."""

    run: tyro.conf.Positional[str]
    """A run's name, or its folder."""


def report(args: Sequence[str]) -> None:
    options = parse(Report, args, None, "just report")
    from fgpt.cli.report import run

    run(options.run)


def parse(cls: type[Any], args: Sequence[str], default: Any, command: str) -> Any:
    """`cls` from command-line options.

    Raises InputError for an option that is none of its fields, a value that does not fit, or a number out of range.
    """
    known = [f"--{name}" for name in _options(cls)]
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if arg.startswith("--") and name not in [*known, "--help"]:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no option {arg.partition('=')[0]}; {hint}{command} --help lists them")
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(cls, args=args, prog=command, config=(tyro.conf.FlagConversionOff,), **given)
    except SystemExit as end:
        if not end.code:
            raise
        # tyro frames its errors where it can: a title, a message that ends at an empty line or a rule, explanations
        lines = [line.strip("│╭╮╰╯─|+- ") for line in said.getvalue().splitlines()]
        message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:])))
        message = re.sub(r"^Error parsing [\w.]+: ", "", message)
        raise InputError(f"{message.rstrip('.') or 'unusable options'}; {command} --help lists them") from None
    ranges.check(options, "--")
    return options


def _options(cls: type[Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        bare = get_origin(field.type) is Annotated  # OmitArgPrefixes: the options of such a field stand by themselves
        kind: Any = get_args(field.type)[0] if bare else field.type
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found += _options(kind, "" if bare else f"{name}.") if nested else [name]
    return found


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "runs": list_runs,
    "generate": generate,
    "chat": chat,
    "classify": classify,
    "compare": compare,
    "merge": merge,
    "eval": evaluate,
    "report": report,
    "replay": replay,
    "doctor": doctor,
}


def main(argv: Sequence[str]) -> int:
    """Carry out one command. Returns the exit code: 2 for bad input, 130 for one that was interrupted, 141 where nobody
    reads the answers any more.
    """
    command, *args = argv or [""]
    with streams.robust(), on_first(interrupt):
        try:
            if command not in COMMANDS:
                raise InputError(f"expected one of {', '.join(COMMANDS)}, got {command!r}")
            try:
                COMMANDS[command](args)
            except SystemExit as end:  # of a help text, which is an answer as any
                if end.code:
                    raise
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a pipe that was closed is no surprise
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            if sys.stdout is not None:
                streams.drop(sys.stdout)
            return CLOSED
        except Exception as err:
            if (line := explained(err)) is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            return 2
    return 0


INTERRUPTED, CLOSED = 128 + 2, 128 + 13
"""As a shell tells of a process that Ctrl-C, or a closed pipe, has ended."""
