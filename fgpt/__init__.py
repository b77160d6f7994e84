"""GPT fine-tuning as pure functions: a model is a function of a params tree, an adapter a transform of that tree."""

from fgpt.adapter_stacking import stack, unstack
from fgpt.adapters import IA3, Adapters, DoRA, LoRA, adapt, dora, functional_call, ia3, lora, merge, trainable, tune
from fgpt.checks import Finding, check
from fgpt.classification_head import classifier
from fgpt.errors import InputError
from fgpt.evaluation.output_difference import Shift, shift
from fgpt.generation.beam import beam_search, lookup
from fgpt.generation.loop import Generated, generate, stream
from fgpt.generation.sampling import Sampling
from fgpt.io.models import load, save, tokenizer
from fgpt.io.peft.adapter_files import load_peft, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.lift import lift
from fgpt.losses import Batch, loss, nll
from fgpt.model import GPT, Cache, Config, apply, extend, fuse, head, hidden, init, logits
from fgpt.optim import AdamState, Optimizer, adamw, adamw8bit
from fgpt.quantization import quantize
from fgpt.rng import fold_in, key, seed
from fgpt.train_step import Metrics, State, make_step, start
from fgpt.weights import Adapted, dense, embed, linear

__all__ = [
    "GPT",
    "IA3",
    "AdamState",
    "Adapted",
    "Adapters",
    "Batch",
    "Cache",
    "Config",
    "DoRA",
    "Finding",
    "Generated",
    "InputError",
    "LoRA",
    "Metrics",
    "Optimizer",
    "Sampling",
    "Shift",
    "State",
    "adamw",
    "adamw8bit",
    "adapt",
    "apply",
    "beam_search",
    "check",
    "classifier",
    "dense",
    "dora",
    "embed",
    "extend",
    "fold_in",
    "functional_call",
    "fuse",
    "generate",
    "head",
    "hidden",
    "ia3",
    "init",
    "key",
    "lift",
    "linear",
    "load",
    "load_adapters",
    "load_peft",
    "logits",
    "lookup",
    "lora",
    "loss",
    "make_step",
    "merge",
    "nll",
    "quantize",
    "save",
    "save_adapters",
    "save_peft",
    "seed",
    "shift",
    "stack",
    "start",
    "stream",
    "tokenizer",
    "trainable",
    "tune",
    "unstack",
]
