"""The matrix of adapters, bases and transforms: each cell against plain autograd."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jvp, linearize, vmap
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

import fgpt
from builders import stack_trees, tiny, tokens, with_noise
from builders.quantized import signs
from fgpt.kernels import attention, mapped_linear, quantized_linear
from fgpt.kernels.dropout import dropout_mask
from fgpt.kernels.quantized_linear import QUANTIZED, Rotated, RowwiseInt8
from fgpt.layers import weight_matrices
from fgpt.rng import fold_in_seed
from fgpt.tree import astype, leaves, tree_map

Loss: TypeAlias = Callable[..., Tensor]


"""(adapters, batch, seed) -> nats per weighted token, less those of a uniform guess: so what adapters add shows."""


Mistake: TypeAlias = Literal["", "norm not detached", "bias not scaled", "not rounded", "nothing dropped", "untied"]
LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
NEVER_QUANTIZED = r"(wte|wpe)\.w|.*ln_.*|.*\.b"
FROM_PISSA = "LoRA from PiSSA"


"""Over what PiSSA leaves of the base, in any format."""


KINDS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "LoRA": lambda p: fgpt.lora(p, fgpt.key(0), 2, 3, LINEARS),
    "rsLoRA": lambda p: fgpt.lora(p, fgpt.key(0), 2, 3, LINEARS, rs=True),
    "DoRA": lambda p: fgpt.dora(p, fgpt.key(0), 2, 3, LINEARS),
    "IA3": fgpt.ia3,
    "LayerNorm": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "biases": lambda p: fgpt.trainable_leaves(p, r".*\.b"),
    "full": lambda p: fgpt.trainable_leaves(p, NEVER_QUANTIZED if holding(p, QUANTIZED) else ".*"),
    "LoRA and LayerNorm": lambda p: fgpt.lora(p, fgpt.key(0), 2, 3, LINEARS) | fgpt.trainable_leaves(p, r".*ln_.*"),
    "LoRA on q, v, tied wte": lambda p: fgpt.lora(p, fgpt.key(0), 2, 3, r"wte|blocks\.\d+\.attn\.(q|v)"),
    "LoRA with dropout": lambda p: fgpt.lora(p, fgpt.key(0), 2, 3, LINEARS, dropout=0.25),
    "LoRA, tokens of tied wte": lambda p: (
        fgpt.lora(p, fgpt.key(0), 2, 3, LINEARS) | fgpt.trainable_tokens(p, (3, 30, 7))
    ),
    FROM_PISSA: lambda p: fgpt.pissa(plain_params(len(p.blocks)), 2, 3, LINEARS)[1],
}
BF16_TOO = "int8, derivatives in bf16"


"""As on a CPU that multiplies bf16; "int8" is as on one that does not. Either runs on both."""


GPTQ = "nf4 by GPTQ"
CALIBRATION = fgpt.Batch(tokens(31, 8, 20), tokens(31, 8, 20), torch.ones(8, 20))
BASES: dict[str, Callable[[fgpt.GPT], fgpt.GPT]] = {
    "fp32": lambda p: p,
    "bf16": lambda p: astype(p, torch.bfloat16),
    "nf4": lambda p: fgpt.quantize(p, "nf4", double_quant=True),
    GPTQ: lambda p: fgpt.quantize_gptq(p, [CALIBRATION], "nf4"),
    "int8": lambda p: fgpt.quantize(p, "int8"),
    BF16_TOO: lambda p: fgpt.quantize(p, "int8"),
    "rotated int8": lambda p: fgpt.quantize(p, "int8", rotate=True),
    "blockwise8": lambda p: fgpt.quantize(p, "blockwise8"),
}
TOLERANCE = {
    "fp32": 1e-5,  # the largest error seen is 2e-6
    "bf16": 3e-2,  # numbers of 8 bits, so 4e-3 at each rounding, and some twenty roundings on a path: 2e-2 seen
    "nf4": 1e-5,
    GPTQ: 1e-5,
    "int8": 5e-3,  # 2e-6, but where x lies at a tie the two sides may round it apart, by 1/127 of its row: 2.5e-3 seen
    "rotated int8": 1.5e-2,  # as int8, with more elements at ties: 2e-6, and up to 6e-3 in one cell of three
    BF16_TOO: 1.5e-2,  # bf16's 4e-3 at each product of a path backward: 8e-3 seen
    "blockwise8": 1e-5,
}


"""The norm of a leaf's error beside the leaf's, or beside 3 % of the tree's where that is more."""


