"""Chunks of rows, tokenized by several processes at once.

Threads would not do: tiktoken hands every text over by itself, and a thread that waits for the interpreter after each
of them is slower than a loop. The processes are started anew and not forked, because a fork of a process with threads
(torch's, CUDA's) may hang; they speak pickle to their parent alone, over pipes.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from fgpt.data.example_store import example_schema, row_schema
from fgpt.data.tokenization import Encoding, RowChunk, Tokenized, tokenize
from fgpt.errors import InputError

MAX_PROCESSES = 16
"""One process reads and writes all rows, and has no more for others to do."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize_in_order(chunks: Iterable[RowChunk], encoding: Encoding, num_processes: int) -> Iterator[Tokenized]:
    """What `tokenize` makes of each chunk, in their order.

    Args:
        chunks: They are read as they are needed, a few ahead.
        encoding: How rows become tokens.
        num_processes: 0 tokenizes in this process.

    Raises:
        InputError: as `tokenize` does, and if a process ends before it has answered.
    """
    if num_processes == 0:
        yield from (tokenize(chunk, encoding) for chunk in chunks)
        return
    with contextlib.ExitStack() as stack:
        workers = SimpleQueue[Worker]()
        for _ in range(num_processes):
            workers.put(stack.enter_context(Worker(encoding)))

        def ask(chunk: RowChunk) -> Tokenized:
            worker = workers.get()
            try:
                return worker.tokenize(chunk)
            finally:
                workers.put(worker)

        threads = stack.enter_context(ThreadPoolExecutor(num_processes))
        waiting = deque[Future[Tokenized]]()
        for chunk in chunks:
            waiting.append(threads.submit(ask, chunk))
            if len(waiting) > 2 * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Worker:
    """A process that tokenizes, and ends with the context."""

    def __init__(self, encoding: Encoding) -> None:
        program = Path(__file__).with_name("tokenization_worker.py")
        command = [sys.executable, "-P", str(program)]  # -P: imports nothing beside it
        pipe, one_thread = subprocess.PIPE, {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | one_thread)
        self._encoding: Encoding | None = encoding

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not sent is not needed
                    stream.close()

    def tokenize(self, chunk: RowChunk) -> Tokenized:
        import pyarrow as pa

        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if self._encoding is not None:
                pickle.dump(self._encoding, stdin, protocol=5)
                self._encoding = None
            pickle.dump(chunk, stdin, protocol=5)
            stdin.flush()
            answer = pickle.load(stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise InputError(
                f"a process that tokenizes ended at row {chunk.first + 1:,}, and no result came: free memory and try "
                "again"
            ) from None
        if isinstance(answer, str):
            raise InputError(answer)
        if isinstance(answer, Exception):
            raise answer
        examples = pa.ipc.read_record_batch(pa.py_buffer(answer.examples), example_schema())
        rows = pa.ipc.read_record_batch(pa.py_buffer(answer.rows), row_schema())
        return answer._replace(examples=examples, rows=rows)
