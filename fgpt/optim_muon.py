"""Muon: momentum of each matrix, orthogonalized; AdamW for what is no hidden matrix."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from fgpt.errors import check_choice
from fgpt.kernels.adam import Number
from fgpt.kernels.newton_schulz import orthogonalize
from fgpt.kernels.precision import at_least_fp32
from fgpt.optim import NO_MULTIPLIERS, AdamState, Optimizer, Schedule, Tree, adamw, constant_schedule
from fgpt.optim_leaves import check_multipliers, decay_mask, lr_patterns
from fgpt.patterns import matching
from fgpt.tree import device, leaves, node, unflatten_like

AdjustLR: TypeAlias = Literal["match_rms_adamw", "original"]
HIDDEN = r"(?!(wte|wpe|head)\b).*"
"""All but embeddings and the head, whose rows are tokens: the authors leave them to AdamW."""


@node
class MuonState:
    """The state of `muon`.

    Args:
        momentum: The momentum of each matrix, by its path.
        adam: AdamW's state of the other leaves, by their paths; its count is that of all updates.

    >>> muon(0.1).init({"w": torch.ones(2, 2), "b": torch.ones(2)}).momentum
    {'w': tensor([[0., 0.],
            [0., 0.]])}
    """

    momentum: dict[str, Tensor]
    adam: AdamState


def muon(
    lr: Number | Schedule,
    momentum: Number = 0.95,
    *,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: AdjustLR = "match_rms_adamw",
    matrices: str = HIDDEN,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decay: str = ".*",
    lr_multipliers: Mapping[str, Number] = NO_MULTIPLIERS,
) -> Optimizer:
    """Muon for matrices: m ← μm + (1-μ)g; θ ← θ - η (s · orthogonal(μm + (1-μ)g) + λθ). AdamW for the other leaves.

    Each matrix of a LoRA, A and B, is orthogonalized on its own, and so are those of each member of a stack under vmap.
    Newton-Schulz iterations are computed at least in fp32, where the authors compute in bf16.

    Args:
        lr: η, a number or a schedule, of both kinds of leaves.
        momentum: μ.
        nesterov: Orthogonalize μm + (1-μ)g, as written above; else m.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: s of an [out, in] matrix, by torch's names. "match_rms_adamw": 0.2·√max(out, in), so that an update
            is as large as AdamW's, and η and λ serve both kinds of leaves. "original": √max(1, out / in), whose rates
            are other ones (0.02 for Muon in the authors' code).
        matrices: A regular expression; leaves of two dimensions whose whole path matches it take Muon.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: λ, for leaves of two dimensions or more.
        decay: A regular expression; only leaves whose whole path matches it decay.
        lr_multipliers: As in `adamw`.

    Each number but `ns_steps` may be a scalar tensor, to be mapped over or differentiated.

    Raises:
        InputError: for a pattern that is not a regular expression, or an unknown `adjust_lr`; as `adamw` does.

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, for s.

    >>> optimizer = muon(0.1, adjust_lr="original")
    >>> params = {"w": torch.zeros(2, 2)}
    >>> params, state = optimizer.update({"w": torch.eye(2)}, optimizer.init(params), params)
    >>> bool(((params["w"] + 0.1 * torch.eye(2)).abs() < 0.03).all())  # a step of nearly an orthogonal matrix
    True
    """
    for pattern in (matrices, decay):
        matching(pattern, [])
    check_multipliers(lr_multipliers)
    check_choice("adjust_lr", adjust_lr, AdjustLR)
    schedule = lr if callable(lr) else constant_schedule(lr)
    rest = adamw(lr, betas, eps=eps, weight_decay=weight_decay, decay=decay, lr_multipliers=lr_multipliers)
    has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0

    def is_matrix(params: Tree) -> list[bool]:
        by_path = leaves(params)
        matched = set(matching(matrices, [path for path, x in by_path.items() if x.ndim == 2]))
        return [path in matched for path in by_path]

    def init(params: Tree) -> MuonState:
        check_multipliers(lr_multipliers, params)
        zeros = {path: torch.zeros_like(x) for path, x in leaves(params).items()}
        muon_leaves, others = _split(zeros, is_matrix(params))
        count = torch.zeros((), dtype=torch.int64, device=device(params))
        return MuonState(muon_leaves, AdamState(others, dict(others), count))

    def update(grads: Tree, state: MuonState, params: Tree) -> tuple[Tree, MuonState]:
        mask = is_matrix(params)
        (thetas, other_thetas), (gs, other_gs) = _split(leaves(params), mask), _split(leaves(grads), mask)
        others, adam = rest.update(other_gs, state.adam, other_thetas)
        eta = schedule(state.adam.count.to(device(params)))
        ms = {path: _lerp(m, gs[path], 1 - momentum) for path, m in state.momentum.items()}
        steps = [_lerp(at_least_fp32(gs[path]), m, momentum) if nesterov else m for path, m in ms.items()]
        decays = dict(zip(leaves(params), decay_mask(params, decay))) if has_decay else {}
        factors = dict(zip(leaves(params), lr_patterns(params, lr_multipliers)))
        new: dict[str, Any] = dict(others)
        for path, x in zip(ms, orthogonalize(steps, ns_steps), strict=True):
            theta = at_least_fp32(thetas[path])
            step = _scale(x, adjust_lr) * x
            if decays.get(path):
                step = step + weight_decay * theta
            pattern = factors[path]
            rate = eta if pattern is None else eta * lr_multipliers[pattern]
            new[path] = (theta - rate.to(theta.dtype) * step).to(thetas[path].dtype)
        momenta = {path: m.to(state.momentum[path].dtype) for path, m in ms.items()}
        return unflatten_like(params, [new[path] for path in leaves(params)]), MuonState(momenta, adam)

    return Optimizer(init, update, is_elementwise=False)


def _split(by_path: Mapping[str, Tensor], mask: list[bool]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The leaves that are matrices, and the others."""
    muon_leaves: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for (path, x), chosen in zip(by_path.items(), mask, strict=True):
        (muon_leaves if chosen else others)[path] = x
    return muon_leaves, others


def _lerp(x: Tensor, y: Tensor, weight: Number) -> Tensor:
    """x + weight · (y - x), at least in fp32."""
    x, y = at_least_fp32(x), at_least_fp32(y)
    return torch.lerp(x, y, weight.to(x.dtype) if isinstance(weight, Tensor) else weight)


def _scale(x: Tensor, adjust_lr: str) -> float:
    """What makes the update of an [out, in] matrix as large as it should be."""
    out, inp = x.shape
    return 0.2 * math.sqrt(max(out, inp)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1.0, out / inp))
