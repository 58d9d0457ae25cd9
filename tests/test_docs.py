"""The documents say which test proves what: every test they name exists, and every file they link
to.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_linked_files_exist(page: Path) -> None:
    text = page.read_text()
    defined = set(
        re.findall(
            r"def (test_\w+)", "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
        )
    )
    missing = set(re.findall(r"`(test_\w+)`", text)) - defined
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing |= {link for link in links if not (page.parent / link).exists()}
    assert not missing
