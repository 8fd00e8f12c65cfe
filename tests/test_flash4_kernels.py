"""Is a kernel of flash-attn 4 compiled once, by a process of its own, and loaded from then on?"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from paged import CPU
from torch import Tensor

from graphengine.attention import flash4, flash4_kernels
from graphengine.attention.flash4_kernels import Kind, installed, kept
from graphengine.errors import BackendError
from graphengine.kernels import linked
from graphengine.kernels.linked import LinkError

ROOT = Path(__file__).parents[1]
KIND = Kind(torch.bfloat16, 128, 4, False, (9, 0))
VERSIONS = {
    "flash-attn-4": "4.0.0b36",
    "nvidia-cutlass-dsl": "4.8.1",
    "apache-tvm-ffi": "0.1.15",
    "quack-kernels": "0.6.5",
}
# As flash4_compile.py: writes an object whose function needs the runtime's, and what it was told.
SCRIPT = """
import json, subprocess, sys
path, *told = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(told) + "\\n")
if {fails}:
    sys.exit("a warning\\nNoKernelError: not today")
source = "int runtime_answer(void); int __tvm_ffi_func(void) {{ return runtime_answer(); }}"
subprocess.run(["cc", "-fPIC", "-c", "-x", "c", "-o", path, "-"], input=source.encode(), check=True)
"""

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="links for Linux, by a C compiler"
)


class World:
    """All of flash-attn 4 that `kept` uses, made of C."""

    def __init__(self, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache = tmp_path / "cache" / "linked"
        self.log = tmp_path / "log"
        self.versions = dict(VERSIONS)
        self.script = tmp_path / "script.py"
        self.told_to(fail=False)
        package = tmp_path / "nvidia_cutlass_dsl"
        self.runtime = package / "cu13" / "lib" / "libcute_dsl_runtime.so"
        self.runtime.parent.mkdir(parents=True)
        source = tmp_path / "runtime.c"
        source.write_text("int runtime_answer(void) { return 7; }")
        linked._link("cc", source, self.runtime)
        patch.setattr(flash4_kernels, "CACHE", self.cache)
        patch.setattr(flash4_kernels, "_SCRIPT", self.script)
        patch.setattr(flash4_kernels, "version", lambda name: self.versions[name])
        patch.setitem(sys.modules, "tvm_ffi", fake_ffi())
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (
                SimpleNamespace(submodule_search_locations=[str(package)])
                if name == "nvidia_cutlass_dsl"
                else None
            ),
        )

    def told_to(self, *, fail: bool) -> None:
        self.script.write_text(SCRIPT.format(log=str(self.log), fails=fail))

    def compiled(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def files(self) -> list[Path]:
        """Without locks."""
        return sorted(path for path in self.cache.iterdir() if path.suffix != ".lock")


def fake_ffi() -> ModuleType:
    """tvm_ffi whose functions give the address's answer, and what keeps it."""

    class Function:
        @staticmethod
        def __from_extern_c__(address: int, *, keep_alive_object: object) -> Callable[..., Any]:
            answer = ctypes.CFUNCTYPE(ctypes.c_int)(address)
            calls: list[tuple[Any, ...]] = []

            def function(*args: Any) -> None:
                calls.append((answer(), *args))
                args[3].fill_(answer())

            function.__dict__.update(calls=calls, library=keep_alive_object)
            return function

    module = ModuleType("tvm_ffi")
    module.__dict__["Function"] = Function
    return module


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def run(launch: flash4_kernels.Launch, window: int | None = None) -> Tensor:
    q, k = torch.zeros(8, 4, 128), torch.zeros(8, 1, 128)
    borders = torch.tensor([0, 8], dtype=torch.int32)
    return launch(q, k, k, cu_seqlens_q=borders, cu_seqlens_k=borders, window=window)


@needs_compiler
def test_kernel_is_compiled_once(world: World) -> None:
    assert run(kept(KIND)).unique().tolist() == [7]
    assert run(kept(KIND)).unique().tolist() == [7]
    assert len(world.compiled()) == 1
    (file,) = world.files()
    assert re.fullmatch(r"[0-9a-f]{64}\.so", file.name)


