"""Rows of text from the hub by name, or from a file or folder."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fgpt.data import finqa
from fgpt.data.templates import Row
from fgpt.errors import InputError, one_line


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. `input=None` takes the column "input" where there is one; a name given must be there."""

    instruction: str = "instruction"
    input: str | None = None
    output: str = "output"


@dataclass(frozen=True)
class Hub:
    """A dataset on the hub: repository, the files in it that hold the rows, and its columns."""

    repo: str
    files: str
    columns: Columns = Columns()


HUB = {
    "alpaca": Hub("tatsu-lab/alpaca", "data/*.parquet"),
    "dolly": Hub("databricks/databricks-dolly-15k", "*.jsonl", Columns("instruction", "context", "response")),
    "finqa": Hub("TableQAKit/FinQA_retrieval", "train.json"),
    "lima": Hub("GAIR/lima", "train.jsonl"),
    "tulu": Hub("allenai/tulu-v2-sft-mixture", "data/*.parquet"),
}

TEXTS = {
    "tinystories": Hub("roneneldan/TinyStories", "data/train-00000-of-*.parquet"),
    "wikitext-103": Hub("Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet"),
    "wikitext-103-valid": Hub("Salesforce/wikitext", "wikitext-103-raw-v1/validation-*.parquet"),
}
"""Plain text in the column "text": of TinyStories a document a row, of WikiText a line."""

PROBE = 5.0
"""Seconds the hub has to answer. Without this the libraries retry for half a minute before they say it is away."""

Record: TypeAlias = tuple[str, Any]
"""(where it stands, for errors; its columns)."""

Readers: TypeAlias = Mapping[str, Callable[[Path], Iterator[Record]]]
"""How to read a file, by the end of its name."""


def rows(source: str | Path, columns: Columns | None = None, limit: int | None = None) -> list[Row]:
    """The first `limit` rows (default: all) of a source.

    `source` is a name in `HUB`; a .json (list of objects), .jsonl, .csv or .parquet file; or a folder in the hub's
    dataset layout, of which the split "train" is read. A file or folder of that name comes before the hub. Several with
    a + between them ("dolly+train.json") are read one after the other. `columns` defaults to the source's own, or to
    instruction, input, output; of several sources, the hub's keep their own. FinQA's records and LIMA's are known by
    their form, and need none.

    Raises InputError for a source that is not there or cannot be read, and for a row without the text it should hold.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    if "+" in str(source) and not Path(source).exists():
        parts = [part.strip() for part in str(source).split("+")]
        own = [None if part in HUB and not Path(part).exists() else columns for part in parts]
        return [row for part, names in zip(parts, own, strict=True) for row in rows(part, names)][:limit]
    found, hub = found_in(str(source), HUB, "--data")
    columns = columns or (hub.columns if hub else Columns())
    taken = [_row(record, columns, f"{source}, {where}") for where, record in itertools.islice(found, limit)]
    if not taken:
        raise InputError(f"{source}: it holds no rows, expected at least one")
    return taken


def found_in(
    source: str, hubs: Mapping[str, Hub], option: str, split: str = "train", more: Readers | None = None
) -> tuple[Iterator[Record], Hub | None]:
    """The records of a file, which `more` may read, of a folder's split, or else of the hub's dataset of that name, and
    which dataset that is.

    Raises InputError for a source that is not there or cannot be read; `option` is what names another.
    """
    path = Path(source)
    if path.is_dir() and source:  # Path("") would be the current folder
        return folder_records(path, split), None
    if path.is_file():
        return records(path, more), None
    if source in hubs:
        return hub_records(source, hubs[source], option), hubs[source]
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{source}: no such file; expected a path or one of {', '.join(hubs)}: give it with {option}")
    raise InputError(
        f"unknown source {source!r}: expected one of {', '.join(hubs)}, or the path of a file or folder: give it with "
        f"{option}"
    )


def texts(source: str, limit: int | None = None) -> list[str]:
    """The first `limit` rows (default: all) of a source in `TEXTS`.

    Raises InputError where the hub cannot be reached.
    """
    found = hub_records(source, TEXTS[source])
    return [text(record["text"], "text", f"{source}, {where}") for where, record in itertools.islice(found, limit)]


def _row(record: Any, columns: Columns, where: str) -> Row:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
    if finqa.holds(record):
        return finqa.read(record, where)
    turns = record.get("conversations")
    if isinstance(said := record.get("messages"), list):  # Tulu's layout: who says it, and what
        turns = [said_by(said, role, where) for role in ("user", "assistant")]
    if columns.instruction not in record and isinstance(turns, list):  # LIMA's layout; later turns are left out
        record = dict(zip((columns.instruction, columns.output), turns, strict=False))
    wanted = [columns.instruction, columns.output] + ([] if columns.input is None else [columns.input])
    for name in wanted:
        if name not in record:
            have = ", ".join(map(repr, record)) or "none"
            raise InputError(
                f"{where}: no column {name!r}; there are {have}: name the columns to use with --columns.instruction, "
                "--columns.input and --columns.output"
            )
    name = columns.input or "input"
    given = record.get(name)
    return Row(
        text(record[columns.instruction], columns.instruction, where),
        "" if given is None else text(given, name, where),
        text(record[columns.output], columns.output, where),
    )


def said_by(messages: list[Any], role: str, where: str) -> Any:
    """What `role` says first. Raises InputError where it says nothing."""
    for message in messages:
        if isinstance(message, dict) and message.get("role") == role:
            return message.get("content")
    raise InputError(f"{where}: no message of role {role!r} in 'messages': mend the row, or leave it out")


def text(value: Any, name: str, where: str) -> str:
    """What column `name` holds as text. Raises InputError for anything but text and numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    came = "null" if value is None else type(value).__name__
    raise InputError(f"{where}: column {name!r} should hold text, got {came}: mend the row or use another column")


