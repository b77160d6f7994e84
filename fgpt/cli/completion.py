"""`fgpt completion SHELL`: a script by which a shell completes commands, options, their words, recipes and runs.

It is written once, from the classes of options that parse the command line, and starts no Python when Tab is pressed.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args, get_origin

import shtab

from fgpt import ranges
from fgpt.cli.config_file import OPTION as CONFIG
from fgpt.cli.options import option_names
from fgpt.cli.output_options import JSON, JSON_COMMANDS, QUIET, VERBOSE
from fgpt.recipes import KINDS, RECIPES

Commands: TypeAlias = Mapping[str, Callable[..., Any]]
"""By their names: classes of options, and functions of the arguments."""
RECIPE_COMMANDS = ("train", "doctor", "lr-range", "sweep")
"""The commands whose first argument is a recipe, and that have its options."""
FIRST_WORDS = {"data": ["preview"], "eval": ["run", "text", "tasks"], "completion": ["bash", "zsh", "tcsh"]}
"""What stands first after a command, where that is one of few words."""
RUNS = {
    "bash": (
        '_fgpt_runs() { compgen -W "$(cd runs 2>/dev/null && ls -d */run.json 2>/dev/null | sed s,/run.json,,)" -- '
        '"$1"; compgen -d -- "$1"; }'
    ),
    "zsh": "_fgpt_runs() { compadd -- runs/*/run.json(N:h:t); _files -/; }",
    "tcsh": "",
}
"""How each shell finds what was trained: the folders of runs/, and any other."""


def completion_script(shell: str, commands: Commands, summaries: Sequence[tuple[str, str]]) -> str:
    """The script for a shell to evaluate.

    Args:
        shell: bash, zsh or tcsh.
        commands: By their names.
        summaries: The name of each, and a line about it.
    """
    preamble: Any = RUNS
    return shtab.complete(_command_parser(commands, summaries), shell, root_prefix="fgpt", preamble=preamble)


def _command_parser(commands: Commands, summaries: Sequence[tuple[str, str]]) -> argparse.ArgumentParser:
    """Every command with its options, as shtab reads them; nothing is parsed by it."""
    parser = argparse.ArgumentParser("fgpt", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for (name, summary), classes in zip(summaries, option_classes(commands).values(), strict=True):
        command = subparsers.add_parser(name, help=summary.replace("%", "%%"), allow_abbrev=False)
        _add_arguments(command, name)
        _add_options(command, classes)
        for option in other_options(name):
            command.add_argument(option, action="store_true")
    return parser


def other_options(name: str) -> list[str]:
    """The options of a command that no class of options has; what follows --config is any file."""
    options = [QUIET, VERBOSE] + [JSON] * (name in JSON_COMMANDS) + [CONFIG] * (name in (*RECIPE_COMMANDS, "data"))
    return options + {"train": ["--resume", "--auto-resume"], "sweep": ["--resume"]}.get(name, [])


def option_classes(commands: Commands) -> dict[str, list[type[Any]]]:
    """The classes whose fields are the options of each command, in the order of the commands."""
    from fgpt.cli import eval_command
    from fgpt.cli.attribution.command import AttributeOptions
    from fgpt.cli.combine_command import CombineOptions
    from fgpt.cli.data_command import PreviewOptions
    from fgpt.cli.diagnostics.lr_range import RangeOptions
    from fgpt.cli.export_command import ExportOptions
    from fgpt.cli.forget_command import ForgetOptions
    from fgpt.cli.index_command import IndexOptions
    from fgpt.cli.inference.classify_texts import ClassifyOptions
    from fgpt.cli.quantize_command import QuantizeOptions
    from fgpt.cli.sweep.command import SweepOptions

    recipes: list[type[Any]] = [*KINDS.values()]
    of_functions: dict[str, list[type[Any]]] = {
        "train": recipes,
        "doctor": recipes,
        "lr-range": [*recipes, RangeOptions],
        "sweep": [*recipes, SweepOptions],
        "data": [*recipes, PreviewOptions],
        "eval": [*eval_command.COMMANDS.values()],
        "classify": [ClassifyOptions],
        "export": [ExportOptions],
        "quantize": [QuantizeOptions],
        "combine": [CombineOptions],
        "attribute": [AttributeOptions],
        "forget": [ForgetOptions],
        "index": [IndexOptions],
    }
    return {name: [command] if isinstance(command, type) else of_functions[name] for name, command in commands.items()}


def _add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """What stands after the command itself: a recipe, a subcommand, a shell, or runs and files."""
    if name in FIRST_WORDS:
        command.add_argument("word", choices=FIRST_WORDS[name])
    if name in (*RECIPE_COMMANDS, "data"):
        command.add_argument("recipe", choices=[*RECIPES])
    elif name not in ("recipes", "runs", "completion"):
        runs: Any = command.add_argument("run", nargs="*")
        runs.complete = {"bash": "_fgpt_runs", "zsh": "_fgpt_runs", "tcsh": "d"}


def _add_options(command: argparse.ArgumentParser, classes: list[type[Any]]) -> None:
    names = dict.fromkeys(name for cls in classes for name in option_names(cls))
    words = {name: literals for cls in classes for name, literals in _words(cls).items()}
    for name in names:
        option: Any = command.add_argument(name, choices=words.get(name), dest=name)
        if name not in words:
            option.complete = shtab.FILE


def _words(cls: type[Any], prefix: str = "--") -> dict[str, list[str]]:
    """The options of a dataclass whose values are words of a Literal, and these."""
    words: dict[str, list[str]] = {}
    for name, hint in ranges.hints(cls).items():
        option, is_flat = f"{prefix}{name.replace('_', '-')}", ranges.is_flat(hint)
        nested = hint.__origin__ if is_flat else hint
        if dataclasses.is_dataclass(nested):
            words |= _words(nested, prefix if is_flat else f"{option}.")  # pyright: ignore[reportArgumentType]
        elif literals := _literals(hint):
            words[option] = literals
    return words


def _literals(hint: Any) -> list[str]:
    """The words of a type: of a Literal, or of one within a union."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    return [word for part in get_args(hint) for word in _literals(part)]
