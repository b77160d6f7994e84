"""A comparison as one page of HTML, which needs no other file: scores in columns, answers in cards, light or dark."""

import html

from fgpt.cli.evaluation.compare.results import Answer, Comparison, best
from fgpt.cli.evaluation.metrics.text import repeated
from fgpt.data.prompt_templates import InstructionRow

LOOPS = 30.0
"""Percent of repeated 4-grams from which a card says so."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #fff; --ink: #1d2733; --soft: #5a6877; --line: #dce2e9; --warn: #a2441a; --good: #e6f2ea;
  --c0: #7b8794; --c1: #1f6fb8; --c2: #b4611a; --c3: #2e8a57; --c4: #8a4fb0; --c5: #b03a56 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --card: #1c2229; --ink: #e3e8ee; --soft: #98a5b3; --line: #323b45; --warn: #eda07a; --good: #1d3a2a;
  --c0: #93a0ae; --c1: #62aef0; --c2: #e79a55; --c3: #62c48d; --c4: #c191e6; --c5: #ee8aa1 } }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1500px; padding: 2rem clamp(1rem, 3vw, 2.5rem) 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere }
.about { color: var(--soft); margin: 0 0 1.5rem; padding: 0; list-style: none }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  width: fit-content; max-width: 100%; margin-bottom: 2.5rem }
table { border-collapse: collapse }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap }
thead th { vertical-align: bottom; white-space: normal; overflow-wrap: break-word; min-width: 5.5rem; max-width: 14rem }
tbody th, thead th:first-child { text-align: left; font-weight: 400 }
tbody th { position: sticky; left: 0; background: var(--card); white-space: normal; min-width: min(19rem, 40vw) }
tbody tr:last-child > * { border-bottom: 0 }
.best { background: var(--good); font-weight: 650 }
.side { color: var(--c); font-weight: 650 }
.side::before { content: ""; display: inline-block; width: .6em; height: .6em; border-radius: 50%;
  background: var(--c); margin-right: .45em }
section { margin-bottom: 2.4rem }
h2 { font-size: 1.05rem; line-height: 1.4; margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
h2 span { color: var(--soft); font-weight: 400; margin-right: .5em }
.input { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); border-left: 3px solid var(--line);
  margin: 0 0 .8rem; padding-left: .8rem; max-width: 75ch }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)) }
article { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--c); border-radius: 10px;
  padding: .7rem .95rem .85rem; min-width: 0 }
article header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem .8rem;
  margin-bottom: .4rem }
.side { overflow-wrap: anywhere } .note { color: var(--soft); font-size: .85em } .warn { color: var(--warn) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 } .none { color: var(--soft); font-style: italic }
.reference { --c: var(--line); background: none }
details { color: var(--soft) } dt { font-weight: 650; margin-top: .5rem } dd { margin: 0 }
@media print { body { background: none } article, .wide { break-inside: avoid } }
"""

MEANINGS = {
    "points": "What the prompts ask for and the answers hold, as far as a text alone can show it.",
    "FinQA exact match": "FinQA answers whose number is the reference's, to its decimals, or their yes or no.",
    "constraints met": "Of what the instructions demand of the answers' form (in three sentences, as a haiku), as far "
    "as a count can tell; constraints are how many such demands there are.",
    "response loss": "Of the prompts' own answers, not of those written here; perplexity is its exponential.",
    "ROUGE-L": "Words shared with the prompts' own answers, in their order (F1).",
    "ended by the model": "Answers that came to their end within the limit; others are cut.",
    "repeated 4-grams": "Four words in a row that occurred before in the same answer; the mean over answers.",
    "distinct": "Different words, or pairs of words, among those of all answers together; longer answers have fewer.",
    "perplexity of the answers": "How unlikely the base finds what was written, given the prompt: far above its own "
    "column, a text that it would hardly write; far below, one that goes in circles.",
}
"""What scores mean that have these words in their names."""


def page(found: Comparison) -> str:
    """The whole comparison. All text in it is escaped."""
    title = html.escape(found.title)
    about = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found.about)
    sections = "\n".join(f"<section>{answers(i, row, found)}</section>" for i, row in enumerate(found.rows))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f'<body><h1>{title}</h1><ul class="about">{about}</ul>\n{scores_table(found)}\n{sections}\n'
        f"</body></html>\n"
    )


def scores_table(found: Comparison) -> str:
    heads = "".join(f'<th scope="col">{side_name(i, side)}</th>' for i, side in enumerate(found.sides))
    rows = ""
    for name, values in found.cells():
        cells = "".join(
            f'<td class="best">{value}</td>' if top else f"<td>{value}</td>"
            for value, top in zip(values, best(name, values), strict=True)
        )
        rows += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>\n'
    names = [name for name, _ in found.cells()]
    told = "".join(
        f"<dt>{html.escape(words)}</dt><dd>{html.escape(text)}</dd>"
        for words, text in MEANINGS.items()
        if any(words in name for name in names)
    )
    return (
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'
        f'<details style="margin: -1.8rem 0 2.5rem"><summary>what the scores mean</summary><dl>{told}</dl></details>'
    )


def answers(i: int, row: InstructionRow, found: Comparison, heading: str = "h2", lengths: bool = True) -> str:
    """A prompt and what each side answered; with `lengths`, in how many tokens, which compare.json does not hold."""
    given = f'<p class="input">{html.escape(row.input)}</p>' if row.input else ""
    cards = "".join(_card(n, side, some[i], lengths) for n, (side, some) in enumerate(found.answers.items()))
    if row.output:
        cards += (
            '<article class="reference"><header><span class="note">reference</span></header>'
            f'<p class="text">{html.escape(row.output)}</p></article>'
        )
    asked = f"<{heading}><span>{i + 1}</span>{html.escape(row.instruction)}</{heading}>"
    return f'{asked}{given}<div class="cards">{cards}</div>'


def _card(n: int, side: str, answer: Answer, lengths: bool) -> str:
    notes = [f"{len(answer.tokens)} tokens"] if lengths else []
    notes += [] if answer.finished else ['<span class="warn">cut</span>']
    again = repeated(answer.text)
    notes += [f'<span class="warn">{again:.0f} % repeated</span>'] if again >= LOOPS else []
    text = f'<p class="text">{html.escape(answer.text)}</p>' if answer.text else '<p class="none">no text</p>'
    return (
        f'<article style="--c: var(--c{color(n)})"><header>{side_name(n, side)}'
        f'<span class="note">{", ".join(notes)}</span></header>{text}</article>'
    )


def side_name(n: int, name: str) -> str:
    return f'<span class="side" style="--c: var(--c{color(n)})">{html.escape(name)}</span>'


def color(n: int) -> int:
    """The base has a color of its own; five others take turns."""
    return 1 + (n - 1) % 5 if n else 0
