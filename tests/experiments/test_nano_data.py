"""nano's instructions: what the embedded data are, and how they are made."""

import re
from collections import Counter
from pathlib import Path

import pytest
from builders import ROOT, SharedData

from experiments.nano import make_tasks as make_nano_tasks
from experiments.nano import tales as nano_tales
from fgpt.cli.evaluation.metrics.nano import Score, score
from fgpt.cli.training.nano_rows import STORY, Task, read_tasks
from fgpt.data import documents, instruction_datasets
from fgpt.data.prompt_templates import encode, template
from fgpt.errors import InputError
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = ROOT / "fgpt" / "nano"


@pytest.fixture(scope="module")
def heldout() -> list[Task]:
    return read_tasks(NANO / "heldout.jsonl")


def points(tasks: list[Task], responses: list[str], finished: bool = True) -> float:
    return score(tasks, responses, [finished] * len(tasks)).points


# ------------------------------------------------------------------------------------------------- scores by hand


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"instruction": "a", "input": "", "output": "b", "kind": "who", "requires": {"name": "b"}}']
)
def test_a_file_that_holds_no_tasks_is_one_line(tmp_path: Path, line: str):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(InputError, match="expected rows as"):
        read_tasks(tmp_path / "rows.jsonl")


# ------------------------------------------------------------------------------------------------ the embedded rows


def test_every_row_answers_its_own_instruction(tasks: list[Task], heldout: list[Task]):
    for rows in (tasks, heldout):
        got: Score = score(rows, [task.output for task in rows], [True] * len(rows))
        assert got.points == 100
        assert set(got.by_requirement.values()) == {100}


def test_what_does_not_answer_scores_low(heldout: list[Task]):
    assert points(heldout, [""] * len(heldout)) == 0
    assert points(heldout, [template("plain").prompt(task) for task in heldout]) == 0
    assert points(heldout, [f"{task.instruction} {task.input}" for task in heldout]) == 0
    others = [task.output for task in heldout if task.kind == STORY]
    assert points(heldout, [others[(i + 1) % len(others)] for i in range(len(heldout))]) < 25
    assert points(heldout, ["Once upon a time, there was a little girl named Lily. " * 12] * len(heldout), False) == 0
    # a story broken off may still hold its hero; an answer broken off holds nothing
    assert points(heldout, [task.output for task in heldout], finished=False) < 40


def test_no_constant_answer_scores(heldout: list[Task], tasks: list[Task]):
    common = [text for text, _ in Counter(task.output for task in tasks if task.kind != STORY).most_common(20)]
    assert max(points(heldout, [text] * len(heldout)) for text in common) < 3
    for rows in (tasks, heldout):
        answers = [task.output for task in rows if task.kind != STORY]
        assert max(Counter(answers).values()) <= 0.08 * len(answers)


def test_size_and_counts(tasks: list[Task], heldout: list[Task]):
    assert sum((NANO / name).stat().st_size for name in ("tasks.jsonl", "heldout.jsonl")) <= 1.5e6
    assert len(tasks) == 1500
    assert 100 <= len(heldout) <= 120
    for rows in (tasks, heldout):
        assert {task.kind for task in rows} == set(make_nano_tasks.SHARES)
        assert 0.5 < sum(task.kind == STORY for task in rows) / len(rows) < 0.6


def test_tokens_of_a_row_and_of_all(tasks: list[Task], heldout: list[Task]):
    tokenizer = from_ranks(NANO / RANKS)
    lengths = [len(encode(task, template("plain"), tokenizer).tokens) for task in [*tasks, *heldout]]
    assert max(lengths) <= 220
    assert sum(lengths) <= 200_000
    answers = [len(tokenizer.encode(task.output)) for task in heldout]
    assert max(answers) < 150


def test_held_out_rows_are_held_out(tasks: list[Task], heldout: list[Task]):
    prompts = [(task.instruction, task.input) for task in [*tasks, *heldout]]
    assert len(set(prompts)) == len(prompts)
    trained = {text for task in tasks for text in (task.input, task.output)} - {""}
    assert not trained & {task.output for task in heldout if task.kind == STORY}
    assert not trained & {task.input for task in heldout}


