"""Gradients, steps, texts and laws on the device, against the same on this machine's CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from experiments.bench.gpu.measure import CPU, DEVICE, on, packed_batch, relative_error
from experiments.bench.gpu.report import Report
from fgpt.losses import Batch, nll
from fgpt.optim import cosine_schedule
from fgpt.train_step import value_and_grad_once
from fgpt.tree import astype, leaves, tree_map

LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
ADAPTERS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "LoRA": lambda p: fgpt.lora(p, fgpt.key(1), 4, 8, LINEARS),
    "LoRA with dropout": lambda p: fgpt.lora(p, fgpt.key(1), 4, 8, LINEARS, dropout=0.1),
    "DoRA": lambda p: fgpt.dora(p, fgpt.key(1), 4, 8, LINEARS),
    "IA3": fgpt.ia3,
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "full": lambda p: fgpt.trainable_leaves(p, ".*"),
    "LoRA and the tied table": lambda p: fgpt.lora(p, fgpt.key(1), 4, 8, f"{LINEARS}|wte"),
}
TOLERANCE = {"bf16": 4e-2, "int8": 3e-2}
"""Of a gradient, relative; 1e-4 for other bases."""


def parity(report: Report, tiny: bool) -> None:
    cfg = fgpt.Config(2, 4, 256, 128, 211 if tiny else 50257, 512)
    base = fgpt.init(cfg, fgpt.key(0))
    bases = {"fp32": base, "bf16": astype(base, torch.bfloat16)}
    for format in ("nf4", "int8", "blockwise8"):
        bases[format] = fgpt.quantize(base, format)
    wrong = [x for name in bases for x in wrong_gradients(name, bases[name])]
    report.add("parity", "gradients that differ from the CPU's, or fail", wrong or "none")
    transforms(report, base)
    steps(report, base)
    embedding_gradients(report, bases["bf16"])
    report.add("parity", "a bf16 gradient three times: equal bits", is_deterministic(bases["bf16"]))
    if tiny or report.seconds_left > 300:
        texts_and_laws(report)


def nudge(tree: Any) -> Any:
    """`tree` with noise, so that no leaf is zero."""
    rng = torch.Generator().manual_seed(5)
    return tree_map(lambda x: x + 0.05 * torch.randn(x.shape, generator=rng), tree)


def wrong_gradients(name: str, base: fgpt.GPT) -> list[str]:
    """Each adapter over one base, with and without activation checkpointing."""
    wrong: list[str] = []
    batch = packed_batch(2, 96, base.cfg.vocab_size, 3)
    for kind, make in ADAPTERS.items():
        if kind == "full" and name not in ("fp32", "bf16"):
            continue
        adapters, seed = nudge(make(base)), fgpt.seed_tensor(fgpt.key(3)) if "dropout" in kind else None
        for remat in (False, True):

            def loss(a: Any, p: Any, b: Batch, s: Any, remat: bool = remat) -> tuple[Tensor, Tensor]:
                return nll(fgpt.adapt(p, a, rng=s), b, remat)

            case = f"{kind} over {name}{', remat' if remat else ''}"
            try:
                expected, _ = value_and_grad_once(loss, adapters, base, batch, seed)
                gradient, _ = value_and_grad_once(loss, on(adapters), on(base), on(batch), seed)
            except Exception as err:  # a section reports what fails, and goes on
                wrong.append(f"{case}: {type(err).__name__}: {str(err).splitlines()[0][:120]}")
                continue
            error = relative_error(gradient, expected)
            if not error < TOLERANCE.get(name, 1e-4):
                wrong.append(f"{case}: {error:.1e}")
    return wrong


def mean_loss(remat: bool = False) -> Callable[[Any, Any, Batch], Tensor]:
    return lambda a, p, b: nll(fgpt.adapt(p, a), b, remat)[0]


def gradient_of(a: Any, p: Any, b: Batch, remat: bool = False) -> Any:
    return grad(mean_loss(remat))(a, p, b)


def per_example(a: Any, p: Any, b: Batch, remat: bool = False) -> Any:
    return vmap(grad(mean_loss(remat)), in_dims=(None, None, 0))(a, p, b)


def hessian_vector(a: Any, p: Any, b: Batch) -> Any:
    return jvp(lambda x: gradient_of(x, p, b), (a,), (a,))[1]


def one_document(vocab_size: int) -> Batch:
    batch = packed_batch(2, 64, vocab_size, 1)
    return Batch(batch.tokens, batch.targets, batch.weights)


def transforms(report: Report, base: fgpt.GPT) -> None:
    adapters, batch = nudge(ADAPTERS["LoRA"](base)), one_document(base.cfg.vocab_size)
    calls: dict[str, Callable[..., Any]] = {
        "grad": gradient_of,
        "grad, remat": partial(gradient_of, remat=True),
        "vmap(grad)": per_example,
        "vmap(grad), remat": partial(per_example, remat=True),
        "jvp(grad)": hessian_vector,
    }
    for what, call in calls.items():
        error = relative_error(call(on(adapters), on(base), on(batch)), call(adapters, base, batch))
        report.add("parity", f"{what}, relative error", f"{error:.1e}")


def steps(report: Report, base: fgpt.GPT) -> None:
    adapters, batch = nudge(ADAPTERS["LoRA"](base)), one_document(base.cfg.vocab_size)
    schedule = cosine_schedule(1e-3, 10, warmup_steps=2)
    for optimizer_name, make in {"adamw": fgpt.adamw, "adamw8bit": partial(fgpt.adamw8bit, min_8bit_size=64)}.items():
        trained: dict[str, Any] = {}
        for device in (CPU, DEVICE):
            optimizer = make(schedule, weight_decay=0.01)
            step = fgpt.make_step(lambda a, p, b, s: nll(fgpt.adapt(p, a), b), optimizer)
            state = fgpt.init_state(on(adapters, device), optimizer)
            for _ in range(3):
                state, _ = step(state, on(base, device), [on(batch, device)], None)
            trained[device.type] = state.trainable
        error = relative_error(trained[DEVICE.type], trained["cpu"])
        report.add("parity", f"three steps of {optimizer_name}, relative error", f"{error:.1e}")


def embedding_gradients(report: Report, base: fgpt.GPT) -> None:
    """Of a token that occurs everywhere, over a table in bf16: the sum is of thousands of terms."""
    for count in (2048, 4096):
        tokens = torch.zeros(count, dtype=torch.long, device=DEVICE)
        cotangent = torch.randn(count, base.cfg.d_model, device=DEVICE, dtype=torch.bfloat16)
        table = on(fgpt.dense(base.wte.w)).requires_grad_()
        (gradient,) = torch.autograd.grad(fgpt.embed(tokens, table), table, cotangent)
        error = relative_error(gradient[0], cotangent.double().sum(0))
        report.add("parity", f"gradient of a token in {count} places, bf16 table, relative error", f"{error:.1e}")


def is_deterministic(base: fgpt.GPT) -> bool:
    adapters, batch = on(ADAPTERS["LoRA"](base)), on(packed_batch(4, 128, base.cfg.vocab_size))
    gradients = [
        leaves(value_and_grad_once(lambda a, p, b: nll(fgpt.adapt(p, a), b), adapters, on(base), batch)[0])
        for _ in range(3)
    ]
    return all(torch.equal(x, gradients[0][path]) for other in gradients[1:] for path, x in other.items())


def texts_and_laws(report: Report) -> None:
    nano, encode = fgpt.load("nano"), fgpt.tokenizer("nano").encode
    prompts = [encode("Once upon a time"), encode("The dog was")]
    texts = [
        [output.tokens for output in fgpt.generate(on(nano, device), prompts, eos_token_id=-1, max_new_tokens=32)]
        for device in (CPU, DEVICE)
    ]
    report.add("parity", "greedy texts of nano are the CPU's", texts[0] == texts[1])
    for dtype in (torch.float32, torch.bfloat16):
        params = on(astype(nano, dtype))
        results = fgpt.run_checks(
            params, fgpt.lora(params, fgpt.key(0), 4), packed_batch(3, 64, nano.cfg.vocab_size, 2)
        )
        broken = [f"{x.check}: {x.note[:80]}" for x in results if x.holds is False]
        report.add("parity", f"laws of nano in {dtype} that do not hold", broken or "none")
