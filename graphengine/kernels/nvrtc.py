"""How does CUDA C++ become a kernel that can be launched? NVRTC, with its output kept on disk.

What is compiled is kept in the user's cache folder, with a digest behind it, so that only the first
start ever pays for it (a second or two a kernel). The driver's and NVRTC's functions are called
through cuda-bindings, on which torch's own CUDA builds depend.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from graphengine.kernels import ahead

_CACHE = Path("~/.cache/graphengine/kernels")
_DIGEST_BYTES = hashlib.sha256().digest_size
_NUM_COMPILERS = 6  # a model has as many kernels at most


class CompileError(RuntimeError):
    """A kernel that ships with the package cannot be compiled or called here: a bug, or a CUDA
    installation that does not fit."""


class TensorMap(ctypes.Structure):
    """Where the copy engine finds boxes of a matrix."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class Kernel:
    """One kernel of a compiled module, for blocks of one size and one amount of shared memory."""

    def __init__(self, cubin: Callable[[], bytes], name: str) -> None:
        """cubin: of the module, which keeps the bytes of dynamic shared memory in `shared_bytes`,
        an int, and a block's threads in `{name}_threads`."""
        self._cubin = cubin
        self._name = name
        self._function: Any = None
        self._max_clusters: int | None = None

    def load(self) -> None:
        """To the device whose context is current; at the first launch at the latest. Blocks until
        it is compiled; raises as `compiled` does."""
        if self._function is not None:
            return
        module = checked(driver.cuModuleLoadData(self._cubin()))
        function = checked(driver.cuModuleGetFunction(module, self._name.encode()))
        self._shared_bytes = _constant(module, "shared_bytes")
        self._num_threads = _constant(module, f"{self._name}_threads")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, self._shared_bytes))
        # A multiprocessor is split in shared memory and L1 cache, and must be empty to be split
        # anew: all kernels that may start while one of these runs need the same split, the largest.
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        checked(driver.cuFuncSetAttribute(function, attribute, 100))
        self._function = function

    def max_clusters(self, cluster_blocks: int) -> int:
        """How many clusters of so many blocks, as it is compiled for, run at once on an idle GPU.
        In a rehearsal, see `ahead`, 1: it will be loaded."""
        if ahead.is_rehearsal():
            ahead.want(self.load)
            return 1
        self.load()
        if self._max_clusters is None:
            config = self._config(cluster_blocks)
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            sizes = attribute.value.clusterDim
            sizes.x, sizes.y, sizes.z = cluster_blocks, 1, 1
            config.attrs = [attribute]
            config.numAttrs = 1
            found = driver.cuOccupancyMaxActiveClusters(self._function, config)
            self._max_clusters = int(checked(found))
        return self._max_clusters

    def launch(
        self, params: ctypes.Array[ctypes.c_char], *, num_blocks: int, stream: int, early: bool
    ) -> None:
        """params: the kernel's only argument, read before this returns. early: it may start before
        the kernel ahead of it in the stream has ended; it then waits itself. In a rehearsal, see
        `ahead`, it is not launched, but will be loaded."""
        if ahead.is_rehearsal():
            ahead.want(self.load)
            return
        self.load()
        config = self._config(num_blocks)
        config.hStream = stream
        if early:
            ids = driver.CUlaunchAttributeID
            attribute = driver.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

    def _config(self, num_blocks: int) -> Any:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._num_threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        return config


def _constant(module: Any, name: str) -> int:
    address, _ = checked(driver.cuModuleGetGlobal(module, name.encode()))
    value = ctypes.c_int()
    checked(driver.cuMemcpyDtoH(ctypes.addressof(value), address, ctypes.sizeof(value)))
    return value.value


def kernel(
    name: str,
    path: Path,
    headers: Sequence[Path] = (),
    *,
    architecture: str,
    defines: Mapping[str, int],
    device: int | None,
) -> Kernel:
    """`name` of a CUDA C++ file, which another thread begins to compile as `compiled` does; the
    same one for all that ask. device: the one whose context is current where it is loaded."""
    return _kernel(name, (path, tuple(headers), architecture, tuple(defines.items())), device)


