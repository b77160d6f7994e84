"""Log-probabilities under the reference policy, computed once for the same base and answers, and then read from the
user's cache folder; see `fgpt.cli.cache`.

    ~/.cache/fgpt/reference/KEY/logprobs.safetensors

KEY is a hash of the base, of the answers, and of what decides the last bits: the code, torch, the device and the number
of threads. So a training reads the same numbers with the cache and without.
"""

from pathlib import Path

import torch
import xxhash

import fgpt
from fgpt.cli.cache import cache_folder, lock, note_use, remove_unused
from fgpt.cli.console import console
from fgpt.cli.training.hashes import fast_hash, model_hash
from fgpt.cli.training.preference_batches import PreferenceExamples, Reference, reference_logprobs
from fgpt.data.examples import example_lengths
from fgpt.distributed import alone, gather_objects
from fgpt.errors import InputError
from fgpt.io.safetensors_files import read_metadata, read_tensors, write_tensors
from fgpt.layers import num_parameters
from fgpt.model import GPT
from fgpt.tree import device

REFERENCE, FILE = "reference", "logprobs.safetensors"
MIN_WORK = 1e11
"""Parameters times tokens from which on log-probabilities are kept: a second of two CPU cores."""


def cached_reference(base: GPT, examples: PreferenceExamples) -> Reference:
    """`reference_logprobs`, from the cache if they are there. Those that took a while are put there.

    Several processes share the work, and what one of them has in its cache. Those that do not compute the same, as
    their base, rows or machines differ, compute all of it, each by itself.
    """
    tokens = int(example_lengths(examples.chosen).sum() + example_lengths(examples.rejected).sum())
    key = cache_key(base, examples) if num_parameters(base) * tokens >= MIN_WORK else None
    if len(set(gather_objects(key))) > 1:
        with alone():
            return _shared_reference(base, examples, key)
    return _shared_reference(base, examples, key)


def _shared_reference(base: GPT, examples: PreferenceExamples, key: str | None) -> Reference:
    """`cached_reference` of processes that all have the same key; None is that of too little work to be kept."""
    if key is None:
        return reference_logprobs(base, examples)
    folder = cache_folder(REFERENCE) / key
    cached = [x for x in gather_objects(_read(folder, len(examples))) if x is not None]
    if cached:
        return cached[0]
    reference = reference_logprobs(base, examples)
    try:
        with lock(folder):
            tensors = {"chosen": reference.chosen, "rejected": reference.rejected}
            write_tensors(folder / FILE, tensors, {"hash": fast_hash([*tensors.values()])})
        remove_unused(REFERENCE)
    except (InputError, OSError) as err:
        console.print(f"the reference's log-probabilities are not cached: {err}", soft_wrap=True)
    return reference


def cache_key(base: GPT, examples: PreferenceExamples) -> str:
    """The hash of what the log-probabilities follow from, to the last bit."""
    target = device(base)
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    numerics = f"{torch.get_num_threads()} {torch.get_float32_matmul_precision()}"
    digest = xxhash.xxh3_128(f"{torch.__version__} {target.type} {name} {numerics}".encode())
    package = Path(fgpt.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}:".encode() + path.read_bytes())
    digest.update(fast_hash(model_hash(base), examples.chosen, examples.rejected).encode())
    return digest.hexdigest()


def _read(folder: Path, count: int) -> Reference | None:
    if not (folder / FILE).is_file():
        return None
    try:
        tensors = read_tensors(folder / FILE)
        reference = Reference(tensors["chosen"], tensors["rejected"])
        if read_metadata(folder / FILE)["hash"] != fast_hash([reference.chosen, reference.rejected]):
            raise InputError("it holds other numbers than were written")
    except (InputError, KeyError) as err:
        console.print(f"{folder / FILE} is damaged ({err}): computing it again", soft_wrap=True)
        return None
    note_use(folder)
    console.print(f"reference policy: log-probabilities of {count:,} rows from the cache")
    return reference