def holding(params: fgpt.GPT, kinds: Any) -> list[str]:
    """The paths of the layers whose weight is of such a kind."""
    return [path for path, w in weight_matrices(params).items() if isinstance(w, kinds)]


def plain_params(n_layer: int) -> fgpt.GPT:
    """Smaller numbers than `tiny` has: its steep softmaxes would blow bf16's rounding up."""
    return tree_map(lambda x: 0.6 * x, tiny(n_layer=n_layer, d_model=64, d_mlp=128))


def base_params(name: str, n_layer: int, kind: str = "LoRA") -> fgpt.GPT:
    """What adapters of a kind lie on."""
    plain = plain_params(n_layer)
    return BASES[name](fgpt.pissa(plain, 2, 3, LINEARS)[0] if kind == FROM_PISSA else plain)


ROWS = fgpt.Batch(tokens(31, 3, 20), tokens(31, 3, 20, seed=1), torch.rand(3, 20, generator=fgpt.key(0)))
SEED = fgpt.seed_tensor(fgpt.key(7))
SEEDS = torch.stack([SEED, SEED + 1, SEED + 2])  # one for each example, or for each of an ensemble of adapters


def row(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i], tree)


def dot(a: Any, b: Any) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]).sum()


def unit(tree: Any) -> Any:
    size = dot(tree, tree).sqrt()
    return tree_map(lambda x: x / size, tree)


def short(tree: Any) -> Any:
    return tree_map(lambda x: x.bfloat16().float(), tree)


class Point:
    """An ensemble of adapters away from where they begin, and two directions at the first of them.

    All are numbers that bf16 holds, so that its cells begin where the reference does. One direction leans on the
    gradient: a slope that is a small difference of large terms would have no digits to compare.
    """

    def __init__(self, kind: str, frozen: fgpt.GPT, reference: Loss | None = None):
        fresh = KINDS[kind](frozen)
        self.many = [short(with_noise(fresh, 0.08, seed)) for seed in range(3)]
        self.at, *others = self.many
        _, slope, _ = derivatives(reference or reference_over(frozen), self.at, ROWS, SEED)
        v, self.w = (short(unit(tree_map(torch.sub, x, self.at))) for x in others)
        self.v = short(tree_map(torch.add, v, unit(slope)))


def loss_over(frozen: fgpt.GPT, remat: bool = False) -> Loss:
    def loss(adapters: Any, batch: fgpt.Batch, seed: Tensor) -> Tensor:
        return fgpt.loss(fgpt.adapt(frozen, adapters, rng=seed), batch, remat=remat) - math.log(frozen.cfg.vocab_size)

    return loss


def whole(f: Loss) -> Callable[[Any], Tensor]:
    return lambda a: f(a, ROWS, SEED)


def slope(f: Callable[[Any], Tensor], v: Any) -> Callable[[Any], Tensor]:
    return lambda a: jvp(f, (a,), (v,))[1]


def plane(f: Callable[[Any], Tensor], p: Point) -> Callable[[Tensor], Tensor]:
    """The loss at p.at + t_0 v + t_1 w, as a function of t."""
    return lambda t: f(tree_map(lambda x, v, w: x + t[0] * v + t[1] * w, p.at, p.v, p.w))


