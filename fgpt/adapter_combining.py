"""Adapters combined by what they mean: the change that each makes in the weights, its task vector.

    τ_i = θ_i - θ                                         `task_vector`
    linear    τ = Σ w_i τ_i                               task arithmetic; with w_i = 1/n a soup
    ties      trimmed, one sign elected, then averaged
    dare      each τ_i thinned at random, then linear
    slerp     on the arc between two
    θ' = θ + τ                                            as leaves, or as LoRAs of a rank, by SVD

LoRAs of any ranks, rsLoRAs, DoRAs, IA3s and tuned leaves mix: only their meaning is read. Averages of A and of B, which
other libraries take, are not averages of B·A, and of a DoRA they mean nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.adapter_lora import LoRA
from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, own_head
from fgpt.errors import InputError, check_choice
from fgpt.kernels.quantized_linear import is_quantized
from fgpt.kernels.sharded_parameter import ShardedParameter
from fgpt.rng import fold_in, key
from fgpt.tree import children, get_at
from fgpt.weights import Adapted, dense, shape

TaskVector: TypeAlias = dict[str, Float[Tensor, "*shape"]]
"""What is added to each leaf, in fp32, by its path; the path of a layer's matrix ends in .w, quantized or not."""
Method: TypeAlias = Literal["linear", "ties", "dare", "slerp"]
Weights: TypeAlias = Sequence[float] | Float[Tensor, " n"] | Mapping[str, Float[Tensor, " n"]]
"""The weight of each set of adapters; or those at each path of adapters, by the path."""

DENSITY = 0.2
"""The share of a task vector that TIES keeps, as in the paper, and DARE likewise."""


def combine(
    params: Any,
    adapters: Sequence[Adapters],
    weights: Weights | None = None,
    *,
    method: Method = "linear",
    density: float = DENSITY,
    rank: int | None = None,
    rng: torch.Generator | None = None,
) -> Adapters:
    """Adapters that mean the combination of several sets of adapters over one base.

        linear    Σ w_i τ_i
        ties      at each element the mean of those w_i τ̂_i that have the sign of Σ w_i τ̂_i, with τ̂_i the `density`
                  of the elements of τ_i that are largest
        dare      Σ w_i m_i ⊙ τ_i / density, with m_i 1 at a random `density` of the elements, else 0
        slerp     (sin (1-t)Ω τ_1 + sin tΩ τ_2) / sin Ω at each path, with Ω the angle between both and t = w_2

    Linear combinations of LoRAs are LoRAs, whose rank is the sum of the ranks, and exact. Anything else is a leaf that
    replaces the base's; with a `rank`, every matrix is the nearest LoRA of that rank.

    Args:
        params: The base, quantized or not.
        adapters: One or more sets.
        weights: w, one for each set; 1/n by default, for ties 1, as it averages itself. For slerp two, whose sum is 1.
            With linear they may be a tensor, or tensors by the paths of adapters, and be differentiated.
        method: Which combination.
        density: For ties and dare, above 0 and up to 1.
        rank: The rank of the result's LoRAs; None keeps what is exact.
        rng: A key, for dare.

    Raises:
        InputError: for no adapters, for a method, weights or options that do not fit, and for a combination that is no
            LoRA over a quantized matrix, without a `rank`.

    Source: Ilharco et al. 2023 (task arithmetic); Wortsman et al. 2022 (soups); Yadav et al. 2023 (TIES), algorithm 1;
    Yu et al. 2024 (DARE), equation 2; Shoemake 1985 (slerp).

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params = fgpt.init(config, fgpt.key(0))
    >>> both = fgpt.combine(params, [fgpt.lora(params, fgpt.key(i), rank=i) for i in (2, 3)], [0.7, 0.3])
    >>> both["blocks.0.attn.q"].a.shape
    torch.Size([5, 8])
    """
    if not adapters:
        raise InputError("no adapters to combine: expected one or more")
    check_choice("method", method, Method)
    weights = _check_weights(weights, len(adapters), method)
    if not 0 < density <= 1:
        raise InputError(f"density is {density}: expected a share above 0, up to 1")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}: expected 1 or more")
    adapters = _with_heads(params, adapters)
    paths = list(dict.fromkeys(path for tree in adapters for path in tree))
    low_rank = _low_rank_paths(paths, adapters) if method == "linear" else []
    for tree in adapters:
        adapt(params, {path: tree[path] for path in low_rank if path in tree})  # an error if they do not fit
    result: Adapters = {}
    for path in low_rank:
        result[path] = _linear_lora([tree.get(path) for tree in adapters], _at(weights, path))
    rest = [{path: x for path, x in tree.items() if path not in low_rank} for tree in adapters]
    if any(rest):
        vectors = task_vectors(params, rest)
        result |= _as_leaves(params, _combine_vectors(vectors, weights, method, density, rng), rank)
    if rank is None:
        return result
    return {path: truncate_rank(x, rank) if isinstance(x, LoRA) else x for path, x in result.items()}


