"""A run's options as the command line names them, beside those of the named run it was made from."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fgpt import recipes


@dataclass(frozen=True)
class Option:
    name: str
    """As after the dashes: adapter.rank."""
    value: Any
    default: Any
    """The named run's; equal to `value` where there is no such run, or it has no such option."""
    known: bool
    """The named run, in this version, has it."""

    @property
    def differs(self) -> bool:
        return self.value != self.default


def options(run: Mapping[str, Any], recipe: str | None = None) -> list[Option]:
    """All but the name, in the run's order, beside those of a recipe, or of that which the run is named by."""
    usual: Any = recipes.RECIPES.get(run["name"] if recipe is None else recipe)
    default = {} if usual is None else dict(_flat(usual().to_json()))
    flat = [(name, value) for name, value in _flat(run) if name != "name"]
    return [Option(name, value, default.get(name, value), name in default) for name, value in flat]


def command(run: Mapping[str, Any]) -> str:
    """What to type to have the run again: its recipe, with every option in which it differs from that. A run that got
    a name of its own is told by the recipe that is nearest to it.
    """
    recipe = run["name"] if run["name"] in recipes.RECIPES else _nearest(run)
    words = ["just", "train", recipe]
    if recipe != run["name"]:
        words += _typed("name", run["name"])
    for option in options(run, recipe):
        if option.differs:
            words += _typed(option.name, option.value)
    return shlex.join(words)


def _nearest(run: Mapping[str, Any]) -> str:
    """The recipe of the run's kind from which it differs in the fewest options."""
    alike = [name for name, make in recipes.RECIPES.items() if make().to_json().keys() == run.keys()]
    return min(alike, key=lambda name: sum(option.differs for option in options(run, name)), default=run["name"])


def said(value: Any) -> str:
    """A value as it is typed, on one line; nothing for an empty text or list."""
    if isinstance(value, list):
        return " ".join(map(said, value))
    return str(value).replace("\n", "\\n")


def _typed(name: str, value: Any) -> list[str]:
    values = [str(x) for x in value] if isinstance(value, list) else [str(value)]
    if len(values) == 1 and values[0].startswith("-"):  # no option of its own
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        name = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