def compile_eagerly(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


def each_example(f: Loss) -> Callable[[Any], Tensor]:
    """The losses of all examples, by vmap."""
    return lambda a: vmap(f, EXAMPLES)(a, ROWS, SEEDS)


def each_member(f: Loss) -> Callable[[Any], Tensor]:
    """The losses of all adapters of a stack, by vmap."""
    return lambda a: vmap(f, (0, None, 0))(a, ROWS, SEEDS)


def autograd(f: Callable[[Any], Tensor], at: Any, direction: Any = None) -> Any:
    """The gradient of f's sum by torch.autograd outside all transforms; with a direction, that of its product with it,
    through a backward that is recorded.
    """
    tree = tree_map(lambda x: x.detach().clone().requires_grad_(), at)
    inputs, structure = tree_leaves(tree), tree_structure(at)
    grads = list(torch.autograd.grad(f(tree).sum(), inputs, create_graph=direction is not None))
    if direction is not None:
        grads = list(torch.autograd.grad(dot(grads, direction), inputs))
    return tree_unflatten(grads, structure)


def by_dual_numbers(f: Callable[[Any], Tensor], p: Point) -> Tensor:
    """The slope along p.v, by dual numbers made by hand."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(tree_map(forward_ad.make_dual, p.at, p.v)).sum()).tangent
    assert tangent is not None
    return tangent


EXAMPLES = (None, 0, 0)
TRANSFORMS: dict[str, Callable[[fgpt.GPT, Point], Any]] = {
    "grad": lambda w, p: grad(whole(loss_over(w)))(p.at),
    "vmap over examples": lambda w, p: vmap(loss_over(w), EXAMPLES)(p.at, ROWS, SEEDS),
    "vmap over adapters": lambda w, p: vmap(grad_and_value(loss_over(w)), (0, None, 0))(
        stack_trees(p.many), ROWS, SEEDS
    ),
    "vmap over members": lambda w, p: vmap(grad_and_value(loss_over(w)))(stack_trees(p.many), ROWS, SEEDS),
    "vmap(grad)": lambda w, p: vmap(grad(loss_over(w)), EXAMPLES)(p.at, ROWS, SEEDS),
    "jvp": lambda w, p: slope(whole(loss_over(w)), p.v)(p.at),
    "jvp(jvp)": lambda w, p: slope(slope(whole(loss_over(w)), p.v), p.v)(p.at),
    "jvp(grad)": lambda w, p: jvp(grad(whole(loss_over(w))), (p.at,), (p.v,))[1],
    "grad(grad·v)": lambda w, p: grad(lambda a: dot(grad(whole(loss_over(w)))(a), p.v))(p.at),
    "hessian": lambda w, p: hessian(plane(whole(loss_over(w)), p))(torch.zeros(2)),
    "grad(vmap over examples)": lambda w, p: grad(lambda a: each_example(loss_over(w))(a).sum())(p.at),
    "grad(vmap over adapters)": lambda w, p: grad(lambda a: each_member(loss_over(w))(a).sum())(stack_trees(p.many)),
    "autograd(vmap)": lambda w, p: autograd(each_example(loss_over(w)), p.at),
    "autograd twice": lambda w, p: autograd(whole(loss_over(w)), p.at, p.v),
    "autograd(grad·v)": lambda w, p: autograd(lambda a: dot(grad(whole(loss_over(w)))(a), p.v), p.at),
    "forward AD": lambda w, p: by_dual_numbers(whole(loss_over(w)), p),
    "linearize": lambda w, p: linearize(whole(loss_over(w)), p.at)[1](p.v),
    "remat, autograd(vmap)": lambda w, p: autograd(each_example(loss_over(w, remat=True)), p.at),
    "remat, grad": lambda w, p: grad(whole(loss_over(w, remat=True)))(p.at),
    "remat, vmap(grad)": lambda w, p: vmap(grad(loss_over(w, remat=True)), EXAMPLES)(p.at, ROWS, SEEDS),
    "compile(grad)": lambda w, p: compile_eagerly(lambda a: grad(loss_over(w))(a, ROWS, SEED))(p.at),
    "compile(vmap(grad))": lambda w, p: compile_eagerly(lambda a: vmap(grad(loss_over(w)), EXAMPLES)(a, ROWS, SEEDS))(
        p.at
    ),
}


"""`hessian` is torch.func's, jacfwd of jacrev, in the plane of two directions."""


COMPILED = tuple(name for name in TRANSFORMS if name.startswith("compile"))
TRACED = ("linearize",)


"""What is eager and traces the function, which takes as long as all the others together."""


EAGER = tuple(name for name in TRANSFORMS if name not in COMPILED + TRACED)
IMPOSSIBLE: dict[tuple[str, str, str], tuple[type[Exception], str]] = {}


"""(kind, base, transform) -> the error that it raises, and what the error says. Nothing is impossible at present."""


def reference_over(frozen: fgpt.GPT, mistake: Mistake = "") -> Loss:
    """The loss over dense fp32 weights. A `mistake` is one on purpose, which the comparison must notice."""
    weights = {
        path: quantized_linear.reference(w) if isinstance(w, QUANTIZED) else w.float()  # pyright: ignore
        for path, w in weight_matrices(frozen).items()
    }
    others = {path: x.float() for path, x in leaves(frozen).items() if x.is_floating_point()}
    rounds = () if mistake == "not rounded" else holding(frozen, RowwiseInt8)
    rotates = holding(frozen, Rotated)

    def loss(adapters: Any, batch: fgpt.Batch, seed: Tensor) -> Tensor:
        def leaf(path: str) -> Tensor:
            return adapters.get(path, others[path])

        def parts(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """row, W, s·B·A and col."""
            w, x = adapters.get(f"{path}.w", weights[path]), adapters.get(path)
            row, ba, col = torch.ones(w.shape[0]), torch.zeros_like(w), torch.ones(w.shape[1])
            if isinstance(x, fgpt.TrainableTokens):
                w = w.index_copy(0, torch.tensor(x.ids), x.rows)
            if isinstance(x, fgpt.IA3):
                return row if x.row is None else x.row, w, ba, col if x.col is None else x.col
            if isinstance(x, fgpt.LoRA | fgpt.DoRA):
                v = x.lora if isinstance(x, fgpt.DoRA) else x
                ba = v.alpha / (len(v.a) ** 0.5 if v.rs else len(v.a)) * v.b @ v.a
            if isinstance(x, fgpt.DoRA):
                size = (w + ba).norm(dim=1)
                row = x.m / (size if mistake == "norm not detached" else size.detach())
            return row, w, ba, col

        def dense(path: str) -> Tensor:
            row, w, ba, col = parts(path)
            return row[:, None] * (w + ba) * col

        def layer(x: Tensor, path: str) -> Tensor:
            adapter, (row, w, ba, col) = adapters.get(path), parts(path)
            y = x @ dense(path).T
            if path in rounds:  # what rounding adds to the input of the frozen matrix is a constant
                y = y + (round_to_int8(x * col) - x * col).detach() @ (row[:, None] * w).T
            if path in rotates:
                y = y + (rotate(round_to_int8(rotate(x * col))) - x * col).detach() @ (row[:, None] * w).T
            if isinstance(adapter, fgpt.LoRA) and adapter.dropout and mistake != "nothing dropped":
                keep = dropout_mask(fold_in_seed(seed, f"0/{path}"), x[..., 0].numel(), x.shape[-1], adapter.dropout)
                y = y + (x * keep.view(x.shape) / (1 - adapter.dropout) - x) @ ba.T
            scaled = isinstance(adapter, fgpt.IA3) and mistake != "bias not scaled"
            return y + (row if scaled else 1) * leaf(f"{path}.b")

        def norm(x: Tensor, path: str) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.square().mean(-1, keepdim=True) + frozen.cfg.norm_eps).sqrt()
            return x * leaf(f"{path}.w") + leaf(f"{path}.b")

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (frozen.cfg.n_head, -1)).movedim(-2, -3)

        x = dense("wte")[batch.tokens] + dense("wpe")[: batch.tokens.shape[-1]]
        for i in range(frozen.cfg.n_layer):
            y = norm(x, f"blocks.{i}.ln_1")
            y = attention.reference(*(heads(layer(y, f"blocks.{i}.attn.{name}")) for name in "qkv"))
            x = x + layer(y.movedim(-3, -2).flatten(-2), f"blocks.{i}.attn.o")
            y = layer(norm(x, f"blocks.{i}.ln_2"), f"blocks.{i}.mlp.up")
            x = x + layer(F.gelu(y, approximate="tanh"), f"blocks.{i}.mlp.down")
        head = weights["wte"] if mistake == "untied" else dense("wte")
        log_p = (norm(x, "ln_f") @ head.T).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
        return -(batch.weights * log_p).sum() / batch.weights.sum() - math.log(frozen.cfg.vocab_size)

    return loss


