"""One training step on either side: forward, backward, clipping at 1.0 and AdamW, of a LoRA on GPT-2's c_attn."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fgpt.adapter_lora import LoRA, lora
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.families import GPT2
from fgpt.families.mapping import to_hf
from fgpt.kernels.gemv import dense_linear
from fgpt.kernels.onednn_linear import input_grad
from fgpt.losses import Batch, nll
from fgpt.model import GPT, Config, fuse_qkv, fused_qkv, init
from fgpt.optim import adamw
from fgpt.rng import key
from fgpt.train_step import State, init_state, make_step
from fgpt.tree import astype, nbytes, tree_map
from fgpt.weights import dense

LR, RANK, ALPHA, CLIP = 1e-4, 8, 16.0, 1.0

Inputs: TypeAlias = dict[str, Tensor]


def shape(cfg: Config) -> str:
    return f"a GPT-2 of {cfg.n_layer} layers, {cfg.d_model} wide, vocabulary {cfg.vocab_size:,}"


def base_of(cfg: Config, device: torch.device, dtype: torch.dtype) -> GPT:
    """Random weights, q, k and v fused."""
    return tree_map(lambda x: x.to(device), astype(fuse_qkv(init(cfg, key(0))), dtype))


def equal_rows(rows: int, seq: int, vocab: int) -> list[Example]:
    """`rows` of `seq` random tokens, of which half are prompt."""
    tokens = torch.randint(vocab, (rows, seq), generator=key(2)).tolist()
    return [Example.completion(tuple(row), seq // 2) for row in tokens]


def adapters_of(base: GPT) -> Adapters:
    """The same adapter for both sides: rank 8, alpha 16, on the fused q, k, v of `base`."""
    return lora(base, key(1), RANK, ALPHA, r"blocks\..*\.qkv")


def fgpt_step(
    base: GPT, tuned: Adapters | None = None, compile: bool = False, remat: bool = False
) -> Callable[[Batch], float]:
    """fgpt: a step that takes a batch and returns its mean loss. `base` is fused, unless `tuned` is given."""
    optimizer = adamw(LR)
    step = make_step(
        lambda tuned, frozen, batch, _: nll(adapt(frozen, tuned), batch, remat),
        optimizer,
        max_norm=CLIP,
        compile=compile,
    )
    state: State = init_state(adapters_of(base) if tuned is None else tuned, optimizer)

    def run(batch: Batch) -> float:
        nonlocal state
        state, metrics = step(state, base, [batch], None)
        return metrics.loss.item()

    return run


def hub_model(cfg: Config, base: GPT | None = None, nf4: bool = False) -> Any:
    """transformers' GPT-2, with the weights of `base` if given. Attention is sdpa, dropout is 0, and no
    key-value cache is kept. `nf4` loads `base` in 4 bits, scales quantized too, through bitsandbytes, and makes it
    ready for training as peft does, without gradient checkpointing.

    Raises InputError if they are not installed.
    """
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing kernel that is not used here
        import peft
        import transformers
    except ImportError as err:
        raise InputError(f"{err.name} is not installed, and the benchmark compares with it: just setup-dev") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    values: dict[str, Any] = {**GPT2.config_to_hf(cfg), "attn_implementation": "sdpa", "use_cache": False}
    config = transformers.GPT2Config(**values, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if base is None or not nf4:
        model: Any = transformers.GPT2LMHeadModel(config)
        if base is not None:
            model.load_state_dict(to_hf(base, GPT2), strict=False)  # the tied head has no tensor of its own
        return model
    bits: Any = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    state: Any = to_hf(base, GPT2)
    load: Any = transformers.GPT2LMHeadModel.from_pretrained
    with warnings.catch_warnings(action="ignore"):
        model = load(None, config=config, state_dict=state, quantization_config=bits, dtype=torch.float32)
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def hub_bytes(model: Any) -> tuple[int, int]:
    """Bytes held by the matrices that bitsandbytes quantized, scales and codes included, and by the whole model."""
    states = {id(p): getattr(p, "quant_state", None) for p in model.parameters()}
    quantized = {
        str(i): [p.data, *(x for s in (state, state.state2) for x in (s.absmax, s.code, s.offset) if x is not None)]
        for i, p in enumerate(model.parameters())
        if (state := states[id(p)]) is not None
    }
    rest = [p.data for p in model.parameters() if states[id(p)] is None]
    return nbytes(quantized), nbytes([quantized, rest])


def peft_step(
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    tuned: Adapters | None = None,
    rank: int = RANK,
    modules: str | Sequence[str] = ("c_attn",),
    dora: bool = False,
) -> Callable[[Inputs], float]:
    """transformers + peft with AdamW: the same step, on a `hub_model`; `tuned` are the adapters of `fgpt_step`, whose A
    are copied to c_attn.
    """
    import peft

    quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=modules if isinstance(modules, str) else list(modules),
        fan_in_fan_out=not quantized,
        use_dora=dora,
    )
    with warnings.catch_warnings(action="ignore"):  # the two libraries' deprecations of each other
        model = peft.get_peft_model(model if quantized else model.to(device, dtype), settings).train()
    for path, adapter in (tuned or {}).items():
        assert isinstance(adapter, LoRA)
        block = model.base_model.model.transformer.h[int(path.split(".")[1])]
        block.attn.c_attn.lora_A["default"].weight.data.copy_(adapter.a)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.0)

    def run(inputs: Inputs) -> float:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def fgpt_batch(rows: Sequence[Sequence[Example]], device: torch.device) -> Batch:
    """Rows of one or more examples; loss on the answers, and logits only there."""
    return tree_map(lambda x: x.to(device), collate(rows))


def peft_batch(examples: Sequence[Example], device: torch.device, pad_to: int | None = None) -> Inputs:
    """What transformers' collators make: an example a row, padded on the right to the longest or to `pad_to`, label
    -100 on padding and, as in `fgpt_batch`, on the prompt. Without padding there is no attention mask, which is faster.
    """
    seq = max(len(e.tokens) for e in examples) if pad_to is None else pad_to
    tokens = [[*e.tokens, *[0] * (seq - len(e.tokens))] for e in examples]
    labels = [
        [*[-100] * e.prompt_length, *e.tokens[e.prompt_length :], *[-100] * (seq - len(e.tokens))] for e in examples
    ]
    mask = [[*[1] * len(e.tokens), *[0] * (seq - len(e.tokens))] for e in examples]
    inputs = {"input_ids": tokens, "labels": labels}
    if any(0 in row for row in mask):
        inputs["attention_mask"] = mask
    return {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}


def products(base: GPT, batch: Batch) -> Callable[[], None]:
    """The matrix products of our step and nothing else, by the same kernels, on operands of the same shapes.

    Forward: every linear, the adapter's two, attention's two, the head at positions with a loss; of the last block o
    and the MLP there alone. Backward: the gradient of each frozen product's input (the first block's qkv needs none),
    of the adapter's four, of attention's four. Attention is counted as causal: half of the square.
    """
    cfg, (rows, seq) = base.cfg, batch.tokens.shape
    table = dense(base.wte.w)
    n, m, d = rows * seq, int((batch.weights != 0).sum()), cfg.d_model
    operands: dict[tuple[int, ...], Tensor] = {}

    def operand(*size: int) -> Tensor:
        if size not in operands:
            operands[size] = torch.randn(size, dtype=table.dtype, device=table.device)
        return operands[size]

    calls: list[Callable[[], Tensor]] = []
    for i, p in enumerate(base.blocks):
        for linear in (fused_qkv(p.attn), p.attn.o, p.mlp.up, p.mlp.down):
            frozen, is_qkv = dense(linear.w), linear is fused_qkv(p.attn)
            out, inp = frozen.shape
            positions = m if i == cfg.n_layer - 1 and not is_qkv else n
            calls.append(partial(dense_linear, operand(positions, inp), frozen))
            if i or not is_qkv:
                calls.append(partial(input_grad, operand(positions, out), frozen))
        a, b, x, low, dy = operand(RANK, d), operand(3 * d, RANK), operand(n, d), operand(n, RANK), operand(n, 3 * d)
        bh, half, dh = rows * cfg.n_head, seq // 2, d // cfg.n_head
        q, k, s = operand(bh, half, dh), operand(bh, seq, dh), operand(bh, half, seq)
        pairs = [(x, a.T), (low, b.T), (dy, b), (dy.T, low), (low.T, x), *([(low, a)] if i else [])]
        pairs += [(q, k.mT), (s, k), (q, k.mT), (s.mT, q), (s, k), (s.mT, q)]
        calls += [partial(torch.matmul, *pair) for pair in pairs]
    calls += [partial(dense_linear, operand(m, d), table), partial(input_grad, operand(m, cfg.vocab_size), table)]

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run