def task_vector(params: Any, adapters: Adapters) -> TaskVector:
    """What adapters add to each leaf of their base, in fp32. It is computed in fp64, so that little changes are not
    lost in large weights.

    Args:
        params: The base.
        adapters: What lies over it.

    Raises:
        InputError: for what is trained in parts, and as `adapt` does.

    Source: Ilharco et al. 2023, section 2.

    >>> import fgpt
    >>> base = {"layer": fgpt.model.Linear(torch.eye(2))}
    >>> task_vector(base, {"layer": fgpt.LoRA(torch.ones(1, 2), torch.ones(2, 1), alpha=0.5)})
    {'layer.w': tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])}
    """
    if in_parts := [path for path, x in adapters.items() if isinstance(x, ShardedParameter)]:
        raise InputError(f"{in_parts[0]} is trained in parts: unshard the adapters and their base first")
    adapted = adapt(params, adapters)
    params = own_head(params, {path: x for path, x in adapters.items() if path != "wte.w"})
    vector: TaskVector = {}
    for path, x in adapters.items():
        if isinstance(x, Tensor):
            base = get_at(params, path)
            vector[path] = _change(x.to(base.dtype), base)  # as `adapt` rounds it
    for path, x in adapters.items():
        if isinstance(x, Tensor):
            continue
        before, after = get_at(params, path), get_at(adapted, path)
        vector[f"{path}.w"] = _change(after.w, before.w)
        if getattr(after, "b", None) is not getattr(before, "b", None):
            vector[f"{path}.b"] = _change(after.b, before.b)
    return vector


def task_vectors(params: Any, adapters: Sequence[Adapters]) -> list[TaskVector]:
    """The task vectors of several sets, each with all paths of any: zeros where it changes nothing."""
    vectors = [task_vector(params, tree) for tree in adapters]
    paths = {path: x for vector in vectors for path, x in vector.items()}
    return [{path: vector.get(path, torch.zeros_like(x)) for path, x in paths.items()} for vector in vectors]


