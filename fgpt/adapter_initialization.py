r"""Initializations of LoRA: what A and B begin as, and what the base must become so that the model begins as itself.

    W = W' + s·B·A          W' is the new base; `adapt(params', adapters)` means `params`

    pissa      s·B·A = U_r S_r V_rᵀ, the r largest singular components of W = U S Vᵀ
    olora      B = Q_r, A = R_r of W = Q R
    lora_ga    A and B are singular vectors of the gradient of W: the first step is near that of full fine-tuning
    loftq      W' = quantize(W - s·B·A), s·B·A = SVD_r(W - W'), in turn: nearest to W, not equal
    eva        A = the principal directions of the layer's inputs, B = 0: W' = W
    lora_xs    B = U_r and A = S_r V_rᵀ belong to the base and stay; only M of W + s·B·M·A is trained, from M = 0

Each returns (params, adapters), and only what matches `target` changes: calls with other targets and ranks follow one
another, and their adapters compose by dict union. The new base is computed in at least fp32 and rounded to W's dtype.
Rounding to bf16 loses up to 0.4 % of each element of W': a bf16 model begins near itself, and an fp32 model begins as
itself up to fp32's rounding.

Trained adapters belong to the new base: save both, or `merge`. On the original base they are LoRAs of twice the rank,
s·(B·A - B₀·A₀), their difference from the initial ones, which PEFT opens as well:

    fgpt.combine(params, [trained, initial], weights=[1, -1])
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fgpt.adapter_combining import SingularVectors, nearest_lora, top_singular
from fgpt.adapter_defaults import RANK, TARGET, default_alpha
from fgpt.adapter_lora import LoRA, check_rank
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.kernels.quantized_linear import Format, Quantized, dequantize
from fgpt.layer_inputs import input_moments
from fgpt.layers import weight_matrices
from fgpt.losses import Batch
from fgpt.model import GPT
from fgpt.quantization import quantize_weight
from fgpt.tree import replace_at, select
from fgpt.weights import Adapted, Weight, dense, shape

T = TypeVar("T")

GAMMA = 16.0
"""γ of LoRA-GA, as in the paper's experiments."""


def pissa(
    params: T,
    rank: int = RANK,
    alpha: float | None = None,
    target: str = TARGET,
    rs: bool = False,
    *,
    svd_iterations: int | None = None,
) -> tuple[T, Adapters]:
    """Adapters that are the principal part of each matrix, over a base that is the rest.

        W = U S Vᵀ        A = √(S_r/s) V_rᵀ        B = U_r √(S_r/s)        W' = W - s·B·A

    `quantize` the new base for QPiSSA: what is rounded then has no large singular values.

    Args:
        params: The plain params.
        rank: r.
        alpha: The strength, as in `lora`; None is twice the rank. The paper has alpha = r, that is s = 1.
        target: A regular expression that matches a layer's path in full.
        rs: Rank-stabilized scaling, as in `lora`.
        svd_iterations: None decomposes exactly. A number decomposes by so many power iterations from a fixed start: at
            rank 8 of 768 x 3072, 4 take a twentieth of the time and 16 a sixth. W' + s·B·A is W in any case.

    Returns:
        The new base, and the adapters over it.

    Raises:
        InputError: if `target` matches nothing or a matrix that is quantized or adapted, if a rank exceeds the smaller
            side of a layer, or if alpha is not positive.

    Source: Meng et al. 2024 (PiSSA), section 3; Halko et al. 2011, algorithm 4.4, for the iterations.

    >>> import fgpt
    >>> layer = fgpt.model.Linear(torch.diag(torch.tensor([3.0, 2.0])))
    >>> params, adapters = pissa({"layer": layer}, rank=1, target="layer")
    >>> torch.linalg.svdvals(params["layer"].w).round(decimals=4)
    tensor([2., 0.])
    >>> fgpt.dense(fgpt.adapt(params, adapters)["layer"].w).round(decimals=4)
    tensor([[3., 0.],
            [0., 2.]])
    """
    strength = _strength(rank, alpha)
    adapters: Adapters = {}
    for path, w in _plain_matrices(params, target, rank).items():
        adapters[path] = nearest_lora(at_least_fp32(w), rank, strength, rs, svd_iterations=svd_iterations)
    return _subtract(params, adapters), adapters


