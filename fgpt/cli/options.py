"""Options of a command line as a dataclass: tyro parses and documents them, errors are one line."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from docstring_parser import parse_from_object

from fgpt import ranges
from fgpt.cli.option_hints import similar_option, target_hint
from fgpt.errors import InputError
from fgpt.recipes import FineTuningRecipe, TrainingRecipe

GROUPS = {
    "data": (
        "base data mixture streaming shuffle_buffer_size eval_data forget documents num_passages train test source "
        "max_seq_len template assistant_turns head labels overlong num_heldout heldout num_fewshot tokenizer teacher"
    ),
    "training": (
        "lr lr_scheduler_type lr_multipliers epochs steps micro_batch_size grad_accumulation_steps packing "
        "warmup_steps min_lr_ratio lengthened_at weight_decay optimizer ema_decay neftune_noise_alpha betas seed "
        "reward num_generations max_completion_length span_words temperature objective loss_type beta label_smoothing "
        "rpo_alpha gamma desirable_weight undesirable_weight scale_rewards center_rewards_coefficient "
        "label_smoothing_factor kd_ratio kd_temperature privacy"
    ),
    "model": "adapter new_tokens tune_also quantize n_layer n_head d_model vocab biases",
    "speed": "device dtype deterministic shard_base remat compile cuda_graphs peak_tflops",
    "run": (
        "name out eval_every keep_best early_stopping_patience checkpoint_every_minutes keep_checkpoints tracker "
        "compare_prompts compare_data max_new_tokens num_beams length_penalty no_repeat_ngram per_example"
    ),
    "text": "columns prompt",
}
"""The options of recipes as help shows them: in groups, the most used first."""


def parse(cls: type[Any], args: Sequence[str], default: Any, command: str, description: str | None = None) -> Any:
    """An instance of a dataclass from command-line options.

    Args:
        cls: The dataclass; each field is an option.
        args: The command line without the command.
        default: An instance whose values options replace, or None.
        command: How the command is called, in its help and in errors.
        description: What its help begins with; None takes the docstring of `cls`.

    Raises:
        InputError: for an unknown option, and for a value of a wrong type or out of range.
    """
    _check_names(cls, args, command)
    if issubclass(cls, TrainingRecipe):
        options = _ungroup(cls, _tyro(_group(cls, default), args, None, command, description or cls.__doc__))
    else:
        options = _tyro(cls, args, default, command, description)
    ranges.check(options, "--")
    if isinstance(options, FineTuningRecipe):
        options.adapter.check()
        options.privacy.check()
        options.check_schedule()
        _ = options.multipliers
    if isinstance(options, FineTuningRecipe) and (hint := target_hint(options.adapter.target or "")):
        raise InputError(f"--adapter.target {options.adapter.target} matches no path: {hint}")
    return options


def _check_names(cls: type[Any], args: Sequence[str], command: str) -> None:
    """Raises InputError for the first option that `cls` does not have, with the one that may be meant."""
    known = [*option_names(cls), "--help"] + ["--resume", "--auto-resume"] * issubclass(cls, TrainingRecipe)
    for arg in args:
        option = arg.partition("=")[0]
        if not option.startswith("--") or option == "--" or option.replace("_", "-") in known:
            continue
        hint = similar_option(option)
        if hint is None:
            hint = next(iter(difflib.get_close_matches(option.replace("_", "-"), known, n=1, cutoff=0.7)), None)
        if hint is None:
            question = ""
        elif hint.split(" ")[0] in known:
            question = f"did you mean {hint}? "
        else:
            question = f"in fgpt it is {hint}, which {command} does not have; "
        raise InputError(f"no option {option}; {question}{command} --help lists them")


def option_names(cls: type[Any], prefix: str = "") -> list[str]:
    """Every option of a dataclass, without its positional arguments: --adapter.rank, --remat, --no-remat."""
    names: list[str] = []
    for field, hint in zip(dataclasses.fields(cls), ranges.hints(cls).values()):
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            continue
        name = field.name.replace("_", "-")
        bare = hint.__origin__ if ranges.is_flat(hint) else hint
        if dataclasses.is_dataclass(bare):
            names += option_names(bare, prefix if ranges.is_flat(hint) else f"{prefix}{name}.")  # pyright: ignore
        elif hint is bool:
            names += [f"--{prefix}{name}", f"--{prefix}no-{name}"]
        else:
            names.append(f"--{prefix}{name}")
    return names


def _tyro(cls: type[Any], args: Sequence[str], default: Any, command: str, description: str | None) -> Any:
    arguments = {} if default is None else {"default": default}
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(cls, args=args, prog=command, description=description, **arguments)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_error_of(output.getvalue())}; see {command} --help") from None


def _error_of(output: str) -> str:
    """The error that tyro prints: in a box if it can, with a title, the message, and explanations after a rule."""
    lines = [line.strip("│╭╮╰╯─|+- ") for line in output.splitlines()]
    message = " ".join(itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines[1:])))
    if value := WRONG_VALUE.fullmatch(message):
        kinds = [{"int": "an integer", "float": "a number"}[value["kind"].lower()], *filter(None, [value["word"]])]
        return f"{value['option']} is {value['value']!r}: expected {' or '.join(kinds)}"
    if choice := WRONG_CHOICE.fullmatch(message):
        words = re.findall("'(.*?)'", choice["choices"])
        if "None" in words:  # tyro's order is then that of a set
            words = [*sorted({*words} - {"None"}), "None"]
        similar = difflib.get_close_matches(choice["value"], words, n=1)
        question = f" (did you mean {similar[0]}?)" if similar else ""
        return f"{choice['option']} is {choice['value']!r}: expected one of {', '.join(words)}{question}"
    if wrong := WRONG_FIELD.fullmatch(message):
        return f"--{wrong['name'].replace('_', '-')} is {wrong['problem']}"
    if missing := MISSING_ARGUMENT.findall(message):
        return "expected " + " and ".join(f"{name} ({description})" for name, description in missing)
    return message.rstrip(".") or "unusable options"


WRONG_VALUE = re.compile(
    r"Error parsing (?P<option>--\S+): .*\b(?P<kind>int|float)\b(\|{(?P<word>\w+)})?.*?'(?P<value>.*)'\]?\.?",
    re.IGNORECASE,
)
"""How tyro says that a value is no number, nor the word that the option also takes."""
WRONG_CHOICE = re.compile(
    r"invalid choice '(?P<value>.*)' for argument '(?P<option>\S+)'\. Expected one of \((?P<choices>.*)\)\.?",
    re.IGNORECASE,
)
"""How tyro says that a value is none of an option's."""
WRONG_FIELD = re.compile(r"Error parsing [a-z.]+: (?P<name>[a-z_]+) is (?P<problem>.*)")
"""How tyro says what a dataclass has refused."""
MISSING_ARGUMENT = re.compile(r"([A-Z]+) ((?:(?! \(required\)).)*?)\.? \(required\)")
"""How tyro says that arguments are missing: their names and help."""