# ------------------------------------------------------------------------------------------------------------- files


def records(path: Path, more: Readers | None = None) -> Iterator[Record]:
    """The records of a file, by the end of its name; `more` reads others. Raises InputError where it cannot be read."""
    plain = partial(_csv, delimiter="\t", quoting=csv.QUOTE_NONE)  # in a .tsv a quotation mark is only itself
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": plain, ".parquet": _parquet} | dict(more or {})
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: cannot tell its format; expected a name that ends in {', '.join(readers)}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty, expected rows")
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as err:
        raise InputError(f"{path}: not UTF-8 text ({err.reason} at byte {err.start}): save it as UTF-8") from None
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or _first_line(err)}") from None


def _json(path: Path) -> Iterator[Record]:
    try:
        found = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except json.JSONDecodeError as err:
        hint = "if it holds one object a line, name it .jsonl" if err.msg == "Extra data" else "mend it there"
        raise InputError(f"{path}, line {err.lineno}: not JSON ({err.msg}, column {err.colno}): {hint}") from None
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of objects, got {type(found).__name__}: wrap the rows in [ ]")
    yield from ((f"row {number}", record) for number, record in enumerate(found, 1))


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", _parsed(line, f"{path}, line {number}")
            except json.JSONDecodeError as err:
                raise InputError(
                    f"{path}, line {number}: not JSON ({err.msg}, column {err.colno}): expected one object a line"
                ) from None


def _parsed(text: str, where: str) -> Any:
    """JSON. Raises json.JSONDecodeError, and InputError for what is JSON, and can still not be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as err:  # a number of thousands of digits; lists within lists without end
        raise InputError(f"{where}: cannot be read: {err}") from None


def _csv(path: Path, **dialect: Any) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True, **dialect)
        try:
            header = next(reader, [])
            if twice := [name for i, name in enumerate(header) if name in header[:i]]:
                raise InputError(f"{path}: two columns are called {twice[0]!r}: give each a name of its own")
            for values in reader:
                if not values:  # a blank line
                    continue
                if len(values) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, but the header names {len(header)}: "
                        "quote the fields that hold commas or newlines"
                    )
                yield f"line {reader.line_num}", dict(zip(header, values, strict=True))
        except csv.Error as err:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({err}): mend it there") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet  # here, because importing fgpt must stay fast

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            yield from ((f"row {number}", record) for number, record in enumerate(found, 1))
    except pyarrow.ArrowException as err:
        raise InputError(f"{path}: not a Parquet file ({_first_line(err)}): write it again") from None


# -------------------------------------------------------------------------------------------- folders and the hub


def folder_records(path: Path, split: str = "train") -> Iterator[Record]:
    """The records of one split of a folder in the hub's dataset layout; of its only one, where that is asked for as
    "train". Raises InputError for any other folder.
    """
    import datasets

    try:
        splits: Any = datasets.load_dataset(str(path))
    except Exception as err:  # the library raises a dozen unrelated types for a folder it cannot read
        raise InputError(f"{path}: expected a folder in the hub's dataset layout: {_first_line(err)}") from None
    names = list(splits)
    if split not in names and (len(names) > 1 or split != "train"):
        raise InputError(f"{path}: no split {split!r}; there are {', '.join(names)}: name one split's file instead")
    chosen = splits[split if split in names else names[0]]
    yield from ((f"row {number}", record) for number, record in enumerate(chosen, 1))


def hub_records(name: str, hub: Hub, option: str = "--data") -> Iterator[Record]:
    """The records of a hub dataset's files, and of no others that its folder may hold. Raises InputError as `download`
    does, at once.
    """
    found = sorted(download(name, hub, option).glob(hub.files))
    return itertools.chain.from_iterable(records(path) for path in found)


def download(name: str, hub: Hub, option: str = "--data") -> Path:
    """The local folder that holds the files of a hub dataset: from the cache if they are there, else fetched.

    Raises InputError where the hub cannot be reached or refuses; `option` is what takes a file instead.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(local: bool) -> Path:
        return Path(snapshot_download(hub.repo, repo_type="dataset", allow_patterns=hub.files, local_files_only=local))

    try:
        folder = get(local=True)
        if any(folder.glob(hub.files)):
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().dataset_info(hub.repo, timeout=PROBE)
        return get(local=False)
    except Exception as err:  # whatever the transport of the day raises; only an HTTP answer means the hub is there
        cause = err if isinstance(err, HfHubHTTPError) else err.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in (401, 403):
            raise InputError(
                f"the hub refuses {hub.repo} (HTTP {status}): accept its terms at "
                f"https://huggingface.co/datasets/{hub.repo} and run `hf auth login`, or give a file with "
                f"`{option} FILE`"
            ) from None
        raise InputError(
            f"the hub gave no {name!r} ({type(err).__name__}: {_first_line(err)}): connect and try again, give a "
            f"file with `{option} FILE`, or train the run `lora-nano`, which needs no hub"
        ) from None


def _first_line(err: Exception) -> str:
    return one_line((str(err).splitlines() or [type(err).__name__])[0])
