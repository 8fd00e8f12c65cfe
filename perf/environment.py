"""What was it measured on? Card, driver, clocks, versions, commit, read bandwidth."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import graphengine

_PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "transformers", "numpy")
_PACKAGES_WHOLE = ("captures", "graphengine")
_SOURCES = (".py", ".cu", ".cuh", ".json")
_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
# Of the sum, back to back between two waits for the device.
_PASSES = 8
_BANDWIDTH_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}


def environment() -> dict[str, Any]:
    """Everything that can change a figure, except the engine's own options."""
    found: dict[str, Any] = {
        "device": device_name(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        **_commit(),
        "source_hash": source_hash(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "gpu": gpu_state(),
    }
    return found


def _commit() -> dict[str, str | bool | None]:
    """Of the code that runs, wherever it is run from: GRAPHENGINE_COMMIT, or what git says. Whether
    a commit has changes is known of git's own alone, else None."""
    if given := os.environ.get("GRAPHENGINE_COMMIT"):
        return {"commit": given, "is_dirty": None}
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    return {"commit": commit or "", "is_dirty": None if changes is None else bool(changes)}


def source_hash() -> str:
    """SHA-256 of the code that runs, by which a figure can be tied to a tree where no commit can.
    In a clone of that tree the same is printed by

    git ls-files captures graphengine 'perf/*.py' | grep -E '\\.(py|cu|cuh|json)$' | LC_ALL=C sort |
        xargs sha256sum | sha256sum"""
    root = Path(graphengine.__file__).parent.parent
    paths = [path for name in _PACKAGES_WHOLE for path in (root / name).rglob("*.*")]
    named = {
        path.relative_to(root).as_posix(): path
        for path in (*paths, *(root / "perf").glob("*.py"))
        if path.suffix in _SOURCES and path.is_file()  # an editor's lock is a link to nothing
    }
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in named.items()}
    listed = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(listed.encode()).hexdigest()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def gpu_state() -> dict[str, str]:
    """Driver, clocks and temperature as nvidia-smi tells them now; empty without it."""
    line = _run("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-i", "0")
    values = [value.strip() for value in (line or "").split(",")]
    names = _QUERY.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def read_bandwidth(cache: Path | None = None) -> float:
    """Bytes a second that a plain sum over memory past every cache reads: the ceiling of decoding.

    Measured once and kept in `cache` by device, torch version and way of measuring."""
    key = f"{device_name()} / {_cpu_name()} / torch {torch.__version__} / {_PASSES} passes"
    cache = cache or Path.home() / ".cache" / "graphengine" / "bandwidth.json"
    known: dict[str, float] = {}
    if cache.is_file():
        try:
            known = json.loads(cache.read_text())
            return float(known[key])
        except (ValueError, KeyError, TypeError, AttributeError):
            known = known if isinstance(known, dict) else {}
    known[key] = _measure_bandwidth()
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(known, indent=1) + "\n")
    return known[key]


def _measure_bandwidth() -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.ones(_BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(10):
        start_s = time.perf_counter()
        for _ in range(_PASSES):
            total = data.sum()
        total.item()  # waits for all of them: 40 us in all, which one pass would feel by 4 %
        seconds.append(time.perf_counter() - start_s)
    return _PASSES * data.nbytes / statistics.median(seconds[2:])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _git(*arguments: str) -> str | None:
    """What git says of the package's repository. None where it lies in none, or, as an installed
    one, in one that does not have it."""
    file = Path(graphengine.__file__)
    git = ("git", "-C", str(file.parent))
    is_tracked = _run(*git, "ls-files", "--error-unmatch", file.name)
    return _run(*git, *arguments) if is_tracked else None


def _run(*command: str) -> str | None:
    """What it prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
