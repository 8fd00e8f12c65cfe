"""How does a start get kernels of flash-attn 4 without importing it? It loads what the first one
compiled.

flash-attn 4 (package flash-attn-4, module flash_attn.cute) writes its kernels in Python: to import
it and its compiler takes about ten seconds, and each call of its interface 0.1 ms of the host (on a
machine with an H200). Compiled, a kernel is an object file with one function, of the calling
convention that tvm_ffi, a small package, can call; `kernels.linked` keeps it. The stream is torch's
current one, of the device that the tensors are on: tvm_ffi asks torch for it at every call.

Letters: N tokens, T keys, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from graphengine.errors import BackendError
from graphengine.kernels import linked
from graphengine.version import __version__

PACKAGE = "flash-attn-4"
# Whose interface.py gives the arguments below; the one that pyproject.toml names.
VERSION = "4.0.0b36"
# What else decides the bytes of a kernel, or runs it.
_OTHER_PACKAGES = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "quack-kernels")
CACHE = Path("~/.cache/graphengine/flash-attn-4/linked")
_NAME = "func"
_RUNTIME = "libcute_dsl_runtime.so"
_SCRIPT = Path(__file__).with_name("flash4_compile.py")
_COMPILE_TIMEOUT_S = 300
_CPUINFO = Path("/proc/cpuinfo")


class Launch(Protocol):
    """Launches on torch's current stream."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        window: int | None,
    ) -> Tensor:
        """q [N, H, D], k and v [T, K, D] -> [N, H, D]. Causal, the last query of a sequence at its
        last key."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kernel is compiled for: what is left of the compile_key in interface.py, as it is
    called here. group: query heads a kv head."""

    dtype: torch.dtype
    head_dim: int
    group: int
    has_window: bool
    capability: tuple[int, int]


def installed() -> dict[str, str]:
    """Versions by package. Raises BackendError, which names what is missing and no remedy."""
    versions = {}
    for package in (PACKAGE, *_OTHER_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError as error:
            raise BackendError(f"{package} is not installed") from error
    # flash-attn 2 brings a folder flash_attn/cute too, an early state of it: the version tells.
    if versions[PACKAGE] != VERSION:
        raise BackendError(f"it needs {PACKAGE} {VERSION}, {versions[PACKAGE]} is installed")
    return versions


def kept(kind: Kind) -> Launch:
    """The kernel as it was kept, or is now compiled and kept, which takes ten seconds and more.
    Blocks; any thread may call it. Raises LinkError where none can be kept, and BackendError, which
    says why, where it cannot be compiled, or whatever else is not as it was when this was written.
    """
    try:
        return _kept(kind)
    except (BackendError, linked.LinkError):
        raise
    except Exception as error:
        reason = _short(f"{type(error).__name__}: {error}")
        raise BackendError(f"a kernel of {PACKAGE} cannot be had ({reason})") from error


def _kept(kind: Kind) -> Launch:
    ffi = _import_ffi()
    runtime = _runtime()
    # Before the kernels, which need its functions and do not name it.
    try:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise linked.LinkError(f"{runtime} cannot be loaded ({error})") from error
    path = _path(kind, runtime)
    library = linked.load_or_make(
        path, lambda part: _compile(kind, part), longest_s=_COMPILE_TIMEOUT_S
    )
    try:
        symbol = library[f"__tvm_ffi_{_NAME}"]
    except AttributeError as error:
        raise linked.LinkError(f"{path} has no such function ({error})") from error
    address = ctypes.cast(symbol, ctypes.c_void_p).value
    return _launch(ffi.Function.__from_extern_c__(address, keep_alive_object=library))


def _launch(function: Any) -> Launch:
    def launch(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        window: int | None,
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        left, right = (None, None) if window is None else (window - 1, 0)
        # It checks dtypes, shapes, alignment and what is None, and raises. That H is K * group it
        # cannot see.
        function(
            q,
            k,
            v,
            out,
            None,  # no logarithms of sums
            q.shape[-1] ** -0.5,
            cu_seqlens_q,
            cu_seqlens_k,
            None,  # lengths other than those,
            None,
            None,  # a page table,
            left,
            right,
            None,  # a sink,
            None,  # sparse blocks,
            (None, None),  # what functions of scores would read,
            None,  # what finds the sequence of a block among more than 256
            None,
        )
        return out

    return launch


def _import_ffi() -> Any:
    try:
        return importlib.import_module("tvm_ffi")
    except Exception as error:
        raise BackendError(f"tvm_ffi cannot be imported ({_short(str(error))})") from error


def _runtime() -> Path:
    """The library whose functions the kernels call, of the CUDA version that torch is built for if
    there are several. Nothing of its package is imported."""
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    folders = [] if found is None else found.submodule_search_locations or []
    paths = sorted(path for name in folders for path in Path(name).glob(f"cu*/lib/{_RUNTIME}"))
    if not paths:
        raise linked.LinkError(f"{_RUNTIME} of nvidia-cutlass-dsl is not found; install that again")
    ours = f"cu{str(torch.version.cuda).partition('.')[0]}"
    return next((path for path in paths if path.parts[-3] == ours), paths[-1])


def _path(kind: Kind, runtime: Path) -> Path:
    """Where it is kept: by all that decides its bytes and whether it can be loaded."""
    made_for = {
        **installed(),
        "graphengine": __version__,
        "script": hashlib.sha256(_SCRIPT.read_bytes()).hexdigest(),
        "kind": str(kind),
        "runtime": runtime.parts[-3],
        # An object has code for the host too, for the very one that it is compiled on; and a home
        # may be shared by several.
        "machine": [platform.machine(), *platform.libc_ver(), _cpu_features()],
    }
    key = hashlib.sha256(json.dumps(made_for, sort_keys=True).encode()).hexdigest()
    try:
        return CACHE.expanduser() / f"{key}.so"
    except RuntimeError as error:
        raise linked.LinkError("there is no home directory to keep it in") from error


def _cpu_features() -> str:
    """As Linux tells them on x86; empty elsewhere."""
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            return next((line.strip() for line in lines if line.startswith("flags")), "")
    except OSError:
        return ""


def _compile(kind: Kind, part: Path) -> None:
    major, minor = kind.capability
    arguments = [
        str(part),
        str(kind.dtype).removeprefix("torch."),
        str(kind.head_dim),
        str(kind.group),
        "window" if kind.has_window else "none",
        _NAME,
        f"{major}{minor}",
        str(os.getpid()),
    ]
    # -P: nothing is imported from the script's folder, whose modules have common names.
    command = [sys.executable, "-P", str(_SCRIPT), *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"it took over {_COMPILE_TIMEOUT_S} s"
        raise BackendError(f"a kernel of {PACKAGE} cannot be compiled ({reason})") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = _short(lines[-1] if lines else f"exit status {done.returncode}")
        raise BackendError(f"a kernel of {PACKAGE} cannot be compiled ({reason})")


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
