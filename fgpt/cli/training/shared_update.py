"""An update whose micro-batches several processes share, and what must be the same for all of them."""

import hashlib
import json
from pathlib import Path

import fgpt
from fgpt.cli.environment import environment
from fgpt.cli.training.build import adapts_fused_qkv
from fgpt.cli.training.job import TrainingJob, training_options
from fgpt.cli.training.private import is_private
from fgpt.errors import InputError
from fgpt.recipes import SUPERVISED, AnyRecipe, FineTuningRecipe, GRPORecipe


def check_shared_update(recipe: AnyRecipe, num_processes: int) -> None:
    """Raises InputError unless each process gets equally many micro-batches of an update.

    Lots of a private training and rollouts have any number of them: some processes may then have none.
    """
    if num_processes == 1:
        return
    if isinstance(recipe, FineTuningRecipe) and recipe.cuda_graphs:
        raise InputError(
            "--cuda-graphs records the step of one process, and torchrun has started several: leave it out"
        )
    if recipe.micro_batch_size == "auto":
        raise InputError(
            f"--micro-batch-size auto measures the memory of one process, and torchrun has started {num_processes}: "
            "give a number of rows"
        )
    if isinstance(recipe, FineTuningRecipe) and recipe.shard_base:
        _check_sharded(recipe)
    if isinstance(recipe, GRPORecipe) or is_private(recipe):
        return
    micro_batches, rows = recipe.grad_accumulation_steps, int(recipe.micro_batch_size)
    if micro_batches % num_processes:
        raise InputError(
            f"--grad-accumulation-steps is {micro_batches}, and {num_processes} processes share these micro-batches of "
            f"an update: expected a multiple of {num_processes}; " + _division(micro_batches * rows, num_processes)
        )


def _check_sharded(recipe: FineTuningRecipe) -> None:
    """Raises InputError for a training in which processes would multiply with the base another number of times, whose
    optimizer needs whole matrices where they are trained in parts, or that maps over rows at its end.
    """
    if type(recipe) not in SUPERVISED:
        raise InputError("--shard-base is of instruction tuning and classification: leave it out")
    if recipe.adapter.kind == "full" and recipe.optimizer in ("muon", "adamw8bit"):
        raise InputError(
            f"--shard-base puts what --adapter.kind full trains in parts, and --optimizer {recipe.optimizer} is of "
            "whole matrices and blocks: give --optimizer adamw, or leave --shard-base out"
        )
    for option, is_set in (
        ("--compile", recipe.compile),
        ("--privacy.epsilon", recipe.privacy.epsilon is not None),
        ("--per-example", recipe.per_example),
        ("--adapter.target of a fused qkv", adapts_fused_qkv(recipe)),
    ):
        if is_set:
            raise InputError(f"--shard-base and {option} do not go together: leave one of them out")


def _division(rows: int, num_processes: int) -> str:
    """How the rows of an update are shared."""
    if rows % num_processes == 0:
        return (
            f"the same update of {rows} rows is --micro-batch-size {rows // num_processes} --grad-accumulation-steps "
            f"{num_processes}"
        )
    return f"{rows} rows are no multiple either, so it will be another update"


def describe_inputs(job: TrainingJob, run: Path | None) -> dict[str, str]:
    """What must be the same for all processes of a training: code, versions, options, data, and the run."""
    options = {
        name: f"{value:.12g}" if isinstance(value, float) else str(value)
        for name, value in json.loads(training_options(job.recipe)).items()
    }
    hashes = {name: value for name, value in job.fingerprint.items() if name != "options"}
    return {**describe_program(), **options, **hashes, "run": str(run)}


def describe_program() -> dict[str, str]:
    """The code and the versions of this process, by their names."""
    here = environment()
    versions = {name: str(version) for name, version in here["packages"].items()}
    return {"code": _code_hash(), "python": here["python"], **versions}


def _code_hash() -> str:
    """Of all source files of the package."""
    package = Path(fgpt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()
