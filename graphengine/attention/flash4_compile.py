"""How is one kernel of flash-attn 4 compiled to an object file? In a process of its own.

Run as a script, which needs nothing of this package: flash-attn 4, its compiler and what they
import take seconds and a gigabyte, which no engine should have to carry. No GPU is needed: tensors
here have shapes and no memory. What it is told by the environment it sets itself.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import signal
import sys
import types
import warnings
from pathlib import Path

# Whatever they are, nothing is compiled for them; fewer sequences than other kernels are for.
_NUM_TOKENS = 1024
_NUM_SEQUENCES = 2
_NUM_KV_HEADS = 2
# One that every caller gives: the kernel gets it as an argument.
_WINDOW = 100
# Of the user's environment these are not for here: they change what is compiled, or where it goes.
_SETTINGS = ("CUTE_DSL_", "FA_", "FLASH_ATTENTION_", "QUACK_")
_PR_SET_PDEATHSIG = 1  # prctl(2)


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends. That waits for it, and
    so lives as long as its process does, or longer than this one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit("who wanted it has ended")


def _set_environment(arch: str) -> None:
    for name in list(os.environ):
        if name.startswith(_SETTINGS):
            del os.environ[name]
    os.environ.update(
        {
            "FLASH_ATTENTION_ARCH": f"sm_{arch}",
            "CUTE_DSL_ARCH": f"sm_{arch}a",
            "FLASH_ATTENTION_NUM_SMS": "132",  # asked for, and decides nothing on Hopper
            # What was compiled already could not be written again, and in /tmp others may write.
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
            "CUTE_DSL_DISABLE_FILE_CACHING": "1",
            # None is needed, and a context on it would take memory.
            "CUDA_VISIBLE_DEVICES": "",
        }
    )


def compile_to(
    path: Path,
    *,
    dtype: str,
    head_dim: int,
    group: int,
    has_window: bool,
    name: str,
) -> None:
    """Writes the kernel that flash_attn_varlen_func would launch, as function `name`. group: query
    heads a kv head."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    interface = importlib.import_module("flash_attn.cute.interface")
    with FakeTensorMode(), torch.inference_mode():
        heads = (group * _NUM_KV_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS)
        q, k, v = (
            torch.empty(
                _NUM_TOKENS, num_heads, head_dim, dtype=getattr(torch, dtype), device="cuda"
            )
            for num_heads in heads
        )
        borders = torch.empty(_NUM_SEQUENCES + 1, dtype=torch.int32, device="cuda")
        interface.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=borders,
            cu_seqlens_k=borders,
            softmax_scale=head_dim**-0.5,
            causal=True,
            window_size=(_WINDOW, 0) if has_window else (None, None),
        )
    (compiled,) = interface._flash_attn_fwd.compile_cache.cache.values()
    compiled.export_to_c(object_file_path=str(path), function_name=name)


def _leave_out_kernels_of_quack() -> None:
    """flash-attn 4 uses parts of the package quack, whose __init__ imports its kernels too: two
    thirds of all that is imported (perf.prefill_figures, first_call)."""
    found = importlib.util.find_spec("quack")
    assert found is not None
    assert found.submodule_search_locations is not None
    quack = types.ModuleType("quack")
    quack.__path__ = list(found.submodule_search_locations)
    sys.modules["quack"] = quack
    importlib.import_module("quack.dsl")  # which its __init__ has change the compiler


def main(
    path: str,
    dtype: str,
    head_dim: str,
    group: str,
    window: str,
    name: str,
    arch: str,
    parent: str,
) -> int:
    """window: "window" or "none". arch: "90". parent: the process without which this one ends.
    Gives the exit status; what went wrong is the last line of standard error."""
    _end_with(int(parent))
    _set_environment(arch)
    warnings.simplefilter("ignore")
    try:
        _leave_out_kernels_of_quack()
        compile_to(
            Path(path),
            dtype=dtype,
            head_dim=int(head_dim),
            group=int(group),
            has_window=window == "window",
            name=name,
        )
    # Whatever is wrong with the packages, RuntimeError among others.
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
