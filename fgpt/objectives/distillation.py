"""Distillation: the student's next-token distribution approaches a teacher's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fgpt._typing import check_shapes
from fgpt.errors import InputError
from fgpt.kernels.precision import at_least_fp32
from fgpt.losses import Batch, at_loss, loss_hidden
from fgpt.model import GPT, logits


@check_shapes
def kl_divergences(
    teacher: Float[Tensor, "n vocab"], student: Float[Tensor, "n vocab"], *, temperature: float = 1.0
) -> Float[Tensor, " n"]:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)) of each row, in nats; the factor keeps gradients of one size.

    Args:
        teacher: Logits, a constant.
        student: Logits.
        temperature: T. A higher one gives unlikely tokens more weight.

    Raises:
        InputError: for a temperature that is not positive.

    Source: Hinton et al. 2015, section 2.

    >>> kl_divergences(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([0.])
    """
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}: expected a positive number")
    p = (at_least_fp32(teacher.detach()) / temperature).log_softmax(-1)
    q = (at_least_fp32(student) / temperature).log_softmax(-1)
    # Σ p (log p - log q) = Σ p (eᵈ - 1 - d) with d = log q - log p: no term is negative, however close both are.
    d = q - p
    near = p.exp() * (torch.expm1(d.clamp(max=1)) - d.clamp(max=1))
    far = q.exp() - p.exp() * (1 + d)
    return temperature**2 * torch.where(d < 1, near, far).sum(-1)


@check_shapes
def distillation(
    params: GPT,
    batch: Batch,
    teacher: GPT,
    *,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(Σ weight · loss, Σ weight), with the loss r · divergence + (1 - r) · nll, see `kl_divergences`. Logits are
    computed where the batch has a weight.

    Args:
        params: The student.
        batch: Tokens and their weights; with r = 1 the targets are not read.
        teacher: A model of the same vocabulary. It gets no gradient.
        temperature: T, of the divergence alone.
        kd_ratio: r, from 0 to 1: the teacher's share of the loss, the rest is the data's.
        remat: Activation checkpointing of the student.
        compile: Compile the student's transformer block.

    Raises:
        InputError: for models of different vocabularies, and for an r outside of 0 to 1.

    Source: Hinton et al. 2015, section 2.
    """
    if not 0 <= kd_ratio <= 1:
        raise InputError(f"kd_ratio is {kd_ratio}: expected 0 to 1")
    if params.cfg.vocab_size != teacher.cfg.vocab_size:
        raise InputError(
            f"the student has {params.cfg.vocab_size} tokens, the teacher {teacher.cfg.vocab_size}: expected one "
            "vocabulary"
        )
    with torch.no_grad():
        target = logits(teacher, loss_hidden(teacher, batch))
    student = logits(params, loss_hidden(params, batch, remat, compile))
    losses, weights = kl_divergences(target, student, temperature=temperature), at_loss(batch.weights, batch)
    if kd_ratio < 1:
        nll = F.cross_entropy(at_least_fp32(student), at_loss(batch.targets, batch), reduction="none")
        losses = kd_ratio * losses + (1 - kd_ratio) * nll
    return (weights * losses).sum(), weights.sum()
