"""One line for an exception that is no defect of ours; a defect keeps its traceback."""

import errno

from fgpt.errors import InputError, one_line

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""What a system says where nothing more can be written."""


def explain(err: Exception) -> str | None:
    """What happened and what helps; None for a defect."""
    if isinstance(err, InputError):
        return str(err) if str(err).isprintable() else one_line(err)
    if isinstance(err, OSError):
        return _of_system(err)
    if isinstance(err, UnicodeEncodeError):
        return f"{err.object[err.start : err.end]!a} is not a character of UTF-8: expected text that is"
    if isinstance(err, UnicodeDecodeError):
        return f"byte {err.start} of {err.object[:20]!r} .. is not UTF-8: save the file as such"
    if _out_of_memory(err):
        return (
            f"not enough memory ({one_line(err) or 'the system gave none'}): take a smaller model or shorter texts; in "
            "training lower --micro-batch-size or --max-seq-len, or hold the base in 4 bits by --quantize nf4"
        )
    return None


def _of_system(err: OSError) -> str:
    what = one_line(err.strerror or err) or type(err).__name__
    where = f"{err.filename}: " if err.filename is not None else ""
    if err.errno in DISK_FULL:
        return f"{where or 'writing: '}{what}; free space or choose another folder"
    if err.errno == errno.EACCES:
        return f"{where}{what}; choose another place, or change its permissions"
    return f"{where}{what}"


def _out_of_memory(err: Exception) -> bool:
    named = isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError"
    return named or (isinstance(err, RuntimeError) and "can't allocate memory" in str(err))
