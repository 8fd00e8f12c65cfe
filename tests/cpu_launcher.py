"""Runs the kernels in CUDA C++ on a CPU: the kernels themselves, compiled by g++ with another
header of the GPU's instructions (cuda_on_cpu/hopper.cuh)."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from graphengine.kernels import decode_attention, gated_linear, row_attention
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
        return _tensor_map(matrix, box_rows)

    def launch(self, params: Params, num_rows: int, *, early: bool) -> None:
        if num_rows not in self._libraries:
            self._libraries[num_rows] = self._compiled(num_rows)
        library = self._libraries[num_rows]
        with _aligned(params, library.params_bytes()) as address:
            library.run(address, ctypes.c_uint(self.seed))
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
        array, count = _writes(self.writes)
        self._library.run(ctypes.byref(params), ctypes.c_uint(self.seed), array, count)
        self.seed += 1


class CpuRowLauncher:
    """A Launcher of graphengine.kernels.row_attention. seed: of the order in which threads run;
    each launch has its own. folder: for compiled kernels."""

    def __init__(self, folder: Path) -> None:
        self.seed = 0
        self._folder = folder
        self._libraries: dict[tuple[int, ...], ctypes.CDLL] = {}

    def launch(
        self, params: row_attention.Params, defines: dict[str, int], num_blocks: int
    ) -> None:
        key = tuple(defines.values())
        if key not in self._libraries:
            output = self._folder / f"row-{'-'.join(map(str, key))}.so"
            self._libraries[key] = _compiled("row_attention.cpp", output, defines)
        library = self._libraries[key]
        assert library.params_bytes() == ctypes.sizeof(params)
        library.run(ctypes.byref(params), ctypes.c_int(num_blocks), ctypes.c_uint(self.seed))
        self.seed += 1


class CpuGatedLauncher:
    """A Launcher of graphengine.kernels.gated_linear, for tiles of `features`. seed: of the order
    in which threads run; each launch has its own. folder: for compiled kernels, which another may
    have left there. writes: as of CpuAttentionLauncher. quads:
    clusters of four that run at once. launches: (blocks, cluster_rows, early) of each. writes_of:
    the number of the launch that has the writes, if not each has."""

    def __init__(self, features: int, *, num_blocks: int, folder: Path, quads: int = 0) -> None:
        self.num_blocks = num_blocks
        self.launches: list[tuple[int, int, bool]] = []
        self.writes_of: int | None = None
        self.seed = 0
        self.writes: Sequence[tuple[Tensor, Tensor]] = ()
        self._features = features
        self._quads = quads
        self._folder = folder

    def num_quads(self, features: int) -> int:
        return self._quads

    def rows_map(self, x: Tensor) -> TensorMap:
        return _tensor_map(x, 128)

    def weight_map(self, weight: Tensor, features: int) -> TensorMap:
        return _tensor_map(weight, features, num_gates=weight.shape[0] // 2)

    def launch(
        self,
        params: gated_linear.Params,
        features: int,
        num_blocks: int,
        *,
        cluster_rows: int,
        early: bool,
    ) -> None:
        assert features == self._features
        has_writes = self.writes_of in (None, len(self.launches))
        self.launches.append((num_blocks, cluster_rows, early))
        output = self._folder / f"gated-{features}-{cluster_rows}.so"
        if not output.exists():
            _compiled("gated_linear.cpp", output, gated_linear.defines_for(features, cluster_rows))
        library = ctypes.CDLL(str(output))
        array, count = _writes(self.writes if has_writes else ())
        seed = ctypes.c_uint(self.seed)
        with _aligned(params, library.params_bytes()) as address:
            library.run(address, ctypes.c_int(num_blocks), seed, array, count)
        self.seed += 1


def _tensor_map(matrix: Tensor, box_rows: int, *, num_gates: int = 0) -> TensorMap:
    rows, columns = matrix.shape
    tensor_map = TensorMap()
    stride = matrix.stride(0) * matrix.element_size()
    tensor_map.opaque[:6] = [matrix.data_ptr(), rows, columns, stride, box_rows, num_gates]
    return tensor_map


@contextlib.contextmanager
def _aligned(params: ctypes.Structure, size: int) -> Iterator[ctypes.c_void_p]:
    """A copy at an address that a struct with TensorMaps may have. size: of the kernel's struct."""
    assert size == -(-ctypes.sizeof(params) // 64) * 64
    memory = ctypes.create_string_buffer(size + 64)
    address = -(-ctypes.addressof(memory) // 64) * 64
    ctypes.memmove(address, ctypes.addressof(params), ctypes.sizeof(params))
    yield ctypes.c_void_p(address)


def _writes(writes: Sequence[tuple[Tensor, Tensor]]) -> tuple[ctypes.Array[_Write], ctypes.c_int]:
    array = (_Write * len(writes))()
    for place, (to, what) in zip(array, writes, strict=True):
        place.to, place.source, place.size = to.data_ptr(), what.data_ptr(), what.nbytes
    return array, ctypes.c_int(len(writes))


def _compiled(source: str, output: Path, defines: Mapping[str, int]) -> ctypes.CDLL:
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-Wno-psabi"]
    command += [f"-I{_FOLDER}", f"-I{SOURCE.parent}"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run([*command, "-o", str(output), str(_FOLDER / source)], check=True)
    return ctypes.CDLL(str(output))


def layout_claims(params: type[ctypes.Structure], *, alignment: int = 8) -> str:
    """Lines for the end of a kernel's source, which does not compile where its `Params` is not laid
    out as `params`, field by field. alignment: of the kernel's struct."""
    claims = [f"sizeof(Params) == {-(-ctypes.sizeof(params) // alignment) * alignment}"]
    for name, *_ in params._fields_:
        # As offsetof is defined for NVRTC's front end, which ships no stddef.h.
        claims.append(f"__INTADDR__(&((Params*)0)->{name}) == {getattr(params, name).offset}")
    return static_asserts(claims)


def static_asserts(claims: Iterable[str]) -> str:
    return "".join(f'\nstatic_assert({claim}, "");' for claim in claims)
