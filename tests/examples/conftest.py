"""What the tests of examples/imagenet.py share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_imagenet import Main, main_of_the_script, make_pictures


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data, class names and a model's description; tests leave it as it is."""
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root)
    return root


@pytest.fixture(scope="session")
def main() -> Main:
    """The script's."""
    return main_of_the_script()
