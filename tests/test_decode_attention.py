"""Does decode attention on Hopper give what plain attention gives, and a row alike in any company?

See decode_cases.py for what the results are compared with.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from collections.abc import Callable

import pytest
import torch
from decode_cases import BLOCK_SIZE, BORDERS, CPU, SHAPES, Case, Shape
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("cuda-bindings is for Linux here, as in torch", allow_module_level=True)

from cpu_launcher import CpuAttentionLauncher, layout_claims, static_asserts

from graphengine.kernels import (  # after the skip: imports cuda-bindings
    decode_attention,
    decode_chain,
    nvrtc,
)
from graphengine.kernels.decode_attention import TUNING, DecodeAttention, Tuning

CUDA = torch.device("cuda")
# Multiprocessors of an H100 SXM or an H200.
NUM_MULTIPROCESSORS = 132


def defines(shape: Shape, num_blocks: int, tuning: Tuning) -> dict[str, int]:
    return decode_attention.defines_for(**shape.sizes, num_blocks=num_blocks, tuning=tuning)


def make(
    shape: Shape,
    device: torch.device,
    launcher: CpuAttentionLauncher | None = None,
    tuning: Tuning = TUNING,
) -> DecodeAttention:
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the driver's functions need the device's context
    return DecodeAttention(**shape.sizes, device=device, tuning=tuning, launcher=launcher)


def run(case: Case, attention: DecodeAttention) -> Tensor:
    attention.plan(case.tables, case.lens)
    case.lens.clone()  # a kernel that does not start early: see DecodeAttention.plan
    return attention.decode(case.q, case.k_cache, case.v_cache)


Compiled = Callable[..., tuple[Shape, CpuAttentionLauncher, Tuning]]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A shape's launcher, compiled once."""
    folder = tmp_path_factory.mktemp("attention")
    launchers: dict[tuple[object, ...], tuple[Shape, CpuAttentionLauncher, Tuning]] = {}

    def compiled(
        heads: int, kv_heads: int, head_dim: int, num_blocks: int = 3, **changes: int
    ) -> tuple[Shape, CpuAttentionLauncher, Tuning]:
        key = (heads, kv_heads, head_dim, num_blocks, *changes.items())
        if key not in launchers:
            shape = Shape(heads, kv_heads, head_dim)
            tuning = Tuning(**changes)
            output = folder / f"{len(launchers)}.so"
            launcher = CpuAttentionLauncher(defines(shape, num_blocks, tuning), output=output)
            launchers[key] = shape, launcher, tuning
        return launchers[key]

    return compiled


def run_on_cpu(case: Case, compiled: tuple[Shape, CpuAttentionLauncher, Tuning]) -> Tensor:
    """Queries and newest tokens are NaN until the kernel ahead is waited for."""
    shape, launcher, tuning = compiled
    attention = make(shape, CPU, launcher, tuning)
    launcher.writes = case.hide_late()
    return run(case, attention)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 64), (4, 2, 128), (8, 2, 64), (8, 1, 128), (12, 1, 64), (16, 1, 128)],
)
def test_kernel_on_a_cpu_agrees_with_float32(
    on_cpu: Compiled, heads: int, kv_heads: int, head_dim: int
) -> None:
    compiled = on_cpu(heads, kv_heads, head_dim)
    case = Case(compiled[0], BORDERS)
    case.check(run_on_cpu(case, compiled))


def test_long_contexts_and_padded_rows_agree_with_float32(on_cpu: Compiled) -> None:
    compiled = on_cpu(4, 2, 64, num_blocks=7)
    case = Case(compiled[0], [2500, 0, 3, 1100, 0, 0, 1024])
    case.check(run_on_cpu(case, compiled))


def test_scores_far_above_the_others_agree_with_float32(on_cpu: Compiled) -> None:
    compiled = on_cpu(12, 1, 64, num_blocks=5)
    case = Case(compiled[0], [700, 333])
    case.spread_scores()
    case.check(run_on_cpu(case, compiled))


@pytest.mark.parametrize(
    "changes",
    [
        *({"warps": 2}, {"stages": 3}, {"stages": 8}, {"segments": 4}, {"segments": 16}),
        *({"least_tiles": 1}, {"few_rows": 4}, {"end_tiles": 0}, {"end_tiles": 3}),
    ],
)
def test_other_tunings_agree_with_float32(on_cpu: Compiled, changes: dict[str, int]) -> None:
    compiled = on_cpu(2, 1, 64, 4, **changes)
    case = Case(compiled[0], [1, 300, 64, 33, 700])
    case.check(run_on_cpu(case, compiled))


