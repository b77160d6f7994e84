"""The examples and rows of a source as Arrow files in the user's cache folder, made once from the same content.

    ~/.cache/fgpt/tokens/KEY/data/examples.arrow, rows.arrow, cache.json

KEY is a hash of all that the tokens follow from: the source's files, the columns, the template, the tokenizer, and the
code that makes tokens. See `fgpt.cli.cache`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import fgpt
from fgpt.cli.cache import note_use
from fgpt.cli.console import console
from fgpt.data.example_store import example_schema, row_schema
from fgpt.data.instruction_datasets import RowStream
from fgpt.data.tokenization import Encoding, Tokenized
from fgpt.errors import InputError
from fgpt.io.files import atomic_dir, read_json, remove_leftovers, write_json

if TYPE_CHECKING:
    import pyarrow

DATA, EXAMPLES, ROWS, SUMMARY = "data", "examples.arrow", "rows.arrow", "cache.json"
LIBRARIES = ("jinja2", "tiktoken", "tokenizers")
"""Libraries whose version may change the tokens."""
CODE = ("data", "tokenizers")
"""Folders of the package whose code makes tokens of files."""
BLOCK = 1 << 20
"""Bytes of a file that are hashed at a time."""


@dataclass
class TokenizedSource:
    """A source as tokens."""

    examples: "list[pyarrow.RecordBatch]" = field(default_factory=list)
    rows: "list[pyarrow.RecordBatch]" = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter[str])
    """What of its conversations is not trained on, by reason."""
    counts: Counter[str] = field(default_factory=Counter[str])
    """What was done to its rows; see `fgpt.data.tokenization`."""
    format: str = ""
    """Its format in one line."""


def cache_key(
    source: str, files: Sequence[Path], columns: object, encoding: Encoding, tokenizer: Sequence[str | bytes]
) -> str:
    """The hash of what the tokens of a source follow from. Of FinQA they follow from `Encoding.max_seq_len`, too, which
    `read_cached` compares.

    Args:
        source: Its name, which is in its rows.
        files: The files that it is read from.
        columns: The columns that are used.
        encoding: How rows become tokens.
        tokenizer: The contents of the tokenizer's files.
    """
    chat_template = getattr(encoding.tokenizer, "chat_template", None) if encoding.template.chat else None
    has_date = chat_template is not None and "strftime_now" in chat_template.template
    special = f"{encoding.tokenizer.n_vocab} {encoding.tokenizer.eos_token_id} {encoding.tokenizer.bos_token_id}"
    day = date.today().isoformat() if has_date else ""
    settings = [source, repr(columns), repr(encoding.template), str(encoding.last_turns), special, day]
    digest = xxhash.xxh3_128()
    for part in [*settings, *map(version, LIBRARIES), *tokenizer]:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    package = Path(fgpt.__file__).parent
    code = [path for folder in CODE for path in sorted((package / folder).glob("*.py"))]
    for path in [*code, *files]:
        digest.update(f"{path.stat().st_size} {path.name}:".encode("utf-8", "surrogateescape"))
        _feed_file(digest, path)
    return digest.hexdigest()


def read_cached(folder: Path, key: str, max_seq_len: int) -> TokenizedSource | None:
    """What the folder of a key holds; None if there is nothing, or it is not whole, or it is not of this key."""
    import pyarrow as pa

    data = folder / DATA
    if not (data / SUMMARY).exists():
        return None
    try:
        summary = read_json(data / SUMMARY)
        if summary["max_seq_len"] not in (None, max_seq_len):
            return None
        if summary.pop("hash") != _hash(summary):
            raise ValueError("its summary is not the one that was written")
        if summary["key"] != key or any(_identity(data / name) != summary["files"][name] for name in (EXAMPLES, ROWS)):
            raise ValueError("its files are not those that were written")
        left_out, counts = (Counter(dict(summary[name])) for name in ("left_out", "counts"))
        note_use(folder)
        return TokenizedSource(_map(data / EXAMPLES), _map(data / ROWS), left_out, counts, str(summary["format"]))
    except (InputError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as err:
        console.print(f"the cached tokens in {data} are damaged ({err}): tokenizing again", soft_wrap=True)
        return None


def write_cached(
    folder: Path, key: str, results: Iterable[Tokenized], stream: RowStream, max_seq_len: int
) -> TokenizedSource:
    """Write what is made of a source's rows to the folder of its key, and map it.

    Args:
        folder: The folder; `cache.lock` it.
        key: Its key.
        results: What is made of the rows, in their order.
        stream: The rows, all of them read after the last result.
        max_seq_len: What rows were made to fit.

    Raises:
        InputError: if the disk is full or the folder cannot be written.
        OSError: likewise.
    """
    import pyarrow as pa

    remove_leftovers(folder)
    data, depends_on_length, counts = folder / DATA, False, Counter[str]()
    with atomic_dir(data) as new:
        with (
            pa.ipc.new_file(new / EXAMPLES, example_schema()) as examples,
            pa.ipc.new_file(new / ROWS, row_schema()) as rows,
        ):
            for result in results:
                examples.write_batch(result.examples)
                rows.write_batch(result.rows)
                depends_on_length |= result.depends_on_length
                counts += result.counts
        summary = {
            "key": key,
            "files": {name: _identity(new / name) for name in (EXAMPLES, ROWS)},
            "left_out": list((+stream.left_out).items()),
            "counts": list(counts.items()),
            "format": stream.format,
            "max_seq_len": max_seq_len if depends_on_length else None,
        }
        write_json(new / SUMMARY, {**summary, "hash": _hash(summary)})
    return TokenizedSource(_map(data / EXAMPLES), _map(data / ROWS), +stream.left_out, counts, stream.format)


def _hash(summary: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(summary, sort_keys=True).encode()).hexdigest()


def _map(path: Path) -> "list[pyarrow.RecordBatch]":
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(path)))
    return [file.get_batch(number) for number in range(file.num_record_batches)]


def _identity(path: Path) -> list[int | str]:
    """Size and hash of a file."""
    digest = xxhash.xxh3_128()
    _feed_file(digest, path)
    return [path.stat().st_size, digest.hexdigest()]


def _feed_file(digest: "xxhash.xxh3_128", path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