def olora(
    params: T, rank: int = RANK, alpha: float | None = None, target: str = TARGET, rs: bool = False
) -> tuple[T, Adapters]:
    """Adapters from the QR decomposition of each matrix, over a base without them: B has orthonormal columns.

        W = Q R        B = Q[:, :r]        A = R[:r]        W' = W - s·B·A

    Args:
        params: The plain params.
        rank: r.
        alpha: The strength, as in `lora`; None is twice the rank.
        target: A regular expression that matches a layer's path in full.
        rs: Rank-stabilized scaling, as in `lora`.

    Returns:
        The new base, and the adapters over it.

    Raises:
        InputError: as `pissa` does.

    Source: Büyükakyüz 2024 (OLoRA), section 3; with s as PEFT has it.

    >>> import fgpt
    >>> layer = fgpt.model.Linear(torch.tensor([[3.0, 1.0], [4.0, 7.0]]))
    >>> params, adapters = olora({"layer": layer}, rank=1, target="layer")
    >>> adapters["layer"].b.abs().round(decimals=4)
    tensor([[0.6000],
            [0.8000]])
    >>> fgpt.dense(fgpt.adapt(params, adapters)["layer"].w).round(decimals=4)
    tensor([[3., 1.],
            [4., 7.]])
    """
    strength = _strength(rank, alpha)
    adapters: Adapters = {}
    for path, w in _plain_matrices(params, target, rank).items():
        q, r = torch.linalg.qr(at_least_fp32(w))
        adapters[path] = LoRA(r[:rank].clone(), q[:, :rank].clone(), strength, rs)
    return _subtract(params, adapters), adapters


def lora_ga(
    params: T,
    loss: Callable[[T], Float[Tensor, ""]],
    rank: int = RANK,
    alpha: float | None = None,
    target: str = TARGET,
    rs: bool = False,
    *,
    gamma: float = GAMMA,
    svd_iterations: int | None = None,
) -> tuple[T, Adapters]:
    """Adapters whose first step is near that of full fine-tuning: A and B span the largest singular vectors of the
    gradient of each matrix.

        ∂L/∂W = U S Vᵀ        c = out^¼ / √γ        A = c V[:, :r]ᵀ        B = c U[:, r:2r]        W' = W - s·B·A

    PEFT multiplies B by S[r:2r] as well and does not scale A; this is the paper, and its authors' code.

    Args:
        params: The plain params.
        loss: params -> loss, on one batch or the mean over several, such as `lambda p: fgpt.loss(p, batch)`. Only the
            matrices of `target` are differentiated, and their gradients are in memory together.
        rank: r, at most half the smaller side of a layer.
        alpha: The strength, as in `lora`; None is twice the rank.
        target: A regular expression that matches a layer's path in full.
        rs: Rank-stabilized scaling, as in `lora`. The paper has it.
        gamma: γ: less of it gives larger A and B.
        svd_iterations: As in `pissa`, for 2r components.

    Returns:
        The new base, and the adapters over it.

    Raises:
        InputError: as `pissa` does, and if 2r exceeds the smaller side of a layer, or γ is not positive.

    Source: Wang et al. 2024 (LoRA-GA), algorithm 1.

    >>> import fgpt
    >>> layer = fgpt.model.Linear(torch.zeros(2, 2))
    >>> def loss(params):
    ...     return params["layer"].w[0, 0] * 5 + params["layer"].w[1, 1]
    >>> params, adapters = lora_ga({"layer": layer}, loss, rank=1, target="layer", gamma=2**0.5)
    >>> adapters["layer"].a.abs(), adapters["layer"].b.abs()
    (tensor([[1., 0.]]), tensor([[0.],
            [1.]]))
    """
    if not gamma > 0:
        raise InputError(f"gamma is {gamma}: expected a positive number")
    strength = _strength(rank, alpha)
    matrices = _plain_matrices(params, target, rank)
    for path, w in matrices.items():
        if 2 * rank > min(w.shape):
            raise InputError(
                f"rank {rank} on {path}: lora_ga takes 2r singular vectors of {list(w.shape)}, so at most rank "
                f"{min(w.shape) // 2}"
            )

    def loss_of_matrices(new: dict[str, Tensor]) -> Tensor:
        return loss(replace_at(params, new))

    grads: Any = torch.func.grad(loss_of_matrices)({f"{path}.w": w for path, w in matrices.items()})
    adapters: Adapters = {}
    for path, w in matrices.items():
        u, _, vh = top_singular(at_least_fp32(grads[f"{path}.w"]), 2 * rank, svd_iterations)
        c = w.shape[0] ** 0.25 / gamma**0.5
        adapters[path] = LoRA(c * vh[:rank], c * u[:, rank:], strength, rs)
    return _subtract(params, adapters), adapters


