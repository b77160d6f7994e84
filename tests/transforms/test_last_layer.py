"""A Bayesian last layer beside scikit-learn's logistic regression and explicit matrices."""

import numpy as np
import pytest
import torch
from builders import close
from sklearn.linear_model import LogisticRegression
from torch.func import hessian

import fgpt
from fgpt.transforms.laplace import curvature_of_matrix, log_evidence
from fgpt.transforms.last_layer import fit_last_layer

RNG = fgpt.key(0)
FEATURES = torch.randn(300, 5, generator=RNG).double()
TRUE_HEAD = torch.randn(3, 5, generator=RNG).double()
LABELS = torch.multinomial((FEATURES @ TRUE_HEAD.T).softmax(-1), 1, generator=RNG)[:, 0]


def negative_log_likelihood(w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(FEATURES @ w.T, LABELS, reduction="sum")


def test_it_is_the_regression_of_this_prior_with_its_curvature():
    layer = fit_last_layer(FEATURES, LABELS, torch.zeros(3, 5).double())
    reference = LogisticRegression(C=1 / layer.prior_precision, fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(FEATURES.numpy(), LABELS.numpy())
    close(layer.head, torch.from_numpy(np.asarray(reference.coef_)), 1e-4)
    columns = [layer.curvature.rotate(x.view(3, 5)) for x in torch.eye(15).double()]
    basis = torch.stack(columns, 1)
    matrix = basis.T @ layer.curvature.eigenvalues.diag() @ basis
    close(matrix, hessian(negative_log_likelihood)(layer.head).reshape(15, 15), 1e-8)


def test_its_precision_has_the_most_evidence_of_all_fits():
    """That of the whole fit, whose mode moves with the prior: the rounds follow its gradient but for d log det G."""
    best = fit_last_layer(FEATURES, LABELS, torch.zeros(3, 5).double())
    count = float((best.curvature.eigenvalues / (best.curvature.eigenvalues + best.prior_precision)).sum())
    assert best.prior_precision * float(best.head.square().sum()) == pytest.approx(count, rel=0.03)

    def evidence(precision: float) -> float:
        reference = LogisticRegression(C=1 / precision, fit_intercept=False, tol=1e-10, max_iter=10_000)
        w = torch.from_numpy(np.asarray(reference.fit(FEATURES.numpy(), LABELS.numpy()).coef_))
        curvature = curvature_of_matrix(hessian(negative_log_likelihood)(w).reshape(15, 15), w)
        return float(log_evidence(-negative_log_likelihood(w), w, curvature, precision))

    assert evidence(best.prior_precision) > max(evidence(best.prior_precision * x) for x in (0.2, 5.0))


def test_a_prior_around_another_head():
    mean = TRUE_HEAD - TRUE_HEAD.mean(0)
    near = fit_last_layer(FEATURES, LABELS, torch.zeros(3, 5).double(), prior_mean=mean)
    far = fit_last_layer(FEATURES, LABELS, torch.zeros(3, 5).double())
    assert near.prior_precision > far.prior_precision  # the labels are those of that head
    assert float((near.head - mean).norm()) < float((far.head - mean).norm())


def test_no_rows():
    with pytest.raises(fgpt.InputError, match="there are no rows: expected one row or more"):
        fit_last_layer(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2))