def truncate_rank(x: LoRA, rank: int) -> LoRA:
    """The nearest LoRA of a rank, in the Frobenius norm of B·A; one of a lower rank is returned as it is.

    B·A = U S Vᵀ is found from the R's of B = Q R and Aᵀ = Q' R', and never formed.

    Args:
        x: The LoRA.
        rank: The most rows of A.

    Source: Eckart & Young 1936.
    """
    if len(x.a) <= rank:
        return x
    (qb, rb), (qa, ra) = torch.linalg.qr(x.scale * x.b), torch.linalg.qr(x.a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * (vh[:rank] @ qa.T), (qb @ u[:, :rank]) * root
    return LoRA(a, b, float(len(a)))


def nearest_lora(
    change: Float[Tensor, "out in"],
    rank: int,
    alpha: float | None = None,
    rs: bool = False,
    *,
    svd_iterations: int | None = None,
) -> LoRA:
    """The LoRA of a rank whose s·B·A is nearest to a matrix, in the Frobenius norm; A and B share its singular values.

    Args:
        change: The matrix.
        rank: The most rows of A.
        alpha: The strength, as in `lora`; None is the rank, so s = 1 if not `rs`.
        rs: Rank-stabilized scaling, as in `lora`.
        svd_iterations: As of `top_singular`.

    >>> x = nearest_lora(torch.diag(torch.tensor([3.0, 2.0])), 1)
    >>> (x.scale * x.b @ x.a).round(decimals=4).abs()
    tensor([[3., 0.],
            [0., 0.]])
    """
    u, values, vh = top_singular(change, rank, svd_iterations)
    unscaled = LoRA(vh, u, float(len(values)) if alpha is None else alpha, rs)
    root = (values / unscaled.scale).sqrt()
    return replace(unscaled, a=root[:, None] * vh, b=u * root)


class SingularVectors(NamedTuple):
    """The largest components of a matrix W ≈ U diag(values) Vᵀ, in descending order."""

    u: Float[Tensor, "out rank"]
    values: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank in"]


def top_singular(w: Float[Tensor, "out in"], rank: int, iterations: int | None = None) -> SingularVectors:
    """The `rank` largest components of `w`: exactly, or by power iterations of a subspace of twice the rank."""
    if iterations is None:
        u, values, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        columns = min(2 * rank, *w.shape)
        start = torch.randn(w.shape[1], columns, generator=key(0), dtype=w.dtype).to(w.device)
        q = torch.linalg.qr(w @ start).Q
        for _ in range(iterations):
            q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
        u, values, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    return SingularVectors(u[:, :rank], values[:rank], vh[:rank])


# ------------------------------------------------------------------------------------------------------------- weights


def default_weights(count: int, method: Method) -> list[float]:
    """The weights of `combine` if none are given: those of a mean."""
    return [1.0 if method == "ties" else 1 / count] * count


def _check_weights(weights: Weights | None, count: int, method: Method) -> Weights:
    weights = default_weights(count, method) if weights is None else weights
    if isinstance(weights, Mapping | Tensor):
        if method != "linear":
            raise InputError(f"weights for {method} are numbers: tensors, and weights by path, are for linear")
        several = weights.values() if isinstance(weights, Mapping) else [weights]
        if any(w.shape != (count,) for w in several):
            raise InputError(f"expected {count} weights, one for each set of adapters, at each path")
        return weights
    if len(weights) != count or not all(math.isfinite(w) for w in weights):
        raise InputError(f"weights are {list(weights)}: expected {count} finite numbers, one for each set of adapters")
    if method == "slerp" and (count != 2 or abs(sum(weights) - 1) > 1e-6 or min(weights) < 0):
        raise InputError(f"slerp lies between two sets, with weights 1 - t and t: got {list(weights)}")
    return weights


def _at(weights: Weights, path: str) -> Sequence[float] | Tensor:
    """The weights at the path of a leaf or of its layer."""
    if not isinstance(weights, Mapping):
        return weights
    if (name := next((name for name in (path, _layer(path)) if name in weights), None)) is None:
        raise InputError(f"no weights at {path}: expected them at every path of adapters")
    return weights[name]


# --------------------------------------------------------------------------------------------------------------- LoRAs


def _low_rank_paths(paths: Sequence[str], adapters: Sequence[Adapters]) -> list[str]:
    """The layers at which nothing but LoRAs lies. A new head begins as the embedding: both are such layers, or none."""
    others = {_layer(path) for tree in adapters for path, x in tree.items() if not isinstance(x, LoRA)}
    if {"wte", "head"} <= {_layer(path) for path in paths} and others & {"wte", "head"}:
        others |= {"wte", "head"}
    return [path for path in paths if path not in others and _layer(path) == path]


def _layer(path: str) -> str:
    """The path of the layer of a leaf."""
    return path.removesuffix(".w").removesuffix(".b")


def _with_heads(params: Any, adapters: Sequence[Adapters]) -> list[Adapters]:
    """The same sets, if one makes the head of a tied model a layer of its own: what the others do to the embedding they
    do to that head, too.
    """
    has_head = [bool({"head", "head.w"} & tree.keys()) for tree in adapters]
    if not any(has_head) or "head" in dict(children(params)):
        return list(adapters)
    result: list[Adapters] = []
    for tree, has_own in zip(adapters, has_head, strict=True):
        more = {} if has_own else {f"head{path[3:]}": x for path, x in tree.items() if path in ("wte", "wte.w")}
        result.append(tree | more)
    return result


def _linear_lora(members: Sequence[Any], weights: Sequence[float] | Tensor) -> LoRA:
    """Σ w s B A = [w₁s₁B₁ w₂s₂B₂ ..] [A₁; A₂; ..]"""
    present = [(x, w) for x, w in zip(members, weights, strict=True) if x is not None]
    if len(present) == 1 and isinstance(present[0][1], float | int) and present[0][1] == 1:
        return present[0][0]
    a = torch.cat([x.a for x, _ in present])
    b = torch.cat([w * x.scale * x.b for x, w in present], dim=1)
    return LoRA(a, b, float(len(a)))


# -------------------------------------------------------------------------------------------------------- task vectors


def _change(after: Any, before: Any) -> Float[Tensor, "*shape"]:
    base = dense(before).double() if not isinstance(before, Tensor) else before.double()
    return (_as_double(after, before, base) - base).float()


def _as_double(w: Any, before: Any, base: Tensor) -> Tensor:
    """What a weight means in fp64, where `base` is what the one below it means."""
    if w is before:
        return base
    if not isinstance(w, Adapted):
        return w.double() if isinstance(w, Tensor) else dense(w).double()
    below = _as_double(w.base, before, base)
    parts = {
        name: None if x is None else x.double()
        for name, x in vars(w).items()
        if name in ("a", "mid", "b", "row", "col")
    }
    return dense(replace(w, base=below, **parts))


def _combine_vectors(
    vectors: Sequence[TaskVector], weights: Weights, method: Method, density: float, rng: torch.Generator | None
) -> TaskVector:
    if method == "dare" and rng is None:
        raise InputError("dare draws which elements it keeps: expected a key, rng=fgpt.key(0)")
    vectors = _trim(vectors, density) if method == "ties" else vectors
    result: TaskVector = {}
    for path in vectors[0]:
        changes = torch.stack([vector[path] for vector in vectors])
        w = torch.as_tensor(_at(weights, path), dtype=changes.dtype, device=changes.device)
        weighted = w.view(-1, *[1] * (changes.ndim - 1)) * changes
        if method == "ties":
            result[path] = _elect(weighted)
        elif method == "slerp":
            result[path] = _slerp(changes[0], changes[1], float(w[1]))
        elif method == "dare":
            assert rng is not None
            masks = torch.rand(changes.shape, generator=fold_in(rng, path)).to(changes.device) < density
            result[path] = (weighted * masks / density).sum(0)
        else:
            result[path] = weighted.sum(0)
    return result


def _trim(vectors: Sequence[TaskVector], density: float) -> list[TaskVector]:
    """Each vector with the share of its elements that is largest, over all paths, and zeros."""
    trimmed: list[TaskVector] = []
    for vector in vectors:
        sizes = torch.cat([x.abs().flatten() for x in vector.values()])
        count = max(1, int(density * len(sizes)))
        least = sizes.kthvalue(len(sizes) - count + 1).values
        trimmed.append({path: torch.where(x.abs() >= least, x, 0.0) for path, x in vector.items()})
    return trimmed


def _elect(weighted: Float[Tensor, "n *shape"]) -> Float[Tensor, "*shape"]:
    """The mean of those elements that have the sign of the sum."""
    agree = (weighted.sign() == weighted.sum(0).sign()) & (weighted != 0)
    return torch.where(agree, weighted, 0.0).sum(0) / agree.sum(0).clamp(min=1)


def _slerp(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"], t: float) -> Float[Tensor, "*shape"]:
    """Straight between vectors that are parallel, or of which one is zero."""
    norms = first.norm() * second.norm()
    cosine = float((first * second).sum() / norms) if float(norms) else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if abs(math.sin(angle)) < 1e-4:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def _as_leaves(params: Any, vector: TaskVector, rank: int | None) -> Adapters:
    """θ + τ: leaves that replace the base's, and LoRAs for matrices if a rank is given."""
    params = own_head(params, {"head": None} if "head.w" in vector else {})
    result: Adapters = {}
    for path, change in vector.items():
        base = get_at(params, path)
        if rank is not None and path.endswith(".w") and change.ndim == 2:
            result[path.removesuffix(".w")] = nearest_lora(change, rank)
        elif is_quantized(base):
            raise InputError(
                f"the combination at {path} is no LoRA, and the base is quantized there: give a rank, or combine over "
                f"the base before quantization, {list(shape(base))}"
            )
        elif not isinstance(base, Tensor):
            raise InputError(
                f"the combination at {path} is no LoRA, and the base is {type(base).__name__} there: give a rank"
            )
        else:
            result[path] = base.float() + change
    return result
