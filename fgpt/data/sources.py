"""Where data comes from: a file, a folder, or a dataset on the hub by its name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fgpt.data.dataset_folders import folder_records
from fgpt.data.hub_datasets import HubDataset, download, hub_records
from fgpt.data.records import Readers, Record, read_records
from fgpt.errors import InputError

D = TypeVar("D", bound=HubDataset)


def open_source(
    source: str, hub_datasets: Mapping[str, D], *, split: str = "train", extra_readers: Readers | None = None
) -> tuple[Iterator[Record], D | None]:
    """The records of a source, and the dataset if they come from the hub.

    Args:
        source: The path of a file or folder, or a name in `hub_datasets`. A path comes before a name.
        hub_datasets: Datasets by name.
        split: The split to read of a folder.
        extra_readers: Readers of file formats beyond those of `read_records`, by extension.

    Raises:
        InputError: if the source does not exist or cannot be read.
    """
    path = Path(source)
    if path.is_dir() and source:  # Path("") would be the current folder
        return folder_records(path, split), None
    if path.is_file():
        return read_records(path, extra_readers), None
    if source in hub_datasets:
        return hub_records(source, hub_datasets[source]), hub_datasets[source]
    names = ", ".join(hub_datasets)
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"{source}: no such file; expected a path or one of {names}")
    raise InputError(f"unknown source {source!r}: expected one of {names}, or the path of a file or folder")


def source_files(source: str, hub_datasets: Mapping[str, HubDataset]) -> list[Path] | None:
    """The files that the records of a source depend on, in an order of their own; None if that cannot be told.

    Raises:
        InputError: if the hub cannot be reached.
    """
    path = Path(source)
    if path.is_dir() and source:
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    if source in hub_datasets:
        dataset = hub_datasets[source]
        return sorted(download(source, dataset).glob(dataset.files))
    return None
