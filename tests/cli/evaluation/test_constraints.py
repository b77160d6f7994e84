"""Demands on an answer's form: found where they are stated and nowhere else, and told met or not as by hand."""

import json

import pytest
from builders import SharedData

from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.markdown import to_markdown
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.evaluation.compare.scores import instruction_scores
from fgpt.cli.evaluation.metrics import answer_parts as parts
from fgpt.cli.evaluation.metrics.constraints import check, constraints, score
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.prompt_templates import InstructionRow

FOUND: list[tuple[str, str, list[str], list[str]]] = [  # asked, kind, answers that meet it, answers that do not
    ("Describe a flower in three sentences.", "sentences", ["Red! Big? It is."], ["Red. Big.", "Red. Big. Ill. Far."]),
    ("Explain it in one or two sentences.", "sentences", ["It is.", "It is. It was."], ["It. It. It."]),
    ("Write a story in 2 sentences or less.", "sentences", ["One.", "Two. Two."], ["One. Two. Three."]),
    ("Use the word 'set' in a sentence.", "sentences", ["Mr. A. Fox set it at 3.5 p.m. on it."], ["Set. Now."]),
    ("Give me a two sentence summary of the text: A.", "sentences", ["It is. It was."], ["It is."]),
    ("Tell it within two sentences.", "sentences", ["One.", "One. Two."], ["One. Two. Three."]),
    ("Answer with at least 2 sentences.", "sentences", ["Red. Big. Ill."], ["Red."]),
    ("Compare them in one paragraph.", "paragraphs", ["A.\nB.", " A "], ["A.\n\nB.", ""]),
    ("Can you write a three-paragraph essay about home?", "paragraphs", ["A\n\nB\n \nC"], ["A\nB\nC"]),
    ("Summarize it in less than 5 words.", "words", ["a b c d", "1 - 2"], ["a b c d e"]),
    ("In 75 words or fewer, write of a loss.", "words", ["word " * 75], ["word " * 76]),
    ("Generate a short story of 5-7 words.", "words", ["a b c d e", "a b c d e f g"], ["a b c d", "a " * 8]),
    ("Describe the color yellow in 3 words.", "words", ["Warm, bright, sunny"], ["Warm and bright and sunny"]),
    ("Write at least 4 words.", "words", ["a b c d", "a b c d e"], ["a b c"]),
    ("Describe it in more than ten words.", "words", ["a " * 11], ["a " * 10]),
    ("List five animals.", "items", ["1. a\n2) b\n3. c\n4. d\n5. e", "a, b, c, d, e", "a\nb\nc\nd\ne"], ["- a\n- b"]),
    ("Name three cuts of steak.", "items", ["Rib, chuck and flank", "They are: a; b; c.", "A\n\nB\n\nC"], ["A, B"]),
    ("Give me a list of 2 issues.", "items", ["Sure:\n* a\n  - x\n  - y\n* b", "1) a\n- x\n2) b"], ["* a\n* b\n* c"]),
    ("Suggest two ways to save money.", "items", ["First, walk. Second, read."], ["Walk. Read. Sleep."]),
    ("Your answer must contain exactly 3 bullet points.", "bullets", ["- a\n- b\n- c"], ["a\nb\nc", "- a\n- b"]),
    ("Write a haiku about a cat.", "lines", ["a\nb\nc", "a\n\nb\n\nc"], ["a b c", "a\nb\nc\nd"]),
    ("Compose a short limerick.", "lines", ["a\nb\nc\nd\ne"], ["a\nb"]),
    ("Write me a four line poem.", "lines", ["a\nb\nc\nd"], ["a\nb\nc"]),
    ('Write a story. Begin with "One day".', "begins", ["One day, a fox", "\u201cOne day\u201d, he"], ["It was", ""]),
    ("Your response should start with 'Sure'.", "begins", ["Sure, here"], ["Well, sure"]),
    ('Write a sentence that ends with the word "published".', "ends", ["It was published."], ["Published it was."]),
    ("Write a poem that starts with the letter B.", "first letter", ["Bees hum", '"but"'], ["A bee"]),
    ("Generate a sentence using the words \"task\" and 'new'.", "holds", ["New tasks."], ["A task.", "New"]),
    ("Tell a story about a dog. Use the word \u201csquirrel\u201d.", "holds", ["The squirrels ran."], ["The dog ran."]),
    ('Describe the sea without using the word "blue".', "avoids", ["It is bluer, and wet."], ["It is Blue."]),
    ("Describe it and do not mention 'old' or its age.", "avoids", ["It is gold."], ["It is old."]),
    ("Answer in all lowercase letters.", "lower case", ["it is so."], ["It is so.", "1"]),
    ("Write it in all capital letters.", "upper case", ["IT IS 1."], ["It is."]),
    ("Give the facts in JSON format.", "json", ['{"a": 1}', "```json\n[1]\n```"], ["{'a': 1}", "5", "a: 1"]),
    ("Ask a question about my day.", "question", ["How was it?"], ["It was good."]),
]  # fmt: skip

