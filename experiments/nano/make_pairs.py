"""Pairs of answers for `dpo-nano` and judged answers for `kto-nano`, from a run's own samples, scored by what the
instructions of the nano tasks demand.

    python -m experiments.nano.make_pairs runs/lora-nano pairs.jsonl --judged judged.jsonl

A line is {"prompt": .., "chosen": .., "rejected": ..}: of the samples of one instruction, the one with most of its
demands met and the one with fewest. An instruction whose samples all score the same gives no pair. A line of judged
answers is {"prompt": .., "completion": .., "label": ..}: true for an answer that meets every demand, false for one that
meets at most half of them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from fgpt.cli.evaluation.compare import Answer, generate_answers
from fgpt.cli.evaluation.metrics.nano import requirements_met
from fgpt.cli.inference.generation import LoadedRun, load_run
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.cli.training.nano_rows import Task, read_tasks
from fgpt.data.prompt_templates import encode_prompt, template
from fgpt.errors import InputError
from fgpt.generation.sampling import SamplingParams
from fgpt.io.files import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="an instruction-tuned run on the nano tasks")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="answers to each instruction")
    parser.add_argument("--limit", type=int, help="instructions; all by default")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--judged", type=Path, help="a file for single answers with labels, besides")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tasks = read_tasks(NANO_TASKS)[: options.limit]
    answers = sample(load_run(options.run), tasks, options.samples, options.temperature, options.seed)
    files = [(options.out, pairs)] + ([(options.judged, judge)] if options.judged else [])
    for path, lines_of in files:
        lines = list(lines_of(tasks, answers))
        write(path, "".join(json.dumps(line) + "\n" for line in lines))
        print(f"{len(lines)} lines from {len(tasks)} instructions with {options.samples} answers each: {path}")


def sample(run: LoadedRun, tasks: list[Task], num_samples: int, temperature: float, seed: int) -> list[list[Answer]]:
    """`num_samples` answers to each task."""
    prompts = [encode_prompt(task, template(run.recipe.template), run.tokenizer) for task in tasks]
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    order = sorted(range(len(repeated)), key=lambda i: (len(repeated[i]), i))
    sampling, limit = SamplingParams(temperature=temperature), run.recipe.max_new_tokens
    answers = generate_answers(run.params, run.tokenizer, repeated, order, limit, sampling, seed)
    return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]


def points(task: Task, answer: Answer) -> float:
    """The share of the task's demands that an answer meets."""
    met = requirements_met(task, answer.text, answer.finished)
    return sum(met.values()) / len(met)


def prompt(task: Task) -> str:
    """The instruction and its input as one text, which the template `plain` makes the same prompt of."""
    return f"{task.instruction}\n\nInput: {task.input}" if task.input else task.instruction


def pairs(tasks: list[Task], answers: list[list[Answer]]) -> Iterator[dict[str, str]]:
    for task, group in zip(tasks, answers, strict=True):
        finished = [answer for answer in group if answer.finished and answer.text]
        if len(finished) < 2:
            continue
        scores = [points(task, answer) for answer in finished]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if scores[best] > scores[worst]:
            yield {"prompt": prompt(task), "chosen": finished[best].text, "rejected": finished[worst].text}


def judge(tasks: list[Task], answers: list[list[Answer]]) -> Iterator[dict[str, str | bool]]:
    for task, group in zip(tasks, answers, strict=True):
        for answer in group:
            share = points(task, answer)
            if answer.finished and answer.text and (share == 1 or share <= 0.5):
                yield {"prompt": prompt(task), "completion": answer.text, "label": share == 1}


if __name__ == "__main__":
    try:
        main()
    except InputError as err:
        sys.exit(f"error: {err}")
