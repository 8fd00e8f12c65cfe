"""Runs the decode chain and decode attention on a CPU: the kernels themselves, compiled by g++ with
another header of the GPU's instructions (cuda_on_cpu/hopper.cuh)."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from graphengine.kernels import decode_attention
from graphengine.kernels.decode_chain import SOURCE, Params, TensorMap, defines_for
from graphengine.model_config import ModelConfig

_FOLDER = Path(__file__).with_name("cuda_on_cpu")


class CpuLauncher:
    """A Launcher of graphengine.kernels.decode_chain. seed: of the order in which threads run; each
    launch has its own. folder: for compiled kernels."""

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, folder: Path, seed: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.seed = seed
        # (address, bytes) of what the last launch asked for ahead.
        self.prefetched: list[tuple[int, int]] = []
        self._config = config
        self._folder = folder
        self._libraries: dict[int, ctypes.CDLL] = {}

    def tensor_map(self, matrix: Tensor, box_rows: int) -> TensorMap:
        """What the emulated copy engine reads: address, rows, columns, bytes between rows, rows of
        a box."""
        rows, columns = matrix.shape
        tensor_map = TensorMap()
        tensor_map.opaque[:5] = [matrix.data_ptr(), rows, columns, matrix.stride(0) * 2, box_rows]
        return tensor_map

    def launch(self, params: Params, num_rows: int, *, early: bool) -> None:
        if num_rows not in self._libraries:
            self._libraries[num_rows] = self._compiled(num_rows)
        library = self._libraries[num_rows]
        size = library.params_bytes()
        assert size == -(-ctypes.sizeof(params) // 64) * 64
        memory = ctypes.create_string_buffer(size + 64)
        aligned = -(-ctypes.addressof(memory) // 64) * 64
        ctypes.memmove(aligned, ctypes.addressof(params), ctypes.sizeof(params))
        library.run(ctypes.c_void_p(aligned), ctypes.c_uint(self.seed))
        self.seed += 1
        count = library.prefetched(None, None, 0)
        places, sizes = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        library.prefetched(places, sizes, count)
        self.prefetched = list(zip(places, sizes, strict=True))

    def _compiled(self, num_rows: int) -> ctypes.CDLL:
        defines = defines_for(self._config, num_rows=num_rows, num_blocks=self.num_blocks)
        output = self._folder / f"chain-{num_rows}.so"
        return _compiled("decode_chain.cpp", output, defines)


class _Write(ctypes.Structure):
    _fields_ = (("to", ctypes.c_void_p), ("source", ctypes.c_void_p), ("size", ctypes.c_uint64))


class CpuAttentionLauncher:
    """A Launcher of graphengine.kernels.decode_attention. seed: of the order in which threads run;
    each launch has its own. writes: what the kernel ahead writes, when it is first waited for:
    (where, what) of equal sizes, each dense."""

    def __init__(self, defines: Mapping[str, int], *, output: Path, seed: int = 0) -> None:
        self.seed = seed
        self.num_blocks = defines["GRID"]
        self.writes: Sequence[tuple[Tensor, Tensor]] = ()
        self._library = _compiled("decode_attention.cpp", output, defines)

    def plan(self, params: decode_attention.Params) -> None:
        self._library.run_plan(ctypes.byref(params), ctypes.c_uint(self.seed))
        self.seed += 1

    def attend(self, params: decode_attention.Params) -> None:
        assert self._library.params_bytes() == ctypes.sizeof(params)
        writes = [_Write(to.data_ptr(), what.data_ptr(), what.nbytes) for to, what in self.writes]
        array = (_Write * len(writes))(*writes)
        seed = ctypes.c_uint(self.seed)
        self._library.run(ctypes.byref(params), seed, array, ctypes.c_int(len(writes)))
        self.seed += 1


def _compiled(source: str, output: Path, defines: Mapping[str, int]) -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-Wno-psabi"]
    command += [f"-I{_FOLDER}", f"-I{SOURCE.parent}"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run([*command, "-o", str(output), str(_FOLDER / source)], check=True)
    return ctypes.CDLL(str(output))
