"""Formulas as MathML, which browsers set without a script: the pages need no network to show them."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

UNKNOWN = {r"\arg": r"\operatorname{arg}", r"\_": "_"}  # to the converter
logger = logging.getLogger(__name__)


def to_mathml(latex: str, *, block: bool) -> str:
    """One ``<math>`` element; warns of a command that the converter does not know, which it would leave as it is."""
    for command, known in UNKNOWN.items():
        latex = latex.replace(command, known)
    found = convert(latex, display="block" if block else "inline")
    if command := re.search(r"\\\w+", found):
        logger.warning("a formula has a command that cannot be set: %s", command[0])
    return found


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Within a line."""
    self.body.append(to_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """On lines of its own; formulas that a blank line separates stand below each other, as with MathJax."""
    for formula in re.split(r"\n\s*\n", node.astext().strip()):
        self.body.append(f'<div class="formula">{to_mathml(formula, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer; ``html_math_renderer`` chooses it."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
