"""Which tensors does a checkpoint directory hold, and where in its safetensors files?"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from graphengine.errors import WeightsError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth")
# A table older checkpoints store; we compute it from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `num_bytes` of `dtype` from byte `offset` of `file` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a checkpoint by name, less the ignored ones. index: the file each tensor
    should be in, empty where there is no index."""

    path: Path
    files: tuple[Path, ...]
    index: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    def file_of(self, name: str) -> Path:
        """The file a missing tensor should have been in, as far as that is known."""
        if name in self.index:
            return self.path / self.index[name]
        return self.files[0] if len(self.files) == 1 else self.path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the index and the headers, no values. Raises WeightsError naming the file."""
    files, index = _find_files(path)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise WeightsError(
                    f"{file}: tensor {name!r} is in {tensors[name].file.name} too; remove one of "
                    "the files"
                )
            tensors[name] = tensor
    return Checkpoint(path=path, files=tuple(files), index=index, tensors=tensors)


def _find_files(path: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files of `path`, and what the index says of which tensor is in which.

    The index wins over model.safetensors, and that over whatever else there is: some repositories
    ship the weights twice, in another naming."""
    index = path / _INDEX
    if index.is_file():
        weight_map = _read_index(index)
        return [path / name for name in sorted(set(weight_map.values()))], weight_map
    if (path / _SINGLE).is_file():
        return [path / _SINGLE], {}
    files = sorted(path.glob("*.safetensors"))
    if files:
        return files, {}
    for pattern in _PICKLED:
        for file in sorted(path.glob(pattern)):
            raise WeightsError(
                f"{path} has pickled weights only ({file.name}), which can run code when loaded; "
                "convert them to safetensors"
            )
    raise WeightsError(
        f"{path} has no *.safetensors file; complete the checkpoint, or use the load format "
        "'dummy' for random weights"
    )


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except Exception as error:  # it may hold anything
        raise WeightsError(
            f"{index} is not an index of shards ({type(error).__name__}: {error}); it must hold "
            'a "weight_map" from tensor to file name, download it again'
        ) from error
    for name in names:
        # A downloaded index must not make us open files elsewhere.
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{index} names the file {name!r}; only the names of .safetensors files in the "
                "same directory are accepted"
            )
        try:
            is_file = (index.parent / name).is_file()
        except (OSError, ValueError):  # a name that no file can have
            is_file = False
        if not is_file:
            raise WeightsError(
                f"{index} names {name!r}, which is not in {index.parent}; complete the checkpoint"
            )
    return dict(weight_map)


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, without those we ignore."""
    try:
        # Checks the whole header: sizes, no gap, no overlap, and that the file is as long as it
        # says. It does not tell offsets, so those are read from the JSON it has found good.
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as opened:
            (header_bytes,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(header_bytes))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise WeightsError(
            f"{file} is truncated or corrupt ({error}); download it again"
        ) from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or name.endswith(_IGNORED_SUFFIX):
            continue
        if entry["dtype"] not in _DTYPES:
            raise WeightsError(
                f"{file}: tensor {name!r} has dtype {entry['dtype']}, expected one of "
                f"{', '.join(_DTYPES)}; quantized checkpoints are not supported"
            )
        tensors[name] = StoredTensor(
            file=file,
            dtype=_DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=8 + header_bytes + entry["data_offsets"][0],
        )
    return tensors