@needs_compiler
def test_script_is_told_the_kind_and_whose_it_is(world: World) -> None:
    kept(Kind(torch.float16, 64, 8, True, (9, 0)))
    (line,) = world.compiled()
    told = json.loads(line)
    assert told == ["float16", "64", "8", "window", "func", "90", str(os.getpid())]


@needs_compiler
def test_every_kind_and_version_has_a_kernel_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {"dtype": torch.float16},
        {"head_dim": 64},
        {"group": 2},
        {"has_window": True},
        {"capability": (9, 1)},
    ]
    kept(KIND)
    for change in changes:
        kept(replace(KIND, **change))
    assert len(world.files()) == len(world.compiled()) == 6
    for package in VERSIONS:
        if package != flash4_kernels.PACKAGE:
            world.versions[package] += ".post1"
            kept(KIND)
    assert len(world.files()) == 9
    for name, value in (("VERSION", "4.1"), ("__version__", "9.9")):
        monkeypatch.setattr(flash4_kernels, name, value)
        world.versions[flash4_kernels.PACKAGE] = flash4_kernels.VERSION
        kept(KIND)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "1.0"))
    kept(KIND)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(flash4_kernels, "_CPUINFO", cpuinfo)
    kept(KIND)
    for flags in ("fpu avx", "fpu avx avx512f"):
        cpuinfo.write_text(f"processor: 0\nflags: {flags}\nMHz: 1\nflags: of another\n")
        kept(KIND)
    with world.script.open("a") as script:
        script.write("# another")
    kept(KIND)
    assert len(world.files()) == 16


def test_key_takes_no_more_of_the_cpu_than_its_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock, say, changes."""
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(flash4_kernels, "_CPUINFO", cpuinfo)
    assert flash4_kernels._cpu_features() == ""
    cpuinfo.write_text("processor: 0\nMHz: 1\nflags: fpu avx\nflags: of another\n")
    assert flash4_kernels._cpu_features() == "flags: fpu avx"


@needs_compiler
@pytest.mark.parametrize("damage", ["cut off", "others can write it"])
def test_kernel_that_is_damaged_is_made_anew(
    world: World, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(KIND)
    (first,) = world.files()
    good = first.read_bytes()
    # In another folder: what lies at a path that is loaded must stay as it is.
    world.cache = world.cache.with_name("another")
    world.cache.mkdir(mode=0o700)
    monkeypatch.setattr(flash4_kernels, "CACHE", world.cache)
    file = world.cache / first.name
    file.write_bytes(good[:1000] if damage == "cut off" else good)
    file.chmod(0o722 if damage == "others can write it" else 0o700)
    assert run(kept(KIND)).unique().tolist() == [7]
    assert len(world.compiled()) == 2
    assert linked.load(file) is not None


@needs_compiler
def test_kernel_that_does_not_compile_says_why_and_is_not_tried_again(world: World) -> None:
    world.told_to(fail=True)
    with pytest.raises(BackendError, match=r"cannot be compiled \(NoKernelError: not today\)"):
        kept(KIND)
    assert world.files() == []
    assert len(world.compiled()) == 1


def test_compiler_that_takes_too_long_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(flash4_kernels, "_COMPILE_TIMEOUT_S", 0.3)
    begin = time.monotonic()
    with pytest.raises(BackendError, match=r"cannot be compiled \(it took over 0.3 s\)"):
        flash4_kernels._compile(KIND, Path("unused"))
    assert time.monotonic() - begin < 30.0


@needs_compiler
def test_script_imports_nothing_from_its_folder(world: World) -> None:
    """There are modules of common names beside it."""
    world.script.with_name("json.py").write_text("raise ImportError('ours')")
    kept(KIND)


@needs_compiler
def test_python_may_lie_in_a_folder_with_an_equals_sign(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`env` would take it for a variable."""
    python = tmp_path / "a=b" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    kept(KIND)


