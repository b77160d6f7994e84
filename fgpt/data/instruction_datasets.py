"""Rows of text from the hub by name, or from a file or folder."""

import fnmatch
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fgpt.data import conversations, finqa, hub_files
from fgpt.data.conversations import Conversation
from fgpt.data.hub_files import HubError, Repo
from fgpt.data.prompt_templates import InstructionRow, Turn
from fgpt.data.tables import read_csv, read_tsv
from fgpt.data.text_files import OPENERS, format_of, open_text, reading, without_marks
from fgpt.errors import InputError, one_line, shown


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

Record: TypeAlias = tuple[str, Any]
"""(where it stands, for errors; its columns)."""

Readers: TypeAlias = Mapping[str, Callable[[Path], Iterator[Record]]]
"""How to read a file, by the end of its name."""


class Examples(NamedTuple):
    """What a source holds."""

    rows: list[InstructionRow]
    left_out: Counter[str]
    """What of its conversations is not trained on: how many, by the reason."""


def load_rows(source: str | Path, columns: Columns | None = None, limit: int | None = None) -> list[InstructionRow]:
    """The rows of `examples`, which also counts what was left out."""
    return load_examples(source, columns, limit).rows


def load_examples(source: str | Path, columns: Columns | None = None, limit: int | None = None) -> Examples:
    """The first `limit` rows (default: all) of a source, and what of it was left out.

    `source` is a name in `HUB`; a .json (list of objects), .jsonl, .csv, .tsv or .parquet file, the texts among them
    also compressed (.jsonl.gz); or a folder in the hub's dataset layout, of which the split "train" is read. A file or
    folder of that name comes before the hub. Several with a + between them ("dolly+train.json") are read one after the
    other. `columns` defaults to the source's own, or to instruction, input, output; of several sources, the hub's keep
    their own. FinQA's records and conversations (see `fgpt.data.conversations`) are known by their form, and need none.
    Of a conversation each answer is a row.

    Raises InputError for a source that is not there or cannot be read, and for a row without the text it should hold.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    if "+" in str(source) and not Path(source).exists():
        parts = [part.strip() for part in str(source).split("+")]
        own = [None if part in HUB and not Path(part).exists() else columns for part in parts]
        several = [load_examples(part, names) for part, names in zip(parts, own, strict=True)]
        taken = [row for each in several for row in each.rows][:limit]
        return Examples(taken, sum((each.left_out for each in several), Counter()))
    found, hub = open_source(str(source), HUB)
    columns = columns or (hub.columns if hub else Columns())
    taken, left_out = list[InstructionRow](), Counter[str]()
    for where, record in found:
        taken += _rows(record, columns, f"{source}, {where}", left_out)
        if limit is not None and len(taken) >= limit:
            break
    if not taken:
        reason = conversations.summary(left_out)
        raise InputError(
            f"{source}: it holds no rows, expected at least one" + (f"; there are {reason}" * bool(reason))
        )
    return Examples(taken[:limit], +left_out)


def open_source(
    source: str, hubs: Mapping[str, Hub], split: str = "train", more: Readers | None = None
) -> tuple[Iterator[Record], Hub | None]:
    """The records of a file, which `more` may read, of a folder's split, or else of the hub's dataset of that name, and
    which dataset that is.

    Raises InputError for a source that is not there or cannot be read.
    """
    path = Path(source)
    if path.is_dir() and source:  # Path("") would be the current folder
        return folder_records(path, split), None
    if path.is_file():
        return read_records(path, more), None
    if source in hubs:
        return hub_records(source, hubs[source]), hubs[source]
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{source}: no such file; expected a path or one of {', '.join(hubs)}")
    raise InputError(
        f"unknown source {source!r}: expected one of {', '.join(hubs)}, or the path of a file or folder"
    )


def load_texts(source: str, limit: int | None = None) -> list[str]:
    """The first `limit` rows (default: all) of a source in `TEXTS`.

    Raises InputError where the hub cannot be reached.
    """
    found = hub_records(source, TEXTS[source])
    return [text(record["text"], "text", f"{source}, {where}") for where, record in itertools.islice(found, limit)]


def _rows(record: Any, columns: Columns, where: str, left_out: Counter[str]) -> list[InstructionRow]:
    """The rows of a record: one, or as many as its conversation has answers."""
    if isinstance(record, list):  # messages without a name
        record = {"messages": record}
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object of columns, got {type(record).__name__}")
    if finqa.is_finqa(record):
        return [finqa.read(record, where)]
    named = columns.instruction in record and columns.output in record
    null = all(is_missing(record.get(name)) for name in (columns.instruction, columns.output))
    chosen = named and columns != Columns()
    if not chosen and (conversation := conversations.read(record, where, named and not null)) is not None:
        return _turns(conversation, left_out)
    wanted = [columns.instruction, columns.output] + ([] if columns.input is None else [columns.input])
    for name in wanted:
        if name not in record:
            raise InputError(
                f"{where}: no column {name!r}; there are {listed(record)}: name the columns to use in "
                "`columns.instruction`, `columns.input` and `columns.output`",
                field="columns",
            )
    name = columns.input or "input"
    given = record.get(name)
    row = InstructionRow(
        text(record[columns.instruction], columns.instruction, where),
        "" if is_missing(given) else text(given, name, where),
        text(record[columns.output], columns.output, where),
    )
    asked = f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction
    conversation = conversations.history(record, asked, row.output, where)
    return [row] if conversation is None else _turns(conversation, left_out)


def _turns(conversation: Conversation, left_out: Counter[str]) -> list[InstructionRow]:
    """The answers of a conversation as rows: a plain one where it is a question and an answer."""
    pairs = conversations.answers(conversation, left_out)
    if len(pairs) == 1:
        (context, answer), *_ = pairs
        if len(context) == 1 and context[0].role == "user" and answer.weight == 1:
            return [InstructionRow(context[0].content, "", answer.content)]
    rows: list[InstructionRow] = []
    for context, answer in pairs:
        *before, last = context
        asked = last.content if last.role == "user" else conversations.as_text([last])
        text = conversations.as_text(before)
        rows.append(Turn(asked, text, answer.content, context, answer.weight, conversation.where))
    return rows


LISTED = 20
"""Columns that an error names."""


def listed(record: Mapping[Any, Any]) -> str:
    """The names of a record's columns, for an error."""
    names = ", ".join(repr(name) for name in itertools.islice(record, LISTED)) or "none"
    return names + (f" and {len(record) - LISTED:,} more" if len(record) > LISTED else "")


