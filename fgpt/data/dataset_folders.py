"""Local folders in the layout of Hugging Face datasets. Only files in the folder are read, and tables as text."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fgpt.data.arrow_files import first_line
from fgpt.data.records import Readers, read_json, read_json_or_lines
from fgpt.data.tables import read_csv, read_tsv
from fgpt.data.text_files import file_format, read_errors
from fgpt.errors import InputError, short_repr
from fgpt.extras import require_extra

if TYPE_CHECKING:
    from datasets.packaged_modules.csv.csv import CsvConfig

CARDS = ("README.md", ".huggingface.yaml")
"""Files of a folder whose metadata say which files hold its data."""

TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
"""The formats of files that hold rows and nothing else."""

CSV_OPTIONS = ("sep", "delimiter", "features", "keep_default_na", "na_filter", "engine", "chunksize", "memory_map")
"""Options of a folder's CSV files that are obeyed (`sep`, `delimiter`), or have no effect on a table read as text."""


class Folder(NamedTuple):
    """The data files of a folder."""

    splits: dict[str, list[Path]]
    """The files of each split, in their order."""
    readers: Readers
    """How to read them, where that is not what their extensions say."""


def read_folder(path: Path, config: str | None = None) -> Folder:
    """Which files hold the data of a folder, as the library `datasets` resolves them: by the `configs` in its card,
    else by their names. A folder that `save_to_disk` has written is recognized, too.

    CSV and TSV files are read as `read_records` reads them, so that text stays text: `datasets` would use pandas, which
    guesses types. A .json file may hold a list, or an object per line.

    No code is run and nothing is downloaded. No file outside the folder is read. Links are followed within the folder,
    and from a snapshot in the Hugging Face cache to the blobs of the same repository.

    Args:
        path: The folder.
        config: A configuration in the folder's card; by default its only or its default one.

    Raises:
        InputError: if the folder is not in this layout, has no such configuration, or names or links files outside it;
            without the package datasets.
    """
    require_extra("data", "folders of datasets", "datasets")
    _check_cards(path)
    saved = _saved_splits(path)
    splits, readers = (saved, {}) if saved else _resolve(path, config)
    _check_links(path, [str(file) for files in splits.values() for file in files])
    return Folder(splits, readers)


def _resolve(path: Path, config: str | None) -> tuple[dict[str, list[Path]], Readers]:
    import datasets

    try:
        chosen: Any = datasets.load_dataset_builder(str(path), name=config).config
    except Exception as err:  # `datasets` raises a dozen unrelated types for a folder that it cannot read
        if names := _config_names(path, config):
            actual = f"no config {config!r}" if config else "several configs, and none is named"
            raise InputError(f"{path}: {actual}; there are {', '.join(names)}: write NAME:CONFIG") from None
        raise InputError(f"{path}: expected a folder in the layout of a dataset: {first_line(err)}") from None
    splits = {str(name): [Path(file) for file in files] for name, files in (chosen.data_files or {}).items()}
    if not any(splits.values()):
        raise InputError(f"{path}: expected a folder in the layout of a dataset: it holds no data files")
    return splits, _readers(path, chosen)


def check_one_format(path: Path, folder: Folder) -> None:
    """Raises InputError if tables of another format lie beside the files of a folder, whose card does not say which of
    them are meant: the library datasets would read those of one format and say nothing.
    """
    if any((path / card).is_file() for card in CARDS):
        return
    chosen = [file for files in folder.splits.values() for file in files]
    formats = {file_format(file) for file in chosen}
    for sibling in sorted({sibling for file in chosen for sibling in file.parent.iterdir()}):
        if file_format(sibling) in TABLES and file_format(sibling) not in formats:
            raise InputError(
                f"{path}: {sibling.name} has another format than {chosen[0].name}, and a folder is read in one: give a "
                f"pattern, such as '{path}/*', or move it"
            )


def _config_names(path: Path, config: str | None) -> list[str]:
    """The folder's configurations, if there is a choice of which `config` is none."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(str(path))
    except Exception:  # the folder cannot be read at all
        return []
    return names if (config is None and len(names) > 1) or (config is not None and config not in names) else []


SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""What `save_to_disk` writes beside the Arrow files of a dataset, and beside the folders of several splits."""


def _saved_splits(path: Path) -> dict[str, list[Path]]:
    """The Arrow files of a folder that `save_to_disk` has written; empty for any other folder."""
    if (path / SAVED_SPLITS).is_file():
        names = _saved_json(path / SAVED_SPLITS, "splits")
        return {name: _saved_splits(path / name).get("train", []) for name in names}
    if not (path / SAVED).is_file() or not (path / "dataset_info.json").is_file():
        return {}
    return {"train": [path / name for name in _saved_json(path / SAVED, "_data_files")]}


