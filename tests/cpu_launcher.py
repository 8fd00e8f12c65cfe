"""Runs the decode chain on a CPU: the kernel itself, compiled by g++ with another header of the
GPU's instructions (cuda_on_cpu/hopper.cuh)."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from graphengine.kernels.decode_chain import SOURCE, LayerParams, Params, TensorMap, defines_for
from graphengine.model_config import ModelConfig

_FOLDER = Path(__file__).with_name("cuda_on_cpu")


class CpuLauncher:
    """graphengine.kernels.decode_chain.Launcher. `seed` of the order in which threads run."""

    def __init__(self, config: ModelConfig, *, num_blocks: int, chunk_tiles: int) -> None:
        self.num_blocks = num_blocks
        self.seed = 0
        self._config = config
        self._chunk_tiles = chunk_tiles
        self._libraries: dict[int, ctypes.CDLL] = {}

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        address, (rows, columns) = matrix.data_ptr(), matrix.shape
        found = TensorMap()
        found.opaque[:5] = [address, rows, columns, matrix.stride(0) * 2, box_rows]
        return found

    def launch(self, params: Params, num_rows: int) -> None:
        if num_rows not in self._libraries:
            self._libraries[num_rows] = self._compiled(num_rows)
        library = self._libraries[num_rows]
        size = library.params_bytes()
        assert size == -(-ctypes.sizeof(params) // 64) * 64
        assert library.layer_bytes() == ctypes.sizeof(LayerParams)
        padded = ctypes.create_string_buffer(size + 64)
        address = -(-ctypes.addressof(padded) // 64) * 64
        ctypes.memmove(address, ctypes.addressof(params), ctypes.sizeof(params))
        library.run(ctypes.c_void_p(address), ctypes.c_uint(self.seed))

    def _compiled(self, num_rows: int) -> ctypes.CDLL:
        defines = defines_for(
            self._config,
            num_rows=num_rows,
            num_blocks=self.num_blocks,
            chunk_tiles=self._chunk_tiles,
        )
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
        command += [f"-I{_FOLDER}", f"-I{SOURCE.parent}"]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:16]
        output = Path(tempfile.mkdtemp()) / f"{key}.so"
        subprocess.run([*command, "-o", str(output), str(_FOLDER / "decode_chain.cpp")], check=True)
        return ctypes.CDLL(str(output))
