"""Where is what a start can use again kept? One folder of the user's."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/graphengine, or ~/.cache/graphengine where that is not set or not absolute
    (XDG Base Directory Specification). Raises RuntimeError for a user without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "graphengine"
