"""Options from a file: `fgpt train lora-nano --config run.yaml`. What the command line gives as well counts.

recipe: lora-nano          which recipe it is of; it may be left out where the command names one
lr: 1e-3                   every option of the recipe, by its name with - or _
data: [a.jsonl, b.jsonl]
adapter:                   what has dots on the command line is nested, or has dots here too
  rank: 16

The run.json of any run is such a file: its recipe with all of its options but the folder of run directories.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.paths import with_full_paths
from fgpt.cli.run_json import RUN, recipe_fields, upgrade
from fgpt.errors import InputError, short_repr
from fgpt.io.files import read_json, read_text

OPTION, RECIPE = "--config", "recipe"


def split_config(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that --config names, and all other arguments.

    Raises InputError for two files, and for none.

    >>> split_config(["--lr", "1e-3", "--config", "run.yaml"])
    (PosixPath('run.yaml'), ['--lr', '1e-3'])
    """
    paths: list[str] = []
    others: list[str] = []
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name != OPTION:
            others.append(name + equals + value)
        elif not equals and (not rest or rest[0].startswith("--")):
            raise InputError(f"{OPTION} needs a file: a .yaml or .json file of options, or the run.json of a run")
        else:
            paths.append(value if equals else rest.pop(0))
    if len(paths) > 1:
        raise InputError(f"{OPTION} is given {len(paths)} times: expected one file")
    return (Path(paths[0]) if paths else None), others


def read_config(path: Path) -> dict[str, Any]:
    """The content of a file of options, the fields of a recipe by name.

    Raises InputError if it is no such file.
    """
    if path.suffix == ".json":
        values = read_json(path)
        if isinstance(values, dict) and "kind" in upgrade(values):
            fields = recipe_fields(values)
            fields = with_full_paths(path.parent, fields) if path.name == RUN else fields
            return {name: value for name, value in fields.items() if name != "out"}  # whose full path no file has
    else:
        values = _read_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path}: expected options by name, such as lr: 1e-3, got {short_repr(values)}")
    return values


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as err:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(err).split())}") from None


def as_options(values: Mapping[str, Any], path: Path, prefix: str = "") -> list[str]:
    """The fields of a file as command-line options.

    Raises InputError for a value that no option has.

    >>> as_options({"lr": 0.001, "remat": True, "data": ["a", "b"], "adapter": {"rank": 16}}, Path("run.yaml"))
    ['--lr=0.001', '--remat', '--data', 'a', 'b', '--adapter.rank=16']
    """
    options: list[str] = []
    for name, value in values.items():
        option = prefix + name.replace("_", "-")
        if name == RECIPE and not prefix:
            continue
        if isinstance(value, Mapping):
            options += as_options(value, path, f"{option}.")
        elif isinstance(value, bool):
            group, _, last = option.rpartition(".")
            options.append(f"--{option}" if value else f"--{group}{'.' if group else ''}no-{last}")
        elif isinstance(value, list):
            if any(isinstance(x, list | Mapping) for x in value):
                raise InputError(f"{path}: {option} is {short_repr(value)}: expected a list of words or numbers")
            options += [f"--{option}", *map(str, value)] if value else []
        else:
            options.append(f"--{option}={value}")
    return options


def without_overridden(options: Sequence[str], command_line: Sequence[str]) -> list[str]:
    """The options of a file that the command line does not give as well.

    >>> without_overridden(["--lr=0.1", "--data", "a", "b", "--remat"], ["--data", "c", "--no-remat"])
    ['--lr=0.1']
    """
    names = {_positive(arg) for arg in command_line if arg.startswith("--")}
    left: list[str] = []
    is_left = True
    for arg in options:
        is_left = _positive(arg) not in names if arg.startswith("--") else is_left
        if is_left:
            left.append(arg)
    return left


def _positive(arg: str) -> str:
    """The name of an option; of --no-remat it is --remat."""
    group, dot, last = arg.partition("=")[0].replace("_", "-").removeprefix("--").rpartition(".")
    return f"--{group}{dot}{last.removeprefix('no-')}"
