"""Packages that only some of fgpt needs, and that `pip install 'fgpt[EXTRA]'` brings."""

from importlib.util import find_spec

from fgpt.errors import InputError


def require_extra(extra: str, what: str, *packages: str) -> None:
    """Say which extra to install if one of its packages is not there.

    Args:
        extra: as pyproject.toml names it.
        what: what needs the packages, in the plural.
        packages: the names that are imported.

    Raises InputError if a package is not installed.

    >>> import fgpt
    >>> try:
    ...     require_extra("gguf", "GGUF files", "a_package_of_nobody")
    ... except fgpt.InputError as err:
    ...     print(err)
    GGUF files need a_package_of_nobody: pip install 'fgpt[gguf]'
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InputError(f"{what} need {', '.join(missing)}: pip install 'fgpt[{extra}]'")
