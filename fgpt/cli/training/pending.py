"""The metrics of a step on their way from the device: they are read when the next step is under way."""

import math

import torch

from fgpt.cli.metrics_log import Line
from fgpt.errors import InputError
from fgpt.train_step import Metrics

SAMPLED_TOKENS = "sampled_tokens"
"""The figure of a step that samples what it learns from: the tokens of those samples."""


class PendingMetrics:
    """The metrics of a step that has been launched. It holds a few numbers of it, and nothing of its state.

    The copy to the host starts at once, so that reading it waits for this step and not for one launched later.
    """

    def __init__(self, step: int, metrics: Metrics, *, lr: float, tokens: int) -> None:
        self.step, self.lr, self.tokens = step, lr, tokens
        others = metrics.others or {}
        self._others = tuple(others)
        numbers = (metrics.loss, metrics.grad_norm, metrics.weight, *others.values())
        values = torch.stack([x.detach().double() for x in numbers])
        self._values = values.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Line:
        """Step, loss, gradient norm, learning rate, weight and other figures, when the device has computed them.

        Raises InputError if the loss or the norm is not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, weight, *others = self._values.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(
                f"the loss became {loss} (gradient norm {norm}) at step {self.step} with lr {self.lr:.2g}: expected "
                "finite numbers; lower --lr or raise --warmup-steps"
            )
        line = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": self.lr, "weight": weight}
        return line | dict(zip(self._others, others, strict=True))
