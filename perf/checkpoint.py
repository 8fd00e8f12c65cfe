"""What does a loader read? Real sharded checkpoints of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from graphengine.model_config import load_model_config
from graphengine.weights import stored_shapes
from perf.shapes import write_shape

_SHARD_BYTES = 4 << 30


def write_checkpoint(shape: str, folder: Path) -> Path:
    """Directory of a bfloat16 checkpoint of `shape`, sharded as the hub's are, under `folder`.
    Never holds more than one shard in memory."""
    path = write_shape(shape, folder / "checkpoints")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shapes = stored_shapes(load_model_config(path))
    for position, (name, size) in enumerate(shapes.items(), start=1):
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        shard[name] = values.normal_(0.0, 0.02, generator=generator).cpu()
        num_bytes = sum(tensor.nbytes for tensor in shard.values())
        if num_bytes >= _SHARD_BYTES or position == len(shapes):
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, path / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