_Module = tuple[Path, tuple[Path, ...], str, tuple[tuple[str, int], ...]]


@functools.cache
def _kernel(name: str, module: _Module, device: int | None) -> Kernel:
    return Kernel(_compiling(module).result, name)


@functools.cache
def _compiling(module: _Module) -> ahead.Begun[bytes]:
    path, headers, architecture, defines = module
    return ahead.Begun(
        _compilers(),
        lambda: compiled(path, headers, architecture=architecture, defines=dict(defines)),
    )


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_COMPILERS)


def compiled(
    path: Path,
    headers: Sequence[Path] = (),
    *,
    architecture: str,
    defines: Mapping[str, int],
) -> bytes:
    """The cubin of a CUDA C++ file for `architecture`, such as "sm_90a". headers: what it includes,
    by their names. Raises CompileError with the compiler's log. Can run in several threads at
    once."""
    source = path.read_text("utf-8")
    included = {header.name: header.read_text("utf-8") for header in headers}
    options = options_for(architecture, defines)
    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(
        "\0".join((source, *included.values(), *options, str(version))).encode()
    ).hexdigest()
    cached = _CACHE / f"{path.stem}-{key[:32]}.cubin"
    # Without a cache every start compiles: slower, and nothing is lost. RuntimeError: no home.
    with contextlib.suppress(OSError, RuntimeError):
        kept = cached.expanduser().read_bytes()
        cubin, digest = kept[:-_DIGEST_BYTES], kept[-_DIGEST_BYTES:]
        # A file may be damaged: a machine that lost its power left it empty or cut off.
        if hashlib.sha256(cubin).digest() == digest:
            return cubin
    cubin, _ = compile_source(source, path.name, options, included)
    with contextlib.suppress(OSError, RuntimeError):
        folder = _CACHE.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(cubin + hashlib.sha256(cubin).digest())
        os.replace(file.name, folder / cached.name)
    return cubin


def options_for(architecture: str, defines: Mapping[str, int]) -> list[str]:
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    return options + [f"-D{name}={value}" for name, value in defines.items()]


def compile_source(
    source: str, name: str, options: list[str], included: Mapping[str, str]
) -> tuple[bytes, str]:
    """The cubin and what the compiler said of it. included: headers by name. Needs no GPU. Raises
    as `compiled` does."""
    texts = [text.encode() for text in included.values()]
    names = [header.encode() for header in included]
    program = checked(
        nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(texts), texts, names)
    )
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    log_bytes = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
    checked(nvrtc.nvrtcGetProgramLog(program, log_bytes))
    log = log_bytes.rstrip(b"\0").decode(errors="replace")
    if int(result) != 0:
        raise CompileError(f"{name} does not compile: {log}")
    cubin = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin, log


def tensor_map(
    matrix: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> TensorMap:
    """Boxes of `matrix`, bfloat16: sizes of its dimensions, the dense one first, elements between
    two of each other one, multiples of 8, and the box's size, 64 in the dense one, swizzled by 128
    bytes. What lies outside the matrix reads as zeros."""
    encoded = checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            matrix.data_ptr(),
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride * matrix.element_size()) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(encoded.getPtr(), 128))


def is_shared_by_mps(device: torch.device) -> bool:
    """Whether processes run beside each other on a GPU, through CUDA's Multi-Process Service,
    instead of in turns."""
    index = torch.cuda.current_device() if device.index is None else device.index
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED
    status, found = driver.cuDeviceGetAttribute(attribute, checked(driver.cuDeviceGet(index)))
    # A driver that does not know the attribute may have the service all the same.
    return int(status) != 0 or bool(found)


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of cuda-bindings gave beside its status. Raises CompileError for another
    status than success, and torch.OutOfMemoryError, as torch does, where memory ran out."""
    status, *values = result
    if int(status) != 0:
        kind = torch.OutOfMemoryError if status.name.endswith("OUT_OF_MEMORY") else CompileError
        raise kind(f"a CUDA function failed: {status.name} ({int(status)})")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)