def loftq(
    params: T,
    format: Format = "nf4",
    rank: int = RANK,
    alpha: float | None = None,
    target: str = TARGET,
    rs: bool = False,
    *,
    iterations: int = 5,
    double_quant: bool = True,
    svd_iterations: int | None = None,
) -> tuple[T, Adapters]:
    """A quantized base, and adapters that begin as the best correction of its rounding.

        W' = quantize(W - s·B·A)        s·B·A = SVD_r(W - W')        `iterations` times, from B·A = 0

    The iterations need not come nearer to W each time, so those W', A and B are returned whose ‖W - W' - s·B·A‖ is
    least. It is below ‖W - quantize(W)‖, since the first iteration is. That is a law of each matrix, not of the model:
    errors of several matrices may cancel or add up in its logits.

    Args:
        params: The plain params.
        format: As in `quantize`.
        rank: r.
        alpha: The strength, as in `lora`; None is twice the rank. PEFT's own ignores s, and so is right for s = 1.
        target: A regular expression that matches a layer's path in full. Other layers stay plain: `quantize` them with
            another target.
        rs: Rank-stabilized scaling, as in `lora`.
        iterations: T in the paper.
        double_quant: As in `quantize`.
        svd_iterations: As in `pissa`.

    Returns:
        The quantized base, and the adapters over it.

    Raises:
        InputError: as `pissa` and `quantize` do, and if `iterations` is not positive.

    Source: Li et al. 2023 (LoftQ), algorithm 1.

    >>> import fgpt
    >>> w = torch.randn(8, 64, generator=fgpt.key(0))
    >>> params, adapters = loftq({"layer": fgpt.model.Linear(w)}, "nf4", rank=4, target="layer")
    >>> alone = fgpt.quantize({"layer": fgpt.model.Linear(w)}, "nf4", target="layer")
    >>> error = fgpt.dense(fgpt.adapt(params, adapters)["layer"].w) - w
    >>> bool(error.norm() < 0.8 * (fgpt.dense(alone["layer"].w) - w).norm())
    True
    """
    if iterations < 1:
        raise InputError(f"iterations is {iterations}: expected 1 or more")
    strength = _strength(rank, alpha)
    bases: dict[str, Quantized] = {}
    adapters: Adapters = {}
    for path, w in _plain_matrices(params, target, rank).items():
        exact = at_least_fp32(w)
        update, least = torch.zeros_like(exact), torch.inf
        for _ in range(iterations):
            base = quantize_weight(path, (exact - update).to(w.dtype), format, double_quant)
            residual = exact - dequantize(base, exact.dtype)
            x = nearest_lora(residual, rank, strength, rs, svd_iterations=svd_iterations)
            update = x.scale * x.b @ x.a
            distance = float((residual - update).norm())
            if distance < least:
                least, bases[f"{path}.w"], adapters[path] = distance, base, x
    return replace_at(params, bases), adapters


