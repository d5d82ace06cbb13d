"""The documentation: what it shows runs, what it links to exists."""

from __future__ import annotations

import difflib
import itertools
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from torch import Tensor, nn

import calrobust

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
SWAPS = DOCS / "guides" / "swaps"
FENCE = re.compile(r"^ *(`{3,})(\S*)(.*)\n", re.MULTILINE)

RUN_BY_THE_BUILD = {"{doctest}", "{testcleanup}", "{testcode}", "{testoutput}", "{testsetup}"}
FROM_FILES = {"{include}", "{literalinclude}", "{swap}"}
NO_CODE = {"sh", "bash", "text", "{admonition}", "{bibliography}", "{glossary}", "{raw}", "{toctree}"}


class Model(nn.Module):
    """Answers as an open_clip model does."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 4)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
        """Unit-norm features and a logit scale."""
        image_features, text_features = (nn.functional.normalize(self.tower(side), dim=1) for side in (images, texts))
        return image_features, text_features, 10.0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_block_of_code_runs(page: Path) -> None:
    """As a doctest of the build, or because it is taken from a file that a test runs."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    ends = ""
    for ticks, kind, rest in FENCE.findall(page.read_text(encoding="utf-8")):
        if not kind and ticks == ends:
            ends = ""
        elif not ends:
            ends = ticks
            assert kind in RUN_BY_THE_BUILD | FROM_FILES | NO_CODE, f"nothing runs the block {kind!r}"
            for source in rest.split() if kind in {"{literalinclude}", "{swap}"} else ():
                path = (page.parent / source).resolve()
                assert path.exists()
                names = {path.stem, *path.relative_to(ROOT).parts[1:-1]}
                assert any(name in tests for name in names), f"no test runs {source}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_a_part_of_an_example_has_the_line_of_each_loss_it_uses(page: Path) -> None:
    """Who copies it has the names of its own losses; models and data are the reader's."""
    include = re.compile(r'```{literalinclude} (\S+)\n:language: python\n:start-at: "?(.*?)"?\n:end-at: (.*?)\n')
    for source, start, end in include.findall(page.read_text(encoding="utf-8")):
        code = (page.parent / source).read_text(encoding="utf-8")
        before, shown = code[: code.index(start)], code[code.index(start) :]
        losses = re.findall(r"^ *(\w+) = .*Loss\(", before, re.MULTILINE)
        assert [name for name in losses if re.search(rf"\b{name}\b", shown[: shown.index(end)])] == []


def test_training_the_probe_of_its_page_leaves_the_zero_shot_head() -> None:
    """The page's own code, whose head may have been made in inference mode."""
    page = (DOCS / "guides" / "lora.md").read_text(encoding="utf-8")
    setup, probe = re.findall(r"```{test(?:setup|code)}\n(.*?)```", page, re.DOTALL)[:2]
    place: dict[str, Any] = {}
    exec(setup, place)
    with torch.inference_mode():
        head = place["class_features"] = place["class_features"].clone()
    before = head.clone()
    exec(probe.partition("print")[0], place)
    torch.optim.SGD([place["model"].weight], lr=1.0).step()
    assert not torch.equal(place["model"].weight, before)
    assert torch.equal(head, before)


def test_the_drop_in_lines_run_and_train() -> None:
    """The README's first block, around a model of ours: the student moves, and the teacher a little."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("<!-- drop-in -->\n```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    model = Model()
    before = model.tower.weight.detach().clone()
    namespace = {
        "model": model,
        "loader": [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(3)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(code, namespace)
    teacher = namespace["teacher"]
    assert isinstance(teacher, calrobust.EMATeacher)
    student_moved, teacher_moved = (
        (moved.tower.weight - before).norm().item()  # type: ignore[union-attr,operator] # both are a Model
        for moved in (model, teacher.module)
    )
    assert teacher.updates == 3
    assert 0 < teacher_moved < student_moved


@pytest.mark.parametrize("name", ["flyp", "flyp_carot"])
def test_the_flyp_style_loops_learn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after the swap."""
    runpy.run_path(str(SWAPS / f"{name}.py"))
    assert float(capsys.readouterr().out.split()[1]) > 0.9


