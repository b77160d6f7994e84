"""GPT fine-tuning as pure functions: a model is a function of a params tree, an adapter a transform of that tree.

>>> import torch, fgpt
>>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
>>> params = fgpt.init(config, fgpt.key(0))
>>> adapters = fgpt.lora(params, fgpt.key(1), rank=2)
>>> logits = fgpt.functional_call(fgpt.apply, (params, adapters), torch.tensor([1, 2, 3]))
>>> logits.shape
torch.Size([3, 11])
"""

from fgpt.adapter_combining import combine, task_vector
from fgpt.adapter_dora import DoRA, dora
from fgpt.adapter_ia3 import IA3, ia3
from fgpt.adapter_initialization import eva, loftq, lora_ga, lora_xs, olora, pissa
from fgpt.adapter_lora import LoRA, lora
from fgpt.adapter_stacking import stack_adapters, unstack_adapters
from fgpt.adapter_trainable_tokens import TrainableTokens, trainable_tokens
from fgpt.adapter_types import Adapters
from fgpt.adapter_vera import VeRA, vera
from fgpt.adapters import adapt, functional_call, merge, num_trainable, trainable_leaves
from fgpt.checks import CheckResult, run_checks
from fgpt.classification_head import with_classification_head
from fgpt.distributed import World, world
from fgpt.embedding_noise import neftune
from fgpt.errors import InputError
from fgpt.evaluation.output_difference import OutputDifference, compare_outputs
from fgpt.generation.beam import beam_search, beam_search_batch
from fgpt.generation.loop import GenerationOutput, generate, stream
from fgpt.generation.prompt_lookup import prompt_lookup_decode
from fgpt.generation.sampling import SamplingParams
from fgpt.gptq import quantize_gptq
from fgpt.gradient_merging import GradientMerge, merge_by_gradient
from fgpt.io.gguf_adapter import save_gguf_adapter
from fgpt.io.gguf_writer import save_gguf
from fgpt.io.models import load, save, tokenizer
from fgpt.io.peft.adapter_files import load_peft, save_peft
from fgpt.io.serialization import load_adapters, save_adapters
from fgpt.kernels.sharded_parameter import ShardedParameter
from fgpt.lift import as_module, from_module
from fgpt.losses import Batch, loss, nll
from fgpt.model import (
    GPT,
    Config,
    KVCache,
    Tap,
    apply,
    final_norm,
    forward_with_cache,
    fuse_qkv,
    hidden,
    hidden_at,
    init,
    lm_head,
    logits,
    trace,
)
from fgpt.optim import AdamState, Optimizer, adamw, adamw8bit
from fgpt.optim_averages import with_ema, with_swa
from fgpt.optim_muon import muon
from fgpt.optim_schedule_free import schedule_free_adamw
from fgpt.optim_zero import zero_redundancy
from fgpt.quantization import quantize
from fgpt.range_test import LRRange, lr_range
from fgpt.rng import fold_in, key, seed_tensor
from fgpt.sharding import shard, tensor_parallel, unshard
from fgpt.sweeps import SweepResult, stack_batches, stack_states, sweep, sweep_step, unstack_states
from fgpt.train_step import Metrics, State, init_state, make_step
from fgpt.tree import register_with_optree
from fgpt.vocabulary import AddedTokens, add_tokens
from fgpt.weights import Adapted, dense, embed, linear

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "IA3",
    "AdamState",
    "Adapted",
    "Adapters",
    "AddedTokens",
    "Batch",
    "CheckResult",
    "Config",
    "DoRA",
    "GenerationOutput",
    "GradientMerge",
    "InputError",
    "KVCache",
    "LRRange",
    "LoRA",
    "Metrics",
    "Optimizer",
    "OutputDifference",
    "SamplingParams",
    "ShardedParameter",
    "State",
    "SweepResult",
    "Tap",
    "TrainableTokens",
    "VeRA",
    "World",
    "adamw",
    "adamw8bit",
    "adapt",
    "add_tokens",
    "apply",
    "as_module",
    "beam_search",
    "beam_search_batch",
    "combine",
    "compare_outputs",
    "dense",
    "dora",
    "embed",
    "eva",
    "final_norm",
    "fold_in",
    "forward_with_cache",
    "from_module",
    "functional_call",
    "fuse_qkv",
    "generate",
    "hidden",
    "hidden_at",
    "ia3",
    "init",
    "init_state",
    "key",
    "linear",
    "lm_head",
    "load",
    "load_adapters",
    "load_peft",
    "loftq",
    "logits",
    "lora",
    "lora_ga",
    "lora_xs",
    "loss",
    "lr_range",
    "make_step",
    "merge",
    "merge_by_gradient",
    "muon",
    "neftune",
    "nll",
    "num_trainable",
    "olora",
    "pissa",
    "prompt_lookup_decode",
    "quantize",
    "quantize_gptq",
    "register_with_optree",
    "run_checks",
    "save",
    "save_adapters",
    "save_gguf",
    "save_gguf_adapter",
    "save_peft",
    "schedule_free_adamw",
    "seed_tensor",
    "shard",
    "stack_adapters",
    "stack_batches",
    "stack_states",
    "stream",
    "sweep",
    "sweep_step",
    "task_vector",
    "tensor_parallel",
    "tokenizer",
    "trace",
    "trainable_leaves",
    "trainable_tokens",
    "unshard",
    "unstack_adapters",
    "unstack_states",
    "vera",
    "with_classification_head",
    "with_ema",
    "with_swa",
    "world",
    "zero_redundancy",
]
