"""One layer under LoRA, DoRA and IA3 is PEFT's."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from builders.adapters import assert_near
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

import fgpt
from fgpt.model import Linear
from fgpt.tree import leaves


def in_peft(config: Any, seed: int = 0) -> tuple[Any, dict[str, Tensor], Linear]:
    """One linear layer under PEFT, what PEFT trains there (moved from its start), and the layer as ours."""
    plain = nn.Linear(12, 9)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    layer = Linear(plain.weight.detach().clone(), plain.bias.detach().clone())
    model: Any = peft.get_peft_model(nn.Sequential(OrderedDict(lin=plain)), config)  # pyright: ignore
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    return model, trained, layer


def agree(model: Any, trained: Sequence[Tensor], layer: Linear, adapters: fgpt.Adapters) -> None:
    """Outputs, and the gradients of what is trained, in the order of the adapters' leaves."""
    x, u = torch.randn(4, 12, generator=fgpt.key(1)), torch.randn(4, 9, generator=fgpt.key(2))

    def ours(adapters: Any) -> tuple[Tensor, Tensor]:
        adapted = fgpt.adapt({"lin": layer}, adapters)["lin"]
        y = fgpt.linear(x, adapted.w, adapted.b)
        return (u * y.sin()).sum(), y

    peft_y = model(x)
    (u * peft_y.sin()).sum().backward()
    grads, y = grad(ours, has_aux=True)(adapters)
    assert_near(y, peft_y.detach())
    assert (y - F.linear(x, layer.w, layer.b)).abs().max() > 0.1  # pyright: ignore
    found = leaves(grads)
    assert len(found) == len(trained)
    for (path, g), t in zip(found.items(), trained, strict=True):
        assert t.grad is not None, path
        assert_near(g, t.grad.view(g.shape))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rs", [False, True])
def test_lora_and_dora_are_pefts_ranked_stable_and_not(dora: bool, rs: bool):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["lin"], use_dora=dora, use_rslora=rs)
    model, trained, layer = in_peft(config)
    a, b, *m = (trained[name] for name in sorted(trained))  # lora_A, lora_B, lora_magnitude_vector
    lora = fgpt.LoRA(a.detach(), b.detach(), 5.0, rs)
    assert lora.scale == pytest.approx(5 / 3**0.5 if rs else 5 / 3)
    agree(model, [a, b, *m], layer, {"lin": fgpt.DoRA(lora, m[0].detach()) if dora else lora})


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_is_pefts(feedforward: bool):
    """PEFT scales what a layer gives, its bias too, or what a feedforward layer takes."""
    chosen = ["lin"] if feedforward else []
    model, trained, layer = in_peft(peft.IA3Config(target_modules=["lin"], feedforward_modules=chosen))
    (scale,) = trained.values()
    l = scale.detach().flatten()  # noqa: E741
    agree(model, [scale], layer, {"lin": fgpt.IA3(col=l) if feedforward else fgpt.IA3(row=l)})