# ------------------------------------------------------------------------------------------------------ help in groups


def _group(cls: type[Any], default: Any) -> type[Any]:
    """A dataclass of dataclasses, one for each of GROUPS and one for each field that is a dataclass itself."""
    hints, texts = ranges.hints(cls), _help_texts(cls)
    groups: list[tuple[str, Any, Any]] = []
    for title, names in GROUPS.items():
        fields: list[tuple[str, Any, Any]] = []
        nested: list[tuple[str, Any, Any]] = []
        for name in names.split():
            if name in hints:
                hint = Annotated[hints[name], tyro.conf.arg(help=texts.get(name, ""))]
                value = dataclasses.field(default=getattr(default, name))
                (nested if dataclasses.is_dataclass(hints[name]) else fields).append((name, hint, value))
        if fields:
            group = dataclasses.make_dataclass(title, fields, frozen=True)
            groups.append((title, tyro.conf.OmitArgPrefixes[group], dataclasses.field(default_factory=group)))
        groups += nested
    return dataclasses.make_dataclass(cls.__name__, groups, frozen=True)


def _ungroup(cls: type[Any], groups: Any) -> Any:
    """The recipe that an instance of `_group(cls)` holds."""
    values: dict[str, Any] = {}
    for name, group in vars(groups).items():
        values |= vars(group) if name in GROUPS else {name: group}
    return cls(**values)


def _help_texts(cls: type[Any]) -> dict[str, str]:
    """The docstrings of a dataclass's fields, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for field in parse_from_object(base).params:
            texts[field.arg_name] = " ".join((field.description or "").split())
    return texts
