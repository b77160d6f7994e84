"""The command line: `fgpt`, `python -m fgpt`, and what `just` runs.

Errors that a user can fix are one line on stderr and exit code 2.
"""

import contextlib
import difflib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fgpt import __version__
from fgpt.cli import output_options, processes, streams
from fgpt.cli.commands import COMMANDS, run_command, summaries
from fgpt.cli.console import answers, console
from fgpt.cli.errors import explain
from fgpt.cli.output_options import JSON_COMMANDS
from fgpt.cli.signals import interrupt, on_first_signal
from fgpt.errors import CompileWarning, InputError

INTERRUPTED, CLOSED = 128 + 2, 128 + 13
"""Exit codes as a shell reports a process that Ctrl-C, or a closed pipe, has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `argv`, or of the process's own arguments.

    Returns:
        The exit code: 0, 2 for bad input, 130 if interrupted, 141 if stdout is a pipe that nobody reads any more.
    """
    with streams.robust_streams(), on_first_signal(interrupt), one_line_warnings():
        try:
            output, args = output_options.split_output_options(sys.argv[1:] if argv is None else argv)
            command, *options = args or ["--help"]
            with output_options.use_output(output):
                _run(command, options)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is expected
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            if sys.stdout is not None:
                streams.redirect_to_null(sys.stdout)
            return CLOSED
        except processes.AllEndedError:
            return 2
        except Exception as err:
            if (line := explain(err)) is None:
                raise
            if output_options.VERBOSE in (sys.argv[1:] if argv is None else argv):
                traceback.print_exc()
            if not answers.quiet:  # of several processes one prints
                print(f"error: {line}", file=sys.stderr)
            return 2
    return 0


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print our warnings as one line, in place of the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CompileWarning)
        show_any = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, CompileWarning):
                console.print(f"warning: {message}", soft_wrap=True)
            else:
                show_any(message, category, *where)

        warnings.showwarning = show
        yield


def _run(command: str, args: Sequence[str]) -> None:
    if command in ("-h", "--help"):
        _print_help()
    elif command == "--version":
        answers.print(f"fgpt {__version__}", highlight=False)
    elif command not in COMMANDS:
        similar = difflib.get_close_matches(command, COMMANDS, n=1)
        question = f"did you mean {similar[0]}? " if similar else ""
        raise InputError(f"no command {command!r}; {question}expected one of {', '.join(COMMANDS)}")
    else:
        with processes.join(command):
            try:
                run_command(command, args)
            except SystemExit as stop:  # a help text was printed
                if stop.code:
                    raise
                also = ", this one --json" if command in JSON_COMMANDS else ""
                answers.print(f"\nEvery command has --quiet and --verbose{also}: fgpt --help says what they do.")


def _print_help() -> None:
    answers.print("usage: fgpt COMMAND [options]\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, summary in summaries():
        table.add_row(Text(name, "bold"), summary)
    answers.print(table)
    answers.print(
        "\nfgpt COMMAND --help lists the options of a command. Each has --quiet (results and errors alone) and "
        f"--verbose (versions, files, times); --json prints the result of {', '.join(JSON_COMMANDS)} as one JSON "
        "document."
    )
