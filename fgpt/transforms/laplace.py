"""Laplace's approximation: how sure a classifier may be, from the curvature where its training ended.

    θ ~ N(θ*, (G + λI)⁻¹),  G = Σ_i J_iᵀ (diag(p_i) - p_i p_iᵀ) J_i      the posterior, J = ∂logits/∂θ at θ*
    logits of x ~ N(z(x), J(x) (G + λI)⁻¹ J(x)ᵀ)                         of the model linearized at θ*
    p(y | x) = E[softmax(logits of x)]                                   what is predicted

λ is the prior's precision; the one whose evidence is the largest needs no held-out data. θ are adapters, a new head, or
the head alone. G is too large to be inverted as it is: it is taken to be diagonal, or a Kronecker product in each
matrix, or as it is in the last layer alone. Each is a diagonal in some basis, and all else is the same for each.

Source: MacKay 1992, "The Evidence Framework Applied to Classification Networks"; Immer et al. 2021, "Improving
Predictions of Bayesian Neural Nets via Local Linearization"; Daxberger et al. 2021, "Laplace Redux"; Yang et al. 2024,
"Bayesian Low-rank Adaptation for Large Language Models".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from fgpt.adapter_lora import LoRA
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch
from fgpt.rng import fold_in
from fgpt.transforms.curvature import in_form_of
from fgpt.transforms.fisher import fisher_diagonal, fisher_sample
from fgpt.transforms.kronecker import KroneckerFactors, LoRAFactors, kronecker_factors
from fgpt.transforms.per_example import CHUNK_ELEMENTS, stacked_chunks
from fgpt.tree import ravel, tree_leaves, tree_map, unflatten_like

Tree: TypeAlias = Any
ExampleLogits: TypeAlias = Callable[[Tree, Any], Float[Tensor, " classes"]]
"""(params, a batch of one row) -> the logits of its class. Padding of weight 0 must not change them."""
BatchLogits: TypeAlias = Callable[[Tree, Any], Float[Tensor, "n classes"]]
"""(params, a batch) -> the logits of each of its examples."""

JACOBIAN_ELEMENTS = 2**26
"""Of the Jacobians that are in memory at once; they are there three times."""


class Curvature(NamedTuple):
    """G as a diagonal in a basis: G = Q diag(h) Qᵀ.

    Args:
        eigenvalues: h, a tree of tensors.
        rotate: x -> Qᵀ x, from a tree of the form of the params to one of the form of the eigenvalues.
        rotate_back: x -> Q x.

    >>> curvature = Curvature({"w": torch.tensor([4.0, 1.0])}, lambda x: x, lambda x: x)
    >>> curvature.rotate({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """

    eigenvalues: Tree
    rotate: Callable[[Tree], Tree]
    rotate_back: Callable[[Tree], Tree]


# ----------------------------------------------------------------------------------------------------------- curvature


def diagonal_curvature(
    logits: ExampleLogits, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> Curvature:
    """The diagonal of G. No more gradients are in memory than those of a chunk.

    Args:
        logits: The logits of one example.
        params: θ*, what was trained.
        examples: The training rows, batches of one row each.
        chunk_size: Examples that are computed at once. None takes some by their length and the number of params.

    Raises:
        InputError: if there are no examples.

    >>> def logits(params, row):  # p is 1/2, 1/2, and each of two rows adds x² p (1 - p)
    ...     return torch.stack([params["w"] * row.weights.sum(), torch.zeros(())])
    >>> rows = [Batch(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), torch.full((1, 1), x)) for x in (1.0, 3.0)]
    >>> diagonal_curvature(logits, {"w": torch.tensor(0.0)}, rows).eigenvalues
    {'w': tensor(2.5000)}
    """
    total = tree_map(lambda x: torch.zeros_like(at_least_fp32(x)), params)
    for _, _, vectors in _pull_back(logits, params, examples, _roots, chunk_size):
        for vector in vectors:
            total = tree_map(lambda t, g: t + at_least_fp32(g).square().sum(0), total, vector)
    return Curvature(total, lambda x: x, lambda x: x)


def full_curvature(
    logits: ExampleLogits, params: Tree, examples: Sequence[Batch], *, chunk_size: int | None = None
) -> Curvature:
    """G itself, for params of a few thousand elements: those of a head, where everything else is a constant.

    Args:
        logits: The logits of one example.
        params: θ*, such as {"head.w": w}.
        examples: The training rows, batches of one row each.
        chunk_size: As in `diagonal_curvature`.

    Raises:
        InputError: if there are no examples.

    >>> def logits(params, row):
    ...     return params["w"] * row.weights.sum()
    >>> row = Batch(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), torch.ones(1, 1))
    >>> full_curvature(logits, {"w": torch.zeros(2)}, [row]).eigenvalues  # of 1/4 · (1, -1)(1, -1)ᵀ
    tensor([0.0000, 0.5000])
    """
    vector, _ = ravel(params)
    total = torch.zeros(len(vector), len(vector), dtype=torch.float64, device=vector.device)
    for _, _, vectors in _pull_back(logits, params, examples, _roots, chunk_size):
        for tree in vectors:
            rows = torch.cat([x.flatten(1) for x in tree_leaves(tree)], 1).double()
            total += rows.T @ rows
    return curvature_of_matrix(total, params)


def curvature_of_matrix(matrix: Float[Tensor, "n n"], params: Tree) -> Curvature:
    """A positive semidefinite G that is at hand as a matrix, in the order of `ravel(params)`.

    >>> curvature_of_matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), {"w": torch.zeros(2)}).eigenvalues
    tensor([1., 3.])
    """
    vector, unravel = ravel(params)
    eigenvalues, basis = torch.linalg.eigh(matrix)
    basis = basis.to(at_least_fp32(vector).dtype)
    return Curvature(
        eigenvalues.clamp(min=0).to(basis.dtype),
        lambda x: at_least_fp32(ravel(x)[0]) @ basis,
        lambda x: unravel(basis @ x),
    )


def kronecker_curvature(
    logits: BatchLogits, adapters: Tree, batches: Sequence[Any], rng: torch.Generator, *, num_samples: int = 1
) -> Curvature:
    r"""G of each LoRA's A and B as a Kronecker product, of other leaves as an estimate of its diagonal. It costs one
    backward pass of the batches a sample, and no gradients of single examples; other leaves cost 32 backward passes,
    which end at them.

    Args:
        logits: The logits of each example of a batch.
        adapters: θ*: LoRAs, and tensors such as a head.
        batches: The training rows.
        rng: A key, which draws labels from the model's own distribution.
        num_samples: Labels of each example. The factors are unbiased for any number.

    Raises:
        InputError: if there are no batches, and as `kronecker_factors` does.

    Source: Yang et al. 2024, section 4; Ritter et al. 2018, "A Scalable Laplace Approximation for Neural Networks".

    >>> import fgpt
    >>> config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
    >>> base = fgpt.with_classification_head(fgpt.init(config, fgpt.key(0)), 3, fgpt.key(1))
    >>> adapters = fgpt.lora(base, fgpt.key(1), rank=2, target=r".*\.up") | fgpt.trainable_leaves(base, r"head\..*")
    >>> def logits(adapters, tokens):
    ...     return fgpt.apply(fgpt.adapt(base, adapters), tokens)[:, -1]
    >>> curvature = kronecker_curvature(logits, adapters, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fgpt.key(2))
    >>> curvature.eigenvalues["blocks.0.mlp.up"].b.shape, curvature.eigenvalues["head.w"].shape
    (torch.Size([16, 2]), torch.Size([3, 8]))
    """
    if not batches:
        raise InputError("there are no batches: expected the training rows")
    loras: Any = {path: x for path, x in adapters.items() if isinstance(x, LoRA)}
    others = {path: x for path, x in adapters.items() if not isinstance(x, LoRA)}
    total: dict[str, LoRAFactors] = {}
    diagonal = tree_map(lambda x: torch.zeros_like(at_least_fp32(x)), others)
    for i, batch in enumerate(batches):
        rng_of_batch = fold_in(rng, i)
        with torch.no_grad():
            z = logits(adapters, batch)
        for k in range(num_samples if loras else 0):
            sample = fisher_sample(z, fold_in(rng_of_batch, k)) / math.sqrt(num_samples)
            factors = kronecker_factors(lambda a, b=batch, u=sample: (u * logits(others | a, b)).sum(), loras)
            total = {path: _add(total[path], x) if path in total else x for path, x in factors.items()}
        if others:
            part = fisher_diagonal(lambda x, b=batch: logits(loras | x, b), others, fold_in(rng_of_batch, "diagonal"))
            diagonal = tree_map(torch.add, diagonal, part)
    return _in_eigenbasis(adapters, total, diagonal)


def _add(x: LoRAFactors, y: LoRAFactors) -> LoRAFactors:
    """The factors of the positions of both."""
    count = x.num_positions + y.num_positions

    def add(x_part: KroneckerFactors, y_part: KroneckerFactors) -> KroneckerFactors:
        inputs = (x.num_positions * x_part.inputs + y.num_positions * y_part.inputs) / count
        return KroneckerFactors(outputs=x_part.outputs + y_part.outputs, inputs=inputs)

    return LoRAFactors(add(x.a, y.a), add(x.b, y.b), count)


def _in_eigenbasis(adapters: Tree, factors: dict[str, LoRAFactors], diagonal: Tree) -> Curvature:
    """The curvature of LoRAs with these factors, and of other leaves with this diagonal."""
    eigenvalues, bases = dict(diagonal), dict[str, tuple[_Basis, _Basis]]()
    for path, layer in factors.items():
        (a, basis_a), (b, basis_b) = _eigh(layer.a), _eigh(layer.b)
        eigenvalues[path] = replace(adapters[path], a=a, b=b)
        bases[path] = basis_a, basis_b
    eigenvalues = {path: eigenvalues[path] for path in adapters}

    def rotate(tree: Tree) -> Tree:
        rotated = dict(tree)
        for path, (a, b) in bases.items():
            x = tree_map(at_least_fp32, tree[path])
            rotated[path] = replace(x, a=a.outputs.T @ x.a @ a.inputs, b=b.outputs.T @ x.b @ b.inputs)
        return rotated

    def rotate_back(tree: Tree) -> Tree:
        rotated = dict(tree)
        for path, (a, b) in bases.items():
            x = tree[path]
            rotated[path] = replace(x, a=a.outputs @ x.a @ a.inputs.T, b=b.outputs @ x.b @ b.inputs.T)
        return rotated

    return Curvature(eigenvalues, rotate, rotate_back)


class _Basis(NamedTuple):
    """Eigenvectors of both factors, in columns."""

    outputs: Float[Tensor, "out out"]
    inputs: Float[Tensor, "in in"]


def _eigh(factors: KroneckerFactors) -> tuple[Float[Tensor, "out in"], _Basis]:
    """The eigenvalues of the Kronecker product, in the form of the weight, and the eigenvectors of its factors."""
    (h_outputs, outputs), (h_inputs, inputs) = map(torch.linalg.eigh, factors)
    return h_outputs.clamp(min=0)[:, None] * h_inputs.clamp(min=0), _Basis(outputs, inputs)


# ------------------------------------------------------------------------------------------------------------ evidence


def log_evidence(
    log_likelihood: Float[Tensor, ""],
    params: Tree,
    curvature: Curvature,
    prior_precision: Float[Tensor, ""] | float,
    *,
    prior_mean: Tree | None = None,
) -> Float[Tensor, ""]:
    """The logarithm of the evidence of a prior N(θ_0, 1 / λ), in nats:

        log p(data | θ*) - λ/2 ‖θ* - θ_0‖² + n/2 log λ - 1/2 Σ log(h + λ)        n elements of θ

    Args:
        log_likelihood: log p(data | θ*), a sum over the training rows.
        params: θ*.
        curvature: G there.
        prior_precision: λ.
        prior_mean: θ_0, such as the adapters that the training began with; None is 0.

    Source: MacKay 1992, section 3; Immer et al. 2021, "Scalable Marginal Likelihood Estimation for Model Selection in
    Deep Learning".

    >>> curvature = Curvature(torch.tensor([3.0]), lambda x: x, lambda x: x)
    >>> log_evidence(torch.tensor(-1.0), torch.tensor([2.0]), curvature, 1.0).float()  # -1 - 4/2 + 0 - log(4) / 2
    tensor(-3.6931)
    """
    h, square_norm = _spectrum(params, curvature, prior_mean)
    precision = torch.as_tensor(prior_precision, dtype=h.dtype, device=h.device)
    log_ratio = -torch.log1p(h / precision).sum()  # log λ - log(h + λ), without the loss of digits where h is small
    return log_likelihood + (log_ratio - precision * square_norm) / 2


def find_prior_precision(params: Tree, curvature: Curvature, *, prior_mean: Tree | None = None) -> float:
    """The λ of the largest evidence, where λ ‖θ* - θ_0‖² is the number of directions that the data decides,
    Σ h / (h + λ).

    The one side grows in λ and the other falls, so that there is one solution: found by bisection, to six digits.

    Args:
        params: θ*.
        curvature: G there.
        prior_mean: θ_0, as in `log_evidence`.

    Raises:
        InputError: if G or θ* - θ_0 is zero: no prior is the best one.

    Source: MacKay 1992, "Bayesian Interpolation", section 4.4, equation 4.9.

    >>> curvature = Curvature(torch.tensor([3.0, 0.0]), lambda x: x, lambda x: x)
    >>> find_prior_precision(torch.tensor([1.0, 1.0]), curvature)  # 2 λ = 3 / (3 + λ)
    0.436492
    """
    h, square_norm = _spectrum(params, curvature, prior_mean)
    if not 0 < float(h.sum()) < math.inf or not 0 < float(square_norm) < math.inf:
        raise InputError(
            f"the evidence has no largest value: the eigenvalues sum to {float(h.sum()):g}, the square distance of the "
            f"params from the prior's mean is {float(square_norm):g}: expected positive numbers"
        )
    low, high = math.log(1e-30), math.log(1e30)
    while high - low > 1e-7:
        middle = (low + high) / 2
        decided = float((h / (h + math.exp(middle))).sum())
        low, high = (middle, high) if decided > math.exp(middle) * float(square_norm) else (low, middle)
    return float(f"{math.exp(low):.6g}")


def _spectrum(
    params: Tree, curvature: Curvature, prior_mean: Tree | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
    """All h, and ‖θ* - θ_0‖², in fp64."""
    h = torch.cat([x.flatten().double() for x in tree_leaves(curvature.eigenvalues)])
    mean = tree_map(torch.zeros_like, params) if prior_mean is None else in_form_of(params, prior_mean)
    pairs = zip(tree_leaves(params), tree_leaves(mean), strict=True)
    return h, torch.stack([(x.double() - m.double()).square().sum() for x, m in pairs]).sum()


# ---------------------------------------------------------------------------------------------------------- prediction


class LogitPosterior(NamedTuple):
    """The distribution of logits: N(mean, covariance) for each example.

    Args:
        mean: The logits of the model at θ*.
        covariance: J (G + λI)⁻¹ Jᵀ.

    >>> LogitPosterior(torch.zeros(1, 2), torch.zeros(1, 2, 2)).mean.shape
    torch.Size([1, 2])
    """

    mean: Float[Tensor, "n classes"]
    covariance: Float[Tensor, "n classes classes"]


def logit_posteriors(
    logits: ExampleLogits,
    params: Tree,
    curvature: Curvature,
    prior_precisions: Sequence[float],
    examples: Sequence[Batch],
    *,
    chunk_size: int | None = None,
) -> list[LogitPosterior]:
    """How far the logits of each example may be from those of θ*, for each of some priors: nearly all of the time goes
    to the Jacobian, which is computed once.

    Args:
        logits: The logits of one example.
        params: θ*.
        curvature: G there.
        prior_precisions: λ of each prior.
        examples: Batches of one row each, of any lengths, whose targets are not read.
        chunk_size: Examples that are computed at once. None takes those with `JACOBIAN_ELEMENTS` of Jacobians.

    Raises:
        InputError: if there are no examples, or a λ is not positive.

    Source: Immer et al. 2021, section 3, "the GLM predictive".

    >>> def logits(params, row):
    ...     return params["w"] * row.weights.sum()
    >>> row = Batch(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), torch.full((1, 1), 3.0))
    >>> curvature = Curvature({"w": torch.tensor([0.0, 8.0])}, lambda x: x, lambda x: x)
    >>> logit_posteriors(logits, {"w": torch.zeros(2)}, curvature, [1.0], [row])[0].covariance
    tensor([[[9., 0.],
             [0., 1.]]])
    """
    for precision in prior_precisions:
        if not precision > 0:
            raise InputError(f"a prior precision is {precision}: expected positive numbers")
    order: list[int] = []
    means: list[Tensor] = []
    covariances: list[Tensor] = []
    for indices, z, rows in _pull_back(logits, params, examples, _unit_vectors, chunk_size, JACOBIAN_ELEMENTS):
        jacobian = [vmap(curvature.rotate)(row) for row in rows]  # of each class
        covariance = z.new_zeros(len(prior_precisions), *z.shape, z.shape[-1])
        for h, *parts in zip(tree_leaves(curvature.eigenvalues), *map(tree_leaves, jacobian), strict=True):
            part = at_least_fp32(torch.stack(parts, 1)).flatten(2)
            products = [(part / (h.flatten() + precision)) @ part.mT for precision in prior_precisions]
            covariance = covariance + torch.stack(products)
        order += indices
        means.append(z)
        covariances.append(covariance)
    back = torch.tensor(order).argsort().to(means[0].device)
    mean = torch.cat(means)[back]
    return [LogitPosterior(mean, covariance[back]) for covariance in torch.cat(covariances, 1)]


def expected_probs(
    posterior: LogitPosterior, rng: torch.Generator, *, num_samples: int = 1000
) -> Float[Tensor, "n classes"]:
    """E[softmax(logits)], by samples that are the same for every example.

    Args:
        posterior: Of the logits.
        rng: A key.
        num_samples: Samples of the logits; an error of a probability is below 0.5 / √num_samples.

    >>> from fgpt.rng import key
    >>> sure = LogitPosterior(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2, 2))
    >>> unsure = sure._replace(covariance=100 * torch.eye(2)[None])
    >>> expected_probs(sure, key(0)), bool(expected_probs(unsure, key(0))[0, 0] < 0.7)
    (tensor([[0.9526, 0.0474]]), True)
    """
    mean, covariance = (at_least_fp32(x) for x in posterior)
    noise = torch.randn(num_samples, mean.shape[-1], generator=fold_in(rng, "logits"), device=rng.device).to(mean)
    h, basis = torch.linalg.eigh(covariance)
    root = basis * h.clamp(min=0).sqrt()[:, None, :]
    return (mean[:, None] + noise @ root.mT).softmax(-1).mean(1)


def sample_params(
    params: Tree, curvature: Curvature, prior_precision: float, rng: torch.Generator, *, scale: float = 1.0
) -> Tree:
    """θ* + (G + λI)^(-1/2) noise: a draw of the posterior. Most functions of it are better predicted by the linearized
    model, as the posterior is wide where only λ decides.

    Args:
        params: θ*.
        curvature: G there.
        prior_precision: λ.
        rng: A key.
        scale: What the noise is multiplied with.

    >>> from fgpt.rng import key
    >>> curvature = Curvature({"w": torch.full((10000,), 3.0)}, lambda x: x, lambda x: x)
    >>> round(float(sample_params({"w": torch.ones(10000)}, curvature, 1.0, key(0))["w"].std()), 2)
    0.5
    """
    vector, unravel = ravel(curvature.eigenvalues)
    noise = torch.randn(vector.shape, generator=fold_in(rng, "params"), device=rng.device).to(vector)
    step = curvature.rotate_back(unravel(scale * noise / (vector + prior_precision).sqrt()))
    return tree_map(lambda x, d: x + d.to(x.dtype), params, step)


# ------------------------------------------------------------------------------------------------------------ Jacobian


def _pull_back(
    logits: ExampleLogits,
    params: Tree,
    examples: Sequence[Batch],
    cotangents: Callable[[Float[Tensor, "n classes"]], Float[Tensor, "k n classes"]],
    chunk_size: int | None,
    max_elements: int = 0,
) -> Iterator[tuple[list[int], Float[Tensor, "n classes"], Iterator[Tree]]]:
    """Indices of examples of about one length, their logits, and Jᵀ u of each example for the k cotangents u of its
    logits, one after the other. Raises InputError if there are no examples.
    """
    size = sum(x.numel() for x in tree_leaves(params))  # of a tensor, too
    max_rows = CHUNK_ELEMENTS // size
    if max_elements and examples:  # the gradients of all classes are kept
        with torch.no_grad():
            max_rows = max_elements // (size * logits(params, examples[0]).numel())
    for indices, stacked in stacked_chunks(examples, size, max_rows, chunk_size):
        n = len(indices)
        copies = tree_map(lambda x, n=n: x.detach().expand(n, *x.shape).requires_grad_(), params)
        z = vmap(logits)(copies, stacked)
        yield indices, z.detach(), _vjps(z, copies, cotangents(z.detach()))


def _vjps(z: Tensor, copies: Tree, cotangents: Tensor) -> Iterator[Tree]:
    for i, u in enumerate(cotangents):
        last = i + 1 == len(cotangents)
        parts = torch.autograd.grad(z, tree_leaves(copies), u, retain_graph=not last, materialize_grads=True)
        yield unflatten_like(copies, list(parts))


def _roots(z: Float[Tensor, "n classes"]) -> Float[Tensor, "classes n classes"]:
    """u_c = √p_c (e_c - p), of which Σ_c u_c u_cᵀ = diag(p) - p pᵀ."""
    p = at_least_fp32(z).softmax(-1)
    return (p.sqrt()[..., None] * (torch.eye(p.shape[-1]).to(p) - p[:, None, :])).transpose(0, 1).to(z.dtype)


def _unit_vectors(z: Float[Tensor, "n classes"]) -> Float[Tensor, "classes n classes"]:
    return torch.eye(z.shape[-1]).to(z)[:, None, :].expand(-1, len(z), -1)
