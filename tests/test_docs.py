"""The documents name tests, files, functions and options: every one of them exists, and the table
of files in docs/design.md leaves none out.
"""

from __future__ import annotations

import ast
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
import typer

from launch.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DESIGN = ROOT / "docs" / "design.md"
FOLDERS = "actors|learners|launch|tests|benchmarks|docker|docs"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*,{{}}-]*\w[}}/]?")
END = "\0"  # of a text of the code
FILLED_IN = re.compile(r"\.\.\.|…|'[^']*'|\b[A-Z][A-Z0-9_:]*\b|[0-9][0-9.]*")
FUNCTION = re.compile(r"([\w./]+\.py):([A-Za-z_][\w.]*)")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """A name may have choices, as {a,b}.py, or stand for several, as *.yaml."""
    named = {path for found in PATH.findall(page.read_text()) for path in choices(found)}
    assert not {path for path in named if not any(ROOT.glob(path))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_functions_exist(page: Path) -> None:
    named = set(FUNCTION.findall(page.read_text()))
    assert named or page != DESIGN
    assert not {f"{file}:{name}" for file, name in named if name not in names_in(ROOT / file)}


def test_the_design_names_every_file() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "actors", "learners", "launch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {name for name in listed.stdout.split() if name.endswith((".py", ".sh"))}
    there = {name for name in files if (ROOT / name).is_file() and (ROOT / name).stat().st_size}
    named = {path for found in PATH.findall(DESIGN.read_text()) for path in choices(found)}
    unnamed = there - named
    assert there and not unnamed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_commands_and_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands
    called = re.findall(
        r"(?:bin/quatuor|`quatuor|-m launch) +([a-z]+)([^`\n#|]*)", page.read_text()
    )
    assert called or page.name != "README.md"
    assert not {name for name, _ in called} - set(commands)
    for name, rest in called:
        options = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)}
        assert not set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - options - {"--help"}, name


def choices(path: str) -> list[str]:
    """Return the paths that a name such as rooms/{a,b}.py stands for."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ["".join(chosen) for chosen in product(*parts)]


def names_in(file: Path) -> set[str]:
    """Return what a file defines: functions, classes, Class.method, and names given a value."""
    found = set()
    for node in ast.parse(file.read_text()).body if file.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_ours() -> None:
    """A message stands in one text of the code, apart from what a run fills in."""
    rows = re.findall(r"^\| `(.+?)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    texts = {text for folder in FOLDERS.split("|")[:3] for text in texts_in(ROOT / folder)}
    code = END.join(["", *texts, ""])
    unknown = [row for row in rows if not says(code, row)]
    assert len(rows) > 100
    assert not unknown, "\n".join(unknown)


def says(code: str, message: str) -> bool:
    """Tell whether the words of a message follow each other in one text of the code.

    Names and values are a run's own: dots, numbers, what is quoted, and words in capitals stand for
    them; so may what stands before a colon.
    """
    parts = message.split(": ")
    return any(in_order(FILLED_IN.split(": ".join(parts[i:])), code) for i in range(len(parts)))


def in_order(words: list[str], code: str) -> bool:
    longest = max(words, key=len)
    at = code.find(longest) if len(longest) >= 8 else -1
    while at >= 0:
        text = code[code.rindex(END, 0, at + 1) : code.index(END, at)]
        if re.search(".*".join(map(re.escape, words)), text, re.S):
            return True
        at = code.find(longest, at + 1)
    return False


def texts_in(folder: Path) -> list[str]:
    """Return every text of the Python files in a folder, "{}" in place of what is filled in."""
    texts = []
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text())
        docstrings = {id(e.value) for e in ast.walk(tree) if isinstance(e, ast.Expr)}
        for node in (n for n in ast.walk(tree) if id(n) not in docstrings):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts
