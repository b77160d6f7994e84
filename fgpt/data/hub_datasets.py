"""Datasets on the Hugging Face Hub: which files hold their examples, and the records of these files."""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgpt.data import hub_files
from fgpt.data.hub_files import HubError, Repo
from fgpt.data.records import Record, read_records
from fgpt.errors import InputError

PART = re.compile(r"(?P<before>.*-)(?P<number>\d+)(?P<of>-of-(?P<total>\d+))(?P<after>.*)")
"""data/train-00003-of-00012.parquet, or with a hash after the total."""

MAX_PARTS = 10_000
"""Far more than any dataset here has."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset repository on the hub, and the pattern of the files in it that hold the examples."""

    repo: str
    files: str


def hub_records(name: str, dataset: HubDataset) -> Iterator[Record]:
    """The records of `hub_paths`. Raises InputError as it does."""
    return itertools.chain.from_iterable(read_records(path) for path in hub_paths(name, dataset))


def hub_paths(name: str, dataset: HubDataset) -> list[Path]:
    """The paths of a dataset's files, and of no other file that the cache may hold.

    Args:
        name: What the user calls the dataset, for error messages.
        dataset: Its repository and files.

    Raises:
        InputError: as `download` does, at once.
    """
    return sorted(download(name, dataset).glob(dataset.files))


def download(name: str, dataset: HubDataset) -> Path:
    """The local folder with the files of a dataset: from the cache if all of them are there, else downloaded.

    Raises:
        InputError: if the hub cannot be reached, refuses, or lacks a file.
    """
    repo = Repo(dataset.repo, "dataset", [dataset.files])
    cache = hub_files.find_cached(repo)
    files = [] if cache.folder is None else _matching_files(cache.folder, dataset.files)
    missing = missing_parts(files, dataset.files)
    if cache.folder is not None and files and not missing and not cache.partial:
        return cache.folder
    try:
        folder = hub_files.fetch(repo).folder
    except HubError as err:
        total = len(files) + len(missing)
        part = f" beyond the part in the local cache, {len(files)} of {total} files" if missing else ""
        raise hub_error(repo, name, err, part) from None
    files = _matching_files(folder, dataset.files)
    if not files:
        raise InputError(f"the hub's {dataset.repo} has no files that match {dataset.files}: give a file instead")
    if missing := missing_parts(files, dataset.files):
        raise InputError(f"the hub's {dataset.repo} lacks some of its parts, such as {missing[0]}: give a file instead")
    return folder


def hub_error(repo: Repo, name: str, err: HubError, part: str = "") -> InputError:
    """What the hub answers, as one line that says what to do.

    Args:
        repo: The repository.
        name: What the user calls it.
        err: The hub's answer.
        part: What the cache has of it, in words.
    """
    kinds = set(err.class_names)
    if "RepositoryNotFoundError" in kinds and "GatedRepoError" not in kinds:
        return InputError(
            f"the hub has no dataset {repo.name}, or it is private (HTTP {err.status}): check the name at "
            f"https://huggingface.co/datasets/{repo.name}; for a private one run `hf auth login`"
        )
    if "RevisionNotFoundError" in kinds:
        return InputError(f"the hub's {repo.name} has no revision {repo.revision!r}: expected a branch, tag or commit")
    if err.status in (401, 403):
        return InputError(
            f"the hub refuses {repo.name} (HTTP {err.status}): accept its terms at "
            f"https://huggingface.co/datasets/{repo.name} and run `hf auth login`, or give a file instead"
        )
    return InputError(
        f"the hub gave no {name!r}{part} ({err.class_names[0]}: {err.line}): connect and try again, give a file "
        "instead, or train the recipe `lora-nano`, which needs no hub"
    )


def _matching_files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.exists())


def missing_parts(files: Sequence[str], pattern: str) -> list[str]:
    """The files that match `pattern` and are missing, according to the numbers in the names of `files`.

    >>> missing_parts(["train-00000-of-00003.json", "train-00002-of-00003.json"], "train-*.json")
    ['train-00001-of-00003.json']
    """
    matches = [match for file in files if (match := PART.fullmatch(file))]
    present = {(match["before"], match["of"], int(match["number"])) for match in matches}
    missing: dict[tuple[str, str, int], str] = {}
    for match in matches:
        for number in range(min(int(match["total"]), MAX_PARTS)):
            key = (match["before"], match["of"], number)
            name = f"{match['before']}{number:0{len(match['number'])}}{match['of']}{match['after']}"
            if key not in present and fnmatch.fnmatchcase(name, pattern):
                missing.setdefault(key, name)
    return sorted(missing.values())