def eva(
    params: GPT,
    batches: Iterable[Batch],
    rank: int = RANK,
    alpha: float | None = None,
    target: str = TARGET,
    rs: bool = False,
    *,
    rho: float = 2.0,
    svd_iterations: int | None = None,
) -> tuple[GPT, Adapters]:
    r"""Adapters whose A are the principal directions of what each layer reads, with more rank where few directions
    explain much. B = 0, so the params are returned as they are, and they may be quantized.

        Σ x xᵀ = V Λ Vᵀ        A = V[:, :r]ᵀ        share of direction i = Λ_i / tr Λ

    Of the ρ·r first directions of all layers those with the largest shares are taken, r for each layer on average; a
    layer of which none is taken has no adapter. s is that of rank r in every layer.

    PEFT's directions are those of x - mean(x), found batch by batch until they turn no more; here they are those of x
    itself, as in the singular value decomposition of the paper, and all batches are read, once. A layer's largest
    direction is therefore often its mean. PEFT scales alpha by the rank also if `rs`.

    Args:
        params: The model, plain, quantized or adapted.
        batches: Texts of the task. Their positions must be as many as a layer's directions.
        rank: r on average.
        alpha: The strength of a layer of rank r, as in `lora`; None is twice the rank.
        target: A regular expression that matches a layer's path in full; layers of the blocks alone.
        rs: Rank-stabilized scaling, as in `lora`.
        rho: ρ ≥ 1: no layer has more than ρ·r. 1 gives every layer r.
        svd_iterations: As in `pissa`.

    Returns:
        The same params, and adapters over them.

    Raises:
        InputError: as `lora` and `input_moments` do, if ρ is below 1, or for too few positions.

    Source: Paischer et al. 2024 (EVA), section 3 and algorithm 1.

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> params, text = fgpt.init(config, fgpt.key(0)), torch.tensor([[1, 2, 3, 4, 5, 6]])
    >>> batch = fgpt.Batch(text, text, torch.ones(1, 6))
    >>> params, adapters = fgpt.eva(params, [batch], rank=2, target=r".*\.(q|o|down)")
    >>> sum(len(x.a) for x in adapters.values())
    6
    """
    if not rho >= 1:
        raise InputError(f"rho is {rho}: expected 1 or more")
    strength = _strength(rank, alpha)
    weights = _select(params, target, rank)
    directions: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    decompositions: dict[int, SingularVectors] = {}  # layers of one input share their moments
    for path, m in input_moments(params, batches, target).items():
        most = round(min(rho * rank, len(m.total)))
        if m.num_positions < most:
            raise InputError(f"{m.num_positions} positions of text have no {most} directions: give more batches")
        if id(m.total) not in decompositions:
            decompositions[id(m.total)] = top_singular(m.total, most, svd_iterations)
        _, values, vh = decompositions[id(m.total)]
        out = shape(weights[path])[0]
        directions[path], shares[path] = vh[:out], values[:out] / m.total.trace()
    scale = LoRA(torch.empty(rank, 0), torch.empty(0, rank), strength, rs).scale
    adapters: Adapters = {}
    for path, r in _share_ranks(shares, rank * len(shares)).items():
        a = directions[path][:r].clone()
        adapters[path] = LoRA(a, a.new_zeros(shape(weights[path])[0], r), scale * (r**0.5 if rs else r), rs)
    return params, adapters