@needs_compiler
@pytest.mark.parametrize("broken", ["tvm_ffi", "script", "python"])
def test_whatever_else_is_wrong_is_an_error_that_says_why(
    world: World, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" falls back on it, as on no other exception."""
    if broken == "tvm_ffi":
        monkeypatch.setitem(sys.modules, "tvm_ffi", ModuleType("tvm_ffi"))
        said = "AttributeError: .*Function"
    elif broken == "script":
        world.script.unlink()
        said = "FileNotFoundError: .*script.py"
    else:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        said = "FileNotFoundError: .*nowhere"
    with pytest.raises(BackendError, match=rf"flash-attn-4 cannot be had \({said}") as caught:
        kept(KIND)
    assert caught.value.__cause__ is not None


@needs_compiler
def test_folder_that_cannot_be_written_says_so(world: World) -> None:
    file = world.cache.parent
    file.touch()
    with pytest.raises(LinkError, match=rf"{file}/linked cannot be written"):
        kept(KIND)
    assert world.compiled() == []


@needs_compiler
def test_what_the_kernels_need_is_named_where_it_is_missing(world: World) -> None:
    world.runtime.unlink()
    with pytest.raises(LinkError, match=r"libcute_dsl_runtime\.so .* is not found"):
        kept(KIND)
    world.runtime.write_text("no library")
    with pytest.raises(LinkError, match="cannot be loaded"):
        kept(KIND)
    assert world.compiled() == []


@needs_compiler
def test_runtime_is_of_the_cuda_version_that_torch_has(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = world.runtime.parents[2] / "cu14" / "lib" / world.runtime.name
    other.parent.mkdir(parents=True)
    shutil.copy(world.runtime, other)
    for cuda, expected in (("13.0", world.runtime), ("14.2", other), (None, other)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert flash4_kernels._runtime() == expected


@needs_compiler
def test_kernel_is_called_as_it_was_compiled(world: World) -> None:
    """The arguments of interface.py's sm_90 branch, which leaves none out."""
    launch = kept(KIND)
    function = launch.__closure__[0].cell_contents  # type: ignore[attr-defined]
    for window, sides in ((None, [None, None]), (100, [99, 0])):
        out = run(launch, window)
        answer, q, k, v, given_out, *others = function.calls.pop()
        assert answer == 7
        assert given_out is out
        assert [part.shape[1] for part in (q, k, v, out)] == [4, 1, 1, 4]
        lse, scale, borders_q, borders_k, *rest = others
        assert (lse, scale) == (None, 128**-0.5)
        assert borders_q.tolist() == borders_k.tolist() == [0, 8]
        assert rest == [None, None, None, *sides, None, None, (None, None), None, None]


def test_version_is_the_one_that_the_extra_brings() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"flash-attn-4[cu13]=={flash4_kernels.VERSION}"' in text


def test_other_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**VERSIONS, "flash-attn-4": "4.0.0b12"}
    monkeypatch.setattr(flash4_kernels, "version", versions.__getitem__)
    with pytest.raises(BackendError, match=r"needs flash-attn-4 4.0.0b36, 4.0.0b12 is installed"):
        installed()


@pytest.mark.parametrize("package", VERSIONS)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    def version(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return VERSIONS[name]

    monkeypatch.setattr(flash4_kernels, "version", version)
    with pytest.raises(BackendError, match=f"{package} is not installed"):
        installed()


def test_kernel_is_tried_on_the_device_before_it_is_used() -> None:
    calls: list[tuple[Any, ...]] = []

    def launch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape, k.shape, v.shape, options["window"]))
        return q

    flash4._try(launch, KIND, CPU)
    flash4._try(launch, replace(KIND, has_window=True), CPU)
    assert [call[0][1] // call[1][1] for call in calls] == [4, 4]
    assert [call[3] for call in calls] == [None, 1]


def test_kernel_that_the_driver_refuses_is_an_error_and_no_memory_is_not() -> None:
    def launch(*_: Any, **__: Any) -> Tensor:
        raise raised

    raised: Exception = RuntimeError("driver version\nis insufficient")
    with pytest.raises(BackendError, match=r"launched \(driver version is insufficient\)"):
        flash4._try(launch, KIND, CPU)
    raised = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        flash4._try(launch, KIND, CPU)


def test_script_compiles_what_the_interface_would_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a flash-attn 4 that records its call; the script imports nothing else of ours."""
    package = tmp_path / "packages" / "flash_attn" / "cute"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "interface.py").write_text(
        textwrap.dedent(
            """
            import os, quack

            names = ("CUDA_VISIBLE_DEVICES", "FLASH_", "CUTE_", "FA_", "QUACK_")
            told = {k: v for k, v in sorted(os.environ.items()) if k.startswith(names)}

            class Compiled:
                def export_to_c(self, *, object_file_path, function_name):
                    with open(object_file_path, "w") as file:
                        file.write(f"{function_name} {self.call} {told}")

            def _flash_attn_fwd():
                pass

            class Cache:
                cache = {}

            _flash_attn_fwd.compile_cache = Cache()

            def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, **options):
                compiled = Compiled()
                shapes = [tuple(part.shape[1:]) for part in (q, k, v)]
                compiled.call = (shapes, q.dtype, q.device.type, cu_seqlens_q.dtype, options)
                Cache.cache["key"] = compiled
            """
        )
    )
    (tmp_path / "packages" / "quack" / "dsl").mkdir(parents=True)
    (tmp_path / "packages" / "quack" / "__init__.py").write_text("raise ImportError('no triton')")
    (tmp_path / "packages" / "quack" / "dsl" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    for name in ("CUTE_DSL_KEEP", "FA_CLC", "FLASH_ATTENTION_FAKE_TENSOR", "QUACK_ARCH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "CUTE_DSL_ARCH": "sm_90a",
        "CUTE_DSL_DISABLE_FILE_CACHING": "1",
        "FLASH_ATTENTION_ARCH": "sm_90",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    for kind, expected in (
        (
            KIND,
            "{'softmax_scale': 0.08838834764831845, 'causal': True, 'window_size': (None,",
        ),
        (replace(KIND, has_window=True), "'window_size': (100, 0)"),
    ):
        part = tmp_path / "part.o"
        flash4_kernels._compile(kind, part)
        said = part.read_text()
        assert said.startswith(
            "func ([(8, 128), (2, 128), (2, 128)], torch.bfloat16, 'cuda', torch.int32, "
        )
        assert expected in said
        assert said.endswith(str(settings))


# Begins to compile, with a quack that never ends, and leaves once that has begun.
_LEAVES = """
import sys, time
from pathlib import Path
from graphengine.attention import flash4, flash4_kernels
from test_flash4_kernels import KIND
made = flash4._in_thread(lambda kind: flash4_kernels._compile(kind, Path("unused")), KIND)
begun = Path(sys.argv[1])
while not begun.exists() or not begun.read_text():
    assert not made.done(), made.exception()
    time.sleep(0.01)
print(time.time())
if sys.argv[2] == "interrupt":
    raise KeyboardInterrupt
if sys.argv[2] == "kill":
    import os
    os.kill(os.getpid(), 9)
"""


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("end", ["return", "interrupt", "kill"])
def test_start_that_ends_waits_for_no_compiler_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    package, begun = tmp_path / "quack" / "dsl", tmp_path / "begun"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    paths = [tmp_path, ROOT, ROOT / "tests"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    command = [sys.executable, "-c", _LEAVES, str(begun), end]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    left = time.time()
    assert run.stdout, run.stderr
    assert left - float(run.stdout) < 10.0
    compiler = int(begun.read_text())
    while is_alive(compiler):
        assert time.time() < left + 10.0, "it lives on"
        time.sleep(0.01)


def test_script_whose_parent_has_ended_ends() -> None:
    """Before it could ask to be told."""
    arguments = ["unused", "float16", "64", "1", "none", "func", "90", "1"]
    command = [sys.executable, "-P", str(flash4_kernels._SCRIPT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (run.returncode, run.stderr) == (1, "who wanted it has ended\n")
