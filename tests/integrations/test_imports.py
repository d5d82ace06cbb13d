"""What happens where a peer is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("peer", "package"), [("transformers", "transformers[torch]>=5"), ("lightning", "lightning>=2.6")]
)
def test_a_missing_peer_is_an_error_that_says_what_to_install(peer: str, package: str) -> None:
    """The error names a package that pip finds, in place of a ModuleNotFoundError."""
    program = f"import sys; sys.modules['{peer}'] = None; import calrobust.integrations.{peer}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    *_, last = result.stderr.strip().splitlines()
    assert last == f"ImportError: calrobust.integrations.{peer} needs {peer}: pip install '{package}'"
