"""Makes anew what is committed as it was made: ``python docs/figures.py`` (hours, most of them for the benchmarks).

That is the site's diagrams, the README's table and pictures, and the page of benchmarks with its figure. The gallery is
drawn, and the numbers in snippets are checked, whenever the site is built. Sentences about numbers are written by hand.
Needs the extra ``test``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "shift_table_results"
TABLE = re.compile(r"^\| (?:Method|CaRot minus) .*?(?=\n\n)", re.DOTALL | re.MULTILINE)
STUDY = "examples/shift_table.py --seeds 0 1 2 3 4"


def with_table(page: str, results: str) -> str:
    """``page``, its tables of methods replaced by those of ``results``, in their order."""
    tables = iter(TABLE.findall(results))
    return TABLE.sub(lambda _: next(tables), page)


def main() -> None:
    """In the order in which they take longer."""
    for command in ("docs/drawings.py", STUDY, "tests/benchmarks/run.py --write"):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    readme = ROOT / "README.md"
    results = (RESULTS / "table.md").read_text(encoding="utf-8")
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), results), encoding="utf-8")
    for name in ("differences.png", "shift.png", "domains.png"):
        shutil.copy(RESULTS / name, ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
