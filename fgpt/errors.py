"""The one error a user can mend."""


class InputError(ValueError):
    """Bad input. The message is one line: what was expected, what came, and how to mend it.

    Command lines print it alone and exit with a non-zero code; any other exception is a defect of ours and keeps its
    traceback.
    """
