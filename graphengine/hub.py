"""Which directory does a model's name stand for? The demo, a local path or a download."""

from __future__ import annotations

import re
from pathlib import Path

from graphengine.errors import ModelError

_DEMO = Path(__file__).parent / "demo" / "model"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What a model directory is read for. Never code, never pickled weights.
_WEIGHTS = "*.safetensors"
_WANTED = ("*.json", "*.model", "*.txt", "*.jinja")
# Subdirectories and the makers' own format hold the same weights again.
_UNWANTED = ("*/*", "consolidated*")


def resolve_model(model: str, *, with_weights: bool = True) -> Path:
    """The directory of `model`: "demo", an existing directory, or a hub id like "Qwen/Qwen3-0.6B".

    A hub id is downloaded, without its weights unless `with_weights`, or taken from the cache when
    there is no network. Raises ModelError if there is no such thing."""
    if model == "demo":
        return _DEMO
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ModelError(
            f"model {model!r} cannot be looked up ({reason}); give a model directory, a hub id "
            "like 'org/name', or 'demo'"
        ) from error
    if is_file:
        raise ModelError(f"model {model!r} is a file; give the directory it is in")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"no directory {model!r}; give a model directory, a hub id like 'org/name', or 'demo'"
        )
    return _download(model, with_weights=with_weights)


def _download(hub_id: str, *, with_weights: bool) -> Path:
    import huggingface_hub  # here and not above: most runs do not need it

    try:
        path = huggingface_hub.snapshot_download(
            hub_id,
            allow_patterns=[*_WANTED, _WEIGHTS] if with_weights else list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        )
    except Exception as error:  # network, HTTP, disk, cache: the caller can only read the reason
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"no directory {hub_id!r}, and fetching it from the hub failed ({reason}); give a "
            "model directory, or check the name and the network"
        ) from error
    return Path(path)
