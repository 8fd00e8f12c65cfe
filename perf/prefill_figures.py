"""Where does a prefill's time go, and what does attention "flash4" bring? For one NVIDIA GPU.

Each part prints one JSON line, an error too: what was measured is not lost for what failed. Random
values; the Llama-8B shape cut to a few layers. About 100 s on an H200; `--output FILE` keeps them.

    python -m perf.prefill_figures [check first_call attention products row_kernels chunk]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphengine.attention import AttentionBackend, make_attention
from graphengine.attention.flash4 import FlashAttention4
from graphengine.attention.reference import ReferenceAttention
from graphengine.errors import GraphEngineError
from perf.prefill_inputs import attention_flops, attention_inputs, time_us
from perf.prefill_layers import chunk, row_kernels
from perf.result_file import result_path, write_result
from perf.script import check_gpu, check_names, errors_as_exit

Figures = dict[str, Any]
BACKENDS = ("flash", "flash4")
# (query lengths, context before them) of a step's attention.
SHAPES_OF_ATTENTION: dict[str, tuple[list[int], int]] = {
    "4 x 4096": ([4096] * 4, 0),
    "16 x 1024": ([1024] * 16, 0),
    "2 x 4096": ([4096] * 2, 0),
    "8 x 1024": ([1024] * 8, 0),
    "1 x 8192": ([8192], 0),
    "1 x 8192 after 24576": ([8192], 24576),
    "32 x 256": ([256] * 32, 0),
    "256 x 32": ([32] * 256, 0),
    "1 x 16": ([16], 0),
}
_FIRST_CALL = """
import json, sys, time
from pathlib import Path
begin = time.perf_counter()
import torch
from graphengine.attention.flash import FlashAttention
torch.empty(1, device="cuda")
FlashAttention()
torch_s = time.perf_counter() - begin
from graphengine.attention import flash4_kernels, make_attention
flash4_kernels.CACHE = Path(sys.argv[1])
begin = time.perf_counter()
attention = make_attention("flash4", torch.device("cuda", 0))
import_s = time.perf_counter() - begin
from perf.prefill_inputs import attention_inputs
inputs = attention_inputs([4096, 4096], 0, num_heads=32, num_kv_heads=8)
torch.cuda.synchronize()
times = []
for window in (None, None, 100, 100):
    begin = time.perf_counter()
    attention.prefill(*inputs, window=window)
    torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
print(json.dumps({"torch_s": torch_s, "import_s": import_s, "calls_s": times}))
"""
# flash-attn 4 uses parts of quack; its kernels, which its __init__ imports, bring torch._dynamo.
_IMPORT_ALONE = """
import sys, time, types, importlib.util
import torch, flash_attn.flash_attn_interface
if {without}:
    found = importlib.util.find_spec("quack")
    quack = types.ModuleType("quack")
    quack.__path__ = list(found.submodule_search_locations)
    sys.modules["quack"] = quack
