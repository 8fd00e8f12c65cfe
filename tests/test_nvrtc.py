"""Does CUDA C++ become a cubin once, and again when something of it changes?"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from graphengine.kernels import ahead, nvrtc  # after the skip: imports cuda-bindings

SOURCE = 'extern "C" __global__ void fill(int* out) { out[threadIdx.x] = VALUE; }'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nvrtc, "_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "fill.cu"
    path.write_text(SOURCE)
    return path


def compiled(path: Path, value: int = 1, architecture: str = "sm_90a") -> bytes:
    return nvrtc.compiled(path, architecture=architecture, defines={"VALUE": value})


def test_kernel_is_compiled_once(cache: Path, source: Path) -> None:
    cubin = compiled(source)
    assert cubin.startswith(b"\x7fELF")
    (file,) = cache.iterdir()
    assert file.read_bytes().startswith(cubin)
    kept = b"kept"
    file.write_bytes(kept + hashlib.sha256(kept).digest())
    assert compiled(source) == kept


@pytest.mark.parametrize("damage", ["empty", "cut off", "a bit"])
def test_damaged_file_is_compiled_anew(cache: Path, source: Path, damage: str) -> None:
    """As a machine that lost its power may leave one."""
    cubin = compiled(source)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    flipped = bytes([good[100] ^ 1])
    file.write_bytes(
        {"empty": b"", "cut off": good[:-40], "a bit": good[:100] + flipped + good[101:]}[damage]
    )
    assert compiled(source) == cubin
    assert file.read_bytes() == good


def test_changed_source_or_option_is_compiled_anew(cache: Path, source: Path) -> None:
    cubins = {compiled(source), compiled(source, value=2), compiled(source, architecture="sm_80")}
    source.write_text(SOURCE.replace("= VALUE", "+= VALUE"))
    cubins.add(compiled(source))
    assert len(cubins) == len(list(cache.iterdir())) == 4


def test_another_compiler_compiles_anew(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(source)
    monkeypatch.setattr(nvrtc.nvrtc, "nvrtcVersion", lambda: (0, 99, 0))
    compiled(source)
    assert len(list(cache.iterdir())) == 2


def test_cache_that_cannot_be_written_costs_time_only(cache: Path, source: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert compiled(source).startswith(b"\x7fELF")


def test_user_without_a_home_has_no_cache(source: Path, tmp_path: Path) -> None:
    """As in a container that runs under a number without a name."""
    code = f"""
        import os, pwd
        from pathlib import Path
        del os.environ["HOME"]
        pwd.getpwuid = lambda uid: {{}}["no such user"]
        os.chdir({str(tmp_path)!r})
        from graphengine.kernels import nvrtc
        cubin = nvrtc.compiled(Path({str(source)!r}), architecture="sm_90a", defines={{"VALUE": 1}})
        print(cubin[:4])"""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert run.stdout == "b'\\x7fELF'\n", run.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_source_that_does_not_compile_tells_the_line(cache: Path, source: Path) -> None:
    source.write_text("\n__device__ int x = nothing;")
    with pytest.raises(nvrtc.CompileError, match=r'fill.cu\(2\): error: .*"nothing"'):
        compiled(source)
    assert not cache.exists()


def test_memory_that_runs_out_is_told_apart() -> None:
    """A user can free some: `build_runner` looks for this error, not for CompileError."""
    with pytest.raises(torch.OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        nvrtc.checked((nvrtc.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,))
    with pytest.raises(nvrtc.CompileError, match="CUDA_ERROR_INVALID_IMAGE"):
        nvrtc.checked((nvrtc.driver.CUresult.CUDA_ERROR_INVALID_IMAGE,))


# --- beside other work


def kernel_of(source: Path, value: int = 1, device: int = 0) -> nvrtc.Kernel:
    defines = {"VALUE": value}
    return nvrtc.kernel("fill", source, architecture="sm_90a", defines=defines, device=device)


def test_kernel_compiles_in_another_thread_once(cache: Path, source: Path) -> None:
    threads: list[threading.Thread] = []
    compile_source = nvrtc.compile_source

    def watched(*args: object) -> tuple[bytes, str]:
        threads.append(threading.current_thread())
        return compile_source(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "compile_source", watched)
        kernels = [kernel_of(source), kernel_of(source), kernel_of(source, value=2)]
        # Of one file there may be several.
        other = nvrtc.kernel("other", source, architecture="sm_90a", defines={"VALUE": 1}, device=0)
        assert other is not kernels[0]
        assert other._cubin() == kernels[0]._cubin()
        cubins = [kernel._cubin() for kernel in kernels]
    assert kernels[0] is kernels[1]
    assert kernels[0] is not kernel_of(source, device=1)
    assert cubins[0] == cubins[1] == compiled(source)
    assert cubins[2] == compiled(source, value=2)
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_header_is_compiled_in(cache: Path, source: Path, tmp_path: Path) -> None:
    header = tmp_path / "seven.cuh"
    header.write_text("#define VALUE 7")
    source.write_text('#include "seven.cuh"\n' + SOURCE)
    kernel = nvrtc.kernel(
        "fill", source, (header,), architecture="sm_90a", defines={"OTHER": 1}, device=0
    )
    assert kernel._cubin().startswith(b"\x7fELF")


def test_kernel_that_does_not_compile_is_tried_again(cache: Path, source: Path) -> None:
    """A start that failed, for want of memory say, is not the last one's."""
    source.write_text("\n__device__ int x = nothing;")
    kernel = kernel_of(source)
    for _ in range(2):
        with pytest.raises(nvrtc.CompileError, match="nothing"):
            kernel.load()
    source.write_text(SOURCE)
    assert kernel._cubin() == compiled(source)


def test_kernel_is_not_launched_in_a_rehearsal_and_loaded_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> bytes:
        raise nvrtc.CompileError("does not compile")

    kernel = nvrtc.Kernel(fails, "fill")
    params = ctypes.create_string_buffer(64)

    def launch() -> None:
        kernel.launch(params, num_blocks=1, stream=0, early=False)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    mode = SimpleNamespace(__enter__=lambda: None)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(AsyncCompileMode=lambda pool: mode))
    is_inside = False
    with pytest.raises(nvrtc.CompileError), ahead.compiled_ahead(torch.device("cpu"), launch):
        is_inside = True
    assert is_inside
    with pytest.raises(nvrtc.CompileError):
        launch()
