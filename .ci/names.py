"""The house's language, held by `just check`: no function named by a bare participle, no variable that says nothing.

    python .ci/names.py [FILE ..]

A name says what a thing is (a noun) or does (a verb), never how it came about.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("fgpt", "experiments")

BANNED = frozenset(
    [
        "again",
        "alike",
        "apart",
        "asked",
        "found",
        "given",
        "going",
        "held",
        "it",
        "kept",
        "laid",
        "made",
        "mine",
        "meant",
        "opened",
        "own",
        "said",
        "seen",
        "some",
        "taken",
        "told",
        "theirs",
        "wanted",
        "written",
    ]
)
"""Variables, arguments and attributes that no reader can place."""
PARTICIPLES = BANNED | frozenset(
    [
        "fitted",
        "fused",
        "joined",
        "listed",
        "merged",
        "moved",
        "named",
        "placed",
        "read_back",
        "recorded",
        "rounded",
        "scaled",
        "shown",
        "shortened",
        "spoiled",
        "stored",
        "thinned",
        "timed",
        "trimmed",
        "typed",
        "undone",
        "unlike",
        "untuned",
        "drawn",
        "begun",
    ]
)
"""Functions that say how their result came about."""
TERMS = frozenset(["padded", "cached", "quantized", "batched"])
"""Participles that are terms of the field."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def bindings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that is bound: assignments, arguments, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg


def is_participle(name: str) -> bool:
    bare = name.strip("_")
    if "_" in bare or bare in TERMS:
        return False
    return bare in PARTICIPLES or (
        bare.endswith("ed") and len(bare) > 4 and bare not in ("speed", "embed", "feed", "need", "seed")
    )


def faults(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in functions(tree):
        if is_participle(function.name):
            yield f"{path}:{function.lineno}: function {function.name!r} is a participle; say what it does"
    for line, name in sorted(set(bindings(tree))):
        if name.strip("_") in BANNED:
            yield f"{path}:{line}: variable {name!r} says nothing; name what it holds"


def shadowed_modules() -> Iterator[str]:
    """Names exported by a package that are also modules of it: `import fgpt.x` must give a module."""
    for init in sorted(ROOT.glob("fgpt/**/__init__.py")):
        modules = {p.stem for p in init.parent.glob("*.py")} | {
            p.parent.name for p in init.parent.glob("*/__init__.py")
        }
        for node in ast.parse(init.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name
                    if name in modules and node.module and not node.module.endswith(init.parent.name):
                        yield f"{init}: {name!r} is a function and a module"


def main(arguments: list[str]) -> int:
    paths = [Path(x) for x in arguments] or [p for folder in SOURCES for p in sorted((ROOT / folder).rglob("*.py"))]
    faults_found = [fault for path in paths for fault in faults(path)] + ([] if arguments else list(shadowed_modules()))
    print("\n".join(faults_found) or "names: ok")
    return 1 if faults_found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
