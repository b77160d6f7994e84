"""The page around the sections of a report: one file that asks nothing of the network, light or dark."""

import html
from collections.abc import Sequence
from typing import TypeAlias

from fgpt.cli.evaluation.compare.html import STYLE

Section: TypeAlias = tuple[str, str, str]
"""An id, a heading and HTML."""

OWN = """
body { max-width: 1180px }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 0 0 1.6rem; font-size: .92em }
a { color: var(--c1) }
.summary { color: var(--soft); margin: 0 0 1rem }
.state { color: var(--c); font-weight: 650 }
body > section > h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; border-bottom: 1px solid var(--line);
  padding-bottom: .35rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere }
h3 span { color: var(--soft); font-weight: 400; margin-right: .5em }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 0 0 1rem }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .9rem .7rem }
.tiles dt { color: var(--soft); font-size: .85em; font-weight: 400; margin: 0 }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.curves { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
.curve { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: .7rem .9rem .5rem; min-width: 0 }
.broad { grid-column: 1 / -1 }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; margin-bottom: .3rem }
.keys { margin-left: auto; display: flex; gap: .9rem }
.key { font-size: .85em; color: var(--soft) }
.key::before { content: ""; display: inline-block; width: 1.1em; height: 3px; border-radius: 2px; background: var(--c);
  margin-right: .4em; vertical-align: middle }
.raw { --c: color-mix(in srgb, var(--c1) 45%, var(--card)) } .smooth { --c: var(--c1) } .dots { --c: var(--c2) }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg line { stroke: var(--line); stroke-width: 1 }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums }
polyline { fill: none; stroke: var(--c); stroke-width: 1; stroke-linejoin: round }
.smooth polyline, .dots polyline { stroke-width: 2 } circle { fill: var(--c) }
.own { margin-bottom: 1.2rem } .own thead th { text-align: left }
.own thead .figure:not(:first-child) { text-align: right }
td.said, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere }
tr.changed > * { background: var(--good) } tr.changed td:nth-child(2) { font-weight: 650 }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem;
  margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace }
code { font: .92em ui-monospace, monospace }
.missing { color: var(--soft) } .missing code { color: var(--ink) }
.picture { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .5rem; max-width: 100%;
  display: block; margin-bottom: 1.2rem; max-height: 560px }
details { margin-bottom: 1.2rem } summary { cursor: pointer }
.answers { margin-bottom: 1.8rem }
@media (max-width: 40rem) { .broad svg text { font-size: 20px } }
@media print { nav { display: none } .curve, .tiles div { break-inside: avoid } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may do for the page: no script runs, and nothing is fetched, whatever a text in it says."""


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """`summary` is HTML; the title and the headings are escaped."""
    name = html.escape(title)
    links = "".join(f'<a href="#{at}">{html.escape(heading)}</a>' for at, heading, _ in sections)
    body = "\n".join(
        f'<section id="{at}"><h2>{html.escape(heading)}</h2>\n{inner}\n</section>' for at, heading, inner in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}{OWN}</style></head>\n"
        f'<body><h1>{name}</h1><p class="summary">{summary}</p><nav>{links}</nav>\n{body}\n</body></html>\n'
    )


def missing(what: str, command: str = "") -> str:
    """A line in the place of what is not there, with the command that makes it."""
    how = f": <code>{html.escape(command)}</code>" if command else ""
    return f'<p class="missing">{html.escape(what)}{how}</p>'


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and their values, escaped."""
    cells = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="wide own"><table class="facts"><tbody>{cells}</tbody></table></div>'


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; the first cell of a row is its name. Escaped."""
    top = "".join(f'<th scope="col" class="figure">{html.escape(head)}</th>' for head in heads)
    body = ""
    for name, *cells in rows:
        told = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{told}</tr>'
    return f'<div class="wide own"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