def lora_xs(
    params: T,
    rank: int = RANK,
    alpha: float | None = None,
    target: str = TARGET,
    rs: bool = False,
    *,
    svd_iterations: int | None = None,
) -> tuple[T, Adapters]:
    """r² trained elements for each matrix, whatever its size: a small M between frozen singular vectors.

        W = U S Vᵀ        W' = W + s·B·M·A        B = U_r        A = S_r V_rᵀ        M = 0

    The new params hold W, A, B and M, and mean what they meant. The adapters are the M's, tensors that replace those
    leaves, and mean nothing without these A and B, whose signs another machine may choose otherwise: `merge`, or keep
    LoRA(M·A, B). Of a quantized W the dequantized values are decomposed. The paper draws M with a deviation of 1e-5;
    its gradient does not vanish at 0.

    Args:
        params: The base, quantized or not.
        rank: r.
        alpha: The strength, as in `lora`; None is twice the rank.
        target: A regular expression that matches a layer's path in full.
        rs: Rank-stabilized scaling, as in `lora`.
        svd_iterations: As in `pissa`.

    Returns:
        The params with A and B, and the M's, by the paths of their leaves.

    Raises:
        InputError: if `target` matches nothing, if a rank exceeds the smaller side of a layer, or if alpha is not
            positive.

    Source: Bałazy et al. 2024 (LoRA-XS), section 3.

    >>> import fgpt
    >>> layer = fgpt.model.Linear(torch.diag(torch.tensor([3.0, 2.0])))
    >>> params, adapters = lora_xs({"layer": layer}, rank=1, alpha=1, target="layer")
    >>> adapters
    {'layer.w.mid': tensor([[0.]])}
    >>> fgpt.dense(fgpt.adapt(params, {"layer.w.mid": torch.tensor([[0.5]])})["layer"].w).round(decimals=4)
    tensor([[4.5000, 0.0000],
            [0.0000, 2.0000]])
    """
    strength = _strength(rank, alpha)
    weights: dict[str, Adapted] = {}
    adapters: Adapters = {}
    for path, w in _select(params, target, rank).items():
        u, values, vh = top_singular(at_least_fp32(dense(w)), rank, svd_iterations)
        x, mid = LoRA(values[:, None] * vh, u.clone(), strength, rs), values.new_zeros(rank, rank)
        weights[f"{path}.w"] = Adapted(w, x.a, x.b, mid=mid, scale=x.scale)
        adapters[f"{path}.w.mid"] = mid
    return replace_at(params, weights), adapters


def _share_ranks(shares: Mapping[str, Float[Tensor, " _components"]], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares are each layer's; none of them, and the layer is left out."""
    largest = sorted(((float(x), path) for path, values in shares.items() for x in values), key=lambda x: -x[0])
    counts = Counter(path for _, path in largest[:budget])
    return {path: counts[path] for path in shares if counts[path]}


# -------------------------------------------------------------------------------------------------------------- shared


def _strength(rank: int, alpha: float | None) -> float:
    if alpha is not None and not alpha > 0:
        raise InputError(f"alpha is {alpha}: expected a positive number")
    return default_alpha(rank) if alpha is None else float(alpha)


def _select(params: Any, target: str, rank: int) -> dict[str, Weight]:
    """The matrices of the layers whose paths match `target`, each large enough for a rank."""
    weights = weight_matrices(params)
    selected = {path: weights[path] for path in select(weights, target)}
    for path, w in selected.items():
        check_rank(rank, w, path)
    return selected


def _plain_matrices(params: Any, target: str, rank: int) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for path, w in _select(params, target, rank).items():
        if not isinstance(w, Tensor):
            raise InputError(
                f"{path} is {type(w).__name__}, but its matrix must change: initialize on the plain params, then "
                "quantize them, or call loftq on the plain params"
            )
        plain[path] = w
    return plain


def _subtract(params: T, adapters: Adapters) -> T:
    """`params` with W - s·B·A for each W that a LoRA adapts, in the dtype of W."""
    weights = weight_matrices(params)
    new: dict[str, Tensor] = {}
    for path, x in adapters.items():
        w: Any = weights[path]
        assert isinstance(x, LoRA)
        new[f"{path}.w"] = (at_least_fp32(w) - x.scale * x.b @ x.a).to(w.dtype)
    return replace_at(params, new)
