"""The settings that every page of the gallery starts with: the colours of ``calrobust.plotting``, small type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler

from calrobust.plotting import COLOURS


def reset(gallery_conf: dict[str, Any], page: str | Path) -> None:
    """Before a page runs: sphinx-gallery has just put back matplotlib's own settings."""
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 8.5,
            "legend.frameon": False,
        }
    )