begin = time.perf_counter()
import flash_attn.cute
print(time.perf_counter() - begin, "torch._dynamo" in sys.modules)
"""


def make_backends(say: Callable[[Figures], None]) -> dict[str, AttentionBackend]:
    """Those that can be had here; what is missing is told in a line of its own."""
    found = {}
    for name in BACKENDS:
        try:
            backend = make_attention(name, torch.device("cuda", 0))
            if isinstance(backend, FlashAttention4):
                backend.min_mean_length = 1  # else some of these figures would be flash-attn 2's
            found[name] = backend
        except GraphEngineError as error:
            say({"part": name, "error": str(error)})
    return found


def check(backends: dict[str, AttentionBackend]) -> Figures:
    """Largest difference from the reference in float32; values have a deviation of 1."""
    figures: Figures = {}
    for name, backend in backends.items():
        for group, context, window in ((4, 0, None), (4, 300, None), (2, 0, 100), (2, 300, 100)):
            inputs = attention_inputs(
                [1, 700, 128, 333], context, num_heads=8 * group, num_kv_heads=8
            )
            q, k, v, k_cache, v_cache = (part.float() for part in inputs[:5])
            expected = ReferenceAttention().prefill(
                q, k, v, k_cache, v_cache, inputs[5], window=window
            )
            actual = backend.prefill(*inputs, window=window)
            error = float((actual.float() - expected).abs().max())
            figures[f"{name}, {group} query heads, context {context}, window {window}"] = error
            assert error < 2**-5, f"{name}: {error}"
    return figures


def first_call() -> Figures:
    """Seconds to import and to call first, with an empty and a filled cache of compiled kernels."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("empty cache", "filled cache"):
            figures[name] = json.loads(_python(_FIRST_CALL, f"{cache}/linked"))
    for without in (False, True):
        said = _python(_IMPORT_ALONE.format(without=without))
        figures[f"import{' without quack itself' if without else ''}"] = said
    return figures


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-600:])
    return done.stdout.strip().splitlines()[-1]


def attention(backends: dict[str, AttentionBackend]) -> Figures:
    """us and TFLOP/s by backend and shape, head dim 128, 8 kv heads; host us of a call."""
    figures: Figures = {}
    for num_heads in (32, 16):
        for label, (lengths, context) in SHAPES_OF_ATTENTION.items():
            inputs = attention_inputs(lengths, context, num_heads=num_heads, num_kv_heads=8)
            flops = attention_flops(lengths, context, num_heads=num_heads, head_dim=128)
            for name, backend in backends.items():

                def call(backend: AttentionBackend = backend, inputs: Any = inputs) -> Tensor:
                    return backend.prefill(*inputs, window=None)

                us = time_us(call)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(10):
                    call()
                host_us = 1e5 * (time.perf_counter() - begin)
                figures[f"{num_heads} heads, {label}, {name}"] = {
                    "us": us,
                    "tflops": 1e-6 * flops / us,
                    "host_us": host_us,
                }
    return figures


def products() -> Figures:
    """TFLOP/s of the 8B's matrix products by number of tokens, in a burst and after a second."""
    figures: Figures = {}
    sizes = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096)}
    sizes["down"] = (4096, 14336)
    for name, (num_out, num_in) in sizes.items():
        weight = torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) / 64
        for num_tokens in (4096, 8192, 16384):
            x = torch.randn(num_tokens, num_in, device="cuda", dtype=torch.bfloat16)

            def call(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                return torch.nn.functional.linear(x, weight)

            flops = 2.0 * num_tokens * num_out * num_in
            burst = 1e-6 * flops / time_us(call, repeats=3, budget_s=0.03)
            steady = 1e-6 * flops / time_us(call, repeats=3, budget_s=1.0)
            figures[f"{name}, {num_tokens} tokens"] = {"burst": burst, "steady": steady}
    return figures


@errors_as_exit()
def main() -> None:
    names = ("check", "chunk", "attention", "row_kernels", "products", "first_call")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--output", type=result_path)
    arguments = parser.parse_args()
    check_names("part", arguments.parts, names)
    check_gpu("prefills are measured on one")
    lines: list[Figures] = []

    def say(line: Figures) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if arguments.output is not None:
            write_result(lines, arguments.output)

    say({"card": torch.cuda.get_device_name(), "torch": torch.__version__})
    backends = make_backends(say)
    parts: dict[str, Callable[[], Figures]] = {
        "check": lambda: check(backends),
        "chunk": lambda: chunk(backends),
        "attention": lambda: attention(backends),
        "row_kernels": lambda: row_kernels(8192),
        "products": products,
        "first_call": first_call,
    }
    for name in arguments.parts or names:
        begin = time.perf_counter()
        line: Figures = {"part": name}
        try:
            line["figures"] = parts[name]()
        except Exception as error:  # the next part may still be measured
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        say(line | {"took_s": time.perf_counter() - begin})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
