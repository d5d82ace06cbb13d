"""The one exception of this example."""

from __future__ import annotations


class RunError(Exception):
    """What is wrong and how to mend it, in one line for the user."""
