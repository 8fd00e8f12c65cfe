"""How do many small per-row arrays travel in one copy? Typed fields packed in one byte buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# Kernels compiled for 16-byte aligned pointers must find every field aligned in every bucket.
_ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Field:
    """One per-row input or output: dtype [rows, *row_shape]. `pad` fills the rows of a bucket that
    no sequence uses: data like any other, so no kernel needs a special case."""

    name: str
    dtype: torch.dtype
    row_shape: tuple[int, ...] = ()
    pad: int | float = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each field lies in a buffer that holds `rows` rows."""

    rows: int
    nbytes: int
    placed: tuple[tuple[Field, int, int], ...]  # (field, first byte, bytes)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Typed views of `buffer`, uint8 [>= nbytes]: one [rows, *row_shape] each, aliasing it."""
        return {
            field.name: buffer[start : start + size].view(field.dtype).view(-1, *field.row_shape)
            for field, start, size in self.placed
        }

    def host_views(self, buffer: torch.Tensor) -> dict[str, npt.NDArray[np.generic]]:
        """As `views`, as numpy arrays of a buffer in host memory."""
        return {name: view.numpy() for name, view in self.views(buffer).items()}


class Arena:
    """Packs fields field by field. Each number of rows has a layout of its own, so the bytes of a
    bucket are contiguous and one copy moves exactly what that bucket needs."""

    def __init__(self, fields: Sequence[Field]) -> None:
        names = [field.name for field in fields]
        if len(set(names)) != len(names):
            raise ValueError(f"field names {names} are not distinct")
        self.fields = tuple(fields)

    def layout(self, rows: int) -> Layout:
        placed = []
        offset = 0
        for field in self.fields:
            size = rows * math.prod(field.row_shape) * field.dtype.itemsize
            placed.append((field, offset, size))
            offset += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        return Layout(rows, offset, tuple(placed))
