"""Evaluations by several processes beside the same by one: prints whether results are equal, and the FLOPs of each.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/scripts/shared_evaluations.py RUN ..
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gloo_report import gloo_report
from lm_eval.api.instance import Instance
from torch.utils.flop_counter import FlopCounterMode

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.console import console
from fgpt.cli.evaluation.compare import generate_answers
from fgpt.cli.evaluation.lm_eval_model import Model
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.text import text_metrics
from fgpt.cli.tasks import task_type
from fgpt.distributed import alone, gather_objects
from fgpt.generation.sampling import SamplingParams
from fgpt.io import models
from fgpt.recipes import InstructionRecipe

TEXT = "Once upon a time there was a fox who liked to run. " * 40


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)  # pyright: ignore[reportArgumentType]
        for i, args in enumerate(arguments)
    ]


def evaluations() -> dict[str, Callable[[], Any]]:
    params, tokenizer = fgpt.load("nano"), models.tokenizer("nano")
    prompts = [tokenizer.encode(f"The number {i} is " * (1 + i % 4)) for i in range(80)]
    sampling = SamplingParams(temperature=1.0)
    choices = instances("loglikelihood", [(f"Tim has {i} ", ending) for i in range(9) for ending in ("cats", "dogs")])
    options: list[Any] = [{"until": ["."], "max_gen_toks": 5}, {"temperature": 1.0, "do_sample": True}]
    texts = instances("generate_until", [(f"Sue {i}", {"max_gen_toks": 4} | options[i % 2]) for i in range(10)])

    def lm_eval_model() -> Model:
        return Model(params, tokenizer, 2, world=fgpt.world())

    named: dict[str, Callable[[], Any]] = {
        "text": lambda: text_metrics(params, tokenizer, TEXT, window=64, stride=32, batch_size=2),
        "answers": lambda: generate_answers(params, tokenizer, prompts, range(80), 4, sampling, 3),
        "lm-eval's likelihoods": lambda: lm_eval_model().loglikelihood(choices, disable_tqdm=True),
        "lm-eval's texts": lambda: lm_eval_model().generate_until(texts, disable_tqdm=True),
    }
    for name in sys.argv[1:]:
        folder = Path(name)
        recipe = run_dir.read_run(folder)
        answers = 80 if type(recipe) is InstructionRecipe else None
        run_options = RunEvaluationOptions(num_generations=answers, batch_size=2)
        named[folder.name] = lambda r=recipe, f=folder, o=run_options: task_type(r).evaluate(r, f, o)
    return named


def main() -> None:
    console.quiet = True
    with gloo_report() as report:
        for name, evaluate in evaluations().items():
            with FlopCounterMode(display=False) as shared:
                together = evaluate()
            with alone(), FlopCounterMode(display=False) as whole:
                expected = evaluate()
            flops = gather_objects(shared.get_total_flops())
            equal = gather_objects(together == expected)
            report[name] = {"equal": all(equal), "flops": flops, "alone": whole.get_total_flops()}


if __name__ == "__main__":
    main()
