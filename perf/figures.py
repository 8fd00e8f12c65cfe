"""What does one measured figure say? Samples of repeats, their median and spread."""

from __future__ import annotations

import statistics
from typing import Any

Figure = dict[str, Any]


def figure(samples: list[float], unit: str, *, better: str) -> Figure:
    """better: "lower" or "higher". The spread is the samples' range: with a handful of repeats
    nothing finer means much."""
    assert better in ("lower", "higher")
    return {
        "unit": unit,
        "better": better,
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": samples,
    }


def merge(repeats: list[dict[str, tuple[float, str, str]]]) -> dict[str, Figure]:
    """Figures of several repeats, each name -> (value, unit, better)."""
    merged = {}
    for name, (_, unit, better) in repeats[0].items():
        merged[name] = figure([repeat[name][0] for repeat in repeats], unit, better=better)
    return merged
