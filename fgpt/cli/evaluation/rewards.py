"""Rewards of answers, as functions of their texts: what a GRPO recipe's `reward` names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fgpt.cli.evaluation.metrics.nano import is_story, requirements_met, words
from fgpt.cli.training.nano_rows import STORY, Task
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.objectives.number_reward import final_number, number_reward
from fgpt.objectives.rollouts import RewardFunction

PARTIAL = 0.5
"""Most that a demand counts that is not met."""


def nano_reward(task: Task, answer: str, finished: bool) -> float:
    """The share of a row's demands that an answer meets, as `metrics.nano.score` counts them; a demand that is met in
    part counts in part, up to `PARTIAL`: by the words that an answer shares with the right one (F1), the first of
    them and its length if it is finished, by the first words of an opening and the last ones of an ending.
    """
    met = requirements_met(task, answer, finished)
    if all(met.values()):
        return 1.0
    answer_words = words(answer)
    if task.kind != STORY:
        expected = words(task.requires["answer"])
        lengths = len(answer_words), len(expected)
        nearness = (
            _f1(answer_words, expected) + _common_start(answer_words, expected) + min(lengths) / max(lengths) * finished
        )
        return PARTIAL * nearness / 3
    if not is_story(answer, task.instruction):
        return 0.0
    degrees = {part: float(is_met) for part, is_met in met.items()}
    if not met.get("opening", True):
        degrees["opening"] = PARTIAL * _common_start(answer_words, words(task.requires["opening"]))
    if not met.get("ending", True) and finished:
        ending = words(task.requires["ending"])
        degrees["ending"] = PARTIAL * _common_start(answer_words[::-1], ending[::-1])
    return sum(degrees.values()) / len(degrees)


def _f1(answer: Sequence[str], expected: Sequence[str]) -> float:
    common = (Counter(answer) & Counter(expected)).total()
    return 2 * common / (len(answer) + len(expected))


def _common_start(answer: Sequence[str], expected: Sequence[str]) -> float:
    """The share of the expected words that a text begins with."""
    count = 0
    for word, other in zip(expected, answer, strict=False):
        if word != other:
            break
        count += 1
    return count / len(expected)


def gsm8k_reward(row: InstructionRow, answer: str, finished: bool) -> float:
    """Whether the final number of an answer is that of the row's output."""
    return number_reward(row.output, answer)


@dataclass(frozen=True)
class Reward:
    function: RewardFunction
    rows: str
    """The rows that it can judge."""

    def judges(self, row: InstructionRow) -> bool:
        return isinstance(row, Task) if self.function is nano_reward else final_number(row.output) is not None


REWARDS = {
    "nano": Reward(nano_reward, "the embedded instructions, --data nano"),
    "gsm8k": Reward(gsm8k_reward, "rows whose output has a number"),
}


def reward_function(name: str, rows: Sequence[Any]) -> RewardFunction:
    """The reward of that name. Raises InputError if it cannot judge one of the rows."""
    reward = REWARDS[name]
    for i, row in enumerate(rows, 1):
        if not reward.judges(row):
            raise InputError(
                f"--reward {name} cannot judge row {i} ({row.instruction[:60]!r}): it is for {reward.rows}"
            )
    return reward.function
