"""The commands of `fgpt`, by their names. A dataclass is a command whose fields are its options; calling an instance
runs it. What a command imports, it imports when it runs.

tyro parses the options of a command; which command it is, the table here says. tyro's own subcommands would build the
parsers of all commands and recipes for the help of one, and do not end in one line of error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from fgpt.cli.console import answers
from fgpt.cli.inference.options import (
    DEFAULT_DECODING,
    DEFAULT_DOCUMENTS,
    DEFAULT_SAMPLING,
    ComparisonDecoding,
    DocumentOptions,
    GenerationOptions,
)
from fgpt.cli.listing import print_recipes, print_runs
from fgpt.cli.options import parse
from fgpt.cli.sweep_command import sweep
from fgpt.cli.train_command import doctor, lr_range, train
from fgpt.errors import InputError
from fgpt.ranges import PositiveInt

Run = Annotated[Positional[str], arg(metavar="RUN", help="The name of a run, or its folder.")]
RunOrModel = Annotated[
    Positional[str],
    arg(
        metavar="RUN",
        help="The name of a run, or its folder; or a model as it is: nano, smollm2, a folder, a GGUF file, a name on "
        "the Hub.",
    ),
]
PromptTemplate = Annotated[
    str | None,
    arg(
        metavar="NAME",
        help="The prompt template: alpaca, plain, tulu, chat or none. None takes that of the training; of a model, its "
        "own chat template, or none, which continues the text.",
    ),
]


@dataclass(frozen=True)
class Recipes:
    """List what can be trained."""

    def __call__(self) -> None:
        print_recipes()


@dataclass(frozen=True)
class Runs:
    """List what was trained, the newest first: name, recipe, step, loss, state."""

    out: Path = Path("runs")
    """The folder of run directories."""

    def __call__(self) -> None:
        print_runs(self.out)


@dataclass(frozen=True)
class Generate:
    """Answer a prompt with a trained run, in the run's own prompt template; or with a model as it is."""

    run: RunOrModel
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """The instruction, or - for standard input."""
    input: str = ""
    """What the instruction is applied to."""
    template: PromptTemplate = None
    documents: OmitArgPrefixes[DocumentOptions] = DEFAULT_DOCUMENTS
    generation: OmitArgPrefixes[GenerationOptions] = DEFAULT_SAMPLING

    def __call__(self) -> None:
        from fgpt.cli.inference.generation import answer

        answer(self.run, self.prompt, self.input, self.generation, self.template, self.documents)


@dataclass(frozen=True)
class Chat:
    """Have a conversation with a trained run, in the run's own prompt template; or with a model as it is."""

    run: RunOrModel
    template: PromptTemplate = None
    documents: OmitArgPrefixes[DocumentOptions] = DEFAULT_DOCUMENTS
    generation: OmitArgPrefixes[GenerationOptions] = DEFAULT_SAMPLING

    def __call__(self) -> None:
        from fgpt.cli.inference.generation import chat

        chat(self.run, self.generation, self.template, self.documents)


def index(args: Sequence[str]) -> None:
    """Index a folder of texts and PDFs, whose passages then enter prompts."""
    from fgpt.cli.index_command import IndexOptions, run

    run(parse(IndexOptions, args, None, "fgpt index"))


def classify(args: Sequence[str]) -> None:
    """Print how likely each label of a text is, with a trained classifier."""
    from fgpt.cli.inference.classify_texts import ClassifyOptions, run

    run(parse(ClassifyOptions, args, None, "fgpt classify"))


@dataclass(frozen=True)
class Compare:
    """Compare the base and its tuned runs on the same prompts, with scores."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ..")] = ()
    """The names of runs, or their folders."""
    prompts: str | None = None
    """A .json or .jsonl file of texts or of objects with an instruction, or "general", 32 prompts of the package; None
    takes the held-out prompts of the first run."""
    num_prompts: PositiveInt | None = None
    """Take the first N prompts; None takes all of a file, and as many held-out prompts as after training."""
    decoding: OmitArgPrefixes[ComparisonDecoding] = DEFAULT_DECODING
    out: Path | None = None
    """Where to write; None takes the folder of the run, or for several runs a new one beside the first."""

    def __call__(self) -> None:
        from fgpt.cli.evaluation.compare import compare_runs

        compare_runs(self.runs, self.decoding, self.prompts, self.num_prompts, self.out)


@dataclass(frozen=True)
class Merge:
    """Merge a trained adapter into its base, as one model in Hugging Face's layout."""

    run: Run
    merge_base: Literal["dequantized", "original"] | None = None
    """Of a quantized base: add the adapter to the dequantized weights that it was trained on, or the original ones."""

    def __call__(self) -> None:
        from fgpt.cli.merge_command import merge

        merge(self.run, self.merge_base)


