"""What the formatter and the linter cannot say about how code is written here."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
FILES = [ROOT / name for name in LISTED.stdout.split()]
PACKAGES = ("actors", "launch", "learners")
CLAUSES = "What|Where|Who|Whose|Whether|Why|How|Which"
NOT_VERBS = f"{CLAUSES}|When|The|A|An|All|Every|One|No|Of"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_one_thing_is_said_at_a_time(file: Path) -> None:
    """No tuple assignment of unrelated values, no conditional expression inside another, and no
    line that the formatter was told to leave alone.
    """
    text = file.read_text()
    found = [f"{file}:{n.lineno}" for n in ast.walk(ast.parse(text)) if _says_two_things(n)]
    assert not found
    assert "# fmt: " + "skip" not in text


def _says_two_things(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        return any(isinstance(target, ast.Tuple) for target in node.targets)
    if isinstance(node, ast.IfExp):
        parts = (node.body, node.test, node.orelse)
        return any(isinstance(inner, ast.IfExp) for part in parts for inner in ast.walk(part))
    return False


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.relative_to(ROOT).parts[0] in PACKAGES],
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_docstrings_begin_as_they_should(file: Path) -> None:
    """A function's begins with a verb, so not with a clause or an article; that of a property, a
    class or a module names a thing, so it is no clause either.
    """
    found = [
        f"{file}:{getattr(node, 'lineno', 1)}: {doc.splitlines()[0]}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (doc := ast.get_docstring(node))
        and re.match(rf"({CLAUSES if _names_a_thing(node) else NOT_VERBS})\b", doc)
    ]
    assert not found


def _names_a_thing(node: ast.AST) -> bool:
    if isinstance(node, ast.Module | ast.ClassDef):
        return True
    decorators = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])}
    return bool(decorators & {"property", "cached_property", "functools.cached_property"})
