"""What the formatter and the linter cannot say about how code is written here."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
FILES = [ROOT / name for name in LISTED.stdout.split()]


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