def rotate(x: Tensor) -> Tensor:
    """By blocks of 64, as d_model and d_mlp are multiples of it."""
    return (x.unflatten(-1, (-1, 64)) @ (signs(64) / 8)).flatten(-2)


def round_to_int8(x: Tensor) -> Tensor:
    """Each row in integer multiples of its largest magnitude / 127."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def derivatives(f: Loss, at: Any, batch: fgpt.Batch, seed: Tensor, *directions: Any) -> tuple[Tensor, Any, list[Any]]:
    """The loss, its gradient, and its Hessian times each direction, by torch.autograd alone."""
    tree = tree_map(lambda x: x.detach().clone().requires_grad_(), at)
    inputs, structure = tree_leaves(tree), tree_structure(at)
    value = f(tree, batch, seed)
    first = tree_unflatten(list(torch.autograd.grad(value, inputs, create_graph=bool(directions))), structure)
    second = [torch.autograd.grad(dot(first, v), inputs, retain_graph=True) for v in directions]
    return value.detach(), tree_map(torch.detach, first), [tree_unflatten(list(x), structure) for x in second]


def reference_results(f: Loss, p: Point) -> dict[str, Any]:
    """What each transform is to give."""
    _, first, (hv, hw) = derivatives(f, p.at, ROWS, SEED, p.v, p.w)
    rows = [derivatives(f, p.at, row(ROWS, i), SEEDS[i]) for i in range(3)]
    many = [derivatives(f, a, ROWS, SEEDS[i]) for i, a in enumerate(p.many)]
    members = [derivatives(f, a, row(ROWS, i), SEEDS[i]) for i, a in enumerate(p.many)]  # each with its own examples
    each = stack_trees([x for _, x, _ in rows])
    return {
        "grad": first,
        "vmap over examples": torch.stack([x for x, _, _ in rows]),
        "vmap over adapters": (stack_trees([x for _, x, _ in many]), torch.stack([x for x, _, _ in many])),
        "vmap over members": (stack_trees([x for _, x, _ in members]), torch.stack([x for x, _, _ in members])),
        "vmap(grad)": each,
        "jvp": dot(first, p.v),
        "jvp(jvp)": dot(p.v, hv),
        "jvp(grad)": hv,
        "grad(grad·v)": hv,
        "hessian": torch.stack([dot(x, h) for x in (p.v, p.w) for h in (hv, hw)]).view(2, 2),
        "grad(vmap over examples)": tree_map(lambda x: x.sum(0), each),
        "grad(vmap over adapters)": stack_trees([x for _, x, _ in many]),
        "autograd(vmap)": tree_map(lambda x: x.sum(0), each),
        "autograd twice": hv,
        "autograd(grad·v)": hv,
        "forward AD": dot(first, p.v),
        "linearize": dot(first, p.v),
        "remat, autograd(vmap)": tree_map(lambda x: x.sum(0), each),
        "remat, grad": first,
        "remat, vmap(grad)": each,
        "compile(grad)": first,
        "compile(vmap(grad))": each,
    }


def error(got: Any, want: Any) -> float:
    """The largest error of a leaf, as TOLERANCE counts it; infinite where the trees differ in form."""
    x, y = leaves({"": got}), leaves({"": want})
    total = torch.stack([z.norm() for z in y.values()]).norm()
    assert total > 1e-3, "nothing to compare: what is expected is nearly zero"
    if x.keys() != y.keys() or any(x[path].shape != y[path].shape for path in y):
        return math.inf
    far = [(x[path] - y[path]).norm() / max(y[path].norm(), 0.03 * total) for path in y]
    return torch.stack(far).nan_to_num(math.inf).max().item()


def run_transform(name: str, on: str, frozen: fgpt.GPT, p: Point) -> Any:
    """These models are so small that only members and adapters take the products that vmap has of its own here."""
    least = 0 if name.endswith(("adapters", "members")) else mapped_linear.MIN_PRODUCTS
    with (
        mock.patch.object(quantized_linear, "HAS_BF16_MATMUL", on == BF16_TOO),
        mock.patch.object(mapped_linear, "MIN_PRODUCTS", least),
    ):
        return TRANSFORMS[name](frozen, p)


def wrong_cells(kind: str, on: str, names: Iterable[str], n_layer: int = 2) -> dict[str, str]:
    """The transforms of a cell that do not give what they are to give, and what they give instead."""
    frozen = base_params(on, n_layer, kind)
    p = Point(kind, frozen)
    want, found = reference_results(reference_over(frozen), p), {}
    for name in names:
        kind_of_error, says = IMPOSSIBLE.get((kind, on, name), ((), ""))
        try:
            far = error(run_transform(name, on, frozen, p), want[name])
        except Exception as err:
            if not (isinstance(err, kind_of_error) and says in str(err)):
                found[name] = repr(err)
        else:
            if says or far > TOLERANCE[on]:
                found[name] = f"off by {far:.1e}" if not says else "works, and is listed as impossible"
    return found


def table(passed: Mapping[tuple[str, str], int]) -> str:
    """Rows of kinds, columns of bases: how many transforms of how many give what they are to give."""
    notes = [f"{kind} on {on} under {name}: {why}" for (kind, on, name), (_, why) in IMPOSSIBLE.items()]
    lines = [["", *BASES], ["---", *("---:" for _ in BASES)]]
    lines += [[kind, *(f"{passed[kind, on]}/{len(TRANSFORMS)}" for on in BASES)] for kind in KINDS]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + [f"- {note}" for note in notes])


def possible(kind: str, on: str) -> set[str]:
    return {name for name in TRANSFORMS if (kind, on, name) not in IMPOSSIBLE}


def main() -> int:
    passed, all_wrong = {}, {}
    for kind in KINDS:
        for on in BASES:
            found = wrong_cells(kind, on, EAGER) | wrong_cells(kind, on, TRACED + COMPILED, n_layer=1)
            passed[kind, on] = len(possible(kind, on) - found.keys())
            all_wrong |= {(kind, on, name): why for name, why in found.items()}
            print(f"{kind}, {on}: {passed[kind, on]}/{len(TRANSFORMS)}", *found.items(), file=sys.stderr, flush=True)
    print(table(passed))
    return len(all_wrong)


if __name__ == "__main__":
    sys.exit(main())