def is_missing(value: Any) -> bool:
    """Whether a column holds nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text(value: Any, name: str, where: str) -> str:
    """What column `name` holds as text. Raises InputError for anything but text and numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    came = "null" if value is None else "NaN, which is no text" if is_missing(value) else type(value).__name__
    raise InputError(f"{where}: column {name!r} should hold text, got {came}: mend the row or use another column")


# ------------------------------------------------------------------------------------------------------------- files


def read_records(path: Path, more: Readers | None = None) -> Iterator[Record]:
    """The records of a file, by the end of its name; `more` reads others. Raises InputError where it cannot be read."""
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": read_csv, ".tsv": read_tsv, ".parquet": _parquet}
    readers |= dict(more or {})
    form = format_of(path)
    if form not in readers or (form == ".parquet" and path.suffix.lower() in OPENERS):
        raise InputError(
            f"{path}: cannot tell its format; expected a name that ends in {', '.join(readers)}, or the name of a text "
            f"file and then {', '.join(OPENERS)}"
        )
    with reading(path):
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty, expected rows")
        yield from readers[form](path)


def _json(path: Path) -> Iterator[Record]:
    try:
        with open_text(path) as file:
            found = _parsed(file.read(), str(path))
    except json.JSONDecodeError as err:
        hint = "if it holds one object a line, name it .jsonl" if err.msg == "Extra data" else "mend it there"
        raise InputError(f"{path}, line {err.lineno}: not JSON ({err.msg}, column {err.colno}): {hint}") from None
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a list of objects, got {type(found).__name__}: wrap the rows in [ ]")
    yield from ((f"row {number}", record) for number, record in enumerate(found, 1))


