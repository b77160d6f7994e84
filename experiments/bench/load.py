"""GPT-J-6B at its real shape, from random weights in a sharded file of the hub's layout: what loading it into 8 and 4
bits takes, and one step of LoRA on every matrix of it.

The step is that of an early 8-bit GPT-J: rank 2 on all linear layers, the embedding and the head, norms and biases too
(5,208,160 parameters), 8-bit Adam, 2 rows of 105 tokens, activations in bf16. Each format has a separate process.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.bench.baselines import equal_rows, fgpt_batch
from experiments.bench.timing import console, hardware, report, status
from fgpt.adapter_lora import lora
from fgpt.adapters import adapt, num_trainable, trainable_leaves
from fgpt.families import GPTJ
from fgpt.families.mapping import to_hf
from fgpt.io.files import write_json
from fgpt.io.models import CONFIG, WEIGHTS, load
from fgpt.io.safetensors_files import write_tensors
from fgpt.kernels.quantized_linear import Format
from fgpt.losses import nll
from fgpt.model import Config, abstract_params
from fgpt.optim import adamw8bit, constant_schedule
from fgpt.rng import fold_in, key
from fgpt.train_step import init_state, make_step
from fgpt.tree import leaves, nbytes, replace_at

CPU = torch.device("cpu")
SHAPE = Config(
    n_layer=28,
    n_head=16,
    d_model=4096,
    n_ctx=2048,
    vocab_size=50400,
    d_mlp=16384,
    tie_word_embeddings=False,
    parallel_residual=True,
    n_norms=1,
    biases=frozenset({"up", "down", "norm", "head"}),
    rotary_dim=64,
    interleaved=True,
)
TARGETS: dict[Format, float] = {"blockwise8": 9.0, "nf4": 6.0}
"""Peak memory in GB of a process that loads the model and takes the step."""


@dataclass(frozen=True)
class Load:
    """GPT-J-6B into 8 and 4 bits, and a LoRA step on it: seconds and memory."""

    layers: int = 28
    """Fewer for a quick look; the whole file takes 12 GB of disk while it runs."""
    folder: Path | None = None
    """Where to write the file; None takes the system's temporary folder."""
    out: Path = Path("runs/bench")


class LoadResult(NamedTuple):
    load: float
    model_bytes: int
    load_peak: int
    step: float
    step_peak: int
    loss: float
    trained: int


def loading(bench: Load) -> None:
    """Write the file, load it in every format, and write runs/bench/load.json and load.md. Raises InputError."""
    cfg = replace(SHAPE, n_layer=bench.layers)
    with tempfile.TemporaryDirectory(dir=bench.folder, prefix="gptj-") as name:
        folder = Path(name)
        start = time.perf_counter()
        size = write_model(cfg, folder)
        console.print(f"{size / 1e9:.1f} GB of shards in {time.perf_counter() - start:.0f} s")
        rows, trained = [], 0
        for to, target in TARGETS.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result = process.submit(measure_load, str(folder), to).result()
            trained, peak = result.trained, max(result.load_peak, result.step_peak) / 1e9
            gb = (f"{x / 1e9:.2f}" for x in (result.model_bytes, result.load_peak, result.step_peak))
            outcome = f"< {target:.0f} GB ({'met' if peak < target else 'missed'})"
            rows.append((to, f"{result.load:.0f}", *gb, f"{result.step:.0f}", f"{result.loss:.3f}", outcome))
            console.print(", ".join(rows[-1]))
    heads = ("base", "load (s)", "model (GB)", "peak, loading", "peak, with the step", "step (s)", "loss", "target")
    note = (
        f"{hardware(CPU)}; GPT-J's shape, {cfg.n_layer} layers, fp16 shards of a layer; {trained:,} parameters trained"
    )
    report("load", ("", ""), [], [note], bench.out, [(heads, rows)])


def write_model(cfg: Config, folder: Path) -> int:
    """A checkpoint in shards of a layer, all layers alike; returns its bytes."""
    one = replace(cfg, n_layer=1)
    bare = abstract_params(one)
    random = {
        path: (0.02 * torch.randn(x.shape, generator=fold_in(key(0), path))).half() + float(path.endswith("ln_1.w"))
        for path, x in leaves(bare).items()
    }
    tensors = to_hf(replace_at(bare, random), GPTJ)
    layer = {name: x for name, x in tensors.items() if ".h.0." in name}
    where: dict[str, str] = {}
    total = 0
    for i in range(-1, cfg.n_layer):
        rest = {name: x for name, x in tensors.items() if name not in layer}
        shard = {name.replace(".h.0.", f".h.{i}."): x for name, x in layer.items()} if i >= 0 else rest
        file = f"model-{i + 2:05}-of-{cfg.n_layer + 1:05}.safetensors"
        write_tensors(folder / file, shard)
        where |= dict.fromkeys(shard, file)
        total += (folder / file).stat().st_size
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder / CONFIG, GPTJ.config_to_hf(cfg) | {"torch_dtype": "float16"})
    return total


def measure_load(folder: str, to: Format) -> LoadResult:
    """Load and step in this process, which must be fresh, with the peak memory after either."""
    start = time.perf_counter()
    base = load(folder, torch.bfloat16, quantize=to)
    seconds, model_bytes, peak = time.perf_counter() - start, nbytes(base), status("VmHWM")
    adapters = lora(base, key(1), 2, target=r"wte|head|blocks\..*") | trainable_leaves(base, r".*ln_.*|.*\.b")
    batch = fgpt_batch([[row] for row in equal_rows(2, 105, base.cfg.vocab_size)], CPU)
    optimizer = adamw8bit(constant_schedule(1e-4))
    step: Any = make_step(lambda tuned, frozen, batch, seed: nll(adapt(frozen, tuned), batch), optimizer)
    start = time.perf_counter()
    _, metrics = step(init_state(adapters, optimizer), base, [batch], key(0))
    return LoadResult(
        seconds,
        model_bytes,
        peak,
        time.perf_counter() - start,
        status("VmHWM"),
        float(metrics.loss),
        num_trainable(adapters),
    )
