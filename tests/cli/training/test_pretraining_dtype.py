"""Pretraining in bfloat16: products in bfloat16, what is trained and its gradients in float32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pretraining import SHORT_PRETRAINING, TINY_SIZE
from torch.func import grad

import fgpt
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.tasks import build_task
from fgpt.cli.tasks.pretraining import cast
from fgpt.losses import Batch, nll
from fgpt.optim import global_norm
from fgpt.recipes import find
from fgpt.tree import astype, leaves, tree_map


@pytest.mark.slow
def test_the_losses_are_those_of_float32(texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    curves = []
    data = ["--data", str(texts[0]), "--heldout", str(texts[1]), "--peak-tflops", "0.05", "--eval-every", "16"]
    for dtype in ("float32", "bfloat16"):
        options = ["--dtype", dtype, "--name", dtype, "--out", str(tmp_path)]
        assert main(["train", "tinytiny-pretrain", *data, *TINY_SIZE, *SHORT_PRETRAINING, *options]) == 0
        curves.append([line["loss"] for line in read_metrics(tmp_path / dtype / "metrics.jsonl")])
        assert f"all trained; {dtype} on cpu" in " ".join(capsys.readouterr().err.split())
        assert json.loads((tmp_path / dtype / "run.json").read_text())["dtype"] == dtype
    assert curves[0][-1] < curves[0][0] - 1
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert curves[1] != curves[0]


def test_a_step_trains_float32(texts: tuple[Path, Path]):
    recipe: Any = find("tinytiny-pretrain")
    sizes = {"tokenizer": "nano", "vocab": 4100, "n_layer": 1, "n_head": 2, "d_model": 32, "max_seq_len": 64}
    data = {"data": (texts[0],), "heldout": texts[1], "peak_tflops": 0.05, "compile": False}
    job = build_task(replace(recipe, dtype="bfloat16", micro_batch_size=2, **sizes, **data)).job
    state, _ = job.train_step(job.initial_state.take(), next(job.batches(0)))
    assert {x.dtype for x in leaves([state.trainable, state.opt_state.mu, state.opt_state.nu]).values()} == {
        torch.float32
    }


def test_the_gradient_is_that_of_float64():
    """To the rounding of bfloat16, 2**-8, in every leaf: also where a token occurs hundreds of times."""
    cfg = fgpt.Config(n_layer=2, n_head=2, d_model=32, n_ctx=64, vocab_size=64, d_mlp=128)
    params = tree_map(lambda x: x + 0.02 * torch.randn(x.shape, generator=fgpt.key(2)), fgpt.init(cfg, fgpt.key(0)))
    tokens = torch.randint(0, 5, (8, 65), generator=fgpt.key(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(8, 64))

    def gradient(dtype: torch.dtype, tree: Any) -> Any:
        return grad(lambda p: nll(cast(p, dtype), batch)[0])(tree)

    exact, ours = gradient(torch.float64, astype(params, torch.float64)), gradient(torch.bfloat16, params)
    assert {x.dtype for x in leaves(ours).values()} == {torch.float32}
    total = float(global_norm(exact))
    for path, x in leaves(ours).items():
        expected = leaves(exact)[path]
        error = float((x.double() - expected).norm())
        assert error <= 0.03 * float(expected.norm()) + 1e-3 * total, path
    difference = tree_map(lambda a, b: a.double() - b, ours, exact)
    assert float(global_norm(difference)) < 0.015 * total
