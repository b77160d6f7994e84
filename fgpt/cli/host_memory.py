"""The memory of this process, on each system."""

import sys


def peak() -> int:
    """The most bytes that it has had; 0 on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
