"""The pages that fgpt writes: one style, and the pieces that they are made of.

A page is one file. It needs no other file and no network, and no script runs in it but the one that sorts tables, which
the page names by its hash. Templates escape every value (Jinja2's autoescape).
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"
SORT = "sort.js"
"""The script that sorts tables."""


def render(name: str, folders: Sequence[Path] = (), *, title: str, summary: str = "", **values: Any) -> str:
    """A page: the style, the title, a summary below it, and a template of `folders` with `values` as its content.

    The template may use the pieces of this package: {% import "pieces.html" as pieces %}.
    """
    from jinja2 import FileSystemLoader, StrictUndefined  # here, since `fgpt generate` imports the package and no page
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = Markup(environment.get_template(name).render(values))
    script = (TEMPLATES / SORT).read_text(encoding="utf-8") if '<table class="sortable' in content else ""
    page = environment.get_template("page.html")
    style = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    return page.render(
        title=title, summary=summary, content=content, style=style, script=Markup(script), hash=script_hash(script)
    )


def script_hash(script: str) -> str:
    """What a content security policy calls a script that may run.

    Source: Content Security Policy Level 3, section 2.3.1 (hash-source).

    >>> script_hash("alert(1)")
    'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='
    """
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