@pytest.mark.parametrize("page", ["flyp", "lightning", "transformers"])
def test_a_guide_counts_the_lines_of_its_swap(page: str) -> None:
    """Those that are not empty, new and old."""
    text = (DOCS / "guides" / f"{page}.md").read_text(encoding="utf-8")
    before, after = re.findall(r"```{swap} (\S+) (\S+)", text)[0]
    diff = runpy.run_path(str(DOCS / "_ext" / "swap.py"))["diff"]
    lines = diff(DOCS / "guides" / before, DOCS / "guides" / after)
    new, old = (sum(line[0] == sign and line[1:].strip() != "" for line in lines) for sign in "+-")
    assert f"The swap is {new} lines in place of {old}" in text


def test_the_flyp_swap_changes_at_most_ten_lines() -> None:
    """Added and removed lines together."""
    old, new = ((SWAPS / name).read_text(encoding="utf-8").splitlines()[1:] for name in ("flyp.py", "flyp_carot.py"))
    changed = [line for line in difflib.ndiff(old, new) if line[0] in "+-"]
    assert 0 < len(changed) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning_plain", "transformers_plain"])
def test_the_other_sides_of_the_swaps_run(name: str, tmp_path: Path) -> None:
    """What the examples are compared with is code that works."""
    command = [sys.executable, str(SWAPS / f"{name}.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_extras_are_named_as_every_pip_knows_them() -> None:
    """With hyphens, in a way that exists: pip before 23.3 warns of an underscore, and installs nothing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name for name in extras if not re.fullmatch("[a-z0-9-]+", name)] == []
    places = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
    places += [path for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py")]
    named = [re.findall(r"'(?:\.|calrobust)\[([^]]+)\]'", path.read_text(encoding="utf-8")) for path in places]
    assert {name for names in itertools.chain(*named) for name in names.split(",")} == set(extras)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path) -> None:
    """To files of the repository; the build follows those of the site."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if not link.startswith(("http", "#"))]
    assert [link for link in inside if not (page.parent / link.split("#")[0]).exists()] == []


def test_the_build_tells_of_links_that_lead_nowhere(tmp_path: Path) -> None:
    """To a file, and to a place in a page; and says nothing of those that do."""
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(DOCS / '_ext')!r})\nextensions = ['links']\n"
    )
    links = "".join(f'<a href="{link}">.</a>' for link in ("#here", "other.html", "search.html", "#nowhere", "no.html"))
    (tmp_path / "index.rst").write_text(f"Here\n====\n\n.. raw:: html\n\n   {links}\n\n.. toctree::\n\n   other\n")
    (tmp_path / "other.rst").write_text("Other\n=====\n")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-N",
        "-W",
        "--keep-going",
        str(tmp_path),
        str(tmp_path / "_build"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    told = re.findall(r"that is not there: (\S+)", result.stderr)
    assert told == ["#nowhere", "no.html"]


def test_drawings_are_what_their_program_draws() -> None:
    """Running it again changes nothing."""
    drawings = runpy.run_path(str(DOCS / "drawings.py"))["DRAWINGS"]
    committed = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "drawings").glob("*.svg")}
    assert {name: draw() for name, draw in drawings.items()} == committed


def test_the_readme_takes_the_table_that_the_example_prints() -> None:
    """In the place of the one it has, and nothing else changes."""
    with_table = runpy.run_path(str(DOCS / "figures.py"))["with_table"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, readme) == readme
    old = re.search(r"^\| CaRot +\|.*$", readme, re.MULTILINE)
    assert old
    new = "| CaRot | 12.3 ± 4.5 |"
    assert with_table(readme, readme.replace(old[0], new)) == readme.replace(old[0], new)


def test_badges_are_true() -> None:
    """Of Python and of the licence, what the package says; of the paper, what CITATION.cff does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = re.findall(r"badge/(.+?)-([^-]*(?:--[^-]*)*)-", (ROOT / "README.md").read_text(encoding="utf-8"))
    said = {name: unquote(value).replace("--", "-") for name, value in badges}
    paper = said.pop("arXiv")
    assert said == {"python": project["requires-python"].replace(">=", "≥"), "licence": project["license"]}
    assert paper in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_words_in_formulas_can_be_set() -> None:
    """LaTeX, and MathJax with which GitHub shows the pages, want underscores in them escaped."""
    paths = [*PAGES, *(ROOT / "src").rglob("*.py")]
    words = {
        word for path in paths for word in re.findall(r"\\(?:text|mathrm){(.*?)}", path.read_text(encoding="utf-8"))
    }
    assert words
    assert [word for word in words if re.search(r"(?<!\\)_", word)] == []
