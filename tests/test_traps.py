"""TRAPS.md names every test that holds a trap, and every such test its trap."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
TRAPS = 51


def described(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    """The node ids of a file or class, with their docstrings."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from described(child, f"{prefix}::{child.name}")
        elif isinstance(child, ast.FunctionDef) and child.name.startswith("test_"):
            yield f"{prefix}::{child.name}", ast.get_docstring(child) or ""


def test_the_list_of_traps_is_that_of_the_docstrings() -> None:
    """All of them, each with a test at least; what is listed exists and says so, and what says so is listed."""
    listed: dict[int, set[str]] = {}
    for line in (TESTS / "TRAPS.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"(\d+)\. ", line):
            listed[int(heading[1])] = set()
        elif found := re.fullmatch(r" +- `(\S+)`", line):
            listed[max(listed)].add(found[1])
    told = defaultdict[int, set[str]](set)
    for path in TESTS.rglob("test_*.py"):
        name = path.relative_to(TESTS.parent).as_posix()
        for test, docstring in described(ast.parse(path.read_text(encoding="utf-8")), name):
            for numbers in re.findall(r"\(traps? ([\d, and]*\d)", docstring):
                for number in re.findall(r"\d+", numbers):
                    told[int(number)].add(test)
    assert list(listed) == list(range(1, TRAPS + 1))
    assert all(listed.values())
    assert listed == dict(told)
