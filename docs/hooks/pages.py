"""Pages of the site that stand elsewhere in the repository, and the links to them.

README, RESULTS and their like become pages, and so do the notebooks and each source file that a page links to. A link
to a file of the repository, `../fgpt/weights.py`, thus works on a forge and in the site. A link to a folder becomes its
text. A link to what does not exist is left as it is: the build refuses it. In the code of a table a pipe needs a
backslash on a forge, which the site would show.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TOP_PAGES = {
    name: f"project/{name.removesuffix('.md').lower()}.md"
    for name in ("README.md", "RESULTS.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
}
"""The pages of files at the top of the repository."""
LANGUAGES = {".py": "python", ".yaml": "yaml"}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
CODE = re.compile(r"`[^`]+`")
FENCES = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)$", flags=re.M | re.S)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to all but its blocks of code."""
    pieces, end = [], 0
    for fence in FENCES.finditer(text):
        pieces += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*pieces, change(text[end:])])


def repository_path(src_uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    for name, page in TOP_PAGES.items():
        if src_uri == page:
            return name
    return posixpath.join("docs", src_uri)


def page_of(path: str) -> str | None:
    """The page of the site that shows a file of the repository, or nothing: of a folder, or another kind of file."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in TOP_PAGES:
        return TOP_PAGES[path]
    return f"source/{path}.md" if Path(path).suffix in LANGUAGES else None


def linked_files(text: str, path: str) -> list[str]:
    """The files and folders of the repository that `text`, the file at `path`, links to."""
    targets: list[str] = []

    def collect(prose: str) -> str:
        targets.extend(posixpath.normpath(posixpath.join(posixpath.dirname(path), x[1])) for x in LINK.findall(prose))
        return prose

    outside_fences(text, collect)
    return [target for target in targets if (ROOT / target).exists()]


def site_links(text: str, src_uri: str) -> str:
    """`text` of a page with its links to files of the repository as links to pages."""
    folder = posixpath.dirname(repository_path(src_uri))

    def site_link(match: re.Match[str]) -> str:
        label, target, anchor = match.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return match.group()
        page = page_of(path)
        return label if page is None else f"[{label}]({posixpath.relpath(page, posixpath.dirname(src_uri))}{anchor})"

    return outside_fences(text, lambda prose: LINK.sub(site_link, prose))


def plain_pipes(text: str) -> str:
    """`text` without the backslashes before pipes in the code of its tables."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("|"):
            lines[i] = CODE.sub(lambda code: code.group().replace(r"\|", "|"), line)
    return "\n".join(lines)


def source_page(path: str) -> str:
    """A source file as a page."""
    source = (ROOT / path).read_text(encoding="utf-8")
    return f"# {path}\n\n```{LANGUAGES[Path(path).suffix]}\n{source.rstrip()}\n```\n"


def notebook_page(path: Path) -> str:
    """A notebook in the percent format as a page: its text, its code, and the notebook to download."""
    cells = jupytext.read(path).cells
    texts = [cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in cells]
    title, *others = texts
    return "\n\n".join([title, f"[This page as a Jupyter notebook]({path.stem}.ipynb)", *others]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files."""
    docs = Path(config.docs_dir)
    texts = {f.src_uri: Path(str(f.abs_src_path)).read_text(encoding="utf-8") for f in files.documentation_pages()}
    for name, page in TOP_PAGES.items():
        texts[page] = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=texts[page]))
    for path in sorted((docs / "notebooks").glob("*.py")):
        page = f"notebooks/{path.stem}.md"
        texts[page] = notebook_page(path)
        files.append(File.generated(config, page, content=texts[page]))
        notebook = jupytext.writes(jupytext.read(path), fmt="ipynb")
        files.append(File.generated(config, f"notebooks/{path.stem}.ipynb", content=notebook))
    targets = {target for uri, text in texts.items() for target in linked_files(text, repository_path(uri))}
    for path in sorted(targets):
        page = page_of(path)
        if page is not None and page.startswith("source/"):
            files.append(File.generated(config, page, content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes the links of a page, and the pipes in its tables."""
    src_uri = page.file.src_uri
    if src_uri.startswith("source/"):
        return markdown
    return outside_fences(site_links(markdown, src_uri), plain_pipes)
