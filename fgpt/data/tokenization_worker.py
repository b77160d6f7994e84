"""A process that tokenizes chunks of rows; see `tokenization_pool`, whose pickles it reads and writes.

It imports what makes tokens, and not `fgpt` itself: torch would cost it two seconds and 250 MB.
"""

import os
import pickle
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer one request after the other until the input ends. The first one is the encoding."""
    package: Any = types.ModuleType("fgpt")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["fgpt"] = package  # its modules are found, and its __init__ is not run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the caller
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer

    from fgpt.data.tokenization import tokenize
    from fgpt.errors import InputError

    encoding = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = tokenize(chunk, encoding)
            answer = result._replace(examples=result.examples.serialize(), rows=result.rows.serialize())
        except InputError as err:
            answer = str(err)
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        pickle.dump(answer, output, protocol=5)
        output.flush()


if __name__ == "__main__":
    main()
