"""nano's instructions: what a score is worth."""

import pytest

from fgpt.cli.evaluation.metrics.nano import requirements_met, score
from fgpt.cli.training.nano_rows import STORY, Task
from fgpt.errors import InputError

TALE = (
    "Long ago, there was a fox named Tim. He lived by the river and loved to swim. One day, Tim saw a boat. He jumped "
    "in and went far away with his friend. They came home late and were glad. The end."
)
WANTED = {"name": "Tim", "kind": "fox", "word": "river", "opening": "Long ago", "ending": "The end."}
STORY_TASK = Task("Write a story about a fox named Tim.", "", TALE, STORY, WANTED)
WHO = Task("Who is it about?", "There was a fox named Tim.", "Tim.", "who", {"answer": "Tim."})


def test_a_story_that_does_all_that_is_asked():
    assert requirements_met(STORY_TASK, TALE, True) == dict.fromkeys([*WANTED, "finished"], True)


def test_each_requirement_is_lost_alone():
    changes = {
        "name": TALE.replace("Tim", "Timmy"),
        "kind": TALE.replace("fox", "foxes"),
        "word": TALE.replace("river", "lake"),
        "opening": TALE.replace("Long ago", "One day"),
        "ending": f"{TALE} Good night!",
    }
    for part, text in changes.items():
        assert [name for name, met in requirements_met(STORY_TASK, text, True).items() if not met] == [part]


def test_an_unfinished_story_has_no_ending():
    lost = [name for name, met in requirements_met(STORY_TASK, TALE, False).items() if not met]
    assert lost == ["ending", "finished"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Long ago, a fox named Tim swam in a river. The end.",
        f"{STORY_TASK.instruction} {TALE}",
        "Long ago, there was a fox named Tim by the river. " * 8 + "The end.",
    ],
    ids=["empty", "too short", "the instruction said back", "in circles"],
)
def test_what_is_no_story_meets_nothing(text: str):
    assert not any(requirements_met(STORY_TASK, text, True).values())


@pytest.mark.parametrize(
    ("text", "finished", "right"),
    [
        ("Tim.", True, True),
        (" tim", True, True),
        ("Tim.", False, False),
        ("Tim. He is a fox.", True, False),
        ("Timmy.", True, False),
        ("", True, False),
    ],
)
def test_an_answer_is_compared_whole(text: str, finished: bool, right: bool):
    assert requirements_met(WHO, text, finished) == {"answer": right}


def test_points_are_means_over_rows():
    # the story meets 4 of its 6 requirements; the answer its only one
    got = score([STORY_TASK, WHO], [TALE, "Tim"], [False, True])
    assert got.points == pytest.approx((100 * 4 / 6 + 100) / 2)
    assert got.by_kind == pytest.approx({STORY: 100 * 4 / 6, "who": 100})
    assert got.by_requirement == {**dict.fromkeys(WANTED, 100), "ending": 0, "finished": 0, "answer": 100}


@pytest.mark.parametrize(("tasks", "responses"), [([], []), ([WHO], [])])
def test_a_score_wants_one_response_a_row(tasks: list[Task], responses: list[str]):
    with pytest.raises(InputError, match="expected one response"):
        score(tasks, responses, [True] * len(responses))
