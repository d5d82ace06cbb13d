"""Warns of links inside the built pages that lead nowhere: to no file, or to no place in it. Needs no network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


class Page(HTMLParser):
    """The links of a page, and the places that a link may name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of any element."""
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif (tag, name) in {("a", "href"), ("img", "src")} and value:
                self.links.add(value)


def check_links(app: Sphinx, exception: Exception | None) -> None:
    """Follows every relative link of every page."""
    if exception or app.builder.format != "html":
        return
    paths = {name: Path(app.builder.get_outfilename(name)).resolve() for name in app.env.found_docs}
    pages = {path: Page(path) for path in paths.values()}
    for name, path in paths.items():
        for link in sorted(pages[path].links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                logger.warning("link to a file that is not there: %s", link, location=name)
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                logger.warning("link to a place that is not there: %s", link, location=name)


def setup(app: Sphinx) -> dict[str, Any]:
    """After the build, whose ``-W`` makes errors of warnings."""
    app.connect("build-finished", check_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
