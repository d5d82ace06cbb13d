"""The directive ``swap``: what changes between two files that both run, within the whole of the second."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def diff(before: Path, after: Path, context: int | None = None) -> list[str]:
    """Lines that start with a space, a plus or a minus; the modules' docstrings left out.

    ``context`` is how many unchanged lines stand around a change, None for all; an ellipsis stands for the others.
    """
    old, new = (path.read_text(encoding="utf-8").split('"""', 2)[2].strip().splitlines() for path in (before, after))
    lines = difflib.unified_diff(old, new, n=len(new) if context is None else context, lineterm="")
    return [" ..." if line.startswith("@@") else line for line in lines][3:]


class Swap(SphinxDirective):
    """``{swap} before.py after.py``, relative to the page."""

    required_arguments = 2
    option_spec: ClassVar = {"context": directives.nonnegative_int}

    def run(self) -> list[nodes.Node]:
        """One block of code."""
        paths = [Path(self.env.relfn2path(argument)[1]) for argument in self.arguments]
        for path in paths:
            self.env.note_dependency(path)
        text = "\n".join(diff(*paths, self.options.get("context")))
        return [nodes.literal_block(text, text, language="diff")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("swap", Swap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
