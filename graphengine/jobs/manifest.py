"""Is this the job that was begun? What decides its rows is kept beside them and compared."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphengine.errors import ModelError, OutputError
from graphengine.jobs.journal import output_errors, replacing
from graphengine.version import __version__

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_MAX_DIFFERENCES = 5
# What a model directory is read for besides its weights; the same names as graphengine.hub's.
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# Weights are told apart by their headers and by samples: training changes nearly every value.
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10
# Names of a config that came later: a job begun before does not say what it had, and goes on.
_LATER = ("engine.tuning",)


def open_manifest(
    folder: Path,
    *,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    input: list[dict[str, object]],
    format: str,
    has_rows: bool,
) -> dict[str, Any]:
    """The manifest of a job begun in `folder`, or a new one. Raises OutputError, with the
    difference, if it was begun with another config, model or input and has rows already."""
    wanted = {
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "config": dict(config),
        "model": dict(model),
        "input": input,
    }
    # As it will be read: tuples are lists then.
    wanted = json.loads(json.dumps(wanted))
    path = folder / MANIFEST
    begun = _read(path) if has_rows else None
    if begun is None:
        manifest = {**wanted, "graphengine": __version__, "created": int(time.time())}
        with replacing(path) as part:
            part.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        return manifest
    said = begun.get("config")
    for name in _LATER:
        if isinstance(said, dict) and name not in said:
            wanted["config"].pop(name, None)
    differences = _differences(begun, wanted)
    if differences:
        shown = "; ".join(differences[:_MAX_DIFFERENCES])
        more = len(differences) - _MAX_DIFFERENCES
        raise OutputError(
            f"{path}: the job was begun otherwise: {shown}"
            f"{f' and {more} more' if more > 0 else ''}; run it as it was begun, give another "
            f"--output, or remove the output and {folder} to start again"
        )
    return begun


def model_fingerprint(path: Path, *, tokenizer: Path | None, with_weights: bool) -> dict[str, Any]:
    """What tells this model from others, wherever its directory is: hashes of its small files, and
    of headers and samples of its weights; and of the tokenizer, if it has one of its own. Raises
    ModelError if one cannot be read."""
    found: dict[str, Any] = {}
    file = path
    try:
        # What is no file, as a link to none, nobody reads.
        small = {p.name: p for pattern in _SMALL_FILES for p in path.glob(pattern) if p.is_file()}
        for file in (small[name] for name in sorted(small)):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.glob("*.safetensors")) if with_weights else ():
            if file.is_file():
                found[file.name] = _weights_digest(file)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror or error}); a job keeps a hash of what its "
            "model is, make it readable or take it away"
        ) from error
    if tokenizer is not None:
        found["tokenizer"] = model_fingerprint(tokenizer, tokenizer=None, with_weights=False)
    return found


def _weights_digest(path: Path) -> str:
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header_bytes, num_bytes)))
        start = file.tell()
        for number in range(_NUM_SAMPLES):
            file.seek(start + (num_bytes - start) * number // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(start, num_bytes - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with output_errors(path):
        data = path.read_bytes()
    try:
        manifest = json.loads(data)
        version, _ = manifest["schema_version"], manifest["created"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path}: not a job's manifest; restore it, or give another --output"
        ) from error
    if version != SCHEMA_VERSION:
        raise OutputError(
            f"{path}: written by another version of graphengine (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); finish the job with that one"
        )
    assert isinstance(manifest, dict)
    return manifest


def _differences(begun: object, wanted: object, name: str = "") -> list[str]:
    """`config.seed was 0, now 1` for each value of `wanted` that `begun` has otherwise, or only one
    of the two has."""
    if isinstance(begun, dict) and isinstance(wanted, dict):
        keys = [key for key in {**begun, **wanted} if name or key in wanted]
        return [
            line
            for key in keys
            for line in _differences(
                begun.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    if isinstance(begun, list) and isinstance(wanted, list) and name == "input":
        if len(begun) != len(wanted):
            return [f"input had {len(begun)} files, now {len(wanted)}"]
        pairs = zip(begun, wanted, strict=True)
        return [line for i, pair in enumerate(pairs) for line in _differences(*pair, f"input.{i}")]
    return [] if begun == wanted else [f"{name} was {_short(begun)}, now {_short(wanted)}"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
