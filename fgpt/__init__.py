"""GPT fine-tuning as pure functions: a model is a function of a params tree, an adapter a transform of that tree."""

from fgpt.adapter_stacking import stack_adapters, unstack_adapters
from fgpt.adapters import IA3, Adapters, DoRA, LoRA, adapt, dora, functional_call, ia3, lora, merge, num_trainable, trainable_leaves
from fgpt.checks import CheckResult, run_checks
from fgpt.classification_head import with_classification_head
from fgpt.errors import InputError
from fgpt.evaluation.output_difference import OutputDifference, compare_outputs
from fgpt.generation.beam import beam_search, prompt_lookup_decode
from fgpt.generation.loop import GenerationOutput, generate, stream
from fgpt.generation.sampling import SamplingParams
from fgpt.io.models import load, save, tokenizer
from fgpt.io.peft.adapter_files import load_peft, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.lift import from_module
from fgpt.losses import Batch, loss, nll
from fgpt.model import GPT, KVCache, Config, apply, forward_with_cache, fuse_qkv, lm_head, hidden, init, logits
from fgpt.optim import AdamState, Optimizer, adamw, adamw8bit
from fgpt.quantization import quantize
from fgpt.rng import fold_in, key, seed_tensor
from fgpt.train_step import Metrics, State, make_step, init_state
from fgpt.weights import Adapted, dense, embed, linear

__all__ = [
    "GPT",
    "IA3",
    "AdamState",
    "Adapted",
    "Adapters",
    "Batch",
    "KVCache",
    "Config",
    "DoRA",
    "CheckResult",
    "GenerationOutput",
    "InputError",
    "LoRA",
    "Metrics",
    "Optimizer",
    "SamplingParams",
    "OutputDifference",
    "State",
    "adamw",
    "adamw8bit",
    "adapt",
    "apply",
    "beam_search",
    "run_checks",
    "with_classification_head",
    "dense",
    "dora",
    "embed",
    "forward_with_cache",
    "fold_in",
    "functional_call",
    "fuse_qkv",
    "generate",
    "lm_head",
    "hidden",
    "ia3",
    "init",
    "key",
    "from_module",
    "linear",
    "load",
    "load_adapters",
    "load_peft",
    "logits",
    "prompt_lookup_decode",
    "lora",
    "loss",
    "make_step",
    "merge",
    "nll",
    "quantize",
    "save",
    "save_adapters",
    "save_peft",
    "seed_tensor",
    "compare_outputs",
    "stack_adapters",
    "init_state",
    "stream",
    "tokenizer",
    "num_trainable",
    "trainable_leaves",
    "unstack_adapters",
]
