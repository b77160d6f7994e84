"""One line for errors that a user can fix; a defect of fgpt keeps its traceback."""

import errno
import re

from fgpt.errors import InputError, one_line

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors of a file system that cannot be written to."""


def explain(err: Exception) -> str | None:
    """What happened and how to fix it; None for a defect."""
    if isinstance(err, InputError):
        message = _with_option(err)
        return message if message.isprintable() else one_line(message)
    if isinstance(err, OSError):
        return _explain_os_error(err)
    if isinstance(err, UnicodeEncodeError):
        return f"{err.object[err.start : err.end]!a} is not a character of UTF-8: expected text that is"
    if isinstance(err, UnicodeDecodeError):
        return f"byte {err.start} of {err.object[:20]!r} .. is not UTF-8: save the file as UTF-8"
    if _is_out_of_memory(err):
        return (
            f"not enough memory ({one_line(err) or 'allocation failed'}): use a smaller model or shorter texts; in "
            "training lower --max-seq-len or --micro-batch-size, or quantize the base with --quantize nf4"
        )
    return None


def _with_option(err: InputError) -> str:
    """The message, with the field that it names in backticks as a command-line option, and the options that a remedy
    of the library has here.
    """
    message = str(err)
    for remedy, options in OPTIONS_OF.items():
        message = message.replace(remedy, options)
    if err.field is None:
        return message
    return re.sub(rf"`({re.escape(err.field)}[\w.]*)`", lambda name: "--" + name[1].replace("_", "-"), message)


OPTIONS_OF = {
    "shorten it, raise the limit, or drop long rows": "shorten it, raise --max-seq-len, or give --overlong drop or cut",
}
"""Remedies as the library says them, and as the command line does."""


def _explain_os_error(err: OSError) -> str:
    reason = one_line(err.strerror or err) or type(err).__name__
    prefix = f"{err.filename}: " if err.filename is not None else ""
    if err.errno in DISK_FULL:
        return f"{prefix or 'writing: '}{reason}; free space or choose another folder"
    if err.errno == errno.EACCES:
        return f"{prefix}{reason}; choose another place, or change its permissions"
    return f"{prefix}{reason}"


def _is_out_of_memory(err: Exception) -> bool:
    by_type = isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError"
    return by_type or (isinstance(err, RuntimeError) and "can't allocate memory" in str(err))