def _jsonl(path: Path) -> Iterator[Record]:
    with open_text(path) as lines:
        for number, line in enumerate(without_marks(lines), 1):
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
    "train".

    A folder is local: nothing is fetched, and no file outside it is read. Raises InputError for one whose README.md
    names such files, and for any other folder.
    """
    import datasets

    _stays_local(path)
    try:
        splits: Any = datasets.load_dataset(str(path))
    except Exception as err:  # the library raises a dozen unrelated types for a folder it cannot read
        raise InputError(f"{path}: expected a folder in the hub's dataset layout: {_first_line(err)}") from None
    names = list(splits)
    if split not in names and (len(names) > 1 or split != "train"):
        raise InputError(f"{path}: no split {split!r}; there are {', '.join(names)}: name one split's file instead")
    chosen = splits[split if split in names else names[0]]
    yield from ((f"row {number}", record) for number, record in enumerate(chosen, 1))


def _stays_local(path: Path) -> None:
    """Raises InputError where a folder's own words on its data name an address or a file elsewhere."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    for name in ("README.md", ".huggingface.yaml"):
        card = path / name
        if not card.is_file():
            continue
        with reading(card):
            try:
                metadata = metadata_load(card) if name.endswith(".md") else yaml.safe_load(card.read_bytes())
            except (yaml.YAMLError, ValueError) as err:
                raise InputError(f"{card}: its YAML cannot be read: {_first_line(err)}: mend it there") from None
        for text in _data_files(metadata):
            parts = text.replace("\\", "/").split("/")
            if ":" in text or ".." in parts or parts[0] in ("", "~"):
                raise InputError(
                    f"{card}: it names data outside the folder, {shown(text)}: expected files in it; take that out, or "
                    "give the file itself"
                )


def _data_files(metadata: Any, named: bool = False) -> Iterator[str]:
    """All texts under `data_files` and `data_dir` in a dataset's metadata, however deep."""
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            yield from _data_files(value, named or name in ("data_files", "data_dir"))
    elif isinstance(metadata, list):
        for value in metadata:
            yield from _data_files(value, named)
    elif named and isinstance(metadata, str):
        yield metadata


def hub_records(name: str, hub: Hub) -> Iterator[Record]:
    """The records of a hub dataset's files, and of no others that its folder may hold. Raises InputError as `download`
    does, at once.
    """
    found = sorted(download(name, hub).glob(hub.files))
    return itertools.chain.from_iterable(read_records(path) for path in found)


def download(name: str, hub: Hub) -> Path:
    """The local folder that holds the files of a hub dataset: from the cache if they are all there, else fetched.

    Raises InputError where the hub cannot be reached or refuses.
    """
    repo = Repo(hub.repo, "dataset", [hub.files])
    held = hub_files.cached(repo)
    files = [] if held.folder is None else _names(held.folder, hub.files)
    lacking = _missing_parts(files, hub.files)
    if held.folder is not None and files and not lacking and not held.partial:
        return held.folder
    try:
        folder = hub_files.fetch(repo).folder
    except HubError as err:
        if err.status in (401, 403):
            raise InputError(
                f"the hub refuses {hub.repo} (HTTP {err.status}): accept its terms at "
                f"https://huggingface.co/datasets/{hub.repo} and run `hf auth login`, or give a file "
                "instead"
            ) from None
        part = (
            f" beyond the part in the local cache, {len(files)} of {len(files) + len(lacking)} files" if lacking else ""
        )
        raise InputError(
            f"the hub gave no {name!r}{part} ({err.kinds[0]}: {err.line}): connect and try again, give a "
            "file instead, or train the recipe `lora-nano`, which needs no hub"
        ) from None
    files = _names(folder, hub.files)
    if not files or (lacking := _missing_parts(files, hub.files)):
        what = f"files that match {hub.files}" if not files else f"all of its parts, {lacking[0]} for one"
        raise InputError(f"the hub's {hub.repo} does not have {what}: give a file instead")
    return folder


def _names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.exists())


PART = re.compile(r"(?P<before>.*-)(?P<number>\d+)(?P<of>-of-(?P<total>\d+))(?P<after>.*)")
"""data/train-00003-of-00012.parquet, or with a hash after the numbers."""


def _missing_parts(files: Sequence[str], pattern: str) -> list[str]:
    """The files that match `pattern` as those do, and are not there, though the numbers of the others count them."""
    found = [match for file in files if (match := PART.fullmatch(file))]
    there = {(match["before"], match["of"], int(match["number"])) for match in found}
    missing: dict[tuple[str, str, int], str] = {}
    for match in found:
        for number in range(min(int(match["total"]), MOST_PARTS)):
            name = f"{match['before']}{number:0{len(match['number'])}}{match['of']}{match['after']}"
            if fnmatch.fnmatchcase(name, pattern):
                missing.setdefault((match["before"], match["of"], number), name)
    return sorted(name for key, name in missing.items() if key not in there)


MOST_PARTS = 10_000
"""Far above what any dataset here has."""


def _first_line(err: Exception) -> str:
    return one_line((str(err).splitlines() or [type(err).__name__])[0])
