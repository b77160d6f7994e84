"""Where data comes from: files, folders, and datasets on the hub by their names."""

import difflib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from fgpt.data.dataset_folders import Folder, check_one_format, read_folder
from fgpt.data.hub_datasets import HubDataset, hub_paths
from fgpt.data.hub_repos import download_splits
from fgpt.data.hub_streams import stream_records
from fgpt.data.records import EXTENSIONS, Readers, Record, read_records
from fgpt.data.source_syntax import Source, exists, parse_source
from fgpt.data.splits import SplitPart, parse_split
from fgpt.data.text_files import OPENERS
from fgpt.errors import InputError

D = TypeVar("D", bound=HubDataset)

REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""The name of any dataset on the hub."""


class Part(NamedTuple):
    """Files, in their order, and which of their rows are meant."""

    files: tuple[Path, ...]
    rows: SplitPart


class Located(NamedTuple):
    """The files of a source on this machine."""

    parts: tuple[Part, ...]
    readers: Readers
    """How to read them, where that is not what their extensions say."""

    @property
    def files(self) -> list[Path]:
        """All files, in their order, each once."""
        return list(dict.fromkeys(file for part in self.parts for file in part.files))

    def records(self) -> Iterator[Record]:
        """The records, one by one."""
        for part in self.parts:
            yield from part.rows.select(lambda part=part: _read_files(part.files, self.readers))


def _read_files(files: Sequence[Path], readers: Readers) -> Iterator[Record]:
    for file in files:
        prefix = f"{file.name}, " if len(files) > 1 else ""
        for where, record in read_records(file, readers):
            yield prefix + where, record


def open_source(
    source: str | Source,
    hub_datasets: Mapping[str, D],
    *,
    split: str = "train",
    extra_readers: Readers | None = None,
) -> tuple[Iterator[Record], D | None]:
    """The records of a source, and the dataset if the source is one of `hub_datasets`.

    Args:
        source: A source, or its text.
        hub_datasets: Datasets known by name.
        split: The split to read where the source names none.
        extra_readers: Readers of file formats beyond those of `read_records`, by extension.

    Raises:
        InputError: if the source does not exist or cannot be read.
    """
    located, dataset = locate(source, hub_datasets, split=split, extra_readers=extra_readers)
    return located.records(), dataset


def open_stream(
    source: str | Source, hub_datasets: Mapping[str, D], *, split: str = "train"
) -> tuple[Iterator[Record], D | None]:
    """As `open_source`, but a dataset on the hub is read over the network as its records are asked for."""
    source = parse_source(source) if isinstance(source, str) else source
    if exists(source.name) or glob.has_magic(source.name):
        return open_source(source, hub_datasets, split=split)
    known = hub_datasets.get(source.name)
    if known is None and (not REPO.fullmatch(source.name) or _is_file_name(source.name, {})):
        raise _unknown(source, hub_datasets, {})
    parts = parse_split(source.split) if source.split else (SplitPart(),)
    repo, files = (known.repo, known.files) if known else (source.name, None)
    return stream_records(source, parts, repo=repo, split=split, files=files), known


def locate(
    source: str | Source,
    hub_datasets: Mapping[str, D],
    *,
    split: str = "train",
    extra_readers: Readers | None = None,
) -> tuple[Located, D | None]:
    """The files of a source, and the dataset if the source is one of `hub_datasets`. What the cache lacks of the hub's
    files is downloaded. See `open_source`.
    """
    source = parse_source(source) if isinstance(source, str) else source
    extra = dict(extra_readers or {})
    parts = parse_split(source.split) if source.split else (SplitPart(),)
    if files := _local_files(source, extra):
        _check_local(source, "config", "revision")
        return Located(_parts(source, {split: files}, parts, split, is_file=True), extra), None
    if exists(source.name):
        _check_local(source, "revision")
        folder = read_folder(Path(source.name), source.config)
        check_one_format(Path(source.name), folder)
        return Located(_parts(source, folder.splits, parts, split), {**folder.readers, **extra}), None
    known = hub_datasets.get(source.name)
    if known is not None and not source.config and not source.revision and {p.name for p in parts} <= {None, split}:
        files = {split: hub_paths(source.name, known)}
        return Located(_parts(source, files, parts, split), extra), known
    if known is None and (not REPO.fullmatch(source.name) or _is_file_name(source.name, extra)):
        raise _unknown(source, hub_datasets, extra)
    folder = _download(replace(source, name=known.repo if known else source.name), parts, split)
    return Located(_parts(source, folder.splits, parts, split), {**folder.readers, **extra}), known


def _download(source: Source, parts: Sequence[SplitPart], split: str) -> Folder:
    def choose(splits: Mapping[str, object]) -> list[str]:
        return list(dict.fromkeys(_split_name(source, splits, part, split) for part in parts))

    return download_splits(source.name, choose, config=source.config, revision=source.revision)


def _local_files(source: Source, extra: Readers) -> list[Path]:
    """The file of that name, or the files that a pattern matches; none for anything else."""
    if not source.name or "\0" in source.name:
        return []
    path = Path(source.name)
    if exists(source.name):
        return [path] if path.is_file() else []
    if not glob.has_magic(source.name):
        return []
    paths = sorted(Path(name) for name in glob.glob(source.name, recursive=True))
    if files := [each for each in paths if each.is_file()]:
        return files
    raise InputError(f"{source.name}: no file matches{_nearest_file(path)}; expected files for the pattern")


def _check_local(source: Source, *fields: str) -> None:
    for field in fields:
        if value := getattr(source, field):
            kind = "folder" if Path(source.name).is_dir() else "file"
            raise InputError(f"{source}: a {kind} on this machine has no {field} {value!r}: leave it out")


def _parts(
    source: Source,
    splits: Mapping[str, Sequence[Path]],
    parts: Sequence[SplitPart],
    split: str,
    *,
    is_file: bool = False,
) -> tuple[Part, ...]:
    if is_file and (other := [part.name for part in parts if part.name not in (None, "train", split)]):
        raise InputError(f"{source}: a file has no split {other[0]!r}: slice it without one, such as [:1000]")
    names = [split if is_file else _split_name(source, splits, part, split) for part in parts]
    return tuple(Part(tuple(splits[name]), part) for name, part in zip(names, parts, strict=True))


def _split_name(source: Source, splits: Mapping[str, object], part: SplitPart, default: str) -> str:
    """The split that a part is of. A source with a single split gives that one for "train"."""
    name, names = part.name or default, list(splits)
    if name in names:
        return name
    if part.name is None and len(names) == 1 and name == "train":
        return names[0]
    advice = "" if part.name else ": name one in brackets, or give the file of one split instead"
    raise InputError(f"{source.name}: no split {name!r}; there are {', '.join(names)}{advice or ': name one of them'}")


# --------------------------------------------------------------------------------------------------------------- errors


def _is_file_name(name: str, extra: Readers) -> bool:
    return Path(name).suffix.lower() in (*EXTENSIONS, *extra, *OPENERS)


def _unknown(source: Source, hub_datasets: Mapping[str, object], extra: Readers) -> InputError:
    path, names = Path(source.name), ", ".join(hub_datasets)
    if path.suffix or len(path.parts) > 1:
        hint = _nearest_file(path)
        expected = f"expected a path or one of {names}" if names else "expected a path"
        return InputError(f"{source.name}: no such file{hint}; {expected}")
    near = difflib.get_close_matches(source.name, hub_datasets, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InputError(
        f"unknown source {source.name!r}: expected one of {names}, or the path of a file or folder, or owner/name of "
        f"a dataset on the hub{hint}"
    )


def _nearest_file(path: Path) -> str:
    """The name nearest to a path's among those beside it, as the end of a message."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.name != path.name]  # a link that leads nowhere
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f" (the nearest is {path.parent / near[0]})" if near else ""
