"""Local folders in the layout of Hugging Face datasets. Only files in the folder are read, and tables as text."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.data.records import Readers, Record, first_line, read_records
from fgpt.data.tables import read_csv, read_tsv
from fgpt.data.text_files import read_errors
from fgpt.errors import InputError, short_repr
from fgpt.extras import require_extra

if TYPE_CHECKING:
    from datasets.packaged_modules.csv.csv import CsvConfig

CARDS = ("README.md", ".huggingface.yaml")
"""Files of a folder whose metadata say which files hold its data."""

CSV_OPTIONS = ("sep", "delimiter", "features", "keep_default_na", "na_filter", "engine", "chunksize", "memory_map")
"""Options of a folder's CSV files that are obeyed (`sep`, `delimiter`), or have no effect on a table read as text."""


def folder_records(path: Path, split: str = "train") -> Iterator[Record]:
    """The records of one split of a folder. A folder with a single split gives that one for "train".

    CSV and TSV files are read as `read_records` reads them, so that text stays text: `datasets` would use pandas, which
    guesses types. Other formats are read by `datasets`.

    Nothing is downloaded, and no file outside the folder is read. Links are followed within the folder, and from a
    snapshot in the Hugging Face cache to the blobs of the same repository.

    Raises:
        InputError: if the folder is not in this layout, has no such split, or names or links files outside it; without
            the package datasets.
    """
    require_extra("data", "folders of datasets", "datasets")
    import datasets

    _check_cards(path)
    try:
        config: Any = datasets.load_dataset_builder(str(path)).config
        _check_links(path, [file for files in config.data_files.values() for file in files])
        if _is_csv(config):
            files = {str(name): [Path(file) for file in files] for name, files in config.data_files.items()}
            yield from _table_records(_choose_split(path, files, split), _csv_readers(path, config))
            return
        splits: Any = datasets.load_dataset(str(path))
    except InputError:
        raise
    except Exception as err:  # `datasets` raises a dozen unrelated types for a folder that it cannot read
        raise InputError(f"{path}: expected a folder in the layout of a dataset: {first_line(err)}") from None
    chosen = _choose_split(path, splits, split)
    yield from ((f"row {number}", record) for number, record in enumerate(chosen, 1))


def _choose_split(path: Path, splits: Any, split: str) -> Any:
    names = list(splits)
    if split in names:
        return splits[split]
    if len(names) == 1 and split == "train":
        return splits[names[0]]
    raise InputError(f"{path}: no split {split!r}; there are {', '.join(names)}: give the file of one split instead")


# -------------------------------------------------------------------------------------------------------------- tables


def _is_csv(config: Any) -> bool:
    from datasets.packaged_modules.csv.csv import CsvConfig

    return isinstance(config, CsvConfig)


def _table_records(files: Sequence[Path], readers: Readers) -> Iterator[Record]:
    for file in files:
        for where, record in read_records(file, readers):
            yield f"{file.name}, {where}", record


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
