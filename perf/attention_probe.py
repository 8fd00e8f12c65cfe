"""What does decode attention take behind another kernel, ours and others', on one Hopper GPU?

Each load is one CUDA graph of layers, each a stand-in for the kernel ahead (its shared memory, a
microsecond or two, then q) and an attention over a cache of its own, more together than the L2
cache holds. `us` is what a layer takes beyond the stand-in alone. First all are checked against
float32. JSON lines.

    python -m perf.attention_probe [--load 8b-32x256 ...] [--no-variants]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graphengine.attention.base import DecodeMetadata
from graphengine.attention.reference import ReferenceAttention
from graphengine.kernels import decode_attention, nvrtc
from graphengine.kernels.decode_attention import DecodeAttention, Tuning

BLOCK_SIZE = 256
DEVICE = torch.device("cuda")
L2_BYTES = 50e6
REPLAYS = 15
SHARED_BYTES = 225 * 1024  # of the stand-in: as the chain, it leaves no room beside it

STAND_IN = """
#include <hopper.cuh>
struct Params { const bf16* from; bf16* to; int count, num_clocks; };
extern "C" __constant__ int shared_bytes = %d;
extern "C" __global__ void stand_in(const __grid_constant__ Params p) {
    wait_for_kernel_before();
    let_next_kernel_start();
    const long long start = clock64();
    while (clock64() - start < p.num_clocks) {}
    for (int i = blockIdx.x * 256 + threadIdx.x; i < p.count; i += gridDim.x * 256)
        p.to[i] = p.from[i];
}
"""


class StandInParams(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("num_clocks", ctypes.c_int),
    )


class StandIn:
    def __init__(self) -> None:
        header = decode_attention.HEADER
        self._num_blocks = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        options = nvrtc.options_for(decode_attention.ARCHITECTURE, {"GRID": self._num_blocks})
        cubin, _ = nvrtc.compile_source(
            STAND_IN % SHARED_BYTES, "stand_in.cu", options, {header.name: header.read_text()}
        )
        self._kernel = nvrtc.Kernel(cubin, "stand_in", num_threads=256)

    def __call__(self, source: Tensor, to: Tensor, *, early: bool) -> None:
        params = StandInParams(source.data_ptr(), to.data_ptr(), to.numel(), 3000)
        raw = ctypes.create_string_buffer(bytes(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel.launch(raw, num_blocks=self._num_blocks, stream=stream, early=early)


@dataclass(frozen=True)
class Load:
    num_heads: int
    num_layers: int
    contexts: tuple[int, ...]
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def num_bytes(self) -> int:
        return sum(self.contexts) * self.num_kv_heads * self.head_dim * 4


MIXED = tuple(64 + 131 * i % 1500 for i in range(32))
LOADS = {
    "0.6b-32x640": Load(16, 28, (640,) * 32),
    "0.6b-1x256": Load(16, 28, (256,)),
    "0.6b-32xmixed": Load(16, 28, MIXED),
    "8b-32x256": Load(32, 32, (256,) * 32),
    "8b-32x4096": Load(32, 16, (4096,) * 32),
    "8b-1x1024": Load(32, 32, (1024,)),
    "8b-8x1024": Load(32, 32, (1024,) * 8),
    "8b-32xmixed": Load(32, 32, MIXED),
}
BASE = Tuning()
VARIANTS = [
    Tuning(stages=4),
    Tuning(stages=6),
    Tuning(blocks_per_sm=3, stages=4),
    Tuning(blocks_per_sm=1, stages=10),
    Tuning(blocks_per_sm=1, warps=8, stages=5),
    Tuning(blocks_per_sm=4, warps=2, stages=5),
    Tuning(max_segments=8),
    Tuning(max_segments=32),
]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k_cache, v_cache -> out


def make(load: Load, tuning: Tuning) -> DecodeAttention:
    return DecodeAttention(
        num_heads=load.num_heads,
        num_kv_heads=load.num_kv_heads,
        head_dim=load.head_dim,
        block_size=BLOCK_SIZE,
        device=DEVICE,
        tuning=tuning,
    )


def measure(name: str, load: Load, stand_in: StandIn, *, with_variants: bool) -> None:
    from flash_attn import flash_attn_with_kvcache

    from graphengine.kernels.paged_decode import paged_decode

    num_rows = len(load.contexts)
    num_layers = max(load.num_layers, min(160, int(3 * L2_BYTES / load.num_bytes) + 1))
    width = -(-max(load.contexts) // BLOCK_SIZE)
    num_blocks = 1 + num_rows * width
    shape = (num_blocks, BLOCK_SIZE, load.num_kv_heads, load.head_dim)
    caches = [
        torch.randn(2, *shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(num_layers)
    ]
    tables = 1 + torch.randperm(num_blocks - 1, device=DEVICE).view(num_rows, width).int()
    lens = torch.tensor(load.contexts, dtype=torch.int32, device=DEVICE)
    source = torch.randn(num_rows, load.num_heads, load.head_dim, device=DEVICE).bfloat16()
    q = source.clone()
    arrivals = torch.zeros(num_rows * load.num_kv_heads, dtype=torch.int32, device=DEVICE)
    splits = max(1, min(16, 256 // (num_rows * load.num_kv_heads)))

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=lens, block_table=tables, causal=True
        )
        return out[:, 0]

    def triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paged_decode(q, k, v, tables, lens, arrivals, window=None, num_splits=splits)

    def ours(tuning: Tuning) -> Run:
        attention = make(load, tuning)
        return lambda q, k, v: attention.decode(q, k, v, tables, lens)

    def attempt(run: Run | None) -> float:
        """Device us of a layer; None: of the stand-in alone."""
        graph = torch.cuda.CUDAGraph()
        outs = []
        with torch.cuda.graph(graph):
            for index, cache in enumerate(caches):
                stand_in(source, q, early=index > 0)
                if run is not None:
                    outs.append(run(q, cache[0], cache[1]))
        times: list[float] = []
        for _ in range(REPLAYS + 3):
            start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / num_layers)
        return statistics.median(times[3:])

    metadata = DecodeMetadata(slot_mapping=lens, block_tables=tables, context_lens=lens)
    exact = ReferenceAttention().decode(
        source.float(), caches[0][0].float(), caches[0][1].float(), metadata, window=None
    )
    runs: list[tuple[str, Tuning | None, Run]] = [
        ("flash-attn", None, flash),
        ("paged_decode", None, triton),
        ("ours", BASE, ours(BASE)),
    ]
    if with_variants:
        runs += [("ours", tuning, ours(tuning)) for tuning in VARIANTS]
    for kernel, _, run in runs:
        out = run(source, caches[0][0], caches[0][1]).float()
        error = float(((out - exact).norm() / exact.norm()).cpu())
        assert error < 5e-3, f"{name}, {kernel}: off float32 by {error}"
    alone = attempt(None)
    for kernel, tuning, run in [*runs, runs[0], runs[2]]:
        us = attempt(run) - alone
        line = {"load": name, "kernel": kernel, "us": round(us, 2)}
        line["TB/s"] = round(load.num_bytes / us / 1e6, 2)
        line["us_stand_in"] = round(alone, 2)
        if tuning is not None:
            line |= asdict(tuning)
        print(json.dumps(line), flush=True)


def compile_all(loads: list[Load], tunings: list[Tuning]) -> None:
    """Into the user's cache, several at a time."""
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count

    def compile(job: tuple[int, Tuning]) -> None:
        num_heads, tuning = job
        defines = decode_attention.defines_for(
            num_heads=num_heads,
            num_kv_heads=8,
            head_dim=128,
            block_size=BLOCK_SIZE,
            num_blocks=num_sms * tuning.blocks_per_sm,
            tuning=tuning,
        )
        source, header = decode_attention.SOURCE, decode_attention.HEADER
        architecture = decode_attention.ARCHITECTURE
        nvrtc.compiled(source, (header,), architecture=architecture, defines=defines)

    jobs = {(load.num_heads, tuning) for load in loads for tuning in tunings}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile, jobs))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", nargs="*", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--no-variants", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
    tunings = [BASE] if arguments.no_variants else [BASE, *VARIANTS]
    compile_all([LOADS[name] for name in arguments.load], tunings)
    stand_in = StandIn()
    for name in arguments.load:
        measure(name, LOADS[name], stand_in, with_variants=not arguments.no_variants)


if __name__ == "__main__":
    main()