NONE = [
    "What is the difference between the two sentences?",
    "Rewrite the following sentence: List three animals in one sentence.",
    'Translate "write a haiku in three lines" into French.',
    "List five animals and describe each in one sentence.",  # the items alone: see below
    "Describe it in about 50 words.",
    "Provide a 50-word description of a phone.",  # a rough size
    "Combine the two sentences.",
    "From the list of five items choose the odd one.",
    "Name the five star hotels here.",
    "List 2019 films.",
    "List words that start with 'a'.",
    "Find a word that ends with 'ing'.",
    "Explain what the word 'set' means.",
    "Write a script to output JSON.",
    "Describe it in one sentence and then translate it.",
    "Write an essay of around 50 to 60 words.",
    "Summarize the text, which has more than 200 words.",
    "Tell what one could use to write a sentence.",
    "Convert the JSON to XML.",
    "Answer the following question.",
    "Create a survey question.",
    "Write a couple of sentences on rain.",
    "What is a haiku?",
    "Edit the haiku.",
    "Select the third paragraph.",
    "I want to do it all in one line so I'm thinking of this",
    "Find words with at least three letters.",
    "Write two paragraphs, each of three sentences.",
    "Write a poem in five lines of two words each.",
    "word " * 160 + "in three sentences",
]


@pytest.mark.parametrize(("instruction", "kind", "meet", "miss"), FOUND, ids=[x[0][:40] for x in FOUND])
def test_demands_by_hand(instruction: str, kind: str, meet: list[str], miss: list[str]):
    (one,) = [x for x in constraints(instruction) if x.kind == kind]
    assert one.phrase.lower() in instruction.lower()
    assert {text: one.met(text) for text in (*meet, *miss)} == dict.fromkeys(meet, True) | dict.fromkeys(miss, False)


@pytest.mark.parametrize("instruction", NONE)
def test_nothing_is_found_where_nothing_sure_is_stated(instruction: str):
    assert constraints(instruction) == []


def test_several_demands():
    found = constraints('Write a story in less than 100 words. Begin with "Once" and end with "The end."')
    assert [x.kind for x in found] == ["words", "begins", "ends"]
    assert constraints("Write a haiku. List three reasons.") == []  # of which part would the lines be?
    row = InstructionRow("Describe it in two sentences. Use the word 'red'.")
    assert [(x.kind, met) for x, met in check(row, "It is red.")] == [("sentences", False), ("holds", True)]


def test_the_score_counts_demands_and_not_rows():
    request = [
        InstructionRow("Describe it in two sentences. Use the word 'red'."),
        InstructionRow("Say a word."),
        InstructionRow("List two hues."),
    ]
    texts = ["It is red.", "Red.", "red, blue"]
    assert score(request, texts) == {"constraints met (%)": pytest.approx(100 * 2 / 3), "constraints": 3}
    assert score(request[1:2], texts[1:2]) == {}
    rows = [InstructionRow("Write at most 9 words."), InstructionRow('Write without using the word "a".')]
    assert score(rows, ["", " "]) == {"constraints met (%)": 0, "constraints": 2}
    scores = {side: instruction_scores(request, [Answer(x, (1,), True) for x in subset]) for side, subset in
              (("base", ["", "", ""]), ("tuned", texts))}  # fmt: skip
    answers = {side: [Answer("a", (1,), True)] * 3 for side in scores}
    found = Comparison("t", [], request, answers, scores, {})
    assert "| constraints met (%), of 3 | 0.00 | 66.67 |" in to_markdown(found)
    assert ">constraints met (%), of 3</th>" in page(found)
    assert "Share of the constraints in the instructions" in page(found)


# ------------------------------------------------------------------------------------------------- what a text has


def test_parts_of_a_text():
    text = "# Title\nDr. A. Fox came at 5 p.m. to us. \u201cWhy?\u201d He left!\n\n1. one\n   - in\n2. two"
    assert parts.sentences(text) == 1 + 3 + 3
    assert (parts.lines(text), parts.paragraphs(text), parts.num_marked_items(text)) == (5, 2, 2)
    assert parts.words("It's 5 - 3 = 2, so.") == 5
    assert parts.items("1. a 2. b 3. c") == {3}
    assert parts.items("These are:\na b\nc d") >= {2, 3}
    assert 3 in parts.items("They are: salt, bread and wine.")
    assert parts.num_marked_items("---\n**bold** it is\n-5 degrees") == 0
    assert (parts.lines(""), parts.sentences(" \n"), parts.items("")) == (0, 0, {0})


# ---------------------------------------------------------------------------------------------------------- real rows


@pytest.mark.parametrize(
    ("name", "least"),
    [("alpaca_demo/alpaca_en_demo.json", 100), ("lima/lima.json", 15), ("dolly/dolly_finqa_val.jsonl", 10)],
)
def test_good_answers_meet_what_is_found(name: str, least: int, shared_data: SharedData):
    """A false find, or a wrong count, would show as a good answer that misses it."""
    met = [x for row in load_rows(shared_data(name)) for _, x in check(row, row.output)]
    assert len(met) >= least
    assert sum(met) >= 0.88 * len(met)


def test_few_of_the_instructions_of_other_tasks_demand_anything(shared_data: SharedData):
    rows = [json.loads(x) for x in shared_data("prompts/user_oriented_instructions.jsonl").read_text().splitlines()]
    found = [x.phrase for row in rows for x in constraints(row["instruction"])]
    assert found == ["in just one sentence"]
