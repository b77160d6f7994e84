"""A folder as a repository on the Hugging Face Hub, in one commit: it has all files of the folder, or is not made.

The contents of large files are uploaded before. If something fails then, no commit names them, and the repository is as
it was; one that was made for them is empty.
"""

import os
from pathlib import Path

from fgpt.errors import InputError, one_line


def push_folder(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Push the files of a folder, and return the address of the repository.

    Args:
        folder: Without folders in it.
        repo: USER/NAME; it is made if it does not exist.
        private: Whether it is then private. Without, the owner's default holds, which is public for a user.
        message: Of the commit.

    Raises:
        InputError: if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # here, because importing it takes longer than importing fgpt

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        url = api.create_repo(repo, private=True if private else None, exist_ok=True)
        api.create_commit(repo, operations, commit_message=message)
    except Exception as err:  # of the library, of what it sends requests by, of the system
        raise _hub_error(repo, err) from None
    return str(url)


def _hub_error(repo: str, err: Exception) -> InputError:
    status = getattr(getattr(err, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(
            f"the hub refuses {repo} (HTTP {status}), and nothing was pushed: run `hf auth login` with a token that "
            "may write there"
        )
    if status is not None:
        return InputError(f"the hub does not take {repo} (HTTP {status}), and nothing was pushed: {_first_line(err)}")
    if type(err).__name__ == "OfflineModeIsEnabled":
        return InputError(f"HF_HUB_OFFLINE forbids requests to the hub: unset it to push {repo}")
    if isinstance(err, ValueError):  # a name that no repository has, a card that the hub does not accept
        return InputError(f"the hub does not take {repo}, and nothing was pushed: {_first_line(err)}")
    return InputError(f"the hub cannot be reached ({type(err).__name__}), and nothing was pushed")


def _first_line(err: Exception) -> str:
    return one_line(str(err).strip().split("\n")[0])[:200]
