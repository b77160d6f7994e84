"""What messages, help texts and documents tell a user to type can be typed."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import fgpt
from fgpt import ranges
from fgpt.cli import eval_command
from fgpt.cli.attribution.command import AttributeOptions
from fgpt.cli.combine_command import CombineOptions
from fgpt.cli.commands import COMMANDS
from fgpt.cli.data_command import PreviewOptions
from fgpt.cli.diagnostics.lr_range import RangeOptions
from fgpt.cli.export_command import ExportOptions
from fgpt.cli.forget_command import ForgetOptions
from fgpt.cli.index_command import IndexOptions
from fgpt.cli.inference.classify_texts import ClassifyOptions
from fgpt.cli.options import option_names
from fgpt.cli.output_options import OUTPUT_OPTIONS
from fgpt.cli.quantize_command import QuantizeOptions
from fgpt.cli.sweep.command import SweepOptions
from fgpt.recipes import KINDS, RECIPES

PACKAGE = Path(fgpt.__file__).parent
ROOT = PACKAGE.parent
CLASSES: list[type[Any]] = [
    *KINDS.values(),
    *(command for command in COMMANDS.values() if isinstance(command, type)),
    *eval_command.COMMANDS.values(),
    ClassifyOptions,
    AttributeOptions,
    CombineOptions,
    ExportOptions,
    ForgetOptions,
    IndexOptions,
    QuantizeOptions,
    SweepOptions,
    PreviewOptions,
    RangeOptions,
]
"""Every class whose fields are options of some command."""
OPTIONS = {"--help", "--config", "--resume", "--auto-resume", *OUTPUT_OPTIONS}
OPTIONS |= {option for cls in CLASSES for option in option_names(cls)}
GROUPS = {option.rpartition(".")[0] for option in OPTIONS if "." in option}
"""--adapter, --columns: what the names of several options begin with."""
OTHERS = {
    "--no-deps": "pip",
    "--system-site-packages": "venv",
    "--merge": "llama.cpp",
    "--lora": "llama.cpp",
    "--porcelain": "git",
    "--logdir": "TensorBoard",
    "--project": "trackio",
    "--load_in_4bit": "transformers",
    "--learning_rate": "transformers",
    "--c": "a CSS property",
    "--version": "of fgpt itself, no option of a command",
    "--no": "before the name of a flag",
    "--standalone": "torchrun",
    "--nnodes": "torchrun",
    "--nproc-per-node": "torchrun",
    "--rdzv-backend": "torchrun",
    "--rdzv-endpoint": "torchrun",
    "--rdzv-id": "torchrun",
    "--master-port": "torchrun",
    "--text": "a former option, in a hint of what to type now",
}
"""What is named and is no option of ours."""

PYTHON = [*sorted((PACKAGE / "cli").rglob("*.py")), *sorted((PACKAGE / "recipes").rglob("*.py"))]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((PACKAGE / "cli").rglob("*.html"))]


class Sentence(NamedTuple):
    where: str
    text: str


def sentences(path: Path) -> Iterator[Sentence]:
    """The strings of a Python file, an f-string as one with ? for each value; the lines of any other file."""
    source, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    if path.suffix != ".py":
        for i, line in enumerate(source.splitlines(), 1):
            yield Sentence(f"{name}:{i}", line)
        return
    nodes = list(ast.walk(ast.parse(source)))
    inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [str(x.value) if isinstance(x, ast.Constant) else "?" for x in node.values]
            yield Sentence(f"{name}:{node.lineno}", "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield Sentence(f"{name}:{node.lineno}", node.value)


ALL = [sentence for path in (*PYTHON, *TEXTS) for sentence in sentences(path)]
NAMED = re.compile(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?")


def choices(option: str) -> set[str]:
    """The values of an option that takes one of a few words; none for any other option."""
    values: set[str] = set()
    for cls in CLASSES:
        hint = _hint(cls, option.removeprefix("--").replace("-", "_").split("."))
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal:
                values.update(x for x in get_args(part) if isinstance(x, str))
    return values


def _hint(cls: type[Any], names: list[str]) -> Any:
    hint = ranges.hints(cls).get(names[0])
    return _hint(hint, names[1:]) if hint is not None and len(names) > 1 else hint


def test_the_texts_are_read():
    found = {option for sentence in ALL for option in NAMED.findall(sentence.text)}
    assert len(found) > 40
    assert {"--micro-batch-size", "--adapter.rank", "--resume", "--merge-base"} <= found
    assert choices("--head") == {"classifier", "lm"}
    assert choices("--adapter.kind") >= {"lora", "full"}
    assert choices("--lr") == set()


def test_every_option_that_is_named_exists():
    unknown = [
        f"{sentence.where}: {option}"
        for sentence in ALL
        for option in NAMED.findall(sentence.text)
        if option not in OPTIONS | GROUPS | {*OTHERS}
    ]
    assert unknown == []


def test_every_value_that_is_given_to_an_option_exists():
    unknown, checked = [], 0
    for sentence in ALL:
        for option, value in re.findall(rf"({NAMED.pattern})[ =]([a-z][\w-]*)", sentence.text):
            if allowed := choices(option):
                checked += 1
                if value not in allowed:
                    unknown.append(f"{sentence.where}: {option} {value}, of {sorted(allowed)}")
    assert unknown == []
    assert checked >= 3


def test_every_command_that_is_named_exists():
    """`fgpt train lora-nano`: a command, and after `train` a recipe, after `eval` what is evaluated."""
    commands, unknown = 0, []
    for sentence in ALL:
        for program, name, following in re.findall(r"\b(fgpt|just) ([a-z][\w-]*) ?([\w?-]*)", sentence.text):
            if name not in COMMANDS:
                continue
            commands += 1
            is_recipe = not re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", following) or following in RECIPES
            is_evaluated = following in (*eval_command.COMMANDS, "", "?", "--help")
            if not (is_recipe if name in ("train", "doctor", "lr-range") else name != "eval" or is_evaluated):
                unknown.append(f"{sentence.where}: {program} {name} {following}")
    assert unknown == []
    assert commands > 50


def test_the_command_line_advises_its_own_commands():
    advised = [
        sentence
        for path in PYTHON
        for sentence in sentences(path)
        if {*COMMANDS} & {*re.findall(r"\bjust ([a-z]+)", sentence.text)}
    ]
    assert advised == []


def test_the_library_names_no_command_and_no_option():
    named = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ("cli", "recipes"):
            continue
        for sentence in sentences(path):
            commands = re.findall(r"\b(?:fgpt|just) ([a-z]+)", sentence.text)
            if set(commands) & {*COMMANDS} or set(NAMED.findall(sentence.text)) & OPTIONS:
                named.append(sentence)
    assert named == []
