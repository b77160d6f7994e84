"""The options of a run as the command line names them, beside those of the recipe it was made from."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fgpt import recipes


@dataclass(frozen=True)
class Option:
    name: str
    """Without the dashes: adapter.rank."""
    value: Any
    default: Any
    """The recipe's value; equal to `value` if there is no such recipe, or it has no such option."""
    in_recipe: bool
    """Whether the recipe, in this version, has the option."""

    @property
    def differs(self) -> bool:
        return self.value != self.default

    @property
    def text(self) -> str:
        return as_text(self.value)

    @property
    def default_text(self) -> str:
        """The recipe's value if it is another one, else nothing."""
        return as_text(self.default) if self.differs else ""


def options(run: Mapping[str, Any], recipe: str | None = None) -> list[Option]:
    """All options of a run but its name, in its order, compared with `recipe`, by default that of the run's name."""
    make: Any = recipes.RECIPES.get(run["name"] if recipe is None else recipe)
    defaults = {} if make is None else dict(_flatten(make().to_json()))
    flat = [(name, value) for name, value in _flatten(run) if name != "name"]
    return [Option(name, value, defaults.get(name, value), name in defaults) for name, value in flat]


def command(run: Mapping[str, Any]) -> str:
    """The command that trains the run again: its recipe and every option that differs from it. A run with a name of
    its own starts from the recipe that is closest to it.
    """
    recipe = run["name"] if run["name"] in recipes.RECIPES else _closest_recipe(run)
    words = ["fgpt", "train", recipe]
    if recipe != run["name"]:
        words += _arguments("name", run["name"])
    for option in options(run, recipe):
        if option.differs:
            words += _arguments(option.name, option.value)
    return shlex.join(words)


def _closest_recipe(run: Mapping[str, Any]) -> str:
    """The recipe of the run's kind from which it differs in the fewest options."""
    same_kind = [name for name, make in recipes.RECIPES.items() if make().to_json().keys() == run.keys()]
    return min(same_kind, key=lambda name: sum(option.differs for option in options(run, name)), default=run["name"])


def as_text(value: Any) -> str:
    """A value as it is typed, on one line; nothing for an empty text or list."""
    if isinstance(value, list):
        return " ".join(map(as_text, value))
    return str(value).replace("\n", "\\n")


def _arguments(name: str, value: Any) -> list[str]:
    """An option and its values as words of a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = [str(x) for x in value] if isinstance(value, list) else [str(value)]
    if len(values) == 1 and values[0].startswith("-"):  # else it would be read as an option
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        option = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{option}.")
        else:
            yield option, value