def _saved_json(path: Path, name: str) -> list[str]:
    """A list of file names, which are texts or objects with a `filename`."""
    try:
        with read_errors(path):
            entries = json.loads(path.read_bytes())[name]
        names = [entry if isinstance(entry, str) else entry["filename"] for entry in entries]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f"{path}: expected {name!r} as the library datasets writes it: save the folder again"
        ) from None
    if any(not isinstance(each, str) or ".." in Path(each).parts or Path(each).is_absolute() for each in names):
        raise InputError(f"{path}: it names data outside the folder: expected files in the folder")
    return names


# ------------------------------------------------------------------------------------------------------- a card's words


def _readers(path: Path, config: Any) -> Readers:
    """The readers of a folder's files, with the separator or the field that its card sets."""
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig

    if isinstance(config, CsvConfig):
        return _csv_readers(path, config)
    if isinstance(config, JsonConfig) and config.field is not None:
        return {".json": functools.partial(read_json, field=config.field)}
    return {".json": read_json_or_lines}


def _csv_readers(path: Path, config: "CsvConfig") -> Readers:
    """The readers of a folder's tables, with the separator that its card sets."""
    from datasets import BuilderConfig

    default = type(config)()
    common = {field.name for field in dataclasses.fields(BuilderConfig)}
    options = [field.name for field in dataclasses.fields(config) if field.name not in common]
    changed = [name for name in options if getattr(config, name) != getattr(default, name)]
    if unknown := [name for name in changed if name not in CSV_OPTIONS]:
        raise InputError(
            f"{path}: its {CARDS[0]} sets {', '.join(unknown)} for its tables: expected `sep` alone; write the tables "
            "so that they need no more"
        )
    if config.sep == ",":
        return {}
    if config.sep == "\t":
        return {".csv": read_tsv}
    if len(config.sep) != 1:
        raise InputError(f"{path}: its {CARDS[0]} sets the separator {config.sep!r}: expected one character")
    read = functools.partial(read_csv, delimiter=config.sep)
    return {".csv": read, ".tsv": read}


# ---------------------------------------------------------------------------------------------- no file outside is read


def _check_links(path: Path, files: Sequence[str]) -> None:
    """Raises InputError if a file is a link, or in a linked folder, that leads out of `path`."""
    root = path.resolve()
    allowed = [root, *_cache_blobs(root)]
    for file in files:
        target = Path(file).resolve()
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise InputError(
                f"{file}: a link to a file outside the folder, {target}: put the file itself into the folder, or give "
                "the file as the source"
            )


def _cache_blobs(root: Path) -> list[Path]:
    """The folder of blobs to which a snapshot in the Hugging Face cache links:
    datasets--me--name/snapshots/COMMIT/data/train.csv -> datasets--me--name/blobs/HASH.
    """
    snapshots = next((folder.parent for folder in (root, *root.parents) if folder.parent.name == "snapshots"), None)
    if snapshots is None or "--" not in snapshots.parent.name:
        return []
    return [snapshots.parent / "blobs"]


def _check_cards(path: Path) -> None:
    """Raises InputError if a folder's metadata name a URL or a file outside the folder as its data."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    for name in CARDS:
        card = path / name
        if not card.is_file():
            continue
        _check_links(path, [str(card)])
        with read_errors(card):
            try:
                metadata = metadata_load(card) if name.endswith(".md") else yaml.safe_load(card.read_bytes())
            except (yaml.YAMLError, ValueError) as err:
                raise InputError(f"{card}: its YAML cannot be read: {first_line(err)}: fix it") from None
        for text in _data_files(metadata):
            parts = text.replace("\\", "/").split("/")
            if ":" in text or ".." in parts or parts[0] in ("", "~"):
                raise InputError(
                    f"{card}: it names data outside the folder, {short_repr(text)}: expected files in the folder; "
                    "remove that entry, or give the file as the source"
                )


def _data_files(metadata: Any, is_data: bool = False) -> Iterator[str]:
    """All texts under `data_files` and `data_dir` in a dataset's metadata, at any depth."""
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            yield from _data_files(value, is_data or name in ("data_files", "data_dir"))
    elif isinstance(metadata, list):
        for value in metadata:
            yield from _data_files(value, is_data)
    elif is_data and isinstance(metadata, str):
        yield metadata