def export(args: Sequence[str]) -> None:
    """Export a run for other programs: PEFT, transformers, llama.cpp, Ollama, the Hugging Face Hub."""
    from fgpt.cli.export_command import ExportOptions, run

    run(parse(ExportOptions, args, None, "fgpt export"))


def quantize(args: Sequence[str]) -> None:
    """Compare the formats of a base on your own text, and write it in one of them."""
    from fgpt.cli.quantize_command import QuantizeOptions, run

    run(parse(QuantizeOptions, args, None, "fgpt quantize"))


def combine(args: Sequence[str]) -> None:
    """Combine the adapters of several runs over one base into a new run."""
    from fgpt.cli.combine_command import CombineOptions, run

    run(parse(CombineOptions, args, None, "fgpt combine"))


def attribute(args: Sequence[str]) -> None:
    """Show which training rows made a run answer as it does, on a page."""
    from fgpt.cli.attribution.command import AttributeOptions, run

    run(parse(AttributeOptions, args, None, "fgpt attribute"))


def forget(args: Sequence[str]) -> None:
    """Make the run that a training without some rows would have made."""
    from fgpt.cli.forget_command import ForgetOptions, run

    run(parse(ForgetOptions, args, None, "fgpt forget"))


def evaluate(args: Sequence[str]) -> None:
    """Evaluate a run or a model: held-out loss, perplexity of a text, lm-eval's tasks."""
    from fgpt.cli.eval_command import run

    run(args)


def data(args: Sequence[str]) -> None:
    """Show the examples that a recipe makes of your data, and what of them is trained on."""
    from fgpt.cli.data_command import run

    run(args)


@dataclass(frozen=True)
class Report:
    """Show a run on one page: curves, options, samples, comparison, environment; or several runs, in one chart."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ..")] = ()
    """The names of runs, or their folders. Of several the losses are drawn over each other."""
    all: bool = False
    """Write the report of every run, and a page that lists them."""
    out: Path = Path("runs")
    """The folder of run directories."""

    def __call__(self) -> None:
        from fgpt.cli import report

        if bool(self.runs) == self.all:
            raise InputError("expected either runs or --all: fgpt report RUN [RUN2 ..], or fgpt report --all")
        if self.all:
            report.run_all(self.out)
        elif len(self.runs) == 1:
            report.run(self.runs[0], self.out)
        else:
            report.run_several(self.runs, self.out)


@dataclass(frozen=True)
class Replay:
    """Recompute one step of a training: its examples, its loss, its gradient norm."""

    run: Run
    step: PositiveInt
    """The number of the step, from 1."""

    def __call__(self) -> None:
        from fgpt.cli.diagnostics.replay import replay

        replay(self.run, self.step)


@dataclass(frozen=True)
class Completion:
    """Print the script by which a shell completes commands and options: eval "$(fgpt completion bash)"."""

    shell: Annotated[Positional[Literal["bash", "zsh", "tcsh"]], arg(metavar="SHELL")]
    """The shell."""

    def __call__(self) -> None:
        from fgpt.cli.completion import completion_script

        answers.print(
            completion_script(self.shell, COMMANDS, summaries()), highlight=False, markup=False, soft_wrap=True
        )


COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "recipes": Recipes,
    "runs": Runs,
    "generate": Generate,
    "chat": Chat,
    "index": index,
    "classify": classify,
    "compare": Compare,
    "eval": evaluate,
    "merge": Merge,
    "export": export,
    "quantize": quantize,
    "combine": combine,
    "attribute": attribute,
    "forget": forget,
    "report": Report,
    "replay": Replay,
    "doctor": doctor,
    "data": data,
    "lr-range": lr_range,
    "sweep": sweep,
    "completion": Completion,
}
"""Dataclasses of options, and functions of the arguments."""


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a command with its arguments. Raises InputError for bad ones."""
    command = COMMANDS[name]
    if isinstance(command, type):
        parse(command, args, None, f"fgpt {name}")()
    else:
        command(args)


def summaries() -> list[tuple[str, str]]:
    """The name of each command and the first line of its docstring."""
    return [(name, (command.__doc__ or "").splitlines()[0]) for name, command in COMMANDS.items()]
