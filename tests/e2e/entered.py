"""Functions of ours that a piece of work enters, in the driver and in every other process."""

from __future__ import annotations

import ast
import sys
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).parents[2]
PACKAGES = tuple(str(ROOT / name) for name in ("actors", "learners", "launch"))

Function = tuple[str, int]
"""A file, and the line where the function, or its first decorator, begins."""

entered: set[Function] = set()


def note(frame: Any, event: str, _: Any) -> None:
    """Remember a function of ours that is entered; comprehensions belong to the one around them."""
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(PACKAGES) and code.co_name[0] != "<":
        entered.add((code.co_filename, code.co_firstlineno))


def start(handles: list[Any]) -> None:
    """Begin to note, here and in the processes of these Ray actors."""
    ray.get([handle.__ray_call__.remote(_start_in_worker) for handle in handles], timeout=60)
    entered.clear()
    sys.setprofile(note)


def stop(handles: list[Any]) -> set[Function]:
    """End it here, and return what was entered anywhere."""
    sys.setprofile(None)
    found = ray.get([handle.__ray_call__.remote(_entered) for handle in handles], timeout=60)
    return set().union(entered, *found)


def _start_in_worker(host: Any) -> None:
    """Profiles belong to threads: an engine has one of its own, and is called in others."""
    entered.clear()
    sys.setprofile(note)
    if hasattr(host.worker, "_commands"):
        host.worker._commands.put((Future(), lambda: sys.setprofile(note)))
        host.worker = _Noting(host.worker)


class _Noting:
    """An object whose methods are noted in whatever thread they are called."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        sys.setprofile(note)
        return getattr(self.inner, name)


def _entered(host: Any) -> set[Function]:
    return entered


def statements(function: Function) -> int:
    """Return how many statements a function has, its docstring and functions inside it apart."""
    node = _functions(function[0])[function[1]]
    inner = {
        id(n) for f in ast.walk(node) if f is not node and _is_function(f) for n in ast.walk(f)
    }
    found = (n for n in ast.walk(node) if isinstance(n, ast.stmt) and id(n) not in inner)
    return sum(not _is_text(n) for n in found) - 1  # the definition itself


@cache
def _functions(file: str) -> dict[int, Any]:
    tree = ast.parse(Path(file).read_text())
    found = [node for node in ast.walk(tree) if _is_function(node)]
    return {min([n.lineno, *(d.lineno for d in n.decorator_list)]): n for n in found}


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
