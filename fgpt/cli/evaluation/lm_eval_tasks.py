"""lm-eval's tasks for `fgpt eval tasks`: find them by name, run them on a model, print a table."""

import difflib
import io
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.table import Table

from fgpt.cli.console import console, result_console
from fgpt.distributed import world
from fgpt.errors import InputError, one_line
from fgpt.model import GPT
from fgpt.tokenizers.tokenizer_files import Tokenizer


class Tasks(NamedTuple):
    """Existing tasks, before anything is loaded or downloaded."""

    names: list[str]
    manager: Any
    """lm-eval's index of tasks."""


def find(names: str, include_path: Path | None = None) -> Tasks:
    """The tasks of a list such as "hellaswag,arc_*": those of `include_path`, and lm-eval's own.

    Raises InputError if lm-eval is not installed or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager  # here, because it is an extra, and takes seconds to import
    except ModuleNotFoundError as err:
        raise InputError(
            f"tasks need lm-eval ({err}): pip install 'fgpt[eval]', or in a clone just setup-eval"
        ) from None
    patterns = [name.strip() for name in names.split(",") if name.strip()]
    if not patterns:
        raise InputError("no tasks: expected names such as hellaswag,arc_easy")
    if include_path is not None:
        if not include_path.is_dir():
            raise InputError(f"{include_path}: no such folder; --include-path is a folder of lm-eval's YAML files")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(manager.match_tasks([name]) for name in patterns):  # the index of lm-eval's own takes ten seconds
            return Tasks(manager.match_tasks(patterns), manager)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in patterns:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no task {name!r}; {hint}`lm_eval ls tasks` lists them, --include-path FOLDER adds yours")
    return Tasks(manager.match_tasks(patterns), manager)


def run(
    tasks: Tasks,
    params: GPT,
    tokenizer: Tokenizer,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Scores of a model, printed as a table and returned with the settings they depend on.

    Raises InputError if a task's data cannot be loaded, and as `fgpt.cli.evaluation.lm_eval_model` does.
    """
    import lm_eval

    from fgpt.cli.evaluation.lm_eval_model import Model

    model = Model(params, tokenizer, batch_size, world=world())
    evaluate = cast(Any, lm_eval.simple_evaluate)  # it is loaded lazily
    try:
        with redirect_stderr(io.StringIO()) if console.quiet else nullcontext():  # bars and logs, once
            output = evaluate(
                model=model,
                tasks=[*tasks.names],
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=chat,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as err:
        names = ", ".join(tasks.names)
        raise InputError(f"the data of {names}: {one_line(err)}; connect once, or take a local task") from None
    show(output["results"])
    if model.truncated.requests:
        console.print(
            f"{model.truncated.requests:,} prompts did not fit the context of {model.max_length} tokens and lost "
            f"{model.truncated.tokens:,} tokens at the beginning"
        )
    scores = {key: output[key] for key in ("results", "versions", "n-shot", "n-samples") if key in output}
    settings = {"limit": limit, "chat": chat, "lm_eval": version("lm-eval")}
    return scores | settings | {"truncated": model.truncated._asdict()}


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print lm-eval's results as a table: its metrics, and their standard errors if it has them."""
    table = Table("task", "metric", "score", "±", title="lm-eval", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for task, scores in results.items():
        for metric, x in scores.items():
            name, _, kind = metric.partition(",")
            if kind and not name.endswith("_stderr") and isinstance(x, int | float):
                error = scores.get(f"{name}_stderr,{kind}")
                table.add_row(task, name, f"{x:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    result_console.print(table)
