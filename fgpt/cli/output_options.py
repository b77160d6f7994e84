"""The options that every command has, anywhere among its own.

--quiet      results and errors alone
--verbose    besides the messages: versions, files, times, and the traceback of an error
--json       the result as one JSON document on stdout, and nothing else there; of the commands in JSON_COMMANDS
"""

import contextlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from fgpt.cli import host_memory
from fgpt.cli.console import answers, console, result_console
from fgpt.errors import InputError

QUIET, VERBOSE, JSON = "--quiet", "--verbose", "--json"
OUTPUT_OPTIONS = (QUIET, VERBOSE, JSON)
JSON_COMMANDS = ("runs", "generate", "classify", "compare", "eval", "doctor")
"""The commands whose result is also to be had as JSON."""
PACKAGES = ("torch", "bitsandbytes", "safetensors", "tokenizers", "huggingface_hub", "numpy")
"""What --verbose gives the versions of."""


class Output(NamedTuple):
    """What a command prints."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False


_outputs: list[Output] = []
"""That of the command that runs now."""


def split_output_options(argv: Sequence[str]) -> tuple[Output, list[str]]:
    """The output options of a command line, and all other arguments. What follows `--` is left as it is.

    Raises InputError for --quiet with --verbose, and for --json of a command that has none.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    flags = set(words[:end]) & {*OUTPUT_OPTIONS}
    args = [word for word in words[:end] if word not in OUTPUT_OPTIONS] + words[end:]
    if {QUIET, VERBOSE} <= flags:
        raise InputError("--quiet prints less and --verbose more: give one of them")
    if JSON in flags and args and args[0] not in JSON_COMMANDS and not args[0].startswith("-"):
        raise InputError(f"fgpt {args[0]} has no --json: it is of {', '.join(JSON_COMMANDS)}")
    return Output(QUIET in flags, VERBOSE in flags, JSON in flags), args


@contextlib.contextmanager
def use_output(output: Output) -> Iterator[None]:
    """Within it the consoles print what the output options say."""
    before = console.quiet, result_console.quiet
    console.quiet = console.quiet or output.quiet
    result_console.quiet = result_console.quiet or output.json
    _outputs.append(output)
    try:
        with _debug_messages() if output.verbose else contextlib.nullcontext():
            yield
    finally:
        _outputs.pop()
        console.quiet, result_console.quiet = before


def is_json() -> bool:
    """Whether the result is to be one JSON document."""
    return bool(_outputs) and _outputs[-1].json


def print_json(document: Any) -> None:
    """Print the one JSON document of a command on stdout. Infinity and NaN, which JSON does not have, are null."""
    if not answers.quiet:
        print(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=os.fspath))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return value


@contextlib.contextmanager
def _debug_messages() -> Iterator[None]:
    """Print the library's debug messages, versions before them, and the time and memory that was used after them."""
    handler, logger, start = _ConsoleHandler(), logging.getLogger("fgpt"), time.perf_counter()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    logger.debug("fgpt %s, Python %s, %s", _version("fgpt"), platform.python_version(), versions)
    logger.debug("%s, %s cores, in %s", platform.platform(), os.cpu_count(), os.getcwd())
    try:
        yield
    finally:
        peak = host_memory.peak() / 1e9
        logger.debug("%.2f s, %.2f GB of memory at most", time.perf_counter() - start, peak)
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ConsoleHandler(logging.Handler):
    """Prints log messages on the console."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(f"debug: {record.getMessage()}", style="dim", soft_wrap=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