def test_no_held_out_story_is_trained_on(tasks: list[Task], shared_data: SharedData):
    """The stories that the rows were made of are split as nano's own data is."""
    stories = documents.read(shared_data("stories/stories-valid.txt"))

    def bare(text: str) -> str:
        """A text without its opening and its hero, which the maker changes."""
        return re.sub(r"[A-Z]\w*|\b(?:an?|girl|boy)\b", "", text.partition(". ")[2].partition("\n")[0])[:120]

    heldout_texts = {bare(story) for story in stories}
    assert not [
        task.output
        for task in tasks
        if task.kind == STORY and len(bare(task.output)) > 60 and bare(task.output) in heldout_texts
    ]


def test_other_readers_see_plain_rows(heldout: list[Task]):
    rows = instruction_datasets.load_rows(NANO / "heldout.jsonl")
    assert [(row.instruction, row.input, row.output) for row in rows] == [
        (task.instruction, task.input, task.output) for task in heldout
    ]


# -------------------------------------------------------------------------------------------------------- the maker


TOYS = "ball kite boat drum doll book rope cart".split()  # noqa: SIM905
PLACES = "park zoo lake farm beach store garden forest".split()  # noqa: SIM905


def made_up_story(i: int) -> str:
    toy, place, kind = TOYS[i % 8], PLACES[i // 8 % 8], ("girl", "boy", "cat")[i % 3]
    she, her = ("She", "her") if kind == "girl" else ("He", "his")
    middle = (
        f"One day, {she.lower()} went to the {place} with {her} mom.",
        f"One day, {she.lower()} found a red {toy} in the grass.",
        f"{she} was very {('sad', 'happy', 'scared')[i % 3]}.",
        f"{she} loved to play with {her} {toy} number {i}.",
    )[i // 3 % 4]
    return (
        f"Once upon a time, there was a little {kind} named Pat. {middle} The sun was warm on day {i}.\n"
        f"Pat looked at the {toy} for a long time and then took it home to show it to {her} dad. They smiled and made "
        f"some soup in the kitchen."
    )


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    paths = {"stories": tmp_path / "stories.txt", "held_out": tmp_path / "held-out.txt"}
    for start, path in zip((0, 600), paths.values(), strict=True):
        path.write_text("\n<|endoftext|>\n".join(made_up_story(i) for i in range(start, start + 300)))
    return paths


def test_the_maker_is_a_function_of_the_stories(tmp_path: Path, texts: dict[str, Path]):
    files = []
    for name in ("one", "two"):
        make_nano_tasks.main(tmp_path / name, (texts["stories"],), texts["held_out"], rows=40, held_out_rows=20)
        files.append([(tmp_path / name / file).read_bytes() for file in ("tasks.jsonl", "heldout.jsonl")])
    assert files[0] == files[1]
    rows, remaining = read_tasks(tmp_path / "one" / "tasks.jsonl"), read_tasks(tmp_path / "one" / "heldout.jsonl")
    assert (len(rows), len(remaining)) == (40, 20)
    assert points(rows, [task.output for task in rows]) == 100
    assert not {(task.instruction, task.input) for task in rows} & {
        (task.instruction, task.input) for task in remaining
    }


def test_too_few_stories_are_one_line(tmp_path: Path, texts: dict[str, Path]):
    with pytest.raises(InputError, match="give more stories, or ask for fewer rows"):
        make_nano_tasks.main(tmp_path / "out", (texts["stories"],), texts["held_out"], rows=5000, held_out_rows=20)
    assert not (tmp_path / "out").exists()


def test_a_recast_tale_keeps_its_grammar():
    tale = nano_tales.parse("Once upon a time there was a girl named Lily. Lily's dog saw Lilypad. The girl sang.")
    assert tale is not None
    got = nano_tales.rename(nano_tales.become(tale, "fox"), "Mia")
    assert got.text == "Once upon a time, there was a fox named Mia. Mia's dog saw Lilypad. The fox sang."


@pytest.mark.parametrize(
    "story",
    [
        "Once upon a time, there was a big ship. It sailed.",
        "Once upon a time, there was a little girl named Mr. Bob. He ran.",
        "Once upon a time, there was a dream named Lily. She ran.",
        "One day, Tim ran.",
    ],
)
def test_a_story_without_a_hero_of_a_known_kind_is_left_out(story: str):
    assert nano_tales.parse(story) is None


def test_sentences_do_not_end_inside_quotes():
    text = 'Tim said, "Look! A boat!" Then he ran. "No!" she said. The end.'
    assert nano_tales.sentences(text) == ['Tim said, "Look! A boat!"', "Then he ran.", '"No!" she said.', "The end."]
