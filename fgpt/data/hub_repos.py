"""Any dataset repository on the hub: which of its files a configuration and a split need, and downloading those alone.

A repository's files are resolved by the same rules as those of a local folder (`dataset_folders.read_folder`), in a
folder of empty files with their names and the repository's own card. No code of a repository is run.
"""

import glob
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fgpt.data import hub_files
from fgpt.data.dataset_folders import CARDS, Folder, read_folder
from fgpt.data.hub_datasets import hub_error, missing_parts
from fgpt.data.hub_files import HubError, Repo
from fgpt.errors import InputError, short_repr

Choose = Callable[[Mapping[str, list[Path]]], Sequence[str]]
"""Picks the names of the splits to read, of those that there are; raises InputError for one that is not there."""


class _Listing(NamedTuple):
    """The names of a repository's files at a commit, and the folder of those that the cache holds."""

    folder: Path
    files: list[str]
    is_complete: bool = True
    """The names are those of all files, not only of those in the cache."""


def download_splits(name: str, choose: Choose, *, config: str | None = None, revision: str | None = None) -> Folder:
    """The chosen splits of a repository, from the cache if all of their files are there, else downloaded.

    Args:
        name: owner/name.
        choose: Picks the splits.
        config: A configuration; by default the only or the default one.
        revision: A branch, a tag or a commit; by default main.

    Raises:
        InputError: if the hub has no such dataset, configuration, split or revision, refuses it, or cannot be reached.
    """
    repo = Repo(name, "dataset", list(CARDS), revision)
    listing = _list_files(repo)
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary).resolve() / PurePosixPath(name).name
        _write_skeleton(skeleton, listing, name)
        try:
            folder = read_folder(skeleton, config)
        except InputError as err:
            raise _explain(name, listing, skeleton, err) from None
        chosen = choose(folder.splits)
        names = {split: [file.relative_to(skeleton).as_posix() for file in folder.splits[split]] for split in chosen}
    needed = sorted({file for files in names.values() for file in files})
    if not listing.is_complete and (missing := missing_parts(needed, "*")):
        raise InputError(f"the hub cannot be reached, and the local cache of {name} lacks {missing[0]}: connect once")
    root = _download(repo, listing, needed)
    return Folder({split: [root / file for file in files] for split, files in names.items()}, folder.readers)


def check_repo(name: str, revision: str | None = None) -> None:
    """Raises InputError if the hub has no such dataset or revision, refuses it, or cannot be reached."""
    repo = Repo(name, "dataset", list(CARDS), revision)
    try:
        hub_files.fetch(repo)
    except HubError as err:
        raise hub_error(repo, name, err) from None


def _list_files(repo: Repo) -> _Listing:
    """The files of a repository by the cache's own record of them, else as the hub lists them."""
    cached = hub_files.find_cached(repo)
    files = hub_files.cached_names(repo)
    if cached.folder is not None and files is not None and not cached.partial:
        return _Listing(cached.folder, files)
    try:
        fetched = hub_files.fetch(repo)
    except HubError as err:
        if cached.folder is None or err.status is not None:
            raise hub_error(repo, repo.name, err) from None
        local = [path.relative_to(cached.folder).as_posix() for path in cached.folder.rglob("*") if path.is_file()]
        return _Listing(cached.folder, local, is_complete=False)
    return _Listing(fetched.folder, fetched.files)


def _download(repo: Repo, listing: _Listing, files: Sequence[str]) -> Path:
    """The folder of a snapshot that holds `files`."""
    if all((listing.folder / file).exists() for file in files):
        return listing.folder
    part = repo._replace(patterns=[glob.escape(file) for file in files], revision=listing.folder.name)
    try:
        folder = hub_files.fetch(part).folder
    except HubError as err:
        present = sum((listing.folder / file).exists() for file in files)
        cached = f" beyond the part in the local cache, {present} of {len(files)} files" if present else ""
        raise hub_error(repo, repo.name, err, cached) from None
    if missing := [file for file in files if not (folder / file).exists()]:
        raise InputError(f"the hub's {repo.name} lacks {missing[0]}: give a file instead")
    return folder


def _write_skeleton(skeleton: Path, listing: _Listing, name: str) -> None:
    """Empty files with the names of a repository's, apart from its programs, and its cards."""
    skeleton.mkdir()
    for file in listing.files:
        parts = PurePosixPath(file).parts
        if PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
            raise InputError(f"the hub's {name} names a file {short_repr(file)}: expected paths within it")
        if file.endswith(".py"):  # beside a program `datasets` looks for no data
            continue
        path = skeleton / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file in CARDS and (listing.folder / file).is_file():
            shutil.copyfile(listing.folder / file, path)
        else:
            path.touch()


def _explain(name: str, listing: _Listing, skeleton: Path, err: InputError) -> InputError:
    """The error of a skeleton, as one of the repository."""
    message = str(err).replace(str(skeleton), name)
    script = f"{PurePosixPath(name).name}.py"
    if script in listing.files and "data files" in message:
        return InputError(
            f"{name}: its data come from a program, {script}, and no program of a dataset is run: try "
            f"{name}@refs/convert/parquet, or give a file instead"
        )
    return InputError(message)