@pytest.mark.parametrize(
    "contexts",
    [[70] * 33, [1, 200, 64, 130] * 16, [5 + 11 * i for i in range(47)], [130] * 32 + [0] * 9],
    ids=["33 rows", "64 rows", "47 rows", "the first warp's alike"],
)
def test_many_rows_agree_with_float32(on_cpu: Compiled, contexts: list[int]) -> None:
    compiled = on_cpu(2, 1, 64, 40)  # shares that two warps plan
    case = Case(compiled[0], contexts)
    case.check(run_on_cpu(case, compiled))


def test_a_block_may_have_the_last_segment_of_a_row_and_the_first_of_the_next(
    on_cpu: Compiled,
) -> None:
    """All lines that a block can write out are in use: rows of as many segments as there may be,
    which shares of 5, 6 and 7 blocks cut in every place."""
    for num_blocks in (5, 6, 7):
        compiled = on_cpu(2, 1, 64, num_blocks, segments=3, least_tiles=1)
        case = Case(compiled[0], [192, 384, 192, 576, 192])
        case.check(run_on_cpu(case, compiled))


@pytest.mark.parametrize(
    "contexts",
    [[640] * 9 + [0] * 23, [1, 1500] * 8, [64] * 15 + [900], [5 + 20 * i for i in range(30)]],
    ids=["padded", "in turns", "one long", "of all lengths"],
)
def test_no_block_has_much_more_to_do_than_others(on_cpu: Compiled, contexts: list[int]) -> None:
    """The end of a row's kv head takes about as long as a tile: a block of short rows has many."""
    shape, launcher, tuning = on_cpu(8, 4, 64, 16)
    launcher.writes = ()
    attention = make(shape, CPU, launcher, tuning)
    case = Case(shape, contexts)
    attention.plan(case.tables, case.lens)
    tile = 16 * tuning.warps
    num_tiles = [-(-context // tile) for context in case.contexts]
    places = [
        (row, head, at)
        for row, num in enumerate(num_tiles)
        for head in range(shape.num_kv_heads)
        for at in range(num)
    ]
    shares = attention._shares[:, :4].tolist()
    end = shares[-1][0]
    begins = [
        places.index((row, head, at)) if position < end else len(places)
        for position, row, head, at in shares
    ]
    work = [
        end - begin + sum(at + 1 == num_tiles[row] for row, _, at in places[begin:end])
        for begin, end in itertools.pairwise(begins)
    ]
    assert sum(work) == len(places) + len(contexts) * shape.num_kv_heads
    # Shares begin where segments do, of two tiles or more.
    longest_segment = max(2, -(-max(num_tiles) // tuning.max_segments(len(contexts), 4)))
    assert max(work) <= sum(work) / 16 * 17 / 16 + 1 + longest_segment


def test_ends_count_unless_all_rows_are_alike(on_cpu: Compiled) -> None:
    """Shares of whole rows of a kv head, with what its end counts as, where they may be a little
    larger. The same of all blocks, which several warps plan."""
    for kv_heads, num_blocks, contexts, per_block, end_tiles in (
        (4, 16, [640] * 16, 4 * 10, 0),
        (4, 16, [640] * 10 + [576] * 6, 4 * 11, 1),
        (4, 16, [640] * 33, 83, 0),
        (1, 40, [130] * 32 + [0] * 9, 4, 1),
    ):
        shape, launcher, tuning = on_cpu(2 * kv_heads, kv_heads, 64, num_blocks)
        launcher.writes = ()
        attention = make(shape, CPU, launcher, tuning)
        case = Case(shape, contexts)
        attention.plan(case.tables, case.lens)
        shares = attention._shares[:-1]
        assert set(shares[:, 6].tolist()) == {per_block}
        assert set(shares[:, 7].tolist()) == {end_tiles}


def test_a_row_on_a_cpu_is_alike_alone_and_among_others(on_cpu: Compiled) -> None:
    """In any order of threads, wherever the shares of blocks end: by one block, by many."""
    shape, _, _ = on_cpu(4, 2, 64)
    contexts = [900, 64, 640, 1, 130, 77, 1500]
    case = Case(shape, contexts)
    first = run_on_cpu(case, on_cpu(4, 2, 64)).clone()
    for num_blocks in (1, 7, 16):
        for num_rows in (1, 3, 7):
            fewer = Case(shape, contexts[:num_rows])
            out = run_on_cpu(fewer, on_cpu(4, 2, 64, num_blocks))
            assert torch.equal(out, first[:num_rows])
    many = Case(shape, contexts + [5 + 3 * i for i in range(25)])
    assert torch.equal(run_on_cpu(many, on_cpu(4, 2, 64))[:7], first)


def test_a_row_on_a_cpu_is_alike_in_any_place(on_cpu: Compiled) -> None:
    compiled = on_cpu(4, 2, 64)
    contexts = [900, 64, 640, 1, 130, 77, 1500]
    first = run_on_cpu(Case(compiled[0], contexts), compiled).clone()
    order = torch.tensor([6, 3, 5, 0, 2, 1, 4])
    case = Case(compiled[0], contexts)
    case.q.copy_(case.q[order].clone())
    case.tables, case.lens = case.tables[order], case.lens[order]
    assert torch.equal(run_on_cpu(case, compiled), first[order])


def test_blocks_of_one_row_may_end_in_any_order(on_cpu: Compiled) -> None:
    """A block for each tile, so that all arrive at about the same time: a count that goes ahead of
    its block's stores is found here alone."""
    compiled = on_cpu(2, 1, 128, 12)
    for _ in range(5):
        case = Case(compiled[0], [700])
        case.check(run_on_cpu(case, compiled))


def test_one_set_of_buffers_serves_any_steps(on_cpu: Compiled) -> None:
    """Counters are zeros again after each launch, and what partials hold is not read again."""
    shape, launcher, tuning = on_cpu(4, 2, 64, num_blocks=7)
    launcher.writes = ()
    attention = make(shape, CPU, launcher, tuning)
    for seed, contexts in enumerate(([300, 900], [900], [64, 1, 700], [300, 900])):
        case = Case(shape, contexts, seed=seed)
        case.check(run(case, attention))
    assert not attention._arrivals.any()


def test_rows_of_a_chain_are_cut_alike_however_many_there_are() -> None:
    assert TUNING.few_rows >= decode_chain.MAX_ROWS
    for num_kv_heads in (1, 2, 8, 200):
        few = {TUNING.max_segments(n, num_kv_heads) for n in range(1, TUNING.few_rows + 1)}
        many = {
            TUNING.max_segments(n, num_kv_heads)
            for n in range(TUNING.few_rows + 1, decode_attention.MAX_ROWS + 1)
        }
        assert len(few) == len(many) == 1
        assert min(few | many) >= 1


def takes(shape: Shape, dtype: torch.dtype = torch.bfloat16, major: int = 9, **sizes: int) -> bool:
    capability = (major, 0)
    sizes = {**shape.sizes, **sizes}
    return DecodeAttention.takes(**sizes, dtype=dtype, device=CUDA, capability=capability)


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_takes_shapes_in_bfloat16_only_and_on_hopper_only(name: str) -> None:
    assert takes(SHAPES[name])
    assert not takes(SHAPES[name], dtype=torch.float16)
    assert not takes(SHAPES[name], major=8)
    assert not takes(SHAPES[name], major=10)
    assert not takes(SHAPES[name], block_size=32)
    on_cpu = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "block_size": 256}
    assert not DecodeAttention.takes(**on_cpu, dtype=torch.bfloat16, device=CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [Shape(8, 8, 256), Shape(8, 8, 80), Shape(17, 1, 64)])
def test_other_shapes_are_refused(shape: Shape) -> None:
    assert not takes(shape)


def compile_attention(shape: Shape, added: str = "") -> str:
    """The compiler's log of decode_attention.cu with `added` at its end."""
    tuning = TUNING
    values = defines(shape, NUM_MULTIPROCESSORS * tuning.blocks_per_sm, tuning)
    options = nvrtc.options_for(decode_attention.ARCHITECTURE, values)
    options += ["--ptxas-options=-v"]
    source = decode_attention.SOURCE.read_text("utf-8") + added
    included = {header.name: header.read_text("utf-8") for header in decode_attention.HEADERS}
    _, log = nvrtc.compile_source(source, "decode_attention.cu", options, included)
    return log


@pytest.mark.parametrize("name", SHAPES)
def test_kernel_compiles_without_spills(name: str) -> None:
    log = compile_attention(SHAPES[name])
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills == ["0"] * 4, log  # of two kernels


@pytest.mark.parametrize("name", SHAPES)
def test_host_and_kernel_agree_on_the_params_and_blocks_fit(name: str) -> None:
    claims = [f"sizeof(Share) == {4 * decode_attention.SHARE_INTS}"]
    # 228 KiB a multiprocessor, 1 of them for the system of each block.
    claims.append("(SHARED_BYTES + 1024) * BLOCKS_PER_SM <= 228 * 1024")
    added = layout_claims(decode_attention.Params) + static_asserts(claims)
    compile_attention(SHAPES[name], added)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_agrees_with_float32(name: str) -> None:
    shape = SHAPES[name]
    attention = make(shape, CUDA)
    many = [[640] * 32, [300] * 64, [5 + 97 * i for i in range(33)]]
    for contexts in ([*BORDERS, 0, 0], [4096, 1, 2500, 0], [1000], [1], *many):
        case = Case(shape, contexts, CUDA)
        case.check(run(case, attention))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_a_row_is_alike_alone_and_among_others(name: str) -> None:
    shape = SHAPES[name]
    attention = make(shape, CUDA)
    contexts = [900, 64, 4096, 1, 130, 77, 1500] + [5 + 97 * i for i in range(25)]
    all_rows = run(Case(shape, contexts, CUDA), attention).clone()
    for num_rows in (1, 2, 3, 7, 16):
        out = run(Case(shape, contexts[:num_rows], CUDA), attention)
        assert torch.equal(out, all_rows[:num_rows])


WRITER = """
#include <hopper.cuh>
struct Params {
    const bf16 *q_from, *kv_from;
    bf16 *q, *k_cache, *v_cache;
    const long long* slots;  // [N]
    int q_count, kv_count, num_rows;
};
extern "C" __constant__ int shared_bytes = 0, writer_threads = 256;
extern "C" __global__ void writer(const __grid_constant__ Params p) {
    let_next_kernel_start();
    const long long start = clock64();
    while (clock64() - start < 50000) {}
    for (int i = threadIdx.x; i < p.q_count; i += 256) p.q[i] = p.q_from[i];
    for (int i = threadIdx.x; i < p.num_rows * p.kv_count; i += 256) {
        const long long to = p.slots[i / p.kv_count] * p.kv_count + i % p.kv_count;
        p.k_cache[to] = p.kv_from[i];
        p.v_cache[to] = p.kv_from[p.num_rows * p.kv_count + i];
    }
}
"""


class WriterParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_from", "kv_from", "q", "k_cache", "v_cache")),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("q_count", "kv_count", "num_rows")),
    )


@pytest.mark.gpu
def test_captured_behind_a_kernel_that_writes_its_inputs() -> None:
    """The kernel begins while the one ahead has yet to write q and the newest tokens, which hold
    NaN until then; contexts change under the graph."""
    shape, num_rows = SHAPES["llama-8b"], 8
    header = decode_attention.HEADERS[0]
    options = nvrtc.options_for(decode_attention.ARCHITECTURE, {"GRID": 1})
    cubin, _ = nvrtc.compile_source(
        WRITER, "writer.cu", options, {header.name: header.read_text("utf-8")}
    )
    writer = nvrtc.Kernel(lambda: cubin, "writer")
    attention = make(shape, CUDA)
    cases = [Case(shape, n, CUDA) for n in ([700] * 8, [65, 1, 4000, 3, 256, 640, 17, 1025])]

    def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=CUDA)

    num_blocks = max(case.k_cache.shape[0] for case in cases)
    row_shape = shape.num_kv_heads, shape.head_dim
    caches = buffer(2, num_blocks, BLOCK_SIZE, *row_shape)
    tables = buffer(num_rows, max(c.tables.shape[1] for c in cases), dtype=torch.int32)
    lens = torch.ones(num_rows, dtype=torch.int32, device=CUDA)
    q, q_from = buffer(2, num_rows, shape.num_heads, shape.head_dim)
    kv_from, slots = buffer(2, num_rows, *row_shape), buffer(num_rows, dtype=torch.int64)

    def step() -> Tensor:
        params = WriterParams(
            q_from.data_ptr(),
            kv_from.data_ptr(),
            q.data_ptr(),
            caches[0].data_ptr(),
            caches[1].data_ptr(),
            slots.data_ptr(),
            q.numel(),
            kv_from[0, 0].numel(),
            num_rows,
        )
        attention.plan(tables, lens)
        raw = ctypes.create_string_buffer(bytes(params), ctypes.sizeof(params))
        stream = torch.cuda.current_stream().cuda_stream
        writer.launch(raw, num_blocks=1, stream=stream, early=False)
        return attention.decode(q, caches[0], caches[1])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    expected = [run(case, attention).clone() for case in cases]
    for _ in range(20):
        for case, exact in zip(cases, expected, strict=True):
            newest = torch.tensor([b * BLOCK_SIZE + slot for b, slot in case.newest], device=CUDA)
            slots.copy_(newest)
            for cache, own, source in zip(
                caches, (case.k_cache, case.v_cache), kv_from, strict=True
            ):
                cache[: len(own)] = own
                source.copy_(own.flatten(0, 1)[newest])
                cache.view(-1, *row_shape)[newest] = float("nan")
            tables[:, : case.tables.shape[1]] = case.tables
            lens.copy_(case.lens)
            q_from.copy_(case.q)
            q.fill_(float("nan"))
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, exact)
