"""The house: names, imports and documentation of the package as a whole."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pytest_socket import SocketConnectBlockedError

import calrobust
from calrobust import functional, losses, metrics, plotting, schedules
from calrobust.integrations import lightning, open_clip, transformers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "calrobust"
PUBLIC = [calrobust, functional, losses, metrics, plotting, schedules, lightning, open_clip, transformers]


def dotted(path: Path) -> str:
    """The module's name inside the package: ``functional.calibration``, and ``""`` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The modules a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_public_names_are_sorted_and_exist(module: ModuleType) -> None:
    """__all__ is in order, without repeats, and every name in it is there."""
    assert list(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m in PUBLIC for n in m.__all__ if not isinstance(getattr(m, n), ModuleType)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_public_name_is_documented_with_an_example_and_has_a_page(module: ModuleType, name: str) -> None:
    """A docstring whose example runs in the doctests and prints something to check, and an entry in the API index."""
    examples = doctest.DocTestParser().get_examples(getattr(module, name).__doc__ or "")
    assert any(example.want for example in examples), f"{module.__name__}.{name} has no example that prints"
    index = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8").split()
    path = f"{module.__name__}.{name}".removeprefix("calrobust.")
    assert path in index or name in index, f"{path} is missing in docs/api.rst"


ALLOWED = {  # who may import whom, from the ground floor up
    "_checks": set(),
    "distributed": set(),
    "kernels": {"_checks", "distributed", "kernels"},
    "functional": {"_checks", "distributed", "kernels", "functional"},
    "losses": {"_checks", "distributed", "kernels", "functional"},
    "metrics": {"_checks", "_state", "functional", "metrics"},
    "_state": {"_checks"},
    "teacher": {"_checks", "_state"},
    "schedules": {"_checks"},
    "weights": {"_checks", "_state"},
    "evaluation": {"_checks", "_state", "functional"},
    "report": {"_checks", "functional", "report"},
    "plotting": {"_checks", "functional", "report"},
    "integrations": {
        "_checks",
        *calrobust.__all__,
        "losses",
        "teacher",
        "integrations",
    },  # outside the house, they see what users see
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=dotted)
def test_import_arrows_go_up_only(path: Path) -> None:
    """Kernels know nobody, functions know kernels, shells know functions, and only the roof knows all."""
    floor = dotted(path).split(".")[0]
    if not floor:
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("calrobust.")}
    assert ours <= ALLOWED[floor], f"{floor} must not import {ours - ALLOWED[floor]}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=dotted)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    """In the metrics torchmetrics, in its kernels triton; plots and tables inside the functions that need them."""
    top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    allowed = {"torch", "calrobust", *sys.stdlib_module_names}
    lazily_loaded = {"metrics._shared": "torchmetrics", "kernels.triton": "triton"}
    lazily_loaded |= {f"kernels.triton.{kernels}": "triton" for kernels in ("softmax", "sigmoid")}
    assert top <= allowed | {lazily_loaded.get(dotted(path), "torch")}


def test_importing_the_package_loads_torch_and_nothing_else() -> None:
    """Only the metrics bring torchmetrics, on first use; nothing is printed."""
    program = (
        "import sys, torch; before = set(sys.modules); import calrobust;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new & {'torchmetrics', 'matplotlib', 'pandas', 'tqdm', 'sklearn', 'open_clip', 'netcal',"
        "'lightning', 'transformers', 'triton'}));"
        "calrobust.metrics.CalibrationError; print('torchmetrics' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["[]", "True", ""]
    assert result.stderr == ""


def test_lazy_modules_are_listed_and_unknown_names_are_errors() -> None:
    """dir() shows what attribute access gives."""
    assert {"metrics", "plotting"} <= set(dir(calrobust))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module("calrobust").nothing  # noqa: B018  (the access is the test)


@pytest.mark.parametrize(
    "path", ["metrics.CalibrationError", "functional.calibration_error", "plotting.shift_scatter", "schedules.power"]
)
def test_a_name_of_a_module_tells_where_it_is(path: str) -> None:
    """As ``cr.CalibrationError`` is written before its module is known."""
    with pytest.raises(AttributeError, match=rf"did you mean calrobust\.{re.escape(path)}\?"):
        getattr(calrobust, path.split(".")[1])


def test_no_test_reaches_for_a_network() -> None:
    """Sockets lead to this machine and nowhere else."""
    blocked = pytest.raises(SocketConnectBlockedError)
    with socket.socket() as connection, pytest.warns(UserWarning, match=r"192\.0\.2\.1"), blocked:
        connection.connect(("192.0.2.1", 80))
