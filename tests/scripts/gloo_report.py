"""What each script of several processes begins and ends with."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fgpt.distributed import gather_objects


@contextmanager
def gloo_report() -> Iterator[dict[str, Any]]:
    """A gloo group of one thread each, and a report to fill, which rank 0 prints as JSON at the end."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report: dict[str, Any] = {}
    yield report
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()
    assert "pt_gloo_runloop" not in thread_names(), "a thread of the group that lives on can abort the process"


def thread_names() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def worst_of_ranks(errors: dict[str, float]) -> dict[str, float]:
    """The largest of each error over the ranks, which all have the same ones."""
    gathered = gather_objects(dict(errors))
    return {name: max(there[name] for there in gathered) for name in errors}
