"""Where shapes are checked: by the outermost function, in each thread, and never by a backward pass."""

import threading
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import fgpt
from fgpt._typing import check_shapes


@check_shapes
def inner(x: Float[Tensor, "a a"]) -> Float[Tensor, "a a"]:
    return x


@check_shapes
def outer(x: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    return inner(x)


def checks(x: Tensor) -> bool:
    """Whether `inner` refuses a matrix that is not square."""
    try:
        inner(x)
    except jaxtyping.TypeCheckError:
        return True
    return False


def test_the_outermost_function_checks_alone():
    oblong = torch.ones(2, 3)
    assert checks(oblong)
    assert outer(oblong) is oblong
    with pytest.raises(jaxtyping.TypeCheckError):
        outer(torch.ones(2))
    assert checks(oblong), "after an error and after a call there are checks again"


def test_another_thread_checks_meanwhile():
    found: list[bool] = []

    @check_shapes
    def wait_for_another(x: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
        thread = threading.Thread(target=lambda: found.append(checks(x)))
        thread.start()
        thread.join()
        return inner(x)

    wait_for_another(torch.ones(2, 3))
    assert found == [True]


class CheckInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * float(checks(torch.ones(2, 3)))


def test_a_backward_checks_nothing():
    x = torch.ones(2, requires_grad=True)
    y: Any = CheckInBackward.apply(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]
    assert checks(torch.ones(2, 3))


def test_a_model_checks_what_it_is_given(gpt: fgpt.GPT):
    with pytest.raises(jaxtyping.TypeCheckError):
        fgpt.hidden(gpt, torch.ones(1, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        fgpt.apply(gpt, torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.int64))
