"""What the tests of examples/finetune.py share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folders import Main, main_of_the_script, make_folders


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures and tiny models; tests leave them as they are."""
    root = tmp_path_factory.mktemp("folders")
    make_folders(root)
    return root


@pytest.fixture(scope="session")
def main() -> Main:
    """The script's."""
    return main_of_the_script()
